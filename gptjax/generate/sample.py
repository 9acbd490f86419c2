"""Samples of a model in training: parameters change between calls, so nothing is prepared."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import UserError
from gptjax.generate import sampling
from gptjax.generate.candidates import make_sampling
from gptjax.generate.kernels import prepare
from gptjax.generate.rules import Rules
from gptjax.generate.sampling import Controls
from gptjax.model.config import ModelConfig


def sample(
  params: Any,
  config: ModelConfig,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  key: jax.Array,
  num_ids: int | None = None,
) -> np.ndarray:
  """Continues prompts, all of them in one batch.

  Args:
    params: the whole tree, on a device.
    config: the architecture.
    prompts: token ids, at least one each.
    max_new_tokens: how many to add.
    temperature: of the draw; 0 is greedy.
    key: every row draws from its own stream, whatever its companions.
    num_ids: only ids below this are drawn: those a tokenizer can decode. None: the vocabulary.

  Returns:
    int32 [B, max_new_tokens], without the prompts.

  Raises:
    UserError: no prompts, an empty one, ids outside the vocabulary, or prompt and new tokens exceed
      the context.
  """
  _check_prompts(prompts, config)
  length_R = np.array([len(prompt) for prompt in prompts], np.int32)
  longest = int(length_R.max())
  if longest + max_new_tokens > config.context_length:
    raise UserError(
      f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of"
      f" {config.context_length}; shorten one of them"
    )
  # Prompts are padded to a power of two, so that few shapes are compiled.
  padded = min(1 << (longest - 1).bit_length(), config.context_length - max_new_tokens)
  tokens_RS = np.zeros((len(prompts), padded + max_new_tokens), np.int32)
  for row, prompt in zip(tokens_RS, prompts):
    row[: len(prompt)] = prompt
  chooser = make_sampling(config.vocab_size, [temperature] * len(prompts)) if temperature else None
  tokens_RS = np.asarray(
    _sample(params, tokens_RS, length_R, max_new_tokens, key, chooser, config, padded, num_ids)
  )
  return np.stack([row[n : n + max_new_tokens] for row, n in zip(tokens_RS, length_R)])


def _check_prompts(prompts: Sequence[Sequence[int]], config: ModelConfig) -> None:
  if not len(prompts):
    raise UserError("there are no prompts; give at least one")
  for prompt in prompts:
    if not len(prompt):
      raise UserError("a prompt has no tokens; give it at least one")
    outside = [int(token) for token in prompt if not 0 <= token < config.vocab_size]
    if outside:
      raise UserError(
        f"a prompt has the token {outside[0]}, but the model's are 0 to {config.vocab_size - 1};"
        " encode it with the tokenizer of the model"
      )


@functools.partial(jax.jit, static_argnames=("config", "num_prompt_slots", "num_ids"))
def _sample(params, tokens_RS, length_R, max_new, key, chooser, config, num_prompt_slots, num_ids):
  num_rows = len(tokens_RS)
  keys_R = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows))
  weights = prepare(params, config)
  texts = sampling.new_texts(tokens_RS, length_R, length_R + max_new, keys_R, None, 0)
  unknown_N = jnp.arange(num_ids or config.vocab_size, config.vocab_size)
  suppressed_RN = jnp.tile(unknown_N[None], (num_rows, 1)) if unknown_N.size else None
  controls = Controls(Rules(suppressed_RN=suppressed_RN), chooser)
  prompts_RL = tokens_RS[:, :num_prompt_slots]
  texts, cache = sampling.start(weights, prompts_RL, texts, controls, config)
  return sampling.run(weights, texts, cache, controls, config).tokens_RS


def sample_long(
  params: Any,
  config: ModelConfig,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float,
  key: jax.Array,
  num_ids: int | None = None,
) -> np.ndarray:
  """Continues prompts beyond the context: whenever it is full, the last half is kept.

  Args, Returns and Raises: as `sample`.
  """
  _check_prompts(prompts, config)
  if config.context_length < 2:
    raise UserError("a model with a context of 1 token has no room to continue a prompt")
  texts = [list(prompt) for prompt in prompts]
  half = config.context_length // 2
  left = max_new_tokens
  while left:
    kept = [text[-half:] for text in texts]
    num_new = min(left, config.context_length - max(map(len, kept)))
    new = sample(
      params,
      config,
      kept,
      max_new_tokens=num_new,
      temperature=temperature,
      key=jax.random.fold_in(key, left),
      num_ids=num_ids,
    )
    for text, row in zip(texts, new):
      text.extend(row.tolist())
    left -= num_new
  return np.array([text[len(text) - max_new_tokens :] for text in texts], np.int32)
