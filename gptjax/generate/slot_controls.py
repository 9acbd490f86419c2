"""What decides the next tokens of slots, in one shape for rows that come and go.

What any row ever used stays in the arrays, at the value that changes nothing, so that the step is
compiled once; what no row uses now is told beside them, and stepped over.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

from gptjax.generate.candidates import Sampling, make_sampling
from gptjax.generate.options import DecodingOptions, is_sampled
from gptjax.generate.rules import Rules, make_rules, pad_lists
from gptjax.generate.sampling import Controls

IDLE = DecodingOptions(eos_token_id=())
# What changes nothing, where it is not -1.
_NEUTRAL = {
  "bias_RN": 0.0,
  "repetition_R": 1.0,
  "frequency_R": 0.0,
  "presence_R": 0.0,
  "ngram_R": 0,
  "min_length_R": 0,
  "limit_R": 0,
  "cut_mass_R": -1.0,
  "min_p_R": 0.0,
  "typical_mass_R": 2.0,
}
_RIGHT_ALIGNED = ("biased_RNW", "bad_RNW")
_WARPERS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


@struct.dataclass
class Uses:
  """What any row uses; the rest of the step is stepped over. All are scalars.

  Attributes:
    rules, alternatives: bool.
    drawing: 0 is nothing, 1 temperature, 2 any warper.
  """

  rules: jax.Array
  drawing: jax.Array
  alternatives: jax.Array


class ControlsMaker:
  """Makes the controls of all rows, again and again.

  Args:
    vocab_size: V.
  """

  def __init__(self, vocab_size: int):
    self._vocab_size = vocab_size
    # Name -> (shape without rows, dtype) of the widest array.
    self._seen: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    self._num_rows = 0

  def make(
    self,
    options: Sequence[DecodingOptions],
    min_length_R: Sequence[int],
    limit_R: Sequence[int],
  ) -> tuple[Controls, Uses]:
    """Returns the controls of rows, and what of them any row uses.

    Args:
      options: of each row; IDLE where it is free.
      min_length_R, limit_R: each row's entries of `checks.Lengths`.
    """
    self._num_rows = len(options)
    rules = make_rules(options, model_end_id=None, min_length_R=min_length_R, limit_R=limit_R)
    controls = Controls(
      rules=self._widen(rules),
      sampling=self._sampling(options),
      end_RE=self._keep_size("ends", pad_lists(row.eos_token_id for row in options)),
    )
    drawn = [row for row in options if is_sampled(row)]
    is_warped = any(getattr(row, name) != off for row in drawn for name, off in _WARPERS.items())
    uses = Uses(
      rules=np.bool_(bool(jax.tree.leaves(rules))),
      drawing=np.int32(len(drawn) > 0) + np.int32(is_warped),
      alternatives=np.bool_(any(row.top_logprobs for row in options)),
    )
    return controls, uses

  def _sampling(self, options: Sequence[DecodingOptions]) -> Sampling | None:
    drawn = [is_sampled(row) for row in options]
    if not any(drawn) and "temperature_R" not in self._seen:
      return None

    def values(name: str, greedy: float) -> list:
      return [getattr(row, name) if is_drawn else greedy for row, is_drawn in zip(options, drawn)]

    made = make_sampling(
      self._vocab_size,
      values("temperature", 0.0),
      values("top_k", 0),
      values("top_p", 1.0),
      values("min_p", 0.0),
      values("typical_p", 1.0),
    )
    # Rows to come may have no top-k: all of the vocabulary are candidates.
    return self._widen(made.replace(width=0))

  def _widen(self, made: Rules | Sampling) -> Rules | Sampling:
    """Keeps what any earlier row needed, so that rows that come and go compile nothing."""
    arrays = {
      field.name: self._keep_size(field.name, getattr(made, field.name))
      for field in dataclasses.fields(made)
      if field.metadata.get("pytree_node", True)
    }
    return made.replace(**arrays)

  def _keep_size(self, name: str, array: np.ndarray | None) -> np.ndarray | None:
    """Widens an array of all rows to the widest that there was of its name."""
    if array is not None:
      old, _ = self._seen.get(name, (array.shape[1:], array.dtype))
      self._seen[name] = tuple(np.maximum(old, array.shape[1:])), array.dtype
    if name not in self._seen:
      return None
    shape, dtype = self._seen[name]
    off = self._vocab_size if name == "top_k_R" else _NEUTRAL.get(name, -1)
    wide = np.full((self._num_rows, *shape), off, dtype)
    if array is not None and name in _RIGHT_ALIGNED:
      wide[:, : array.shape[1], wide.shape[2] - array.shape[2] :] = array
    elif array is not None:
      wide[tuple(map(slice, array.shape))] = array
    return wide
