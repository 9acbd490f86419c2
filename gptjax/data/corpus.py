"""Corpora as streams of documents, with the bytes each one came from.

Reads txt (a file is a document), jsonl, jsonl.gz, csv and parquet (a record is a document), and
`datasets` hub names, streamed. Long documents come in pieces, so memory does not grow with them.
Imports no jax, and `datasets` only for a hub name.
"""

import codecs
import contextlib
import csv
import dataclasses
import glob
import gzip
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gptjax.data.config import CorpusConfig
from gptjax.data.tokenizer import cut_text, find_cut
from gptjax.errors import DataError, did_you_mean

PIECE_CHARS = 1 << 17
# A tokenizer that allows no cuts gets a text file in one piece, which must fit in memory.
UNCUT_FILE_BYTES = 2 << 30

# What the byte range of a document counts in, by kind of source.
BYTES_OF = {
  "txt": "the file",
  "jsonl": "the file",
  "csv": "the file",
  "jsonl.gz": "the uncompressed file",
  "parquet": "the text column's values, joined",
  "hub": "the text column's values, joined",
}


@dataclasses.dataclass(frozen=True)
class Source:
  """One file, or one split of a hub data set.

  Attributes:
    kind: a key of BYTES_OF.
    path: the file's absolute path, or "name[:configuration]@split".
    text_column: field of a record that holds the text; unused for txt.
  """

  kind: str
  path: str
  text_column: str = "text"


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
  """A document, or a piece of a long one.

  Attributes:
    text: never empty.
    source: index into the sources read.
    start_byte, end_byte: where the text (txt) or the record that holds it is; see BYTES_OF.
    index: number of the document among all of the corpus; pieces share it.
    is_end: whether this piece is the document's last.
    split: "train" or "valid".
  """

  text: str
  source: int
  start_byte: int
  end_byte: int
  index: int = 0
  is_end: bool = True
  split: str = "train"


def find_sources(config: CorpusConfig) -> tuple[list[Source], list[Source]]:
  """Finds the training and the held-out sources of a corpus; either may be empty.

  A file that is held out is left out of training, so globs may overlap.

  Raises:
    DataError: a pattern that matches nothing, a folder, an unknown kind of file.
  """
  if config.hub:
    splits = (config.hub_split, config.hub_valid_split)
    train, valid = (
      [Source("hub", f"{config.hub}@{split}", config.text_column)] if split else []
      for split in splits
    )
  else:
    valid = [_file_source(path, config.text_column) for path in find_files(config.valid_files)]
    train = [_file_source(path, config.text_column) for path in find_files(config.files)]
    train = [source for source in train if source not in valid]
    if config.files and not train:
      raise DataError("data.valid_files holds out every file of data.files; leave some to train on")
  return train, valid


def find_files(patterns: Iterable[str]) -> list[str]:
  """Expands paths and globs to absolute paths, each once, the matches of a glob sorted.

  Raises:
    DataError: a pattern that matches nothing, or a folder.
  """
  found = {}
  for pattern in patterns:
    path = os.path.expanduser(pattern)
    matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    matches = [match for match in matches if match == path or os.path.isfile(match)]
    if not matches:
      raise DataError(f'no file matches "{pattern}"{_nearest_file(path)}')
    if os.path.isdir(path):
      raise DataError(f'"{pattern}" is a folder; name its files, for example "{pattern}/*.txt"')
    found.update(dict.fromkeys(os.path.abspath(match) for match in matches))
  return list(found)


def read_documents(sources: Iterable[Source], cuts: str = "before_space") -> Iterator[Document]:
  """Streams the documents of sources in order, long ones in pieces.

  Args:
    sources: as `find_sources` returns them.
    cuts: `Tokenizer.cuts`, where a document may be cut into pieces.

  Raises:
    DataError: a missing or unreadable file, invalid UTF-8, a damaged record, no text column.
  """
  index = itertools.count()
  for number, source in enumerate(sources):
    with readable(source.path):
      if source.kind == "txt":
        yield from _as_pieces(_read_txt(source.path, cuts), number, index)
        continue
      for text, start, end in _RECORD_READERS[source.kind](source):
        pieces = ((piece, start, end) for piece in cut_text(text, PIECE_CHARS, cuts))
        yield from _as_pieces(pieces, number, index)


