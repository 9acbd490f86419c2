"""Every format opens lazily and reads exactly; what is damaged is refused in one line."""

import base64
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pickle_writer as writer
import pytest
import safetensors.numpy
from flax import serialization

from gptjax.checkpoint import lazy_tensor
from gptjax.checkpoint.tensors import TensorSource, open_tensors
from gptjax.errors import CheckpointError

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]
NANO_SORT = Path(__file__).parent.parent.parent / "shared/data/models/gpt_nano_sort"
# Indices a mesh, a layer stack or a doctor asks for; the last three are unusual.
INDICES = [
  *(None, (), 0, -1, 2, slice(1, 3), (slice(1, 3), slice(2, 5)), (slice(None), slice(4)), (0, 1)),
  *(..., (..., 1), (slice(None, None, -2), 3), (slice(3, 3),), (None, 1)),
]


def make_arrays():
  """Returns one array of each dtype and of each rank."""
  random = np.random.default_rng(0)
  arrays = {
    f"of.{name}": random.integers(0, 100, (4, 6)).astype(lazy_tensor.DTYPES[name])
    for name in DTYPES
  }
  arrays |= {"mask": np.tri(3, dtype=bool)[None, None], "scalar": np.array(2.5, np.float32)}
  return arrays | {"bias": random.standard_normal(5).astype("float32"), "empty": np.zeros((0, 3))}


def check_equal(source, arrays):
  assert list(source) == list(arrays) or set(source) == set(arrays)
  for name, expected in arrays.items():
    assert source[name].shape == expected.shape
    assert source[name].dtype == expected.dtype
    found = source[name].read()
    np.testing.assert_array_equal(found, expected, strict=True)
    assert found.flags.aligned


def write_safetensors(path, header, data):
  header = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(header)) + header + data)
  return path


def write_torch(path, arrays, legacy=False):
  items, storages = writer.state_dict(arrays, legacy)
  write = writer.write_legacy if legacy else writer.write_zip
  write(path, writer.pickle(writer.ordered_dict(**items)), storages)
  return path


def write_flax(path, tree):
  path.write_bytes(serialization.msgpack_serialize(tree))
  return path


def nested(arrays):
  return {"transformer": {"h": {"0": dict(arrays)}}}


def refusal(path):
  with pytest.raises(CheckpointError) as caught:
    open_tensors(path)
  message = str(caught.value)
  assert "\n" not in message
  assert len(message) < 600
  return message


def test_safetensors(tmp_path):
  arrays = make_arrays()
  safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
  source = open_tensors(tmp_path)
  check_equal(source, arrays)
  assert source.metadata == {"format": "pt"}
  assert source.format == "safetensors"
  assert source["bias"].where == "model.safetensors"
  assert source["of.bfloat16"].nbytes == 48


@pytest.mark.parametrize("legacy", [False, True])
def test_torch(legacy, tmp_path):
  arrays = make_arrays()
  write_torch(tmp_path / "pytorch_model.bin", arrays, legacy)
  source = open_tensors(tmp_path)
  check_equal(source, arrays)
  assert source.format == "torch"


def test_a_file_of_any_name_is_known_by_its_bytes(tmp_path):
  arrays = make_arrays()
  safetensors.numpy.save_file(arrays, tmp_path / "a.weights")
  check_equal(open_tensors(tmp_path / "a.weights"), arrays)
  for legacy in (False, True):
    check_equal(open_tensors(write_torch(tmp_path / f"b{legacy}", arrays, legacy)), arrays)
  found = open_tensors(write_flax(tmp_path / "c", {"w": arrays["bias"]}))
  check_equal(found, {"w": arrays["bias"]})


@pytest.mark.parametrize("length", [0x3C, 0x4B50, 0x0280, 0x2E80])
def test_the_length_of_a_header_may_spell_another_format(length, tmp_path):
  """They begin with "<", "PK", and the first bytes of a pickle."""
  header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
  path = write_safetensors(tmp_path / "weights", header.encode().ljust(length), b"\7")
  assert open_tensors(path)["w"].read() == 7


def test_flax(tmp_path):
  arrays = make_arrays() | {"weights": np.arange(24, dtype=ml_dtypes.bfloat16).reshape(4, 6)}
  del arrays["empty"]  # to_bytes makes a jax array of nothing else but this; see the next test
  write_flax(tmp_path / "flax_model.msgpack", nested(arrays) | {"step": 3})
  source = open_tensors(tmp_path)
  check_equal(source, {f"transformer/h/0/{name}": array for name, array in arrays.items()})
  assert source.metadata == {"step": 3}
  assert source.format == "flax"


