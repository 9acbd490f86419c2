"""Greedy search and sampling: what a row carries, one step of all rows, and the loop on the device.

Everything is said by row (rules, sampling, limits, random stream), so that rows of unlike requests
can share one program, and a row's text does not depend on its companions.

R counts rows, S slots, E end tokens, X alternatives.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.generate.cache import Cache, extend, prefill
from gptjax.generate.candidates import Sampling, draw, warp
from gptjax.generate.rules import Rules, apply_rules
from gptjax.generate.stopping import Stops, advance
from gptjax.model.config import ModelConfig
from gptjax.model.heads import lm_logits

PyTree = Any

RUNNING, END_TOKEN, STOP_STRING, LENGTH = 0, 1, 2, 3  # Rows.finish_R


@struct.dataclass
class Controls:
  """What decides the next token of each row; traced, but for what is None.

  Attributes:
    rules: on logits.
    sampling: None is greedy.
    end_RE: int32 tokens that end a row, padded with -1; None is none.
    stops: texts that end a row, or None.
  """

  rules: Rules
  sampling: Sampling | None = None
  end_RE: jax.Array | None = None
  stops: Stops | None = None


@struct.dataclass
class Alternatives:
  """The likeliest tokens at each new place, best first: ids_RSX int32, logprobs_RSX float32."""

  ids_RSX: jax.Array
  logprobs_RSX: jax.Array


@struct.dataclass
class Texts:
  """Rows of tokens and how they stand.

  Attributes:
    tokens_RS: int32; the first length_R of a row count, the prompt first.
    prompt_length_R, length_R, limit_R: int32; a row of limit_R tokens has ended.
    finish_R: int32, RUNNING or why the row has ended.
    logprobs_RS: float32 of each new token under the model alone, at its place.
    alternatives: under the model alone, or None.
    stop_state_RZ: what the stop strings remember, or None.
    keys_R: random stream of each row.
  """

  tokens_RS: jax.Array
  prompt_length_R: jax.Array
  length_R: jax.Array
  limit_R: jax.Array
  finish_R: jax.Array
  logprobs_RS: jax.Array
  alternatives: Alternatives | None
  stop_state_RZ: jax.Array | None
  keys_R: jax.Array


def new_texts(
  tokens_RS: jax.Array,
  prompt_length_R: jax.Array,
  limit_R: jax.Array,
  keys_R: jax.Array,
  stop_state_RZ: jax.Array | None,
  num_alternatives: int,
) -> Texts:
  """Makes rows that have their prompts only."""
  shape = (*tokens_RS.shape, num_alternatives)
  alternatives = Alternatives(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
  return Texts(
    tokens_RS=tokens_RS,
    prompt_length_R=prompt_length_R,
    length_R=prompt_length_R,
    limit_R=limit_R,
    finish_R=jnp.zeros_like(prompt_length_R),
    logprobs_RS=jnp.zeros(tokens_RS.shape, jnp.float32),
    alternatives=alternatives if num_alternatives else None,
    stop_state_RZ=stop_state_RZ,
    keys_R=keys_R,
  )


def start(
  weights: PyTree,
  prompts_PL: jax.Array,
  texts: Texts,
  controls: Controls,
  config: ModelConfig,
) -> tuple[Texts, Cache]:
  """Reads the prompts and chooses the first token of every row.

  Args:
    weights: from `prepare`.
    prompts_PL: int32, each prompt once, padded on the right; R / P neighbouring rows share one.
    texts: from `new_texts`.
    controls: of each row.
    config: the architecture.
  """
  num_rows, num_slots = texts.tokens_RS.shape
  copies = num_rows // len(prompts_PL)
  hidden_PLD, cache = prefill(weights, prompts_PL, num_slots, config)
  last_P = texts.prompt_length_R[::copies] - 1
  hidden_RD = jnp.repeat(hidden_PLD[jnp.arange(len(last_P)), last_P], copies, axis=0)
  cache = jax.tree.map(lambda array: jnp.repeat(array, copies, axis=0), cache)
  return choose(weights, hidden_RD, texts, controls, config), cache


def step(
  weights: PyTree, texts: Texts, cache: Cache, controls: Controls, config: ModelConfig
) -> tuple[Texts, Cache]:
  """Reads the last token of every row and chooses the next; rows that have ended stay."""
  hidden_RD, cache = read_last(weights, texts, cache, config)
  return choose(weights, hidden_RD, texts, controls, config), cache


def read_last(
  weights: PyTree, texts: Texts, cache: Cache, config: ModelConfig
) -> tuple[jax.Array, Cache]:
  """Reads the last token of every row; returns its hidden states [R, D] and the cache."""
  position_R = texts.length_R - 1
  token_R1 = jnp.take_along_axis(texts.tokens_RS, position_R[:, None], axis=1)
  hidden_R1D, cache = extend(weights, token_R1, position_R, cache, config)
  return hidden_R1D[:, 0], cache


def run(
  weights: PyTree, texts: Texts, cache: Cache, controls: Controls, config: ModelConfig
) -> Texts:
  """Steps until every row has ended."""

  def is_running(carry):
    return jnp.any(carry[0].finish_R == RUNNING)

  def body(carry):
    return step(weights, *carry, controls, config)

  return jax.lax.while_loop(is_running, body, (texts, cache))[0]


def choose(
  weights: PyTree, hidden_RD: jax.Array, texts: Texts, controls: Controls, config: ModelConfig
) -> Texts:
  """Appends the next token of every running row.

  Args:
    hidden_RD: after the final norm, at the last token of each row.
  """
  logits_RV = lm_logits(weights, hidden_RD, config)
  token_R = pick(score(logits_RV, texts, controls.rules), texts, controls.sampling)
  return append(texts, token_R, logits_RV, controls)


def score(logits_RV: jax.Array, texts: Texts, rules: Rules) -> jax.Array:
  """Applies the rules to the logits of each row's next token."""
  return apply_rules(logits_RV, texts.tokens_RS, texts.length_R, texts.prompt_length_R, rules)