def _as_pieces(
  pieces: Iterable[tuple[str, int, int]], source: int, indices: Iterator[int]
) -> Iterator[Document]:
  """Numbers one document and marks its last piece; an empty document is none."""
  index = None
  for piece, following in itertools.pairwise(itertools.chain(pieces, [None])):
    text, start, end = piece
    index = next(indices) if index is None else index
    yield Document(text, source, start, end, index, is_end=following is None)


def _read_txt(path: str, cuts: str) -> Iterator[tuple[str, int, int]]:
  """Reads a text file piece by piece; newlines and all else stay as they are."""
  if cuts == "nowhere":
    _check_fits_in_memory(path)
  with open(path, "rb") as file:
    start = read = _skip_byte_order_mark(file)
    # `held` is text that was searched and has no cut.
    held, pending, undecoded, searched = [], "", b"", PIECE_CHARS
    while block := file.read(PIECE_CHARS):
      read += len(block)
      undecoded += block
      text, used = _decode(undecoded, path, read - len(undecoded), final=False)
      pending, undecoded = pending + text, undecoded[used:]
      while (cut := find_cut(pending, searched, cuts)) is not None:
        piece = "".join([*held, pending[:cut]])
        end = start + len(piece.encode())
        yield piece, start, end
        held, pending, start, searched = [], pending[cut:], end, PIECE_CHARS
      if len(pending) > PIECE_CHARS:
        held.append(pending[:-1])
        pending, searched = pending[-1:], 1
    _decode(undecoded, path, read - len(undecoded), final=True)
    if rest := "".join([*held, pending]):
      yield rest, start, read


def _check_fits_in_memory(path: str) -> None:
  num_bytes = os.path.getsize(path)
  if num_bytes > UNCUT_FILE_BYTES:
    raise DataError(
      f'"{path}" has {num_bytes / 1e9:.1f} GB; this tokenizer takes a text file in one piece, up to'
      f" {UNCUT_FILE_BYTES / 1e9:.1f} GB: write it as jsonl, one document a line"
    )


def _read_jsonl(source: Source) -> Iterator[tuple[str, int, int]]:
  opener = gzip.open if source.kind == "jsonl.gz" else open
  with opener(source.path, "rb") as file:
    start = _skip_byte_order_mark(file)
    for number, line in enumerate(file, 1):
      end = start + len(line)
      if line.strip():
        place = f'"{source.path}" line {number}'
        record = parse_json(_decode(line, source.path, start)[0], place)
        yield _text_of(record, source, place), start, end
      start = end


def _read_csv(source: Source) -> Iterator[tuple[str, int, int]]:
  csv.field_size_limit(sys.maxsize)
  with open(source.path, "rb") as file:
    start = end = _skip_byte_order_mark(file)

    def lines() -> Iterator[str]:
      nonlocal end
      for line in file:
        text, _ = _decode(line, source.path, end)
        end += len(line)
        yield text

    reader = csv.DictReader(lines(), strict=True)
    try:
      _check_column(source, reader.fieldnames or [])
      start = end
      for record in reader:
        place = f'"{source.path}" line {reader.line_num}'
        if None in record:
          raise DataError(f"{place} has more fields than the header has names; quote the commas")
        yield _text_of(record, source, place), start, end
        start = end
    except csv.Error as error:
      raise DataError(f'"{source.path}" after line {reader.line_num} is no CSV: {error}') from error


def _read_parquet(source: Source) -> Iterator[tuple[str, int, int]]:
  import pyarrow.parquet

  file = pyarrow.parquet.ParquetFile(source.path)
  _check_column(source, file.schema_arrow.names)
  batches = file.iter_batches(batch_size=256, columns=[source.text_column])
  texts = (text for batch in batches for text in batch.column(0).to_pylist())
  yield from _with_byte_ranges(texts, source)