def test_flax_arrays_of_jax_and_of_nothing(tmp_path):
  tree = {"w": jax.numpy.ones((2, 3), jax.numpy.bfloat16), "empty": np.zeros((0, 3))}
  source = open_tensors(write_flax(tmp_path / "x.msgpack", tree))
  check_equal(source, {name: np.asarray(array) for name, array in tree.items()})


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_a_chunked_array_is_read_in_part(index, tmp_path, monkeypatch):
  array = np.arange(24, dtype=np.float32).reshape(4, 6)
  monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 28)
  tensor = open_tensors(write_flax(tmp_path / "x.msgpack", {"w": array}))["w"]
  assert len(tensor.parts) == 4
  expected = array if index is None else array[index]
  np.testing.assert_array_equal(tensor.read(index), expected, strict=True)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_a_mapped_array_is_read_in_part(index, tmp_path):
  array = np.arange(24, dtype=ml_dtypes.bfloat16).reshape(4, 6)
  safetensors.numpy.save_file({"w": array}, tmp_path / "model.safetensors")
  found = open_tensors(tmp_path)["w"].read(index)
  np.testing.assert_array_equal(found, array if index is None else array[index], strict=True)


def test_nanogpt(tmp_path):
  arrays = {"transformer.wte.weight": np.eye(3, dtype=np.float32)}
  items, storages = writer.state_dict(arrays)
  loss = writer.tensor(writer.storage("9", "float32", 1), [], [])
  content = {
    "model": writer.ordered_dict(**{f"_orig_mod.{k}": v for k, v in items.items()}),
    "model_args": writer.plain_dict({"n_layer": writer.integer(2), "bias": b"\x89"}),
    "best_val_loss": loss,
    "config": writer.plain_dict(
      {"out_dir": writer.text("out"), "lr": b"G" + struct.pack(">d", 0.5)}
    ),
  }
  storages["9"] = (struct.pack("<f", 1.5), 1)
  writer.write_zip(tmp_path / "ckpt.pt", writer.pickle(writer.plain_dict(content)), storages)
  source = open_tensors(tmp_path)
  check_equal(source, arrays)
  assert source.metadata["model_args"] == {"n_layer": 2, "bias": False}
  assert source.metadata["config"] == {"out_dir": "out", "lr": 0.5}
  assert source.metadata["best_val_loss"].read() == 1.5


def write_gpt1(folder, num_layers=2, width=8):
  shapes = [[6, width], [10, width]]
  shapes += num_layers * [
    *([1, width, 3 * width], [3 * width], [1, width, width], [width], [width], [width]),
    *([1, width, 4 * width], [4 * width], [1, 4 * width, width], [width], [width], [width]),
  ]
  flat = np.arange(sum(int(np.prod(shape)) for shape in shapes), dtype=np.float32)
  for number, part in enumerate(np.array_split(flat, 10)):
    np.save(folder / f"params_{number}.npy", part)
  (folder / "params_shapes.json").write_text(json.dumps(shapes))
  return shapes, flat


def test_openai_gpt1(tmp_path):
  shapes, flat = write_gpt1(tmp_path)
  source = open_tensors(tmp_path)
  assert [list(tensor.shape) for tensor in source.values()] == shapes
  names = list(source)
  assert names[:4] == ["model/pe", "model/we", "model/h0/attn/c_attn/w", "model/h0/attn/c_attn/b"]
  assert names[-1] == "model/h1/ln_2/b"
  np.testing.assert_array_equal(np.concatenate([t.read().ravel() for t in source.values()]), flat)
  assert any("," in tensor.where for tensor in source.values())  # some span shards
  check_equal(
    open_tensors(tmp_path / "params_shapes.json"), {k: t.read() for k, t in source.items()}
  )


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda folder: (folder / "params_3.npy").unlink(), "params_3.npy is missing"),
    (lambda folder: (folder / "params_9.npy").unlink(), "one is missing"),
    (lambda folder: (folder / "params_2.npy").write_bytes(b"\x93NUMPY\x01\x00"), "params_2.npy"),
    (lambda folder: os.truncate(folder / "params_2.npy", 400), "truncated"),
    (lambda folder: np.save(folder / "params_2.npy", np.ones(3, object)), "params_2.npy"),
    (lambda folder: np.save(folder / "params_2.npy", np.ones(3)), "float32"),
    (lambda folder: (folder / "params_shapes.json").write_text("[[1], [2]]"), "2 shapes"),
    (lambda folder: (folder / "params_shapes.json").write_text("[[-1]]"), "shape"),
    (lambda folder: (folder / "params_shapes.json").write_text("{"), "JSON"),
  ],
)
def test_a_damaged_gpt1_is_refused(damage, message, tmp_path):
  write_gpt1(tmp_path)
  damage(tmp_path)
  assert message in refusal(tmp_path)


