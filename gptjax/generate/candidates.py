"""Temperature, top-k, top-p, min-p and typical-p, and the draw of one token a row.

Exact to transformers' warpers and their order, without sorting: what a warper keeps is all above
some threshold, and a threshold is found by bisection over the bits of a float32, 32 masked sums.
Over GPT-2's vocabulary that is 2 ms where a sort is 16 ms (two CPU cores). Where every row has
top-k on, `lax.top_k` finds `Sampling.width` candidates first, in 0.1 ms, for the rest to work on.

Every option is an array with an entry a row, so one program serves rows with other settings: a row
without an option has its neutral value. `Sampling.width` is 0, the whole vocabulary, as soon as one
row has no top-k or a large one.

Ties: as many of equal scores are kept as transformers keeps, which cuts some of them, in no order
that PyTorch promises; here top-p cuts lower ids first. The one exception: of scores that equal the
last of the top k, at most `width` candidates in all are kept; transformers keeps all.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

_MAX_WIDTH = 1024
# Bit patterns of -inf and inf in the order of the floats, as `_float` takes it.
_LOWEST, _HIGHEST = -0x7F800001, 0x7F800000


@struct.dataclass
class Sampling:
  """Options of each row; None where no row has it on. Made by `make_sampling`.

  Attributes:
    temperature_R: float32; 0 takes the likeliest token.
    top_k_R: int32; the size of the vocabulary is off.
    cut_mass_R: float32, 1 - top_p, as transformers compares with; -1 is off.
    min_p_R: float32; 0 is off.
    typical_mass_R: float32, typical_p; 2 is off.
    width: how many candidates `lax.top_k` finds; 0 is the whole vocabulary. Static.
  """

  temperature_R: jax.Array
  top_k_R: jax.Array | None = None
  cut_mass_R: jax.Array | None = None
  min_p_R: jax.Array | None = None
  typical_mass_R: jax.Array | None = None
  width: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Candidates:
  """The tokens that a row may draw.

  Attributes:
    ids_RC: int32; from the likeliest down, or all in order where `Sampling.width` is 0.
    log_probs_RC: float32, normalised; -inf is cut.
  """

  ids_RC: jax.Array
  log_probs_RC: jax.Array


def make_sampling(
  vocab_size: int,
  temperature: Sequence[float],
  top_k: Sequence[int | None] | None = None,
  top_p: Sequence[float | None] | None = None,
  min_p: Sequence[float | None] | None = None,
  typical_p: Sequence[float | None] | None = None,
) -> Sampling:
  """Makes the options of a batch from values that are already checked.

  Args:
    vocab_size: V of the scores.
    temperature: of each row; 0 takes the likeliest.
    top_k: of each row; None or 0 is off, here and for min_p.
    top_p: of each row; None or 1 is off, here and for typical_p.
  """
  count = _per_row(top_k, lambda k: min(k, vocab_size) if k else vocab_size, vocab_size, np.int32)
  width = 0
  if count is not None and count.max() <= min(_MAX_WIDTH, vocab_size - 1):
    # A power of two, so that few programs are compiled and most ties have room.
    width = min(max(64, 1 << (int(count.max()) - 1).bit_length()), vocab_size)
  return Sampling(
    temperature_R=np.asarray(temperature, np.float32),
    top_k_R=count,
    cut_mass_R=_per_row(top_p, lambda p: -1.0 if p is None or p >= 1 else 1.0 - p, -1.0),
    min_p_R=_per_row(min_p, lambda p: p or 0.0, 0.0),
    typical_mass_R=_per_row(typical_p, lambda p: 2.0 if p is None or p >= 1 else p, 2.0),
    width=width,
  )


def _per_row(values, neutral_or_value: Callable, off: float, dtype=np.float32) -> np.ndarray | None:
  row = np.array([neutral_or_value(value) for value in values or ()], dtype)
  return row if (row != off).any() else None


def warp(scores_RV: jax.Array, sampling: Sampling) -> Candidates:
  """Returns the candidates of each row and their probabilities.

  Args:
    scores_RV: float32 logits after all rules; -inf is banned, and one a row must not be.

  Source: transformers 5.23, generation/logits_process.py, with min_tokens_to_keep=1.
  """
  scores_RC, ids_RC = _narrow(scores_RV, sampling)
  place_RC = jax.lax.broadcasted_iota(jnp.int32, scores_RC.shape, 1)
  likeliest_R1 = jnp.argmax(scores_RC, axis=-1, keepdims=True)
  one_hot_RC = jnp.where(place_RC == likeliest_R1, 0.0, -jnp.inf)
  log_probs_RC = jax.nn.log_softmax(_cut(scores_RC, ids_RC, sampling, 1), axis=-1)
  is_greedy_R1 = sampling.temperature_R[:, None] == 0
  return Candidates(ids_RC, jnp.where(is_greedy_R1, one_hot_RC, log_probs_RC))


def shortlist(
  scores_RV: jax.Array, sampling: Sampling, min_tokens_to_keep: int
) -> tuple[jax.Array, jax.Array | None]:
  """Warps scores that must keep their size, as those of beams.

  Args:
    scores_RV: float32, after all rules.
    sampling: no temperature of it is 0.
    min_tokens_to_keep: that no single warper cuts.

  Returns:
    (scores_RC divided by the temperature, -inf where cut, not normalised; ids_RC, or None where
    they are the whole vocabulary in order).
  """
  scores_RC, ids_RC = _narrow(scores_RV, sampling)
  is_kept_RC = _cut(scores_RC, ids_RC, sampling, min_tokens_to_keep) > -jnp.inf
  scores_RC = _keep(scores_RC / sampling.temperature_R[:, None], is_kept_RC)
  return scores_RC, ids_RC if sampling.width else None


def draw(candidates: Candidates, keys_R: jax.Array, index_R: jax.Array) -> jax.Array:
  """Draws one token a row.

  One uniform number a row picks from the probabilities laid end to end in order of id, so that a
  row's draw depends neither on its companions nor on how many candidates it was given.

  Args:
    keys_R: a typed key for each row.
    index_R: int32, how many tokens the row drew before.

  Returns:
    int32 [R].
  """
  step_keys_R = jax.vmap(jax.random.fold_in)(keys_R, index_R)
  bits_R = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(step_keys_R)
  # In the middle of 2^23 parts: exact in float32, never 0, below 1.
  uniform_R = ((bits_R >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
  probs_RC = jnp.exp(candidates.log_probs_RC)
  target_R = uniform_R * jnp.sum(probs_RC, axis=-1)

  def reaches_target(id_R):
    return _mass(probs_RC, candidates.ids_RC <= id_R[:, None]) > target_R

  last_id_R = jnp.max(jnp.where(probs_RC > 0, candidates.ids_RC, 0), axis=-1)
  return _bisect(reaches_target, jnp.zeros_like(last_id_R), last_id_R)


def _narrow(scores_RV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
  if sampling.width:
    return jax.lax.top_k(scores_RV, sampling.width)
  return scores_RV, jax.lax.broadcasted_iota(jnp.int32, scores_RV.shape, 1)


def _cut(scores_RC: jax.Array, ids_RC: jax.Array, sampling: Sampling, least: int) -> jax.Array:
  """Applies all warpers; the scores returned are less than 0 by what their row's highest was."""
  if sampling.top_k_R is not None:
    scores_RC = _keep_top_k(scores_RC, jnp.maximum(sampling.top_k_R, least))
  temperature_R1 = sampling.temperature_R[:, None]
  # The highest is 0 before it is scaled: XLA computes scores anew where it fuses, with or without
  # rounding the product, and a difference of products that should be 0 would not be.
  scores_RC = scores_RC - jnp.max(scores_RC, axis=-1, keepdims=True)
  scores_RC = scores_RC / jnp.where(temperature_R1 == 0, 1.0, temperature_R1)
  if sampling.cut_mass_R is not None:
    scores_RC = _keep_top_p(scores_RC, ids_RC, sampling.cut_mass_R, least)
  if sampling.min_p_R is not None:
    scores_RC = _keep_min_p(scores_RC, sampling.min_p_R, least)
  if sampling.typical_mass_R is not None:
    scores_RC = _keep_typical(scores_RC, sampling.typical_mass_R, least)
  return scores_RC


