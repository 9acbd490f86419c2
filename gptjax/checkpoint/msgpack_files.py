"""Reads flax_model.msgpack without copying its arrays: it walks and notes where they lie.

Sources: the msgpack specification; flax/serialization.py (extension 1 is an array: its shape, its
dtype and its bytes; arrays over 1 GiB are dicts of chunks).
"""

import mmap
import struct
from typing import Any

from gptjax.checkpoint import lazy_tensor
from gptjax.checkpoint.lazy_tensor import LazyTensor, Malformed

SEPARATOR = "/"  # between the names of nested modules

_ARRAY_EXTENSION, _SCALAR_EXTENSION = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_MAX_DEPTH = 32
_MAX_VALUES = 1_000_000
_MAX_TEXT_BYTES = 2**16
_CUT_OFF = "it is truncated or damaged: copy or download it again"

# By the first byte: the value itself, how the number behind it is packed, or how the length is.
_FIXED = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
  **{0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"},
  **{0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"},
}
_LENGTHS = {
  **{0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I")},
  **{0xC7: ("extension", ">B"), 0xC8: ("extension", ">H"), 0xC9: ("extension", ">I")},
  **{0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I")},
  **{0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("dict", ">H"), 0xDF: ("dict", ">I")},
}


class _Extent(tuple):
  """(first byte, byte after the last) of bytes that were not read."""


def read_msgpack(buffer: mmap.mmap, where: str) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
  """Returns the arrays by their path, joined with "/", and the other leaves as metadata.

  Raises:
    Malformed: truncated, no dict of arrays, or an array whose bytes are not its shape's.
  """
  walk = _Walk(buffer, where)
  content = walk.value(0)
  if not isinstance(content, dict) or walk.place != len(buffer):
    raise Malformed(f"it is not one dict of arrays; {_CUT_OFF}")
  found = _flatten(content, "")
  leaves = dict(found)
  if len(leaves) < len(found):
    raise Malformed(f'it has two arrays of one path, joined with "{SEPARATOR}"')
  tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, LazyTensor)}
  if not tensors:
    raise Malformed("it holds no arrays")
  return tensors, {name: leaf for name, leaf in leaves.items() if name not in tensors}


class _Walk:
  """Decodes values one after another from `place`."""

  def __init__(self, buffer: mmap.mmap, where: str):
    self._buffer = buffer
    self._where = where
    self._left = _MAX_VALUES
    self.place = 0

  def value(self, depth: int) -> Any:
    """Returns the next value; arrays become LazyTensors and bytes extents."""
    self._left -= 1
    if self._left < 0 or depth > _MAX_DEPTH:
      raise Malformed("it is nested beyond reason or has more than a million values")
    first = self._take(1)[0]
    if first < 0x80 or first >= 0xE0:
      return first if first < 0x80 else first - 0x100
    if first in _FIXED:
      return _FIXED[first]
    if first in _NUMBERS:
      return self._number(_NUMBERS[first])
    kind, length = self._kind(first)
    return getattr(self, f"_{kind}")(length, depth)

  def _kind(self, first: int) -> tuple[str, int]:
    """Returns what the first byte announces and its length."""
    if first < 0xC0:
      low_bits = {0x80: ("dict", 0x0F), 0x90: ("list", 0x0F)}
      kind, mask = low_bits.get(first & 0xF0, ("text", 0x1F))
      return kind, first & mask
    if 0xD4 <= first <= 0xD8:
      return "extension", 1 << (first - 0xD4)
    if first not in _LENGTHS:
      raise Malformed(f"byte {self.place - 1} is no msgpack; {_CUT_OFF}")
    kind, packing = _LENGTHS[first]
    return kind, self._number(packing)

  def _take(self, count: int) -> bytes:
    start, self.place = self.place, self.place + count
    if self.place > len(self._buffer):
      raise Malformed(f"it ends within a value at byte {start}; {_CUT_OFF}")
    return self._buffer[start : self.place]

  def _number(self, packing: str) -> Any:
    return struct.unpack(packing, self._take(struct.calcsize(packing)))[0]

  def _skip(self, count: int) -> _Extent:
    start, self.place = self.place, self.place + count
    if self.place > len(self._buffer):
      raise Malformed(f"it ends within {count} bytes from {start}; {_CUT_OFF}")
    return _Extent((start, self.place))

  def _bytes(self, length: int, depth: int) -> _Extent:
    return self._skip(length)

  def _text(self, length: int, depth: int) -> str:
    if length > _MAX_TEXT_BYTES:
      raise Malformed(f"it has a name of {length} bytes")
    try:
      return self._take(length).decode()
    except UnicodeDecodeError as error:
      raise Malformed(f"it has a name that is not UTF-8; {_CUT_OFF}") from error

  def _list(self, length: int, depth: int) -> list[Any]:
    return [self.value(depth + 1) for _ in range(length)]

  def _dict(self, length: int, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(length):
      key = self.value(depth + 1)
      if not isinstance(key, str) or key in found:
        raise Malformed("it has a dict with a name that is no string or comes twice")
      found[key] = self.value(depth + 1)
    return self._join_chunks(found) if _CHUNKED in found else found

  def _extension(self, length: int, depth: int) -> LazyTensor:
    code, stop = self._number(">b"), self.place + length
    if code not in (_ARRAY_EXTENSION, _SCALAR_EXTENSION):
      raise Malformed(f"it has the msgpack extension {code}, which is no array of flax")
    content = self.value(depth + 1)
    if self.place != stop or not isinstance(content, list) or len(content) != 3:
      raise Malformed(f"an array before byte {stop} is damaged; {_CUT_OFF}")
    shape, dtype, extent = lazy_tensor.check_shape(content[0]), content[1], content[2]
    if not isinstance(extent, _Extent):
      raise Malformed(f"an array before byte {stop} has no bytes")
    dtype = lazy_tensor.check_dtype(dtype)
    tensor_bytes = extent[1] - extent[0]
    array = LazyTensor(shape, dtype, self._where, ())
    if array.nbytes != tensor_bytes:
      raise Malformed(
        f"an array {dtype}{list(shape)} has {tensor_bytes} of {array.nbytes} bytes; {_CUT_OFF}"
      )
    mapped = lazy_tensor.map_array(self._buffer, dtype, shape, extent[0])
    return lazy_tensor.whole(shape, mapped, self._where)

  def _join_chunks(self, found: dict[str, Any]) -> LazyTensor:
    """Puts an array over 1 GiB together, which flax stores as flat chunks."""
    shape, chunks = (_as_list(found.get(name)) for name in ("shape", "chunks"))
    shape = lazy_tensor.check_shape(shape)
    if not chunks or not all(isinstance(chunk, LazyTensor) for chunk in chunks):
      raise Malformed("a chunked array has no chunks")
    dtypes = {chunk.dtype for chunk in chunks}
    parts = tuple(chunk.parts[0].reshape(-1) for chunk in chunks)
    tensor = LazyTensor(shape, chunks[0].dtype, self._where, parts)
    if len(dtypes) > 1 or tensor.nbytes != sum(part.nbytes for part in parts):
      raise Malformed(f"the chunks of an array {list(shape)} do not fill it; {_CUT_OFF}")
    return tensor


def _as_list(numbered: Any) -> list[Any]:
  """Returns the values of {"0": ..., "1": ...}, as flax writes tuples."""
  if not isinstance(numbered, dict) or set(numbered) != {str(i) for i in range(len(numbered))}:
    raise Malformed("a chunked array's parts are not numbered")
  return [numbered[str(i)] for i in range(len(numbered))]


def _flatten(content: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
  """Lists (path, leaf); two paths may be one where names hold the separator."""
  found = []
  for name, value in content.items():
    if isinstance(value, dict):
      found += _flatten(value, f"{prefix}{name}{SEPARATOR}")
    elif not isinstance(value, _Extent):
      found.append((prefix + name, value))
  return found