def test_mingpt(tmp_path):
  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  entry = {"shape": [2, 3], "dtype": "torch.float32"}
  content = {
    "config": {"n_layer": 3},
    "w": entry | {"data": base64.b64encode(array.tobytes()).decode()},
  }
  (tmp_path / "x-model.json").write_text(json.dumps(content))
  source = open_tensors(tmp_path)
  check_equal(source, {"w": array})
  assert source.metadata == {"config": {"n_layer": 3}}
  content["w"]["data"] = "AAAA"
  (tmp_path / "x-model.json").write_text(json.dumps(content))
  assert "'w' has 3 bytes" in refusal(tmp_path)


@pytest.mark.skipif(not NANO_SORT.exists(), reason="needs ../shared/data")
def test_the_trained_mingpt():
  source = open_tensors(NANO_SORT)
  assert source.metadata["config"]["n_layer"] == 3
  assert source["transformer.h.2.attn.c_attn.weight"].read().shape == (144, 48)
  assert np.isfinite(source["lm_head.weight"].read()).all()


WRITERS = {
  "model.safetensors": lambda path, arrays: safetensors.numpy.save_file(arrays, path),
  "pytorch_model.bin": write_torch,
  "flax_model.msgpack": write_flax,
}


def write_shards(folder, name, arrays):
  """Writes an index and two shards and returns their names."""
  stem, suffix = name.split(".")
  shards = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
  halves = [dict(list(arrays.items())[::2]), dict(list(arrays.items())[1::2])]
  for shard, half in zip(shards, halves, strict=True):
    WRITERS[name](folder / shard, half)
  weight_map = {k: shards[k not in halves[0]] for k in arrays}
  index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
  (folder / f"{name}.index.json").write_text(json.dumps(index))
  return shards


@pytest.mark.parametrize("name", WRITERS)
def test_shards(name, tmp_path):
  arrays = make_arrays()
  shards = write_shards(tmp_path, name, arrays)
  source = open_tensors(tmp_path)
  check_equal(source, arrays)
  assert source.metadata == {"total_size": 1}
  assert {tensor.where for tensor in source.values()} == set(shards)
  check_equal(open_tensors(tmp_path / f"{name}.index.json"), arrays)


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_shards_are_refused(name, tmp_path):
  arrays = make_arrays()
  first, second = write_shards(tmp_path, name, arrays)
  size = (tmp_path / first).stat().st_size
  os.truncate(tmp_path / first, size - 8)
  assert first in refusal(tmp_path)
  os.truncate(tmp_path / first, 0)
  assert "empty" in refusal(tmp_path)
  (tmp_path / first).unlink()
  assert f"the first is '{first}'" in refusal(tmp_path)
  (tmp_path / first).write_bytes((tmp_path / second).read_bytes())
  assert "does not hold 'of.float64'" in refusal(tmp_path)


@pytest.mark.parametrize("shard", ["../secret", "/etc/passwd", "a/b", "..", "a\\b", "", 5, None])
def test_an_index_names_files_beside_it_only(shard, tmp_path):
  index = {"weight_map": {"w": shard}}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  assert "no file beside it" in refusal(tmp_path)


def test_an_index_may_name_what_no_file_can_be_called(tmp_path):
  index = {"weight_map": {"w": "x" * 5000}}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  assert "cannot be read: File name too long" in refusal(tmp_path)
  index = {"weight_map": {"w": "\x1b[2Jx"}}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  assert "the first is '\\x1b[2Jx'" in refusal(tmp_path)


@pytest.mark.parametrize(
  "text", ["", "[]", "{}", '{"weight_map": {}}', "[" * 10**5, '{"a":1,"a":2}']
)
def test_a_damaged_index_is_refused(text, tmp_path):
  (tmp_path / "model.safetensors.index.json").write_text(text)
  assert "index.json" in refusal(tmp_path)


