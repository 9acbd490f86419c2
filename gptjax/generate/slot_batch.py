"""The rows that run, in arrays of the size that they need.

A step costs what its arrays hold, running or not: one row alone should not pay for sixty-four, nor
short texts for a long context. So the arrays have one of few sizes, for each of which the step is
compiled. They grow as soon as a row needs it, and shrink when for a while none does.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from gptjax.generate import slot_programs
from gptjax.generate.cache import Cache
from gptjax.generate.sampling import Controls
from gptjax.generate.slot_controls import Uses
from gptjax.model.config import ModelConfig

PyTree = Any

_GROWTH = 4
# Contexts from here on have a size for short texts, too.
_LONG = 512
_STEPS_BEFORE_SHRINKING = 32


@dataclasses.dataclass(frozen=True, order=True)
class Size:
  """Rows, and positions of each."""

  num_rows: int
  num_positions: int

  def fits(self, num_rows: int, num_positions: int) -> bool:
    """Says whether there is room."""
    return num_rows <= self.num_rows and num_positions <= self.num_positions


def make_sizes(num_rows: int, num_positions: int) -> list[Size]:
  """Returns the sizes of arrays of up to `num_rows`, smallest first: 1, 4, 16, ... rows."""
  counts = [1]
  while counts[-1] < num_rows:
    counts.append(min(counts[-1] * _GROWTH, num_rows))
  sizes = [Size(count, num_positions) for count in counts]
  if num_positions >= _LONG and num_rows > 1:
    sizes.append(Size(num_rows, num_positions // _GROWTH))
  return sorted(sizes)


class SlotBatch:
  """Rows that run, each at a place of the arrays.

  Args:
    weights: from `prepare`.
    config: the architecture.
    sizes: that the arrays may have, from `make_sizes`.

  Attributes:
    size: that they have.
    sizes: as given.
  """

  def __init__(self, weights: PyTree, config: ModelConfig, sizes: list[Size]):
    self._weights, self._config, self.sizes = weights, config, sizes
    self.size = sizes[0]
    self._taken = [False] * self.size.num_rows
    self._texts = slot_programs.idle_texts(self.size.num_rows, self.size.num_positions)
    self._cache = slot_programs.empty_cache(config, self.size.num_rows, self.size.num_positions)
    self._steps_too_large = 0

  def fit(self, num_rows: int, num_positions: int, *, is_needed: bool) -> dict[int, int] | None:
    """Changes the size where it should be another one.

    Args:
      num_rows, num_positions: of all rows that run, and that will join them soon.
      is_needed: there is a row to join; otherwise the arrays may only shrink, in time.

    Returns:
      {place before: place now} of the rows that run, where they have moved, else None.
    """
    wanted = next(size for size in self.sizes if size.fits(num_rows, num_positions))
    if wanted >= self.size and self.size.fits(num_rows, num_positions):
      self._steps_too_large = 0
      return None
    if self.size.fits(num_rows, num_positions):
      self._steps_too_large += not is_needed
      if self._steps_too_large < _STEPS_BEFORE_SHRINKING:
        return None
    return self.resize(wanted)

  def resize(self, size: Size) -> dict[int, int]:
    """Moves the rows to arrays of another size, which they must fit; returns as `fit`."""
    old = [place for place, is_taken in enumerate(self._taken) if is_taken]
    place_R = np.full(size.num_rows, -1, np.int32)
    place_R[: len(old)] = old
    self._texts, self._cache = slot_programs.resize(
      self._texts, self._cache, place_R, size.num_positions
    )
    self.size, self._steps_too_large = size, 0
    self._taken = [place < len(old) for place in range(size.num_rows)]
    return {before: now for now, before in enumerate(old)}

  def join(
    self, ids: list[int], limit: int, seed: int, prompt_index: int, copy: int, cache: Cache
  ) -> int:
    """Has a prompt that was read run at a free place, which is returned.

    Args:
      ids: of the prompt.
      limit: tokens of prompt and text together.
      seed, prompt_index, copy: of its random stream.
      cache: of one row, with the prompt.
    """
    place = self._taken.index(False)
    tokens_S = np.zeros(self.size.num_positions, np.int32)
    tokens_S[: len(ids)] = ids
    numbers = map(np.int32, (len(ids), limit))
    self._texts, self._cache = slot_programs.join(
      self._texts,
      self._cache,
      cache,
      np.int32(place),
      tokens_S,
      *numbers,
      np.uint32(seed),
      np.int32(prompt_index),
      np.int32(copy),
    )
    self._taken[place] = True
    return place

  def step(self, controls: Controls, uses: Uses, num_alternatives: int) -> tuple[np.ndarray, ...]:
    """Gives every row its next token; returns arrays of each place, as `slot_programs.step`."""
    with jax.default_matmul_precision("highest"):
      self._texts, self._cache, news = slot_programs.step(
        self._weights, self._texts, self._cache, controls, uses, num_alternatives, self._config
      )
    return jax.device_get(news)

  def vacate(self, place: int, *, has_ended: bool) -> None:
    """Frees a place; a row that has not ended by itself is stopped."""
    self._taken[place] = False
    if not has_ended:
      finish_R = slot_programs.stop(self._texts.finish_R, np.int32(place))
      self._texts = self._texts.replace(finish_R=finish_R)
