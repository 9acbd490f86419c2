"""Pickles build plain values and tensors; everything else is refused and nothing is run."""

import pickle as python_pickle
import struct
import time

import numpy as np
import pickle_writer as writer
import pytest
from pickle_writer import call, global_name, integer, pickle, text, tuple_of

from gptjax.checkpoint import unpickle
from gptjax.checkpoint.tensors import open_tensors
from gptjax.errors import CheckpointError

ONE = writer.tensor(writer.storage("0", "float32", 1), [1], [1])
ONE_STORAGE = {"0": (b"\0\0\x80\x3f", 1)}
ORDERED_DICT = global_name("collections", "OrderedDict")


def stack_global(module, name):
  return text(module) + text(name) + b"\x93"


def attacks(command):
  """Returns {name: pickled content} of which Python's own unpickler would run several."""
  run = call(global_name("os", "system"), text(command))
  evaluate = text(f"__import__('os').system({command!r})")
  rebuild = global_name("torch._utils", "_rebuild_tensor_v2")
  return {
    "os.system": run,
    "posix.system": call(global_name("posix", "system"), text(command)),
    "eval": call(global_name("builtins", "eval"), evaluate),
    "python 2 eval": call(global_name("__builtin__", "eval"), evaluate),
    "exec by STACK_GLOBAL": stack_global("builtins", "exec") + tuple_of(evaluate) + b"R",
    "subprocess": call(global_name("subprocess", "getoutput"), text(command)),
    "inside a state dict": writer.plain_dict({"w": ONE, "x": run}),
    "as an argument": call(ORDERED_DICT, run),
    "INST": b"(" + text(command) + b"ios\nsystem\n",
    "OBJ": b"(" + global_name("os", "system") + text(command) + b"o",
    "NEWOBJ": global_name("subprocess", "Popen") + tuple_of(text(command)) + b"\x81",
    "NEWOBJ_EX": global_name("subprocess", "Popen") + tuple_of(text(command)) + b"}\x92",
    "extension registry": b"\x82\x01" + tuple_of(text(command)) + b"R",
    "torch.hub.load": call(global_name("torch.hub", "load"), text("a/b"), text("c")),
    "torch.load": call(global_name("torch", "load"), text("other.bin")),
    "dotted name": stack_global("torch._utils", "_rebuild_tensor_v2.__globals__"),
    "a name with a backslash": global_name("o\\s", "system"),
    "dotted module": stack_global("collections.OrderedDict", "__init__"),
    "getattr": call(global_name("builtins", "getattr"), ORDERED_DICT, text("__init__")),
    "call of a result": call(ORDERED_DICT) + tuple_of(text(command)) + b"R",
    "call of a string": text("os.system") + tuple_of(text(command)) + b"R",
    "call of a storage type": call(global_name("torch", "FloatStorage"), integer(10**9)),
    "state of a class": ORDERED_DICT + writer.plain_dict({"__setstate__": run}) + b"b",
    "state of our function": rebuild
    + tuple_of(b"N", b"}" + text("__code__") + text("") + b"s")
    + b"b",
    "state of a tensor": ONE + writer.plain_dict({"shape": text("x")}) + b"b",
    "__setstate__": global_name("os", "_wrap_close") + b")\x81" + text(command) + b"b",
    "persistent id that is a string": text("storage") + b"Q",
    "persistent module": tuple_of(text("module"), *[text("x")] * 4) + b"Q",
    "persistent id of a class": tuple_of(
      text("storage"), global_name("collections", "OrderedDict"), text("0"), text("cpu"), integer(1)
    )
    + b"Q",
    "buffer from outside": b"\x97",
    "a set of tuples": b"\x8f(" + tuple_of(integer(1)) + b"\x90",
  }


def bombs():
  """Returns {name: pickled content} that asks for memory, time or stack without end."""
  doubling = b"]q\x00" + b"".join(
    b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)
  )
  many_pairs = b"](" + b"".join(text(f"k{i}") + b"N\x86" for i in range(20_000)) + b"eq\x01"
  return {
    "huge BINBYTES8": b"\x8e" + struct.pack("<Q", 2**62),
    "huge BINUNICODE8": b"\x8d" + struct.pack("<Q", 2**62),
    "huge BINUNICODE": b"X" + struct.pack("<I", 2**32 - 1),
    "huge LONG4": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "negative LONG4": b"\x8b" + struct.pack("<i", -1),
    "huge frame": b"\x95" + struct.pack("<Q", 2**63) + b"N",
    "huge memo": b"N" + b"r" + struct.pack("<I", 2**32 - 1),
    "deep tuple": b")" + b"\x85" * 200_000,
    "deep tuple as key": b"})" + b"\x85" * 200_000 + b"Ns",
    "deep list": b"]" * 100_000 + b"a" * 99_999,
    "many marks": b"(" * 2000,
    "one list in many dicts": ORDERED_DICT
    + b"q\x00"
    + many_pairs
    + b"("
    + b"h\x00h\x01\x85R" * 50_000
    + b"t",
    "doubling": writer.plain_dict({"w": ONE, "x": doubling}),
    "contains itself": b"}q\x00" + text("w") + ONE + b"s" + text("x") + b"h\x00s",
  }


def built(shape, strides, offset=0, size=6):
  """Returns the items of a state dict with one window on a storage."""
  return {"w": writer.tensor(writer.storage("0", "float32", size), shape, strides, offset)}


