"""The compiled programs of slots; all of them take slots and lengths as values, not as shapes.

Letters as in sampling.py; Q counts the tokens of a chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.generate import programs, sampling
from gptjax.generate.cache import Cache, extend
from gptjax.generate.candidates import Sampling
from gptjax.generate.sampling import Controls, Texts
from gptjax.generate.slot_controls import Uses
from gptjax.model.config import ModelConfig
from gptjax.model.heads import lm_logits

PyTree = Any


@functools.partial(jax.jit, donate_argnames="texts")
def write_row(
  texts: Texts,
  slot: jax.Array,
  tokens_S: jax.Array,
  length: jax.Array,
  limit: jax.Array,
  seed: jax.Array,
  prompt_index: jax.Array,
  copy: jax.Array,
) -> Texts:
  """Writes a prompt over what was in a slot; the row stays idle until it is marked.

  While it is, steps write at its last token, which is read again before it counts.
  """
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt_index), copy)
  return texts.replace(
    tokens_RS=texts.tokens_RS.at[slot].set(tokens_S),
    prompt_length_R=texts.prompt_length_R.at[slot].set(length),
    length_R=texts.length_R.at[slot].set(length),
    limit_R=texts.limit_R.at[slot].set(limit),
    finish_R=texts.finish_R.at[slot].set(sampling.LENGTH),
    keys_R=texts.keys_R.at[slot].set(key),
  )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def read(
  weights: PyTree,
  tokens_1Q: jax.Array,
  slot: jax.Array,
  position: jax.Array,
  cache: Cache,
  config: ModelConfig,
) -> tuple[jax.Array, Cache]:
  """Reads a chunk of a prompt into a slot; returns its hidden states [Q, D] and the cache."""
  programs.report("reading into slots", tokens=tokens_1Q.shape[1])
  row = jax.tree.map(lambda whole: jax.lax.dynamic_slice_in_dim(whole, slot, 1), cache)
  hidden_1QD, row = extend(weights, tokens_1Q, position[None], row, config)
  cache = jax.tree.map(
    lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, slot, 0), cache, row
  )
  return hidden_1QD[0], cache


@functools.partial(jax.jit, donate_argnums=0)
def copy_row(cache: Cache, source: jax.Array, target: jax.Array) -> Cache:
  return jax.tree.map(lambda whole: whole.at[target].set(whole[source]), cache)


@functools.partial(jax.jit, donate_argnums=0)
def set_value(array_R: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
  return array_R.at[slot].set(value)


@functools.partial(jax.jit, static_argnames=("num_alternatives", "config"))
def score(
  weights: PyTree,
  hidden_QD: jax.Array,
  targets_Q: jax.Array,
  num_alternatives: int,
  config: ModelConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (log-probabilities of the targets, the likeliest ids, and theirs)."""
  programs.report("scores of a prompt", tokens=len(targets_Q), alternatives=num_alternatives)
  log_probs_QV = jax.nn.log_softmax(lm_logits(weights, hidden_QD, config), axis=-1)
  logprobs_QX, ids_QX = jax.lax.top_k(log_probs_QV, num_alternatives)
  return jnp.take_along_axis(log_probs_QV, targets_Q[:, None], axis=1)[:, 0], ids_QX, logprobs_QX


@functools.partial(
  jax.jit, static_argnames=("num_alternatives", "config"), donate_argnames=("texts", "cache")
)
def step(
  weights: PyTree,
  texts: Texts,
  cache: Cache,
  controls: Controls,
  uses: Uses,
  num_alternatives: int,
  config: ModelConfig,
) -> tuple[Texts, Cache, tuple[jax.Array, ...]]:
  """Returns (texts, cache, (token_R, logprob_R, finish_R, ids_RX and logprobs_RX))."""
  programs.report_texts("a step of slots", texts)
  hidden_RD, cache = sampling.read_last(weights, texts, cache, config)
  logits_RV = lm_logits(weights, hidden_RD, config)
  scores_RV = jax.lax.cond(
    uses.rules, lambda: sampling.score(logits_RV, texts, controls.rules), lambda: logits_RV
  )
  drawing = controls.sampling
  only_temperature = drawing and Sampling(drawing.temperature_R)
  token_R = jax.lax.switch(
    uses.drawing,
    [
      functools.partial(sampling.pick, scores_RV, texts, kind)
      for kind in (None, only_temperature, drawing)
    ],
  )
  texts = sampling.append(texts, token_R, logits_RV, controls)

  def find_alternatives():
    logits_RX, ids_RX = jax.lax.top_k(logits_RV, num_alternatives)
    return ids_RX, logits_RX - jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)

  shape = len(token_R), num_alternatives
  ids_RX, logprobs_RX = jax.lax.cond(
    uses.alternatives,
    find_alternatives,
    lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)),
  )
  last = jnp.arange(len(token_R)), texts.length_R - 1
  news = texts.tokens_RS[last], texts.logprobs_RS[last], texts.finish_R, ids_RX, logprobs_RX
  return texts, cache, news


def empty_cache(config: ModelConfig, num_rows: int, num_slots: int) -> Cache:
  shape = (num_rows, config.num_heads, num_slots, config.head_width)

  def layers():
    return tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.num_layers))

  return Cache(layers(), layers())