def open_hub(name: str, split: str, *, is_streamed: bool) -> Iterable[dict]:
  """Opens one split of a `datasets` hub name, "name" or "name:configuration".

  Raises:
    DataError: it cannot be reached or is not there.
  """
  import datasets

  path, _, configuration = name.partition(":")
  try:
    return datasets.load_dataset(path, configuration or None, split=split, streaming=is_streamed)
  # datasets raises its own, requests' and the hub's errors, without a common base.
  except Exception as error:
    raise _unreadable_hub(name, split, error) from error


def _unreadable_hub(name: str, split: str, error: Exception) -> DataError:
  reason = str(error).splitlines()[0] if str(error) else type(error).__name__
  return DataError(f'data.hub "{name}" split "{split}" cannot be read: {reason}')


def _read_hub(source: Source) -> Iterator[tuple[str, int, int]]:
  name, _, split = source.path.rpartition("@")
  records = open_hub(name, split, is_streamed=True)
  try:
    columns = records.column_names or list(next(iter(records)))
  except Exception as error:
    raise _unreadable_hub(name, split, error) from error
  _check_column(source, columns)
  yield from _with_byte_ranges((record[source.text_column] for record in records), source)


_RECORD_READERS: dict[str, Callable[[Source], Iterator[tuple[str, int, int]]]] = {
  "jsonl": _read_jsonl,
  "jsonl.gz": _read_jsonl,
  "csv": _read_csv,
  "parquet": _read_parquet,
  "hub": _read_hub,
}


def _with_byte_ranges(texts: Iterable[str], source: Source) -> Iterator[tuple[str, int, int]]:
  start = 0
  for number, text in enumerate(texts, 1):
    text = _text_of({source.text_column: text}, source, f'"{source.path}" record {number}')
    end = start + len(text.encode())
    yield text, start, end
    start = end


def _file_source(path: str, text_column: str) -> Source:
  suffixes = [kind for kind in BYTES_OF if path.lower().endswith(f".{kind}")]
  if not suffixes:
    kinds = ", ".join(f".{kind}" for kind in BYTES_OF if kind != "hub")
    raise DataError(f'"{path}" is of an unknown kind; data.files may end in {kinds}')
  return Source(suffixes[0], path, text_column)


def _nearest_file(path: str) -> str:
  folder = Path(path).parent
  names = [str(file) for file in folder.iterdir()] if folder.is_dir() else []
  return did_you_mean(path, names) if len(names) < 20 else ""


def _skip_byte_order_mark(file: BinaryIO) -> int:
  if file.read(3) == codecs.BOM_UTF8:
    return 3
  file.seek(0)
  return 0


def _decode(data: bytes, path: str, offset: int, final: bool = True) -> tuple[str, int]:
  try:
    return codecs.utf_8_decode(data, "strict", final)
  except UnicodeDecodeError as error:
    byte = offset + error.start
    raise DataError(f'"{path}" is not UTF-8 at byte {byte}; convert it to UTF-8') from error


def parse_json(line: str, place: str) -> dict:
  """Reads one JSON object. Raises DataError, with the place, for anything else."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise DataError(f"{place} is not JSON: {error}") from error
  if not isinstance(record, dict):
    raise DataError(f"{place} is {line[:40]!r}; each record must be one object")
  return record


def _check_column(source: Source, columns: Iterable[str]) -> None:
  if source.text_column not in columns:
    hint = did_you_mean(source.text_column, columns)
    raise DataError(f'data.text_column "{source.text_column}" is not in "{source.path}"{hint}')


def _text_of(record: dict, source: Source, place: str) -> str:
  _check_column(source, record)
  text = record[source.text_column]
  if not isinstance(text, str):
    raise DataError(f'{place}: "{source.text_column}" is {text!r}; it must be text')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise DataError(f"{place} holds half of a surrogate pair: {error}") from error
  return text


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
  """Turns what goes wrong while a file is read into a DataError that names it."""
  try:
    yield
  except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise DataError(f'"{path}" cannot be read: {reason}') from error
