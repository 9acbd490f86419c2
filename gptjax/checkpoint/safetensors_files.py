"""Reads safetensors: 8 bytes of header length, a JSON header, the tensors back to back.

The library's NumPy reader takes no slice of a bfloat16 tensor and copies what it reads, so the
header is read here, and believed in nothing that can be checked.

Source: https://github.com/huggingface/safetensors, README.
"""

import math
import mmap
from typing import Any

from gptjax.checkpoint import lazy_tensor
from gptjax.checkpoint.lazy_tensor import LazyTensor, Malformed

_DTYPES = {
  **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
  **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
  **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}


def read_safetensors(buffer: mmap.mmap, where: str) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
  """Returns the tensors and the header's metadata.

  Raises:
    Malformed: truncated; or the header does not describe each byte of the rest exactly once.
  """
  length = int.from_bytes(buffer[:8], "little")
  if len(buffer) < 8 or length > len(buffer) - 8:
    raise Malformed(
      f"its header says {length} bytes and the file has {len(buffer)}; it is truncated or no"
      " safetensors file: copy or download it again"
    )
  if length > lazy_tensor.MAX_INDEX_BYTES:
    raise Malformed(f"its header says {length} bytes, more than {lazy_tensor.MAX_INDEX_BYTES}")
  header = lazy_tensor.parse_json(buffer[8 : 8 + length])
  if not isinstance(header, dict):
    raise Malformed("its header is not a JSON object")
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict):
    raise Malformed("the header's __metadata__ is not a JSON object")
  entries = {name: _parse_entry(name, entry) for name, entry in header.items()}
  _check_extents(entries, len(buffer) - 8 - length)
  return {
    name: lazy_tensor.whole(
      shape, lazy_tensor.map_array(buffer, dtype, shape, 8 + length + start), where
    )
    for name, (dtype, shape, start, _) in entries.items()
  }, metadata


def _parse_entry(name: str, entry: Any) -> tuple:
  """Returns (dtype, shape, first byte, byte after the last) of one tensor."""
  if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
    raise Malformed(f"its header describes {lazy_tensor.spell(name)} without dtype, shape, offsets")
  dtype = entry["dtype"]
  if not isinstance(dtype, str) or dtype not in _DTYPES:
    raise Malformed(
      f"{lazy_tensor.spell(name)} has dtype {lazy_tensor.spell(dtype)}, which is not one of"
      f" {', '.join(_DTYPES)}"
    )
  shape, offsets = lazy_tensor.check_shape(entry["shape"]), entry["data_offsets"]
  if (
    not isinstance(offsets, list) or len(offsets) != 2 or not all(map(lazy_tensor.is_size, offsets))
  ):
    raise Malformed(f"its header gives {lazy_tensor.spell(name)} offsets that are no offsets")
  dtype = lazy_tensor.DTYPES[_DTYPES[dtype]]
  needed = math.prod(shape) * dtype.itemsize
  if offsets[1] - offsets[0] != needed:
    raise Malformed(
      f"its header gives {lazy_tensor.spell(name)} bytes {offsets[0]} to {offsets[1]}, and"
      f" {dtype}{list(shape)} has {needed}; the file is damaged: download it again"
    )
  return dtype, shape, *offsets


def _check_extents(entries: dict[str, tuple], size: int) -> None:
  """Raises Malformed unless the tensors follow each other and fill `size` bytes."""
  end = 0
  for name, (*_, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
    if start != end:
      raise Malformed(
        f"its header puts {lazy_tensor.spell(name)} at byte {start}, and the tensor before ends at"
        f" {end}; the file is damaged: download it again"
      )
    end = stop
  if end != size:
    raise Malformed(
      f"its header describes {end} bytes of tensors and the file has {size}; it is truncated or"
      " damaged: copy or download it again"
    )
