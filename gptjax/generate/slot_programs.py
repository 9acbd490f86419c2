"""The compiled programs of slots; rows, lengths and places are values in them, not shapes.

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


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def read(
  weights: PyTree, tokens_1Q: jax.Array, position: jax.Array, cache: Cache, config: ModelConfig
) -> tuple[jax.Array, Cache]:
  """Reads a chunk of a prompt; returns its hidden states [Q, D] and the cache, of one row."""
  programs.report("reading prompts", tokens=tokens_1Q.shape[1])
  hidden_1QD, cache = extend(weights, tokens_1Q, position[None], cache, config)
  return hidden_1QD[0], cache


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


@functools.partial(jax.jit, donate_argnames=("texts", "cache"))
def join(
  texts: Texts,
  cache: Cache,
  prompt_cache: Cache,
  place: jax.Array,
  tokens_S: jax.Array,
  length: jax.Array,
  limit: jax.Array,
  seed: jax.Array,
  prompt_index: jax.Array,
  copy: jax.Array,
) -> tuple[Texts, Cache]:
  """Writes a prompt that was read over what was at a place, and has its row run."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt_index), copy)
  texts = texts.replace(
    tokens_RS=texts.tokens_RS.at[place].set(tokens_S),
    prompt_length_R=texts.prompt_length_R.at[place].set(length),
    length_R=texts.length_R.at[place].set(length),
    limit_R=texts.limit_R.at[place].set(limit),
    finish_R=texts.finish_R.at[place].set(sampling.RUNNING),
    keys_R=texts.keys_R.at[place].set(key),
  )
  cache = jax.tree.map(
    lambda whole, row: whole.at[place].set(row[0, :, : whole.shape[2]]), cache, prompt_cache
  )
  return texts, cache


@functools.partial(jax.jit, donate_argnums=0)
def stop(finish_R: jax.Array, place: jax.Array) -> jax.Array:
  """Has a row end."""
  return finish_R.at[place].set(sampling.LENGTH)


@functools.partial(jax.jit, static_argnames="num_positions")
def resize(
  texts: Texts, cache: Cache, place_R: jax.Array, num_positions: int
) -> tuple[Texts, Cache]:
  """Moves rows to arrays of another size.

  Args:
    place_R: where each new row was; where it is negative, the new row is idle.
    num_positions: of the new rows.
  """
  is_old_R = place_R >= 0

  def move(array, axis):
    taken = jnp.take(array, jnp.maximum(place_R, 0), axis=0)
    room = max(0, num_positions - taken.shape[axis])
    padded = jnp.pad(taken, [(0, room if i == axis else 0) for i in range(taken.ndim)])
    return jax.lax.slice_in_dim(padded, 0, num_positions, axis=axis)

  take = functools.partial(jnp.take, indices=jnp.maximum(place_R, 0), axis=0)
  texts = texts.replace(
    tokens_RS=move(texts.tokens_RS, 1),
    logprobs_RS=move(texts.logprobs_RS, 1),
    prompt_length_R=take(texts.prompt_length_R),
    length_R=jnp.where(is_old_R, take(texts.length_R), 1),
    limit_R=take(texts.limit_R),
    finish_R=jnp.where(is_old_R, take(texts.finish_R), sampling.LENGTH),
    keys_R=take(texts.keys_R),
  )
  return texts, jax.tree.map(lambda array: move(array, 2), cache)


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


def empty_cache(config: ModelConfig, num_rows: int, num_positions: int) -> Cache:
  """Returns a cache of zeros."""
  shape = (num_rows, config.num_heads, num_positions, config.head_width)

  def layers():
    return tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.num_layers))

  return Cache(layers(), layers())


def idle_texts(num_rows: int, num_positions: int) -> Texts:
  """Returns rows that have ended; arrays of their own each, since they are donated."""
  texts = sampling.new_texts(
    jnp.zeros((num_rows, num_positions), jnp.int32),
    jnp.ones(num_rows, jnp.int32),
    jnp.ones(num_rows, jnp.int32),
    jax.random.split(jax.random.key(0), num_rows),
    None,
    0,
  )
  return texts.replace(
    length_R=jnp.ones(num_rows, jnp.int32),
    finish_R=jnp.full(num_rows, sampling.LENGTH, jnp.int32),
  )
