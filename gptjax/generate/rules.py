"""Rules on logits: pure functions of the tokens so far, in transformers' order.

A rule that no row uses is None and costs nothing; otherwise it is an array with one entry a row, at
the value that changes nothing where a row does not use it. So rows with different options share
one compiled program, and `jax.tree.map(lambda x: x[rows], rules)` picks, repeats or reorders rows.
Lists are padded with -1 to a power of two, so that few shapes are compiled.

R counts rows, S their slots, W the longest run of tokens, N runs of one row, E end tokens.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gptjax.generate.options import DecodingOptions, end_ids

Array = Any  # numpy as made, jax in a program


@struct.dataclass
class Rules:
  """What each row's options do to its logits; None is off for all rows.

  Attributes:
    biased_RNW, bias_RN: float32 added to the logit of a run's last token after its others.
    repetition_R: float32 divisor of positive logits, factor of negative ones.
    frequency_R, presence_R: float32, taken away a time and once.
    ngram_R: int32 size of runs that may not come twice; 0 is off.
    bad_RNW: int32 runs that may not be completed.
    end_RE, min_length_R: no token of end_RE before the row is that long, prompt included.
    allowed_RV: bool, which tokens a `Constraint` lets follow.
    forced_first_R: int32 first new token; -1 is none.
    forced_last_RE, limit_R: int32 tokens, one of which ends a row of limit_R.
    suppressed_RN, suppressed_first_RN: int32 tokens, never chosen or not at first.
    num_beams: rows of one search, which are neighbours.
  """

  biased_RNW: Array | None = None
  bias_RN: Array | None = None
  repetition_R: Array | None = None
  frequency_R: Array | None = None
  presence_R: Array | None = None
  ngram_R: Array | None = None
  bad_RNW: Array | None = None
  end_RE: Array | None = None
  min_length_R: Array | None = None
  allowed_RV: Array | None = None
  forced_first_R: Array | None = None
  forced_last_RE: Array | None = None
  limit_R: Array | None = None
  suppressed_RN: Array | None = None
  suppressed_first_RN: Array | None = None
  num_beams: int = struct.field(pytree_node=False, default=1)


def make_rules(
  row_options: Sequence[DecodingOptions],
  *,
  model_end_id: int | None,
  min_length_R: Sequence[int],
  limit_R: Sequence[int],
  num_beams: int = 1,
) -> Rules:
  """Gathers the rules of rows, in NumPy arrays.

  Args:
    row_options: one a row, checked, with bad_words encoded.
    model_end_id: ends texts where the options do not say.
    min_length_R, limit_R: each row's entries of `checks.Lengths`.
    num_beams: rows of one search.
  """
  ends = [end_ids(options, model_end_id) for options in row_options]
  forced_last_RE = pad_lists(options.forced_eos_token_id for options in row_options)
  # The lengths belong to their rules: without end tokens, or a minimum, there is none.
  has_minimum = any(end and minimum for end, minimum in zip(ends, min_length_R, strict=True))
  bias = [options.logit_bias for options in row_options]
  first = [options.forced_bos_token_id for options in row_options]

  def values(name: str, off: float, dtype: type) -> np.ndarray | None:
    return _values([getattr(options, name) for options in row_options], off, dtype)

  return Rules(
    biased_RNW=_runs([[ids for ids, _ in row] for row in bias]),
    bias_RN=pad_lists(([weight for _, weight in row] for row in bias), 0.0, np.float32),
    repetition_R=values("repetition_penalty", 1.0, np.float32),
    frequency_R=values("frequency_penalty", 0.0, np.float32),
    presence_R=values("presence_penalty", 0.0, np.float32),
    ngram_R=values("no_repeat_ngram_size", 0, np.int32),
    bad_RNW=_runs([options.bad_words_ids for options in row_options]),
    end_RE=pad_lists(ends) if has_minimum else None,
    min_length_R=np.asarray(min_length_R, np.int32) if has_minimum else None,
    forced_first_R=_values([-1 if token is None else token for token in first], -1, np.int32),
    forced_last_RE=forced_last_RE,
    limit_R=None if forced_last_RE is None else np.asarray(limit_R, np.int32),
    suppressed_RN=pad_lists(options.suppress_tokens for options in row_options),
    suppressed_first_RN=pad_lists(options.begin_suppress_tokens for options in row_options),
    num_beams=num_beams,
  )


def _values(values: Sequence[float], off: float, dtype: type) -> np.ndarray | None:
  return None if all(value == off for value in values) else np.asarray(values, dtype)


def _width(sizes: Iterable[int]) -> int:
  return 1 << max(0, max(sizes) - 1).bit_length()


def pad_lists(
  rows: Iterable[Sequence], pad: float = -1, dtype: type = np.int32
) -> np.ndarray | None:
  """Packs lists at the left of [R, N], N a power of two; None where all are empty."""
  rows = list(rows)
  if not any(rows):
    return None
  array = np.full((len(rows), _width(map(len, rows))), pad, dtype)
  for line, row in zip(array, rows, strict=True):
    line[: len(row)] = row
  return array


def _runs(rows: Sequence[Sequence[Sequence[int]]]) -> np.ndarray | None:
  """Packs runs of tokens at the right of [R, N, W]."""
  if not any(rows):
    return None
  width = _width(len(run) for row in rows for run in row)
  array = np.full((len(rows), _width(map(len, rows)), width), -1, np.int32)
  for lines, row in zip(array, rows, strict=True):
    for line, run in zip(lines, row):
      line[width - len(run) :] = run
  return array


def apply_rules(
  scores_RV: jax.Array,
  tokens_RS: jax.Array,
  length_R: jax.Array,
  prompt_length_R: jax.Array,
  rules: Rules,
) -> jax.Array:
  """Applies every rule to the scores of the next tokens. No array has both V and S.

  Args:
    scores_RV: float32 logits, or log-probabilities in a beam search.
    tokens_RS: int32 tokens of each row from slot 0 on, the prompt first; what follows the first
      length_R of them is never read.
    length_R, prompt_length_R: int32, at least 1.
    rules: one entry a row.

  Returns:
    float32 scores, -inf where a token is forbidden.
  """
  scores_RV, rules = jax.tree.map(jnp.asarray, (scores_RV, rules))
  rows = _Rows(*map(jnp.asarray, (tokens_RS, length_R, prompt_length_R)))
  first_R = prompt_length_R
  if rules.bias_RN is not None:
    scores_RV += _bias(scores_RV, rows, rules)
  if rules.repetition_R is not None:
    scores_RV = _penalize_repetition(scores_RV, rows, rules.repetition_R)
  if rules.frequency_R is not None or rules.presence_R is not None:
    scores_RV -= _count_penalty(scores_RV, rows, rules)
  if rules.ngram_R is not None:
    scores_RV = _ban(scores_RV, _repeating(rows, rules.ngram_R))
  if rules.bad_RNW is not None:
    scores_RV = _ban(scores_RV, _completing(rows, rules.bad_RNW))
  if rules.end_RE is not None:
    is_short_R1 = (length_R < rules.min_length_R)[:, None]
    scores_RV = _ban(scores_RV, jnp.where(is_short_R1, rules.end_RE, -1))
  if rules.allowed_RV is not None:
    scores_RV = _constrain(scores_RV, rules)
  if rules.forced_first_R is not None:
    is_first_R = (length_R == prompt_length_R) & (rules.forced_first_R >= 0)
    scores_RV = _force(scores_RV, rules.forced_first_R[:, None], is_first_R)
    # What is suppressed at the beginning is so where a token is chosen.
    first_R = prompt_length_R + (rules.forced_first_R >= 0)
  if rules.forced_last_RE is not None:
    is_last_R = (length_R == rules.limit_R - 1) & jnp.any(rules.forced_last_RE >= 0, axis=1)
    scores_RV = _force(scores_RV, rules.forced_last_RE, is_last_R)
  if rules.suppressed_RN is not None:
    scores_RV = _ban(scores_RV, rules.suppressed_RN)
  if rules.suppressed_first_RN is not None:
    is_first_R1 = (length_R == first_R)[:, None]
    scores_RV = _ban(scores_RV, jnp.where(is_first_R1, rules.suppressed_first_RN, -1))
  return scores_RV


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Tokens of rows: the first length_R of each, the prompt first."""

  tokens_RS: jax.Array
  length_R: jax.Array
  prompt_length_R: jax.Array

  @property
  def slots_1S(self) -> jax.Array:
    return jnp.arange(self.tokens_RS.shape[1])[None, :]

  def where(self, is_wanted_RS: jax.Array) -> jax.Array:
    """Returns the wanted ones of the tokens so far, and -1 elsewhere."""
    is_token_RS = self.slots_1S < self.length_R[:, None]
    return jnp.where(is_token_RS & is_wanted_RS, self.tokens_RS, -1)


