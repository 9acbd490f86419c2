"""Token files: what is built, when, how it is split, and that nothing half-built is ever used."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gptjax.data import building, encoding, prepare, token_files
from gptjax.data.config import CorpusConfig, DataConfig
from gptjax.data.token_files import TokenFiles, find_shard, read_manifest, slice_shards
from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.errors import ConfigError, DataError

WORDS = "the quick brown fox jumps over the lazy dog\n"


def prepare_data(tmp_path, **keys):
  keys = {"cache_dir": str(tmp_path / "cache"), "vocab_size": 280, **keys}
  return prepare.prepare_data(DataConfig(**keys), report=lambda line: None)


def text_of(prepared, split):
  tokens = prepared.corpora["corpus"][("train", "valid").index(split)]
  return prepared.tokenizer.decode(tokens.read(0, tokens.num_tokens))


def write_jsonl(path, count):
  path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(count)))
  return str(path)


@pytest.fixture
def text_file(tmp_path):
  file = tmp_path / "a.txt"
  file.write_text(WORDS * 40)
  return str(file)


def test_one_document_is_split_as_nanogpt_splits(tmp_path, text_file):
  prepared = prepare_data(tmp_path, files=(text_file,), tokenizer="char", end_token="")
  data = WORDS * 40
  assert text_of(prepared, "train") == data[: int(len(data) * 0.9)]
  assert text_of(prepared, "valid") == data[int(len(data) * 0.9) :]
  assert prepared.bytes_per_token == 1


def test_a_single_record_is_split_too(tmp_path):
  file = write_jsonl(tmp_path / "a.jsonl", 1)
  prepared = prepare_data(tmp_path, files=(file,), valid_fraction=0.5)
  assert text_of(prepared, "train") == "docum"
  assert text_of(prepared, "valid") == "ent 0<|endoftext|>"


def test_held_out_files_are_whole_documents_with_end_tokens(tmp_path):
  for name in "abc":
    (tmp_path / f"{name}.txt").write_text(f"text {name}\n")
  prepared = prepare_data(
    tmp_path, files=(f"{tmp_path}/*.txt",), valid_files=(f"{tmp_path}/b.txt",)
  )
  assert text_of(prepared, "train") == "text a\n<|endoftext|>text c\n<|endoftext|>"
  assert text_of(prepared, "valid") == "text b\n<|endoftext|>"
  train, _ = prepared.corpora["corpus"]
  starts = train.document_starts
  assert starts[0] == 0
  assert starts[-1] == train.num_tokens
  assert train.read(*starts[1:])[-1] == prepared.tokenizer.end_id


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.1), (3, 0.9), (30, 0.1), (500, 0.1)])
def test_documents_are_drawn_whole_and_always_some(tmp_path, count, fraction):
  file = write_jsonl(tmp_path / "a.jsonl", count)
  prepared = prepare_data(tmp_path, files=(file,), valid_fraction=fraction)
  train, valid = prepared.corpora["corpus"]
  assert train.num_documents + valid.num_documents == count
  expected = min(max(count * fraction, 1), count - 1)
  # A draw of 500 documents varies by its binomial deviation; 4 of them is a chance of 1e-4.
  assert abs(valid.num_documents - expected) <= 4 * math.sqrt(count * fraction * (1 - fraction))
  both = text_of(prepared, "train") + text_of(prepared, "valid")
  assert sorted(both.split("<|endoftext|>")[:-1]) == sorted(f"document {i}" for i in range(count))


def test_no_validation_when_the_fraction_is_zero(tmp_path, text_file):
  prepared = prepare_data(tmp_path, files=(text_file,), valid_fraction=0)
  assert prepared.valid_tokens == 0
  assert prepared.bytes_per_token > 1


def test_bytes_per_token_counts_every_target_and_nothing_else(tmp_path):
  (tmp_path / "a.txt").write_text(WORDS * 9)
  (tmp_path / "b.txt").write_text("日本語 the fox")
  prepared = prepare_data(
    tmp_path, files=(f"{tmp_path}/a.txt",), valid_files=(f"{tmp_path}/b.txt",)
  )
  ids = prepared.tokenizer.encode("日本語 the fox")
  num_bytes = len("日本語 the fox".encode()) - prepared.tokenizer.bytes_of_token[ids[0]]
  assert prepared.bytes_per_token == num_bytes / len(ids)  # the end token is a target too


def test_only_changed_inputs_are_built_again(tmp_path, text_file, monkeypatch):
  built = []
  write = prepare._write_tokens
  monkeypatch.setattr(prepare, "_write_tokens", lambda *args: built.append(1) or write(*args))
  first = prepare_data(tmp_path, files=(text_file,))
  os.utime(text_file)
  again = prepare_data(tmp_path, files=(text_file,))
  assert len(built) == 1
  assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
  status = os.stat(text_file)
  with open(text_file, "r+") as file:
    file.write("THE")
  os.utime(text_file, ns=(status.st_atime_ns, status.st_mtime_ns))
  assert text_of(prepare_data(tmp_path, files=(text_file,)), "train").startswith("THE")
  assert len(built) == 2
  prepare_data(tmp_path, files=(text_file,), valid_fraction=0.2)
  assert len(built) == 3


def test_shards_are_joined_again(tmp_path, text_file, monkeypatch):
  whole = text_of(prepare_data(tmp_path, files=(text_file,)), "train")
  monkeypatch.setattr(token_files, "SHARD_TOKENS", 100)
  prepared = prepare_data(tmp_path / "shards", files=(text_file,))
  train, _ = prepared.corpora["corpus"]
  assert len(train.shards) > 3
  assert text_of(prepared, "train") == whole
  positions = np.array([[5, 99, 100], [101, 250, 3]])
  np.testing.assert_array_equal(
    train.gather(positions), train.read(0, train.num_tokens)[positions], strict=True
  )


def test_large_vocabularies_take_four_bytes(tmp_path):
  folder = tmp_path / "wide"
  folder.mkdir()
  text = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x13000)]))
  make_char_tokenizer([text]).save(folder / "tokenizer.json")
  (tmp_path / "a.txt").write_text(text)
  prepared = prepare_data(
    tmp_path, files=(f"{tmp_path}/a.txt",), tokenizer=str(folder), end_token=""
  )
  assert prepared.corpora["corpus"][0].shards[0].dtype == "uint32"
  assert text_of(prepared, "train") + text_of(prepared, "valid") == text


def test_processes_give_the_same_tokens_and_start_no_jax(tmp_path, text_file, monkeypatch):
  alone = text_of(prepare_data(tmp_path, files=(text_file,)), "train")
  monkeypatch.setattr(prepare, "PROCESSES_FROM_BYTES", 0)
  monkeypatch.setattr(encoding, "TASK_CHARS", 100)
  monkeypatch.setattr("gptjax.data.corpus.PIECE_CHARS", 50)
  prepared = prepare_data(tmp_path / "two", files=(text_file,), build_processes=2)
  assert text_of(prepared, "train") == alone
  code = "import gptjax.data.encoding, gptjax.data.prepare, sys; print('jax' in sys.modules)"
  output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert output.stdout == "False\n"


def test_an_error_in_a_process_arrives(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, "PROCESSES_FROM_BYTES", 0)
  make_char_tokenizer(["abc"]).save(tmp_path / "tokenizer.json")
  (tmp_path / "a.txt").write_text("abcabcabcé")
  with pytest.raises(DataError, match="'é'"):
    prepare_data(
      tmp_path,
      files=(f"{tmp_path}/a.txt",),
      tokenizer=f"{tmp_path}/tokenizer.json",
      end_token="",
      build_processes=1,
    )
  assert not [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")]


def test_a_killed_build_leaves_nothing_that_is_used(tmp_path):
  target = tmp_path / "built"
  code = (
    "import time, pathlib; from gptjax.data.building import build_once\n"
    "def build(path): path.mkdir(); (path / 'half').touch(); time.sleep(60)\n"
    f"build_once(pathlib.Path({str(target)!r}), pathlib.Path.is_dir, build)"
  )
  process = subprocess.Popen([sys.executable, "-c", code])
  half = tmp_path / "built.building" / "half"
  deadline = time.monotonic() + 20
  while not half.exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert half.exists()
  assert not target.exists()
  building.build_once(target, lambda path: path.is_dir(), lambda path: path.mkdir())
  assert os.listdir(target) == []
  assert not half.parent.exists()


def test_a_truncated_build_is_built_again(tmp_path, text_file):
  prepared = prepare_data(tmp_path, files=(text_file,))
  whole = text_of(prepared, "train")
  folder = prepared.corpora["corpus"][0].folder
  os.truncate(folder / "train-00000.bin", 10)
  assert text_of(prepare_data(tmp_path, files=(text_file,)), "train") == whole


def test_two_processes_build_the_same_thing_once(tmp_path, text_file):
  code = (
    "from gptjax.data import prepare; from gptjax.data.config import DataConfig\n"
    "write = prepare._write_tokens\n"
    "prepare._write_tokens = lambda *args: print('built') or write(*args)\n"
    f"config = DataConfig(files=({text_file!r},), cache_dir={str(tmp_path / 'c')!r},"
    " vocab_size=280)\n"
    "prepared = prepare.prepare_data(config, report=lambda line: None)\n"
    "print(prepared.corpora['corpus'][0].num_tokens)"
  )
  processes = [
    subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  outputs = [process.communicate()[0].split() for process in processes]
  assert outputs[0][-1] == outputs[1][-1]
  assert sum(output.count("built") for output in outputs) == 1


def test_manifest_says_what_was_built(tmp_path, text_file):
  prepared = prepare_data(tmp_path, files=(text_file,))
  train, _ = prepared.corpora["corpus"]
  manifest = read_manifest(train.folder)
  assert manifest["tokenizer"] == prepared.tokenizer.fingerprint
  assert [source["path"] for source in manifest["sources"]] == [text_file]
  assert manifest["train"][0]["bytes"] == os.path.getsize(text_file)
  assert train.pieces.tolist() == [[0, 0, 0, train.text_bytes]]


def test_mixture_has_one_tokenizer_and_several_corpora(tmp_path, text_file):
  other = write_jsonl(tmp_path / "b.jsonl", 20)
  mixture = {"a": CorpusConfig(files=(text_file,)), "b": CorpusConfig(files=(other,), weight=3)}
  prepared = prepare_data(tmp_path, mixture=mixture)
  assert prepared.weights == {"a": 1, "b": 3}
  assert set(prepared.corpora) == {"a", "b"}


@pytest.fixture
def char_tokenizer(tmp_path):
  path = tmp_path / "tokenizer.json"
  make_char_tokenizer(["abcdefgh"], "<end>").save(path)
  return str(path)


def write_llmc(path, tokens, magic, version, dtype, count=None):
  header = np.zeros(256, np.int32)
  header[:3] = magic, version, len(tokens) if count is None else count
  path.write_bytes(header.tobytes() + np.array(tokens, dtype).tobytes())


def test_existing_token_files_are_read_where_they_are(tmp_path, char_tokenizer):
  tokens = [0, 1, 8, 2, 3, 4, 8, 5, 6, 8]
  np.array(tokens, np.uint16).tofile(tmp_path / "a.bin")
  write_llmc(tmp_path / "b.bin", tokens, 20240520, 1, np.uint16)
  write_llmc(tmp_path / "c.bin", tokens, 20240801, 7, np.uint32)
  prepared = prepare_data(
    tmp_path,
    token_files=(f"{tmp_path}/[ab].bin",),
    valid_token_files=(f"{tmp_path}/c.bin",),
    tokenizer=char_tokenizer,
    end_token="<end>",
  )
  train, valid = prepared.corpora["corpus"]
  assert train.read(0, 20).tolist() == tokens * 2
  assert valid.read(0, 10).tolist() == tokens
  assert train.document_starts.tolist() == [0, 3, 7, 10, 13, 17, 20]
  assert train.num_documents == 6
  assert prepared.bytes_per_token == 6 / 9  # letters after the first, of nine targets
  assert not list(train.folder.glob("*.bin"))


def test_token_files_without_held_out_ones_are_cut(tmp_path, char_tokenizer):
  np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 1], np.uint16).tofile(tmp_path / "a.bin")
  keys = {"tokenizer": char_tokenizer, "end_token": "", "valid_fraction": 0.2}
  prepared = prepare_data(tmp_path, token_files=(f"{tmp_path}/a.bin",), **keys)
  assert [split.num_tokens for split in prepared.corpora["corpus"]] == [8, 2]


def test_slices_of_shards(tmp_path):
  np.arange(6, dtype=np.uint16).tofile(tmp_path / "a.bin")
  shard = find_shard(str(tmp_path / "a.bin"))
  sliced = slice_shards([shard, shard], 4, 9)
  assert [(part.offset_bytes, part.num_tokens) for part in sliced] == [(8, 2), (0, 3)]


@pytest.mark.parametrize(
  "name", ["train-documents.npy", "valid-pieces.npy", "train-00000.bin", "tokenizer-*.json"]
)
def test_a_build_that_lost_a_file_to_a_crash_is_made_again(tmp_path, text_file, name):
  whole = text_of(prepare_data(tmp_path, files=(text_file,)), "train")
  (path,) = [*tmp_path.glob(f"cache/*/{name}"), *tmp_path.glob(f"cache/{name}")]
  path.write_bytes(b"")
  assert text_of(prepare_data(tmp_path, files=(text_file,)), "train") == whole
  assert path.stat().st_size


def test_a_column_of_files_without_columns_is_refused(tmp_path, text_file):
  with pytest.raises(ConfigError, match=r"data\.text_column .* has no effect"):
    prepare_data(tmp_path, files=(text_file,), text_column="body")


def test_damaged_token_files_are_one_line(tmp_path, char_tokenizer):
  write_llmc(tmp_path / "short.bin", [1, 2], 20240520, 1, np.uint16, count=5)
  write_llmc(tmp_path / "version.bin", [1, 2], 20240520, 9, np.uint16)
  (tmp_path / "odd.bin").write_bytes(b"abc")
  (tmp_path / "empty.bin").write_bytes(b"")
  np.array([1, 99], np.uint16).tofile(tmp_path / "large.bin")
  for name, message in (
    ("short", "its header promises 1034"),
    ("version", "version 9; only 1"),
    ("odd", "even number"),
    ("empty", "is empty"),
    ("large", "holds token 99; the tokenizer has 9"),
  ):
    with pytest.raises(DataError, match=message):
      prepare_data(
        tmp_path,
        token_files=(f"{tmp_path}/{name}.bin",),
        valid_fraction=0,
        tokenizer=char_tokenizer,
        end_token="",
      )


def test_contradicting_and_empty_input_is_one_line(tmp_path, text_file):
  (tmp_path / "empty.txt").write_text("")
  np.zeros(4, np.uint16).tofile(tmp_path / "a.bin")
  bins = (f"{tmp_path}/a.bin",)
  for keys, message in (
    ({}, "set data.files, data.token_files or data.hub"),
    ({"files": (text_file,), "hub": "x"}, "keep one"),
    ({"files": (text_file,), "valid_token_files": bins}, "no effect"),
    ({"files": (text_file,), "hub_valid_split": "test"}, "data.hub_valid_split has no effect"),
    ({"token_files": bins}, "no text to make it from"),
    ({"files": (f"{tmp_path}/empty.txt",)}, "is empty"),
    ({"files": (f"{tmp_path}/empty.txt",), "tokenizer": "char"}, "is empty"),
    ({"files": (text_file,), "valid_files": (f"{tmp_path}/empty.txt",)}, "is empty"),
    ({"files": (text_file,), "tokenizer": "bqe"}, "no tokenizer in"),
  ):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
      prepare_data(tmp_path, **keys)
    assert "\n" not in str(caught.value)


def test_unwritable_cache_is_one_line(tmp_path, text_file):
  with pytest.raises(DataError, match=r"cannot be written.*data\.cache_dir"):
    prepare_data(tmp_path, files=(text_file,), cache_dir=f"{text_file}/cache")


def test_token_files_open_again_from_the_folder_alone(tmp_path, text_file):
  train, _ = prepare_data(tmp_path, files=(text_file,)).corpora["corpus"]
  again = TokenFiles(train.folder, "train")
  np.testing.assert_array_equal(again.read(0, 50), train.read(0, 50), strict=True)
