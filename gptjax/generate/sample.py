"""Sampling at a temperature: one compiled loop on the device."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import UserError
from gptjax.generate.cache import decode_step, prefill
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import unstack_layers
from gptjax.model.heads import lm_logits


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
  longest = max(len(prompt) for prompt in prompts)
  if longest + max_new_tokens > config.context_length:
    raise UserError(
      f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of"
      f" {config.context_length}; shorten one of them"
    )
  # Prompts are padded to a power of two, so that few shapes are compiled.
  padded = min(1 << (longest - 1).bit_length(), config.context_length - max_new_tokens)
  tokens_BL = np.zeros((len(prompts), padded), np.int32)
  for row, prompt in zip(tokens_BL, prompts):
    row[padded - len(prompt) :] = prompt
  first_slot_B = np.array([padded - len(prompt) for prompt in prompts], np.int32)
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(prompts)))
  new_tokens = _sample(
    params,
    tokens_BL,
    first_slot_B,
    np.float32(temperature),
    keys_B,
    np.int32(config.vocab_size if num_ids is None else num_ids),
    config,
    max_new_tokens,
  )
  return np.asarray(new_tokens)


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


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens"))
def _sample(params, tokens_BL, first_slot_B, temperature, keys_B, num_ids, config, max_new_tokens):
  decoder = params["decoder"]
  layers = unstack_layers(decoder["layers"], config)
  num_slots = tokens_BL.shape[1] + max_new_tokens
  hidden_BD, cache = prefill(decoder, layers, tokens_BL, first_slot_B, num_slots, config)

  def step(carry, index):
    hidden_BD, cache = carry
    logits_BV = lm_logits(params, hidden_BD, config)
    logits_BV = jnp.where(jnp.arange(config.vocab_size)[None, :] < num_ids, logits_BV, -jnp.inf)
    token_B = draw(logits_BV, temperature, keys_B, index)
    hidden_BD, cache = decode_step(decoder, layers, token_B, cache, config)
    return (hidden_BD, cache), token_B

  _, tokens_LB = jax.lax.scan(step, (hidden_BD, cache), jnp.arange(max_new_tokens))
  return tokens_LB.T


def draw(
  logits_BV: jax.Array, temperature: jax.Array, keys_B: jax.Array, index: jax.Array
) -> jax.Array:
  """Draws one token a row from float32 logits; temperature 0 takes the likeliest. int32 [B]."""
  step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
  scaled_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
  drawn_B = jax.vmap(jax.random.categorical)(step_keys_B, scaled_BV)
  return jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


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