def _keep_top_k(scores_RC: jax.Array, count_R: jax.Array) -> jax.Array:
  """Keeps what is not below the k-th score: the least score with fewer than k above it."""

  def few_above(score_R):
    return jnp.sum(scores_RC > score_R[:, None], axis=-1) < count_R

  return _keep(scores_RC, scores_RC >= _least_float(few_above, count_R)[:, None])


def _keep_top_p(
  scores_RC: jax.Array, ids_RC: jax.Array, cut_mass_R: jax.Array, least: int
) -> jax.Array:
  """Cuts, from the least likely up, and lower ids first, all that adds up to the cut mass."""
  probs_RC = jax.nn.softmax(scores_RC, axis=-1)
  threshold_R = _least_float(
    lambda score_R: _mass(probs_RC, scores_RC <= score_R[:, None]) > cut_mass_R, cut_mass_R
  )
  threshold_R1 = jnp.minimum(threshold_R[:, None], _highest(scores_RC, least))
  is_tied_RC = scores_RC == threshold_R1
  below_R = _mass(probs_RC, scores_RC < threshold_R1)
  last_id_R = jnp.max(jnp.where(is_tied_RC, ids_RC, 0), axis=-1)

  def find_first():
    def exceeds_cut(id_R):
      return below_R + _mass(probs_RC, is_tied_RC & (ids_RC <= id_R[:, None])) > cut_mass_R

    return _bisect(exceeds_cut, jnp.zeros_like(last_id_R), last_id_R)

  has_ties = jnp.any(jnp.sum(is_tied_RC & (scores_RC > -jnp.inf), axis=-1) > 1)
  first_id_R = jax.lax.cond(has_ties, find_first, lambda: last_id_R)
  is_kept_RC = (scores_RC > threshold_R1) | (is_tied_RC & (ids_RC >= first_id_R[:, None]))
  return _keep(scores_RC, is_kept_RC)