def pick(scores_RV: jax.Array, texts: Texts, sampling: Sampling | None) -> jax.Array:
  """Returns the next token of each row: the likeliest, or one that is drawn."""
  if sampling is None:
    return jnp.argmax(scores_RV, axis=-1).astype(jnp.int32)
  return draw(warp(scores_RV, sampling), texts.keys_R, texts.length_R - texts.prompt_length_R)


def append(texts: Texts, token_R: jax.Array, logits_RV: jax.Array, controls: Controls) -> Texts:
  """Writes a token to every running row, with what the model thought of it."""
  is_running_R = texts.finish_R == RUNNING
  num_rows, num_slots = texts.tokens_RS.shape
  # Beyond the slots nothing is written.
  place = jnp.arange(num_rows), jnp.where(is_running_R, texts.length_R, num_slots)
  normalizer_R = jax.nn.logsumexp(logits_RV, axis=-1)
  logprob_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=1)[:, 0] - normalizer_R
  alternatives = texts.alternatives
  if alternatives is not None:
    logits_RX, ids_RX = jax.lax.top_k(logits_RV, alternatives.ids_RSX.shape[2])
    alternatives = Alternatives(
      alternatives.ids_RSX.at[place].set(ids_RX, mode="drop"),
      alternatives.logprobs_RSX.at[place].set(logits_RX - normalizer_R[:, None], mode="drop"),
    )
  length_R = texts.length_R + is_running_R
  stop_state_RZ, finish_R = find_end(texts.stop_state_RZ, token_R, controls.end_RE, controls.stops)
  finish_R = jnp.where((finish_R == RUNNING) & (length_R >= texts.limit_R), LENGTH, finish_R)
  return texts.replace(
    tokens_RS=texts.tokens_RS.at[place].set(token_R, mode="drop"),
    length_R=length_R,
    finish_R=jnp.where(is_running_R, finish_R, texts.finish_R),
    logprobs_RS=texts.logprobs_RS.at[place].set(logprob_R, mode="drop"),
    alternatives=alternatives,
    stop_state_RZ=stop_state_RZ,
  )


def find_end(
  stop_state_RZ: jax.Array | None,
  token_R: jax.Array,
  end_RE: jax.Array | None,
  stops: Stops | None,
) -> tuple[jax.Array | None, jax.Array]:
  """Returns (stop state after one more token, finish_R: RUNNING or why the row ends with it)."""
  finish_R = jnp.full(token_R.shape, RUNNING, jnp.int32)
  if stops is not None:
    stop_state_RZ, is_stopped_R = advance(stop_state_RZ, token_R, stops)
    finish_R = jnp.where(is_stopped_R, STOP_STRING, finish_R)
  if end_RE is not None:
    is_end_R = jnp.any(token_R[:, None] == end_RE, axis=1)
    finish_R = jnp.where(is_end_R, END_TOKEN, finish_R)
  return stop_state_RZ, finish_R