def test_safetensors_come_before_torch_and_flax(tmp_path):
  (tmp_path / "training_args.bin").write_bytes(b"x")
  found = []
  for name in reversed(WRITERS):
    WRITERS[name](tmp_path / name, {name.split("_")[0].split(".")[0]: np.ones(2, np.float32)})
    found += open_tensors(tmp_path)
  assert found == ["flax", "pytorch", "model"]


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
  assert "does not exist" in refusal(tmp_path / "nothing")
  (tmp_path / "config.json").write_text("{}")
  assert "there is config.json" in refusal(tmp_path)
  for name in ("a.bin", "b.bin"):
    write_torch(tmp_path / name, {"w": np.ones(2)})
  assert "2 files of weights" in refusal(tmp_path)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (b"<!DOCTYPE html><html>", "web page"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"GGUF\x03\x00\x00\x00", "GGUF"),
    (b"hello, this is no checkpoint", "neither"),
    (b"PK\x03\x04 and then nothing", "truncated"),
    (b"\x80\x02", "damaged or cut off"),
    (b"\x80\x02N.", "none that torch.save wrote"),
    (b"{}", "JSON without tensors"),
    (b"\x81", "ends within"),
  ],
)
def test_what_is_no_checkpoint_is_refused(data, message, tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(data)
  assert message in refusal(tmp_path)


def entry(start, stop, shape, dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
  ("header", "message"),
  [
    ({"a": entry(0, 24, [6])}, "describes 24 bytes"),
    ({"a": entry(0, 32, [7])}, "has 28"),
    ({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, "the tensor before ends at 16"),
    ({"a": entry(0, 8, [2]), "b": entry(16, 32, [4])}, "at byte 16"),
    ({"a": entry(8, 32, [6])}, "at byte 8"),
    ({"a": entry(0, 64, [16])}, "truncated"),
    ({"a": entry(16, 0, [4])}, "has 16"),
    ({"a": entry(-32, 0, [8])}, "no offsets"),
    ({"a": entry(0, 2**70, [8])}, "no offsets"),
    ({"a": entry(0, 32, [2**40, 0])}, "has 0"),
    ({"a": entry(0, 0, [2**40, 2**40, 0])}, "shape"),
    ({"a": entry(0, 32, [-2, -4])}, "shape"),
    ({"a": entry(0, 32, [True, 8])}, "shape"),
    ({"a": entry(0, 32, [8.0])}, "shape"),
    ({"a": entry(0, 32, [2**60])}, "shape"),
    ({"a": entry(0, 32, 8)}, "shape"),
    ({"a": entry(0, 32, [8], "F8_E4M3")}, "F8_E4M3"),
    ({"a": entry(0, 32, [8], ["F32"])}, "type list"),
    ({"a": {"dtype": "F32"}}, "without dtype, shape, offsets"),
    ({"a": 5}, "without dtype, shape, offsets"),
    ({"__metadata__": 5}, "__metadata__"),
    ([], "not a JSON object"),
    (b"not json", "JSON is damaged"),
    (b'{"a":' * 10**5, "JSON is damaged"),
    (b'{"a":' + b"9" * 10**5 + b"}", "JSON is damaged"),
    (b'{"a":1,"a":2}', "twice"),
  ],
)
def test_a_lying_header_is_refused(header, message, tmp_path):
  write_safetensors(tmp_path / "model.safetensors", header, bytes(32))
  assert message in refusal(tmp_path)


def test_the_lies_are_judged_against_a_true_header(tmp_path):
  write_safetensors(tmp_path / "model.safetensors", {"a": entry(0, 32, [8])}, bytes(32))
  assert open_tensors(tmp_path)["a"].shape == (8,)


@pytest.mark.parametrize("length", [0, 2, 10**3, 2**31, 2**63, 2**64 - 1])
def test_a_lying_header_length_is_refused(length, tmp_path):
  (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100))
  refused = refusal(tmp_path)
  assert "header" in refused or "JSON" in refused


def ext(payload, code=1):
  return b"\xc9" + struct.pack(">Ib", len(payload), code) + payload


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (b"\xdf\xff\xff\xff\xff", "ends within"),
    (b"\xdd\xff\xff\xff\xff", "ends within"),
    (b"\xc6\xff\xff\xff\xff", "ends within"),
    (b"\xdb\xff\xff\xff\xff", "a name of"),
    (b"\xc9\xff\xff\xff\xff\x01", "ends within"),
    (b"\x91" * 1000, "nested beyond reason"),
    (b"\xdd\x7f\xff\xff\xff" + b"\xc0" * 1_000_001, "million values"),
    (b"\xc1", "no msgpack"),
    (ext(b"\x90", code=5), "extension 5"),
    (ext(b"\x90"), "is damaged"),
    (ext(b"\x93\x91\x04\xa7float32\xc4\x04abcd"), "has 4 of 16 bytes"),
    (ext(b"\x93\x91\xff\xa7float32\xc4\x04abcd"), "shape"),
    (ext(b"\x93\x91\x01\xa6object\xc4\x08abcdabcd"), "'object'"),
    (ext(b"\x93\x91\x01\xa7float32\xa4abcd"), "no bytes"),
    (b"\x82\xa1a\x01\xa1a\x02", "comes twice"),
    (b"\x81\x01\x02", "no string"),
    (b"\xa1\xff", "UTF-8"),
    (b"\x81\xb9__msgpack_chunked_array__\xc3", "not numbered"),
    (b"\x01", "no arrays"),
    (b"\x01\x01", "not one dict"),
  ],
)
def test_a_damaged_msgpack_is_refused(value, message, tmp_path):
  (tmp_path / "flax_model.msgpack").write_bytes(b"\x81\xa1w" + value)
  assert message in refusal(tmp_path)