def _at(array_RV: jax.Array, ids_RX: jax.Array):
  """Points at entries of rows; negative ids are none."""
  rows_R1 = jnp.arange(len(array_RV))[:, None]
  return array_RV.at[rows_R1, jnp.where(ids_RX < 0, array_RV.shape[1], ids_RX)]


def _ban(scores_RV: jax.Array, ids_RX: jax.Array) -> jax.Array:
  return _at(scores_RV, ids_RX).set(-jnp.inf, mode="drop")


def _force(scores_RV: jax.Array, ids_RX: jax.Array, is_forced_R: jax.Array) -> jax.Array:
  forced_RV = _at(jnp.full_like(scores_RV, -jnp.inf), ids_RX).set(0.0, mode="drop")
  return jnp.where(is_forced_R[:, None], forced_RV, scores_RV)


def _completing(rows: _Rows, runs_RNW: jax.Array) -> jax.Array:
  """Returns the last token of each run whose other tokens end the row, else -1. int32 [R, N]."""
  width = runs_RNW.shape[-1]
  slots_RW = rows.length_R[:, None] - jnp.arange(width - 1, 0, -1)[None, :]
  ending_RW = jnp.take_along_axis(rows.tokens_RS, jnp.maximum(slots_RW, 0), axis=1)
  ending_RW = jnp.where(slots_RW >= 0, ending_RW, -2)  # matches neither a token nor padding
  before_RNW = runs_RNW[..., :-1]
  matches_RNW = (before_RNW == ending_RW[:, None, :]) | (before_RNW == -1)
  return jnp.where(jnp.all(matches_RNW, axis=-1), runs_RNW[..., -1], -1)