def damages():
  """Returns {name: items of a state dict} that contradict a storage "0" of six floats."""
  return {
    "beyond the end": built([2, 4], [4, 1]),
    "offset beyond the end": built([2, 3], [3, 1], offset=1),
    "stride beyond the end": built([2, 3], [4, 1]),
    "negative stride": built([2], [-1], offset=3),
    "negative offset": built([2], [1], offset=-1),
    "negative size": built([-1], [1]),
    "expanded without end": built([2**40], [0]),
    "overlapping": built([6, 2], [1, 0]),
    "huge size": built([2**60], [1]),
    "wrapping product": built([2**32, 2**32], [0, 0]),
    "other rank": built([6], [1, 1]),
    "storage larger than its bytes": built([6], [1], size=7),
    "storage smaller than its bytes": built([5], [1], size=5),
    "empty and huge": built([2**40, 2**40, 0], [0, 0, 0]),
    "huge storage": built([6], [1], size=2**60),
    "negative storage": built([0], [1], size=-6),
    "storage that is not there": {
      "w": writer.tensor(writer.storage("../0", "float32", 6), [6], [1])
    },
    "storage of two types": built([6], [1])
    | {"x": writer.tensor(writer.storage("0", "int32", 6), [6], [1])},
  }


@pytest.fixture(params=["zip", "legacy"])
def write(request, tmp_path):
  """Returns a function that writes a pickle and storages as one file of either format."""

  def written(pickled, storages=ONE_STORAGE):
    path = tmp_path / "pytorch_model.bin"
    writers = {"zip": writer.write_zip, "legacy": writer.write_legacy}
    writers[request.param](path, pickled, storages)
    return path

  written.legacy = request.param == "legacy"
  return written


def for_format(write, content):
  """Gives the storages of pickled content the sixth item they have in the old format."""
  return content.replace(b"tQ", b"NtQ") if write.legacy else content


def write_six(write, items):
  """Writes a state dict on one storage of the floats 0 to 5."""
  data = np.arange(6, dtype=np.float32).tobytes()
  return write(for_format(write, pickle(writer.plain_dict(items))), {"0": (data, 6)})


def refusal(path):
  with pytest.raises(CheckpointError) as caught:
    open_tensors(path)
  message = str(caught.value)
  assert "\n" not in message
  assert "pytorch_model.bin" in message
  assert len(message) < 500
  return message


@pytest.mark.parametrize("name", attacks(""))
def test_an_attack_is_refused_and_not_run(name, write, tmp_path):
  marker = tmp_path / "marker"
  assert "pickle" in refusal(write(pickle(attacks(f"touch {marker}")[name])))
  assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "exec by STACK_GLOBAL", "INST", "OBJ"])
def test_the_attacks_are_real(name, tmp_path):
  marker = tmp_path / "marker"
  python_pickle.loads(pickle(attacks(f"touch {marker}")[name]))
  assert marker.exists()


def test_the_global_is_named_without_its_control_characters(write):
  assert "'os.system'" in refusal(write(pickle(attacks("true")["os.system"])))
  message = refusal(write(pickle(stack_global("a\n\x1b[2J", "b" * 10_000))))
  assert "\x1b" not in message


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_soon(name, write):
  path = write(pickle(bombs()[name]))
  started = time.monotonic()
  refusal(path)
  assert time.monotonic() - started < 30  # some 2 s; without limits, for ever


@pytest.mark.parametrize("name", damages())
def test_a_tensor_that_does_not_fit_its_storage_is_refused(name, write):
  message = refusal(write_six(write, damages()[name]))
  is_absent = write.legacy and name == "storage that is not there"
  assert ("lists other storages" in message) == is_absent


@pytest.mark.parametrize(
  ("shape", "strides", "offset", "expected"),
  [
    ([2, 3], [3, 1], 0, [[0, 1, 2], [3, 4, 5]]),
    ([3, 2], [1, 3], 0, [[0, 3], [1, 4], [2, 5]]),
    ([2, 2], [3, 1], 1, [[1, 2], [4, 5]]),
    ([1, 6], [0, 1], 0, [[0, 1, 2, 3, 4, 5]]),
    ([], [], 5, 5),
    ([0, 3], [3, 1], 0, np.zeros((0, 3))),
    ([2, 2], [1, 1], 0, [[0, 1], [1, 2]]),
  ],
)
def test_a_window_on_a_storage_is_read(shape, strides, offset, expected, write):
  found = open_tensors(write_six(write, built(shape, strides, offset)))["w"].read()
  np.testing.assert_array_equal(found, np.asarray(expected, np.float32), strict=True)


@pytest.mark.parametrize("step", [1, 7])
def test_every_cut_and_every_flip_is_survived(step, write, tmp_path):
  """A damaged description is refused, or happens to describe something else; no other error."""
  whole = write(pickle(writer.ordered_dict(w=ONE, n=integer(300)))).read_bytes()
  path, refused = tmp_path / "pytorch_model.bin", 0
  damaged = [whole[:stop] for stop in range(0, len(whole), step)]
  damaged += [
    whole[:place] + bytes([whole[place] ^ step]) + whole[place + 1 :] for place in range(len(whole))
  ]
  for data in damaged:
    path.write_bytes(data)
    try:
      for tensor in open_tensors(path).values():
        tensor.read()
    except CheckpointError:
      refused += 1
  assert refused > len(whole) // step


def test_only_protocols_of_torch_are_read(write):
  assert "protocol" in refusal(write(b"\x80\x07N."))
  assert "no dict of tensors" in refusal(write(pickle(integer(5)), {}))
  assert "no named tensors" in refusal(write(pickle(writer.plain_dict({"a": integer(5)})), {}))


def test_the_number_of_instructions_is_limited(write, monkeypatch):
  content = writer.plain_dict({"w": ONE, "x": b"(" + b"N" * 5000 + b"t"})
  path = write(pickle(for_format(write, content)))
  assert len(open_tensors(path).metadata["x"]) == 5000
  monkeypatch.setattr(unpickle, "_MAX_INSTRUCTIONS", 5000)
  assert "5000 instructions" in refusal(path)