def _keep_min_p(scores_RC: jax.Array, min_p_R: jax.Array, least: int) -> jax.Array:
  """Keeps what has min_p of the likeliest token's probability."""
  probs_RC = jax.nn.softmax(scores_RC, axis=-1)
  threshold_R1 = min_p_R[:, None] * jnp.max(probs_RC, axis=-1, keepdims=True)
  return _keep(scores_RC, probs_RC >= jnp.minimum(threshold_R1, _highest(probs_RC, least)))


def _keep_typical(scores_RC: jax.Array, mass_R: jax.Array, least: int) -> jax.Array:
  """Keeps the tokens whose surprise is nearest the entropy, until they add up to the mass.

  Source: Meister et al. 2023, "Locally Typical Sampling", section 4.
  """
  log_probs_RC = jax.nn.log_softmax(scores_RC, axis=-1)
  probs_RC = jnp.exp(log_probs_RC)
  entropy_R1 = -jnp.sum(
    probs_RC * jnp.where(probs_RC > 0, log_probs_RC, 0.0), axis=-1, keepdims=True
  )
  distance_RC = jnp.abs(-log_probs_RC - entropy_R1)
  limit_R = _least_float(
    lambda limit_R: _mass(probs_RC, distance_RC <= limit_R[:, None]) >= mass_R, mass_R
  )
  limit_R1 = jnp.maximum(limit_R[:, None], -_highest(-distance_RC, least))
  return _keep(scores_RC, distance_RC <= limit_R1)


def _highest(values_RC: jax.Array, count: int) -> jax.Array:
  """The last of the `count` highest values of each row, [R, 1]."""
  if count == 1:
    return jnp.max(values_RC, axis=-1, keepdims=True)
  return jax.lax.top_k(values_RC, min(count, values_RC.shape[-1]))[0][:, -1:]


def _keep(scores_RC: jax.Array, is_kept_RC: jax.Array) -> jax.Array:
  return jnp.where(is_kept_RC, scores_RC, -jnp.inf)


def _mass(probs_RC: jax.Array, is_counted_RC: jax.Array) -> jax.Array:
  return jnp.sum(jnp.where(is_counted_RC, probs_RC, 0.0), axis=-1)


def _least_float(is_true: Callable[[jax.Array], jax.Array], like_R: jax.Array) -> jax.Array:
  """Returns each row's least float32 for which a monotone predicate holds; inf where none does."""
  lowest_R = jnp.full(like_R.shape, _LOWEST, jnp.int32)
  highest_R = jnp.full(like_R.shape, _HIGHEST, jnp.int32)
  return _float(_bisect(lambda order_R: is_true(_float(order_R)), lowest_R, highest_R))


def _float(order: jax.Array) -> jax.Array:
  """The float32 at an int32 place in the order of all floats; 0 for those that may be flushed."""
  bits = jnp.where(order < 0, order ^ 0x7FFFFFFF, order)
  is_subnormal = (bits & 0x7FFFFFFF) < 0x00800000
  return jnp.where(is_subnormal, 0.0, jax.lax.bitcast_convert_type(bits, jnp.float32))


def _bisect(
  is_true: Callable[[jax.Array], jax.Array], low_R: jax.Array, high_R: jax.Array
) -> jax.Array:
  """Returns the least int32 from low to high for which a monotone predicate holds, or high."""

  def is_open(bounds):
    low_R, high_R = bounds
    return jnp.any(low_R < high_R)

  def halve(bounds):
    low_R, high_R = bounds
    # The mean rounded down, without overflow.
    middle_R = (low_R & high_R) + ((low_R ^ high_R) >> 1)
    holds_R = is_true(middle_R)
    return jnp.where(holds_R, low_R, middle_R + 1), jnp.where(holds_R, middle_R, high_R)

  # Rows that are done wait for others: their low may pass high by one, and high stays.
  return jax.lax.while_loop(is_open, halve, (low_R, high_R))[1]
