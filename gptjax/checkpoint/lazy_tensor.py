"""Tensors that stay in their files until they are read, and what every reader of a format needs.

Knows no format. A reader raises `Malformed` with what is wrong; `reading` adds the file's name.
"""

import contextlib
import dataclasses
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# What describes the tensors (a header, an index, a pickle) is read into memory, so it is limited.
# That of a thousand tensors is some 100 kB.
MAX_INDEX_BYTES = 32 * 2**20
_MAX_DIMENSIONS = 32

DTYPES = {
  np.dtype(dtype).name: np.dtype(dtype)
  for dtype in (
    *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16),
    *(np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8, np.bool_),
  )
}


class Malformed(Exception):
  """A file is not what its format says; the text completes `"<file>" cannot be read: `."""


@dataclasses.dataclass(frozen=True, eq=False)
class LazyTensor:
  """One tensor of a checkpoint.

  Attributes:
    shape: as the file has it.
    dtype: NumPy's, or bfloat16 of ml_dtypes.
    where: name of the file, for messages.
    parts: arrays mapped from the file. One is the tensor itself; several are flat and follow
      each other in row-major order.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  where: str
  parts: tuple[np.ndarray, ...] = dataclasses.field(repr=False)

  @property
  def nbytes(self) -> int:
    """Returns the bytes of the whole tensor."""
    return math.prod(self.shape) * self.dtype.itemsize

  def read(self, index: Any = None) -> np.ndarray:
    """Returns the tensor, or the part of it that NumPy's basic `index` selects.

    The result is read-only, and a view of the file unless the tensor is in pieces there or begins
    at an odd byte: no memory is taken before somebody copies it. It must not be used after the
    file is overwritten in place (replacing the file by another is harmless).
    """
    if len(self.parts) == 1:
      found = self.parts[0] if index is None else self.parts[0][index]
    else:
      found = self._gather(() if index is None else index)
    found = np.require(found, requirements="A")
    found.flags.writeable = False
    return found

  def _gather(self, index: Any) -> np.ndarray:
    """Joins the rows of the first axis that `index` touches, then applies the rest of it."""
    first, *rest = index if isinstance(index, tuple) and index else (index,)
    if not isinstance(first, int | slice) or not self.shape:
      return self._rows(0, 1, self.shape)[index]
    length, *row = self.shape
    rows = range(length)[first]
    if isinstance(rows, int):
      return self._rows(rows, rows + 1, tuple(row))[tuple(rest)]
    low, high = (min(rows), max(rows) + 1) if rows else (0, 0)
    order = slice(None) if rows.step > 0 else slice(None, None, -1)
    block = self._rows(low, high, (high - low, *row))
    return block[order][(slice(None, None, abs(rows.step)), *rest)]

  def _rows(self, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the flat elements low * n to high * n in `shape`, n being the size of a row."""
    row_size = math.prod(shape) // max(high - low, 1)
    low, high = low * row_size, high * row_size
    found, start = [], 0
    for part in self.parts:
      found.append(part[max(low - start, 0) : max(high - start, 0)])
      start += part.size
    found = [part for part in found if part.size] or [self.parts[0][:0]]
    return (found[0] if len(found) == 1 else np.concatenate(found)).reshape(shape)


class TensorSource(Mapping[str, LazyTensor]):
  """The tensors of a checkpoint by their names in it.

  Attributes:
    metadata: what the checkpoint says besides, plain values.
    where: the file or folder, for messages.
    format: "safetensors", "torch", "flax", "openai-gpt1" or "mingpt".
  """

  def __init__(
    self, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, Any], where: str, format: str
  ):
    self._tensors = dict(tensors)
    self.metadata = dict(metadata)
    self.where = where
    self.format = format

  def __getitem__(self, name: str) -> LazyTensor:
    return self._tensors[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)

  def __repr__(self) -> str:
    return f"TensorSource({len(self)} tensors of {self.where}, {self.format})"


@contextlib.contextmanager
def open_mapped(path: Path) -> Iterator[mmap.mmap]:
  """Maps a whole file, read-only. The mapping lives as long as an array uses it."""
  with path.open("rb") as file:
    if not path.stat().st_size:
      raise Malformed("it is empty (0 bytes); copy or download it again")
    yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def map_array(buffer: mmap.mmap, dtype: np.dtype, shape: tuple[int, ...], start: int) -> np.ndarray:
  """Returns a view of the file from byte `start`; the caller has checked that it is in the file."""
  flat = np.frombuffer(buffer, dtype, math.prod(shape), start) if math.prod(shape) else ()
  return np.asarray(flat, dtype).reshape(shape)


def whole(shape: tuple[int, ...], array: np.ndarray, where: str) -> LazyTensor:
  """Returns the tensor that is one mapped array."""
  return LazyTensor(tuple(shape), array.dtype, where, (array.reshape(shape),))


def check_dtype(name: Any) -> np.dtype:
  """Returns the dtype of NumPy's name; Malformed if it is not one of a GPT's weights or buffers."""
  dtype = DTYPES.get(name) if isinstance(name, str) else None
  if dtype is None:
    raise Malformed(f"dtype {spell(name)} is not one of {', '.join(DTYPES)}")
  return dtype


def check_shape(shape: Any) -> tuple[int, ...]:
  """Returns a shape as a tuple; Malformed unless it is a few sizes that NumPy can multiply."""
  if not isinstance(shape, list | tuple) or not all(map(is_size, shape)):
    raise Malformed("a tensor's shape is not a list of sizes")
  # NumPy multiplies the others also where one size is 0
  if len(shape) > _MAX_DIMENSIONS or math.prod(size or 1 for size in shape) >= 2**56:
    raise Malformed("a tensor's shape is larger than any file")
  return tuple(shape)


def is_size(value: Any) -> bool:
  """Says whether a value from a file is an int from 0 to 2**56."""
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**56


def read_json(path: Path) -> Any:
  """Parses a file; Malformed as `parse_json`."""
  with path.open("rb") as file:
    return parse_json(file.read(MAX_INDEX_BYTES + 1))


def parse_json(text: bytes) -> Any:
  """Parses a header or index; Malformed if it is too large, too deep, or names a key twice."""
  if len(text) > MAX_INDEX_BYTES:
    raise Malformed(f"its JSON has more than {MAX_INDEX_BYTES} bytes")
  try:
    return json.loads(text, object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    raise Malformed(f"its JSON is damaged ({type(error).__name__})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    raise Malformed("its JSON names one key twice")
  return found


def spell(value: Any) -> str:
  """Quotes a short piece of a file, safe to print on one line."""
  if not isinstance(value, str):
    return f"of type {type(value).__name__}"
  return ascii(value if len(value) <= 80 else value[:77] + "...")
