"""Which segments share a row: decided once, best fit first, and stored beside the token files.

A segment is a document, or a context-long part of one, of which every token but the last is an
input and every token but the first a target; so a document's last target is its end token, and
no target lies in another document.
"""

import bisect
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptjax.data.building import build_once, disk_errors_named
from gptjax.data.token_files import NpyWriter, TokenFiles, is_whole_npy

# Segments that are packed together: enough to fill rows well, few enough for any memory.
WINDOW_SEGMENTS = 1 << 17
_FILES = ("segments.npy", "rows.npy")


@dataclasses.dataclass(frozen=True)
class PackingPlan:
  """The segments of every row.

  Attributes:
    segments: int64 [segments, 2], first token and number of inputs, those of a row together.
    row_starts: int64 [rows + 1], first segment of each row.
  """

  segments: np.ndarray
  row_starts: np.ndarray

  @property
  def num_rows(self) -> int:
    return len(self.row_starts) - 1


def open_packing_plan(tokens: TokenFiles, context_length: int) -> PackingPlan:
  """Reads the plan of a split for one context length, or makes and stores it."""
  folder = tokens.folder / f"{tokens.split}-packed-{context_length}"
  with disk_errors_named(str(tokens.folder.parent)):
    build_once(
      folder,
      lambda built: all(is_whole_npy(built / name) for name in _FILES),
      lambda temporary: _write_plan(tokens, context_length, temporary),
    )
  return PackingPlan(*(np.load(folder / name, mmap_mode="r") for name in _FILES))


def _write_plan(tokens: TokenFiles, context_length: int, folder: Path) -> None:
  folder.mkdir()
  with (
    NpyWriter(folder / _FILES[0], (2,)) as segments,
    NpyWriter(folder / _FILES[1]) as rows,
  ):
    for window_S2 in segment_windows(tokens.document_starts, context_length):
      for row in pack_best_fit(window_S2[:, 1].tolist(), context_length):
        rows.append([segments.length])
        segments.append(window_S2[row])
    rows.append([segments.length])


def segment_windows(document_starts: np.ndarray, context_length: int) -> Iterator[np.ndarray]:
  """Cuts documents into segments, int64 [segments, 2] of first token and inputs."""
  for first in range(0, len(document_starts) - 1, WINDOW_SEGMENTS):
    bounds = np.array(document_starts[first : first + WINDOW_SEGMENTS + 1])
    inputs = np.maximum(np.diff(bounds) - 1, 0)
    parts = -(-inputs // context_length)
    ends = np.cumsum(parts)
    # A document may have more parts than a window holds.
    for start in range(0, ends[-1], WINDOW_SEGMENTS):
      segment = np.arange(start, min(start + WINDOW_SEGMENTS, ends[-1]))
      document = np.searchsorted(ends, segment, side="right")
      offset = (segment - ends[document] + parts[document]) * context_length
      lengths = np.minimum(inputs[document] - offset, context_length)
      yield np.stack([bounds[document] + offset, lengths], axis=1)


def pack_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
  """Puts items into bins: the longest first, each where it leaves the least room.

  Args:
    lengths: each in [1, capacity].

  Returns:
    The items of each bin, in order; bins in order of their first item.
  """
  bins: list[list[int]] = []
  room: list[tuple[int, int]] = []  # (room left, bin), sorted
  for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
    length = lengths[item]
    place = bisect.bisect_left(room, (length, -1))
    left, number = room.pop(place) if place < len(room) else (capacity, len(bins))
    if number == len(bins):
      bins.append([])
    bins[number].append(item)
    if left > length:
      bisect.insort(room, (left - length, number))
  return sorted(sorted(items) for items in bins)
