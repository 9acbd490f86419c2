"""Writes files of torch.save byte by byte, without torch and without Python's pickle module.

Pickles are bytes put together from instructions, so the tests can also write what no honest
program would.
"""

import struct
import zipfile

STORAGE_OF = {
  **{"float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage"},
  **{"bfloat16": "BFloat16Storage", "int64": "LongStorage", "int32": "IntStorage"},
  **{"int16": "ShortStorage", "int8": "CharStorage", "uint8": "ByteStorage"},
  "bool": "BoolStorage",
}
MAGIC = 0x1950A86A20F9469CFC6C


def text(value):
  data = value.encode()
  return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
  if 0 <= value < 256:
    return b"K" + bytes([value])
  data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
  return b"\x8a" + bytes([len(data)]) + data


def global_name(module, name):
  return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def tuple_of(*items):
  return b"(" + b"".join(items) + b"t"


def call(function, *arguments):
  return function + tuple_of(*arguments) + b"R"


def ordered_dict(**items):
  pairs = b"".join(text(key) + value for key, value in items.items())
  return call(global_name("collections", "OrderedDict")) + b"(" + pairs + b"u"


def plain_dict(items):
  return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def pickle(content):
  return b"\x80\x02" + content + b"."


def storage(key, dtype, size, legacy=False):
  items = [text("storage"), global_name("torch", STORAGE_OF[dtype]), text(key), text("cpu")]
  return tuple_of(*items, integer(size), *([b"N"] if legacy else [])) + b"Q"


def tensor(storage_id, shape, strides, offset=0):
  shape, strides = (tuple_of(*map(integer, sizes)) for sizes in (shape, strides))
  rebuild = global_name("torch._utils", "_rebuild_tensor_v2")
  return call(rebuild, storage_id, integer(offset), shape, strides, b"\x89", ordered_dict())


def state_dict(arrays, legacy=False):
  """Returns the pickled items {name: tensor} of C-contiguous arrays, and {key: bytes}."""
  items, storages = {}, {}
  for number, (name, array) in enumerate(arrays.items()):
    strides = [stride // array.itemsize for stride in array.strides]
    identity = storage(str(number), array.dtype.name, array.size, legacy)
    items[name] = tensor(identity, array.shape, strides)
    storages[str(number)] = (array.tobytes(), array.size)
  return items, storages


def write_zip(path, pickled, storages, prefix="archive"):
  """Writes the format of torch 1.6 and newer."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(f"{prefix}/data.pkl", pickled)
    archive.writestr(f"{prefix}/byteorder", "little")
    for key, (data, _) in storages.items():
      archive.writestr(f"{prefix}/data/{key}", data)
    archive.writestr(f"{prefix}/version", "3\n")


def write_legacy(path, pickled, storages):
  """Writes the format of torch before 1.6."""
  keys = b"](" + b"".join(text(key) for key in sorted(storages)) + b"e"
  sizes = plain_dict({"protocol_version": integer(1001), "little_endian": b"\x88"})
  head = pickle(integer(MAGIC)) + pickle(integer(1001)) + pickle(sizes) + pickled + pickle(keys)
  tail = b"".join(struct.pack("<q", size) + data for _, (data, size) in sorted(storages.items()))
  path.write_bytes(head + tail)
