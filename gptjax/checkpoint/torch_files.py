"""Reads what torch.save wrote, without torch: the zip files since 1.6 and the plain ones before.

Both are a pickle that describes tensors as strided windows on numbered storages, and the bytes of
the storages. Nothing is unpacked or run; each storage is a view of the mapped file.

Source: torch/serialization.py, torch/_utils.py (layout and the arguments of the rebuilding calls).
"""

import dataclasses
import io
import math
import mmap
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checkpoint import lazy_tensor, unpickle
from gptjax.checkpoint.lazy_tensor import LazyTensor, Malformed

_STORAGES = {
  **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16"},
  **{"BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32"},
  **{"ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8"},
  "BoolStorage": "bool",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED_FLAG, _UTF8_FLAG = 0x1, 0x800
_MAX_DIRECTORY_BYTES = 16 * 2**20  # some 200,000 members
# Where trainers put the weights beside other things; nanoGPT says "model".
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_COMPILED_PREFIX = "_orig_mod."  # of torch.compile
_MAX_METADATA_VALUES = 100_000
_MAX_METADATA_DEPTH = 20


@dataclasses.dataclass(frozen=True)
class _Storage:
  key: str
  dtype: np.dtype
  size: int  # in elements


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A window on a storage: element (i, j) is at offset + i * strides[0] + j * strides[1]."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def read_torch_zip(path: Path, buffer: mmap.mmap) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
  """Returns the tensors and the plain values beside them.

  Raises:
    Malformed: no archive of torch.save, truncated, compressed, or its pickle is refused.
  """
  members = _find_members(path, buffer)
  pickles = [name for name in members if re.fullmatch("[^/]+/data.pkl", name)]
  if len(pickles) != 1:
    raise Malformed("it is a zip file with no data.pkl of torch.save in it")
  prefix = pickles[0].removesuffix("data.pkl")
  if f"{prefix}constants.pkl" in members:
    raise Malformed("it is a TorchScript program; save the state_dict() of the model instead")
  start, stop = members.get(f"{prefix}byteorder", (0, 0))  # since torch 2.1
  if buffer[start:stop] not in (b"", b"little"):
    raise Malformed("its numbers are not little-endian")
  storages: dict[str, _Storage] = {}
  start, stop = members[pickles[0]]
  stream = unpickle.PickleStream(buffer, start, stop)
  content = unpickle.unpickle(stream, _ALLOWED, _storage_loader(storages))

  def locate(storage: _Storage) -> np.ndarray:
    extent = members.get(f"{prefix}data/{storage.key}")
    if extent is None:
      raise Malformed(f"storage {lazy_tensor.spell(storage.key)} is not in the archive")
    return _map_storage(buffer, storage, *extent)

  return _collect(content, {key: locate(storage) for key, storage in storages.items()}, path.name)


def read_torch_legacy(
  path: Path, buffer: mmap.mmap
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
  """Returns what `read_torch_zip` does, of a file of torch before 1.6.

  It is five pickles (a magic number, a version, the machine's sizes, the content, the keys of the
  storages in order), then each storage as its number of elements in 8 bytes and its bytes.
  """
  stream = unpickle.PickleStream(buffer)
  if unpickle.unpickle(stream, {}) != _LEGACY_MAGIC:
    raise Malformed("it is a pickle, but none that torch.save wrote")
  if unpickle.unpickle(stream, {}) != _LEGACY_VERSION:
    raise Malformed(f"it is of another version than {_LEGACY_VERSION} of torch's old format")
  machine = unpickle.unpickle(stream, {})
  if not isinstance(machine, dict) or machine.get("little_endian") is not True:
    raise Malformed("its numbers are not little-endian")
  storages: dict[str, _Storage] = {}
  content = unpickle.unpickle(stream, _ALLOWED, _storage_loader(storages))
  keys = unpickle.unpickle(stream, {})
  if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
    raise Malformed("the list of its storages is damaged")
  if sorted(keys) != sorted(storages):
    raise Malformed("it lists other storages than its tensors use; download it again")
  arrays = _map_in_a_row(buffer, [storages[key] for key in keys], stream.tell())
  return _collect(content, arrays, path.name)


def _map_in_a_row(buffer: mmap.mmap, storages: list[_Storage], place: int) -> dict[str, np.ndarray]:
  """Maps the storages of an old file, which begin at byte `place`."""
  arrays = {}
  for storage in storages:
    start = place + 8
    if int.from_bytes(buffer[place:start], "little") != storage.size:
      raise Malformed(
        f"storage {lazy_tensor.spell(storage.key)} should begin at byte {place} of {len(buffer)};"
        " the file is truncated or damaged: copy or download it again"
      )
    place = min(start + storage.size * storage.dtype.itemsize, len(buffer))
    arrays[storage.key] = _map_storage(buffer, storage, start, place)
  return arrays


def _find_members(path: Path, buffer: mmap.mmap) -> dict[str, tuple[int, int]]:
  """Returns {name: (first byte, byte after the last)} of a zip file's members."""
  try:
    with _CautiousFile(path) as file, zipfile.ZipFile(file) as archive:
      entries = archive.infolist()
  except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
    raise Malformed(
      f"it begins as a zip file and its directory is missing or damaged ({type(error).__name__});"
      " it is probably truncated: copy or download it again"
    ) from error
  members = {entry.filename: _locate_member(buffer, entry) for entry in entries}
  if len(members) < len(entries):
    raise Malformed("it is a zip file that holds one name twice")
  return members


class _CautiousFile(io.FileIO):
  """A file that refuses to give a zip directory of absurd size in one piece."""

  def read(self, size: int = -1) -> bytes:
    found = super().read(size if 0 <= size <= _MAX_DIRECTORY_BYTES else _MAX_DIRECTORY_BYTES + 1)
    if len(found) > _MAX_DIRECTORY_BYTES:
      raise Malformed(f"its zip directory has more than {_MAX_DIRECTORY_BYTES} bytes")
    return found


def _locate_member(buffer: mmap.mmap, entry: zipfile.ZipInfo) -> tuple[int, int]:
  """Finds a member's bytes behind its local header, which must agree with the directory."""
  name = lazy_tensor.spell(entry.filename)
  if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
    raise Malformed(f"its member {name} is compressed, which torch.save never does; unzip and save")
  if entry.flag_bits & _ENCRYPTED_FLAG:
    raise Malformed(f"its member {name} is encrypted")
  if entry.header_offset < 0:
    raise Malformed(f"its member {name} begins before the file")
  header = buffer[entry.header_offset : entry.header_offset + _LOCAL_HEADER_BYTES]
  name_bytes = int.from_bytes(header[26:28], "little")
  start = entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes
  stored_name = buffer[start - name_bytes : start]
  start += int.from_bytes(header[28:30], "little")
  encoding = "utf-8" if entry.flag_bits & _UTF8_FLAG else "cp437"
  if header[:4] != b"PK\x03\x04" or stored_name != entry.orig_filename.encode(encoding):
    raise Malformed(f"its member {name} is not where the zip directory says")
  if start + entry.file_size > len(buffer):
    raise Malformed(f"its member {name} ends beyond the file, which is truncated")
  return start, start + entry.file_size


def _storage_loader(storages: dict[str, _Storage]) -> Callable[[Any], _Storage]:
  """Returns what turns persistent ids into storages and collects them by key."""

  def load(identity: Any) -> _Storage:
    # a zip's identity has five items; an old file's sixth is a view, unused since torch 0.4
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
      raise Malformed("its pickle refers to something that is no storage")
    kind, key, _, size = identity[1:5]
    name = (unpickle.global_name(kind) or "").removeprefix("torch.")
    if name not in _STORAGES or identity[5:] not in ((), (None,)):
      raise Malformed("its pickle refers to a storage of a kind that is not read")
    if not isinstance(key, str) or not lazy_tensor.is_size(size):
      raise Malformed("its pickle refers to a storage without a key or a size")
    storage = _Storage(key, lazy_tensor.DTYPES[_STORAGES[name]], size)
    if storages.setdefault(key, storage) != storage:
      raise Malformed(f"its pickle gives storage {lazy_tensor.spell(key)} two types or sizes")
    return storage

  return load


def _map_storage(buffer: mmap.mmap, storage: _Storage, start: int, stop: int) -> np.ndarray:
  needed = storage.size * storage.dtype.itemsize
  if stop - start != needed:
    raise Malformed(
      f"storage {lazy_tensor.spell(storage.key)} has {max(stop - start, 0)} of {needed} bytes; the"
      " file is truncated or damaged: copy or download it again"
    )
  return lazy_tensor.map_array(buffer, storage.dtype, (storage.size,), start)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_unused: Any) -> _Tensor:
  """Checks a window: every element in the storage, and no more elements than it has."""
  if not isinstance(storage, _Storage) or type(shape) is not tuple or type(strides) is not tuple:
    raise Malformed("its pickle builds a tensor from something that is no storage")
  shape = lazy_tensor.check_shape(shape)
  if len(shape) != len(strides) or not all(map(lazy_tensor.is_size, (offset, *strides))):
    raise Malformed("its pickle gives a tensor strides or an offset that are none")
  last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
  if math.prod(shape) and (last >= storage.size or math.prod(shape) > storage.size):
    raise Malformed(
      f"its pickle describes a tensor {list(shape)} that reaches beyond its storage of"
      f" {storage.size} elements"
    )
  return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_unused: Any) -> _Tensor:
  if not isinstance(tensor, _Tensor):
    raise Malformed("its pickle makes a parameter of something that is no tensor")
  return tensor


