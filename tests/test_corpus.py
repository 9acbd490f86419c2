"""Corpora: every kind of file as documents with the bytes they came from; bad input in one line."""

import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from gptjax.data import corpus
from gptjax.data.config import CorpusConfig
from gptjax.data.corpus import Source, find_files, find_sources, read_documents
from gptjax.errors import DataError

TEXTS = ["first\nline", 'second, "quoted"\r\n日本語', "third 😀"]


def read(path, column="text"):
  (source,), _ = find_sources(CorpusConfig(files=(str(path),), text_column=column))
  return list(read_documents([source]))


def write_csv(path):
  quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
  path.write_bytes(("id,text\n" + "".join(f"{i},{t}\n" for i, t in enumerate(quoted))).encode())


def write_jsonl(path):
  lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS]
  lines.insert(1, "\n")
  path.write_bytes("".join(lines).encode())


def test_a_text_without_cuts_must_fit_in_memory(tmp_path, monkeypatch):
  file = tmp_path / "a.txt"
  file.write_bytes(b"\xef\xbb\xbf" + TEXTS[1].encode())
  source = Source("txt", str(file))
  (document,) = read_documents([source], "nowhere")
  assert (document.text, document.is_end) == (TEXTS[1], True)
  assert (document.start_byte, document.end_byte) == (3, file.stat().st_size)
  monkeypatch.setattr(corpus, "UNCUT_FILE_BYTES", 10)
  with pytest.raises(DataError, match="jsonl"):
    list(read_documents([source], "nowhere"))
  assert len(list(read_documents([source], "anywhere"))) == 1


def test_a_long_text_with_few_cuts_is_cut_as_one_in_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus, "PIECE_CHARS", 16)
  rng = random.Random(0)
  file = tmp_path / "a.txt"
  for rarity in (3, 10, 30, 1000):
    text = "".join(rng.choice("aé語😀") + " " * (not rng.randrange(rarity)) for _ in range(300))
    file.write_text(text)
    pieces = [piece.text for piece in read_documents([Source("txt", str(file))], "before_space")]
    assert pieces == list(corpus.cut_text(text, 16, "before_space"))


@pytest.mark.parametrize("cuts", ["nowhere", "before_space"])
def test_a_file_that_ends_inside_a_character_is_refused(tmp_path, cuts):
  file = tmp_path / "a.txt"
  file.write_bytes("語".encode()[:2])
  with pytest.raises(DataError, match="not UTF-8 at byte 0"):
    list(read_documents([Source("txt", str(file))], cuts))


def test_txt_is_one_document_with_its_bytes(tmp_path):
  file = tmp_path / "a.txt"
  file.write_bytes(TEXTS[1].encode())
  (document,) = read(file)
  assert (document.text, document.is_end) == (TEXTS[1], True)
  assert (document.start_byte, document.end_byte) == (0, len(TEXTS[1].encode()))


def test_byte_order_mark_is_not_text(tmp_path):
  file = tmp_path / "a.txt"
  file.write_bytes(b"\xef\xbb\xbfhello")
  (document,) = read(file)
  assert (document.text, document.start_byte, document.end_byte) == ("hello", 3, 8)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_records_are_found_again_by_their_bytes(tmp_path, kind):
  file = tmp_path / f"a.{kind}"
  {"jsonl": write_jsonl, "csv": write_csv}[kind](file)
  documents = read(file)
  assert [document.text for document in documents] == TEXTS
  assert [document.index for document in documents] == [0, 1, 2]
  raw = file.read_bytes()
  for document in documents:
    record = raw[document.start_byte : document.end_byte].decode()
    if kind == "jsonl":
      assert json.loads(record)["text"] == document.text
    else:
      assert document.text.replace('"', '""') in record


def test_compressed_and_columnar_files(tmp_path):
  write_jsonl(tmp_path / "a.jsonl")
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
  table = pyarrow.table({"id": [1, 2, 3], "text": TEXTS})
  pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
  for name in ("b.jsonl.gz", "c.parquet"):
    assert [document.text for document in read(tmp_path / name)] == TEXTS