def test_two_paths_that_become_one_are_refused(tmp_path):
  one = np.ones(1, np.float32)
  write_flax(tmp_path / "flax_model.msgpack", {"a/b": one, "a": {"b": one}})
  assert "of one path" in refusal(tmp_path)


def rewrite_zip(path, change):
  """Writes a checkpoint again with `change` applied to (archive, member, data) of each member."""
  with zipfile.ZipFile(write_torch(path, {"w": np.arange(6.0)})) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  with zipfile.ZipFile(path, "w") as archive:
    for name, data in members.items():
      change(archive, name, data)
  return path


def write_renamed(archive, name, data):
  archive.writestr(name.replace("data/0", "data/../../0"), data)


def write_bomb(archive, name, data):
  if name.endswith("/0"):
    archive.writestr(name, bytes(10**7), zipfile.ZIP_DEFLATED)
  else:
    archive.writestr(name, data)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda a, name, data: a.writestr(name, data, zipfile.ZIP_DEFLATED), "compressed"),
    (write_bomb, "compressed"),
    (write_renamed, "not in the archive"),
    (lambda a, name, data: a.writestr(name.replace("data.pkl", "x.pkl"), data), "no data.pkl"),
    (lambda a, name, data: a.writestr("/" + name.split("/", 1)[1], data), "no data.pkl"),
    (lambda a, name, data: a.writestr(name, data.replace(b"little", b"big")), "little-endian"),
    (
      lambda a, name, data: a.writestr(name.replace("version", "constants.pkl"), data),
      "TorchScript",
    ),
    (lambda a, name, data: a.writestr(name, data[:47] if len(data) == 48 else data), "47 of 48"),
  ],
)
def test_a_damaged_zip_is_refused(change, message, tmp_path):
  assert message in refusal(rewrite_zip(tmp_path / "pytorch_model.bin", change))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_in_a_zip_is_refused(tmp_path):
  def twice(archive, name, data):
    archive.writestr(name, data)
    archive.writestr(name, data)

  assert "one name twice" in refusal(rewrite_zip(tmp_path / "pytorch_model.bin", twice))


def test_a_zip_directory_that_points_elsewhere_is_refused(tmp_path):
  path = write_torch(tmp_path / "pytorch_model.bin", {"w": np.arange(6.0)})
  data = path.read_bytes()
  entry_start = data.index(b"PK\x01\x02")
  path.write_bytes(data[: entry_start + 42] + struct.pack("<I", 7) + data[entry_start + 46 :])
  assert "not where the zip directory says" in refusal(path)


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack"])
def test_every_cut_and_every_flip_is_survived(name, tmp_path):
  """A damaged file is refused, or still describes its bytes; no other error, no crash."""
  path = tmp_path / name
  WRITERS[name](path, {"w": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)})
  whole, refused = path.read_bytes(), 0
  damaged = [whole[:stop] for stop in range(len(whole))]
  damaged += [
    whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :]
    for i in range(len(whole))
    for bit in (1, 64, 128)
  ]
  for data in damaged:
    path.write_bytes(data)
    try:
      for tensor in open_tensors(path).values():
        tensor.read()
    except CheckpointError:
      refused += 1
  assert len(whole) <= refused < len(damaged)