def _rebuild_dict(pairs: Any = None) -> dict[Any, Any]:
  """Takes the pairs out of the list Python 2 wrote, so that one list cannot fill many dicts."""
  if pairs is None:
    return {}
  if type(pairs) is not list:
    raise Malformed("its pickle makes a dict of something that is no list")
  found = dict(unpickle.checked_pairs(pairs))
  pairs.clear()
  return found


def _refuse_call(*_unused: Any) -> Any:
  raise Malformed("its pickle calls a type of storage")


_ALLOWED = {
  "collections.OrderedDict": _rebuild_dict,
  "torch.Size": lambda sizes: lazy_tensor.check_shape(sizes),
  "torch._utils._rebuild_tensor": _rebuild_tensor,
  "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
  "torch._utils._rebuild_parameter": _rebuild_parameter,
  **{f"torch.{name}": _refuse_call for name in _STORAGES},
}


def _collect(
  content: Any, arrays: dict[str, np.ndarray], where: str
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
  """Separates the named tensors from the rest, in a state dict or a trainer's checkpoint."""
  if type(content) is not dict:
    raise Malformed("it holds no dict of tensors; save the state_dict() of the model")
  wrapper = next((name for name in _WRAPPERS if type(content.get(name)) is dict), None)
  named = content if wrapper is None else content[wrapper]
  rest = {} if wrapper is None else {k: v for k, v in content.items() if k != wrapper}
  tensors = {}
  for name, value in named.items():
    if isinstance(value, _Tensor):
      tensors[str(name).removeprefix(_COMPILED_PREFIX)] = _as_lazy(value, arrays, where)
    else:
      rest[name] = value
  if not tensors:
    raise Malformed("it holds no named tensors; save the state_dict() of the model")
  count = sum(isinstance(value, _Tensor) for value in named.values())
  if len(tensors) < count:
    raise Malformed(f'it holds one name twice, with and without "{_COMPILED_PREFIX}"')
  return tensors, _Plain(arrays, where).copy(rest)


def _as_lazy(tensor: _Tensor, arrays: dict[str, np.ndarray], where: str) -> LazyTensor:
  window = np.lib.stride_tricks.as_strided(
    arrays[tensor.storage.key][tensor.offset :],
    tensor.shape,
    [stride * tensor.storage.dtype.itemsize for stride in tensor.strides],
    writeable=False,
  )
  return LazyTensor(tensor.shape, window.dtype, where, (window,))


class _Plain:
  """Copies metadata, with a limit: a pickle of a kilobyte can describe a tree without end."""

  def __init__(self, arrays: dict[str, np.ndarray], where: str):
    self._arrays = arrays
    self._where = where
    self._left = _MAX_METADATA_VALUES

  def copy(self, value: Any, depth: int = 0) -> Any:
    """Returns plain values, with a LazyTensor for each tensor (an optimizer's, a loss)."""
    self._left -= 1
    if self._left < 0 or depth > _MAX_METADATA_DEPTH:
      raise Malformed("what it holds besides the weights is nested beyond reason")
    if type(value) is dict:
      return {key: self.copy(item, depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
      return type(value)(self.copy(item, depth + 1) for item in value)
    if isinstance(value, _Tensor):
      return _as_lazy(value, self._arrays, self._where)
    if isinstance(value, str | int | float | bytes | None):
      return value
    raise Malformed("it holds a storage or a type where only plain values can be")