def test_long_text_comes_in_pieces_that_join_exactly(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus, "PIECE_CHARS", 10)
  text = "日本語の é text\n with\r\nlines 😀 and" + "averyveryverylongword" * 3 + "\n end  "
  file = tmp_path / "a.txt"
  file.write_bytes(text.encode())
  for cuts in ("before_space", "anywhere", "nowhere"):
    pieces = list(read_documents([Source("txt", str(file))], cuts))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.is_end for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert {piece.index for piece in pieces} == {0}
    assert (len(pieces) > 3) == (cuts != "nowhere")
    for piece in pieces:
      assert file.read_bytes()[piece.start_byte : piece.end_byte].decode() == piece.text


def test_globs_are_sorted_and_held_out_files_are_not_trained_on(tmp_path):
  for name in ("b.txt", "a.txt", "c.txt"):
    (tmp_path / name).write_text(name)
  pattern = f"{tmp_path}/*.txt"
  assert [path[-5:] for path in find_files([f"{tmp_path}/c.txt", pattern])] == [
    "c.txt",
    "a.txt",
    "b.txt",
  ]
  train, valid = find_sources(CorpusConfig(files=(pattern,), valid_files=(f"{tmp_path}/b.txt",)))
  assert [source.path[-5:] for source in train] == ["a.txt", "c.txt"]
  assert [source.path[-5:] for source in valid] == ["b.txt"]
  with pytest.raises(DataError, match="holds out every file"):
    find_sources(CorpusConfig(files=(pattern,), valid_files=(pattern,)))


def test_empty_documents_are_none(tmp_path):
  (tmp_path / "a.txt").write_text("")
  (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "x"}\n')
  sources, _ = find_sources(CorpusConfig(files=(f"{tmp_path}/*",)))
  assert [(document.text, document.index) for document in read_documents(sources)] == [("x", 0)]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", b"good \xe8bad", "not UTF-8 at byte 5"),
    ("a.txt", b"cut \xe6\x97", "not UTF-8 at byte 4"),
    ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
    ("a.jsonl", b'["a"]\n', "must be one object"),
    ("a.jsonl", b'{"txt": "a"}\n', 'did you mean "txt"'),
    ("a.jsonl", b'{"text": 3}\n', "must be text"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
    ("a.jsonl.gz", b"not gzip", "cannot be read"),
    ("a.csv", b"texts,id\na,1\n", 'did you mean "texts"'),
    ("a.csv", b"text,id\na,1,b,c\n", "line 2 has more fields"),
    ("a.csv", b'text,id\n"a,1\nb,2\n', "after line 1 is no CSV: unexpected end of data"),
    ("a.jsonl", b'{"text": ' + b"[" * 100_000, "is not JSON"),
    ("a.parquet", b"not parquet", "cannot be read"),
    ("a.pdf", b"", "unknown kind"),
  ],
)
def test_bad_files_are_one_line(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=message) as caught:
    read(tmp_path / name)
  assert "\n" not in str(caught.value)
  assert name in str(caught.value)


def test_patterns_without_files_are_one_line(tmp_path):
  (tmp_path / "shakespeare.txt").write_text("x")
  with pytest.raises(DataError, match=r"did you mean .*shakespeare.txt"):
    find_files([f"{tmp_path}/shakespere.txt"])
  with pytest.raises(DataError, match="no file matches"):
    find_files([f"{tmp_path}/none/*.txt"])
  with pytest.raises(DataError, match="is a folder"):
    find_files([str(tmp_path)])


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch):
  datasets = pytest.importorskip("datasets")

  def refuse(*args, **kwargs):
    raise ConnectionError("no network\nlong tail")

  monkeypatch.setattr(datasets, "load_dataset", refuse)
  (source,), _ = find_sources(CorpusConfig(hub="some/name:part"))
  with pytest.raises(DataError, match=r'"some/name:part" split "train" .* no network') as caught:
    list(read_documents([source]))
  assert "\n" not in str(caught.value)


def test_hub_records_are_documents(monkeypatch):
  datasets = pytest.importorskip("datasets")

  class Records(list):
    column_names = ("text",)

  records = Records({"text": text} for text in TEXTS)
  monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: records)
  train, valid = find_sources(CorpusConfig(hub="name", hub_valid_split="validation"))
  assert [source.path for source in train + valid] == ["name@train", "name@validation"]
  documents = list(read_documents(train))
  assert [document.text for document in documents] == TEXTS
  assert documents[1].start_byte == documents[0].end_byte == len(TEXTS[0].encode())