def _bias(scores_RV: jax.Array, rows: _Rows, rules: Rules) -> jax.Array:
  ids_RN = _completing(rows, rules.biased_RNW)
  return _at(jnp.zeros_like(scores_RV), ids_RN).add(rules.bias_RN, mode="drop")


def _penalize_repetition(scores_RV: jax.Array, rows: _Rows, repetition_R: jax.Array) -> jax.Array:
  """Source: Keskar et al. 2019 (CTRL), section 4.1, with transformers' care for the sign."""
  ids_RS = rows.where(jnp.array(True))
  old_RS = jnp.take_along_axis(scores_RV, jnp.maximum(ids_RS, 0), axis=1)
  factor_R1 = repetition_R[:, None]
  new_RS = jnp.where(old_RS < 0, old_RS * factor_R1, old_RS / factor_R1)
  return _at(scores_RV, ids_RS).set(new_RS, mode="drop")


def _count_penalty(scores_RV: jax.Array, rows: _Rows, rules: Rules) -> jax.Array:
  ids_RS = rows.where(rows.slots_1S >= rows.prompt_length_R[:, None])
  counts_RV = _at(jnp.zeros_like(scores_RV), ids_RS).add(1.0, mode="drop")
  penalty_RV = jnp.zeros_like(scores_RV)
  if rules.frequency_R is not None:
    penalty_RV += rules.frequency_R[:, None] * counts_RV
  if rules.presence_R is not None:
    penalty_RV += rules.presence_R[:, None] * jnp.sign(counts_RV)
  return penalty_RV


def _repeating(rows: _Rows, ngram_R: jax.Array) -> jax.Array:
  """Returns the tokens that would complete a run that was there before, else -1. int32 [R, S]."""

  def compare(back: jax.Array, matches_RS: jax.Array) -> jax.Array:
    # Does the token `back` places before a slot equal that `back` places before the next token?
    before_RS = jnp.roll(rows.tokens_RS, back, axis=1)
    slot_R1 = jnp.maximum(rows.length_R - back, 0)[:, None]
    same_RS = before_RS == jnp.take_along_axis(rows.tokens_RS, slot_R1, axis=1)
    return matches_RS & (same_RS | (back >= ngram_R)[:, None])

  # A run begins in the row, so what the roll brought around to the first slots does not matter.
  matches_RS = (rows.slots_1S >= ngram_R[:, None] - 1) & (ngram_R > 0)[:, None]
  return rows.where(jax.lax.fori_loop(1, jnp.max(ngram_R), compare, matches_RS))


def _constrain(scores_RV: jax.Array, rules: Rules) -> jax.Array:
  constrained_RV = jnp.where(rules.allowed_RV, scores_RV, -jnp.inf)
  # Where other rules forbid all that is allowed, in all beams of a search, what is allowed wins.
  is_stuck_R = jnp.all(constrained_RV == -jnp.inf, axis=1)
  is_stuck_GB = is_stuck_R.reshape(-1, rules.num_beams)
  is_stuck_R = jnp.repeat(jnp.all(is_stuck_GB, axis=1), rules.num_beams)
  allowed_RV = jnp.where(rules.allowed_RV, 0.0, -jnp.inf)
  return jnp.where(is_stuck_R[:, None], allowed_RV, constrained_RV)