def test_shapes_have_to_be_sane():
  assert lazy_tensor.check_shape([2, 3]) == (2, 3)
  with pytest.raises(lazy_tensor.Malformed, match="larger than any file"):
    lazy_tensor.check_shape([1] * 33)


def test_the_source_is_a_read_only_mapping(tmp_path):
  source = open_tensors(write_torch(tmp_path / "x.bin", {"w": np.arange(6.0)}))
  assert isinstance(source, TensorSource)
  assert "w" in source and "v" not in source
  assert repr(source).startswith("TensorSource(1 tensors of ")
  with pytest.raises(TypeError):
    source["w"] = 1
  with pytest.raises(ValueError, match="read-only"):
    source["w"].read()[0] = 1


MEASURE = """
import re, sys
import numpy as np
from gptjax.checkpoint.tensors import open_tensors

def anonymous_bytes():
  return 1024 * int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1])

before, peak, total = anonymous_bytes(), 0, 0
source = open_tensors(sys.argv[1])
for tensor in source.values():
  array = tensor.read()
  total += array.sum()
  peak = max(peak, anonymous_bytes() - before)
  del array
arrays = [tensor.read().copy() for tensor in source.values()]
print(peak, anonymous_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", [*WRITERS, "legacy.bin", "params_shapes.json"])
def test_reading_takes_the_memory_of_one_tensor(name, tmp_path):
  """Of 40 MB in tensors of 4 MB."""
  arrays = {f"w{i}": np.full((512, 2048), i, np.float32) for i in range(10)}
  if name == "params_shapes.json":
    write_gpt1(tmp_path, num_layers=10, width=296)
    biggest, whole = 4 * 4 * 296**2, 4 * 12 * 296**2 * 10
  else:
    write = WRITERS.get(name, lambda path, arrays: write_torch(path, arrays, legacy=True))
    write(tmp_path / name, arrays)
    biggest, whole = arrays["w0"].nbytes, 10 * arrays["w0"].nbytes
  output = subprocess.run(
    [sys.executable, "-c", MEASURE, tmp_path / name], capture_output=True, text=True, check=True
  ).stdout
  peak, peak_of_copies = map(int, output.split())
  assert peak < biggest + 2e6  # the description and the allocator take 1 MB
  assert peak_of_copies > 0.9 * whole  # so the measure sees memory


@pytest.mark.hf
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_torch_itself_saves(protocol, is_zip, tmp_path):
  import torch

  weights = torch.nn.Linear(3, 4)
  content = weights.state_dict()
  content |= {
    "tie": content["weight"],
    "transposed": content["weight"].t(),
    "row": content["weight"][1],
  }
  content |= {
    "parameter": weights.bias,
    "half": torch.arange(5).half(),
    "brain": torch.ones(2).bfloat16(),
  }
  content |= {
    "mask": torch.ones(1, 1, 3, 3).tril().bool(),
    "positions": torch.arange(5).expand(1, -1),
  }
  torch.save(
    content,
    tmp_path / "x.bin",
    _use_new_zipfile_serialization=is_zip,
    pickle_protocol=protocol,
  )
  source = open_tensors(tmp_path / "x.bin")
  assert set(source) == set(content)
  for name, tensor in content.items():
    assert str(source[name].dtype) == str(tensor.dtype).removeprefix("torch.")
    expected = tensor.detach().float().numpy()
    np.testing.assert_array_equal(source[name].read().astype(np.float32), expected, strict=True)


@pytest.mark.hf
def test_what_a_trainer_saves_with_torch(tmp_path):
  import torch

  model = torch.nn.Linear(3, 4)
  optimizer = torch.optim.AdamW(model.parameters())
  model(torch.ones(3)).sum().backward()
  optimizer.step()
  content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": 7}
  torch.save(content, tmp_path / "ckpt.pt")
  source = open_tensors(tmp_path)
  assert set(source) == {"weight", "bias"}
  assert source.metadata["iter_num"] == 7
  moment = source.metadata["optimizer"]["state"][0]["exp_avg"].read()
  np.testing.assert_array_equal(moment, optimizer.state[model.weight]["exp_avg"].numpy())
  torch.save(model, tmp_path / "whole.bin")
  assert "'torch.nn.modules.linear.Linear'" in refusal(tmp_path / "whole.bin")
