"""Token files: memory-mapped uint16 or uint32 shards, and the tables that lead back to the text.

A built folder holds manifest.json and, for each split, shards (`train-00000.bin`), document
boundaries (`train-documents.npy`, int64 [documents + 1] token positions) and the sources of its
pieces (`train-pieces.npy`, int64 [pieces, 4]: first token, source, start byte, end byte).
nanoGPT's raw uint16 files and llm.c's files with a header are read where they are.
"""

import bisect
import contextlib
import dataclasses
import functools
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.corpus import Document
from gptjax.errors import DataError

SHARD_TOKENS = 1 << 28
SCAN_TOKENS = 1 << 22

_HEADER_BYTES = 256 * 4
# llm.c: magic number of the header -> (version it must have, dtype of the tokens after it).
_LLMC_FORMATS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}


@dataclasses.dataclass(frozen=True)
class Shard:
  """A run of tokens inside a file.

  Attributes:
    path: relative to the built folder, or absolute for a file used where it is.
    dtype: "uint16" or "uint32".
  """

  path: str
  offset_bytes: int
  num_tokens: int
  dtype: str

  @property
  def itemsize(self) -> int:
    return np.dtype(self.dtype).itemsize

  @property
  def end_byte(self) -> int:
    return self.offset_bytes + self.num_tokens * self.itemsize


class TokenFiles:
  """One split of one corpus: a stream of tokens, of which nothing is in memory until read.

  Attributes:
    num_tokens, num_documents: of the split, end tokens included.
    text_bytes: UTF-8 bytes of its text; end tokens have none.
    sources: [{"kind", "path", "text_column"}], which pieces refer to by number.
  """

  def __init__(self, folder: str | Path, split: str):
    manifest = read_manifest(folder)
    entry = manifest["splits"][split]
    self.folder, self.split = Path(folder), split
    self.shards = tuple(Shard(**shard) for shard in entry["shards"])
    self.num_tokens: int = entry["num_tokens"]
    self.num_documents: int = entry["num_documents"]
    self.text_bytes: int = entry["text_bytes"]
    self.sources: list[dict[str, str]] = manifest["sources"]
    self._starts = np.cumsum([0] + [shard.num_tokens for shard in self.shards])

  @functools.cached_property
  def document_starts(self) -> np.ndarray:
    """int64 [documents + 1]: first token of each document, then the end of the last."""
    return np.load(self.folder / f"{self.split}-documents.npy", mmap_mode="r")

  @functools.cached_property
  def pieces(self) -> np.ndarray:
    """int64 [pieces, 4]: first token, source, start byte, end byte."""
    return np.load(self.folder / f"{self.split}-pieces.npy", mmap_mode="r")

  def gather(self, positions: np.ndarray) -> np.ndarray:
    """Returns int32 tokens at int64 positions in [0, num_tokens), of the same shape."""
    if len(self._maps) == 1:
      return self._maps[0][positions].astype(np.int32)
    tokens = np.empty(positions.shape, np.int32)
    shard_of = np.searchsorted(self._starts, positions, side="right") - 1
    for number in np.unique(shard_of):
      inside = shard_of == number
      tokens[inside] = self._maps[number][positions[inside] - self._starts[number]]
    return tokens

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns the int32 tokens of [start, stop)."""
    return self.gather(np.arange(start, stop))

  def piece_at(self, position: int) -> int:
    """Returns the row of `pieces` that the token at `position` was made from."""
    return bisect.bisect_right(self.pieces, position, key=lambda piece: piece[0]) - 1

  @functools.cached_property
  def _maps(self) -> list[np.ndarray]:
    return [map_tokens(self.folder / shard.path, shard) for shard in self.shards]


def map_tokens(path: Path, shard: Shard) -> np.ndarray:
  """Maps the tokens of a shard into memory, read-only."""
  if not shard.num_tokens:
    return np.zeros(0, shard.dtype)
  # A plain array on the mapping: np.memmap's own indexing costs more than the reading.
  return np.asarray(np.memmap(path, shard.dtype, "r", shard.offset_bytes, (shard.num_tokens,)))


def read_manifest(folder: str | Path) -> dict[str, Any]:
  """Reads manifest.json of a built folder."""
  return json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))


def is_whole(folder: Path) -> bool:
  """Whether a folder is a complete build: a manifest, and every file of the size it states."""
  try:
    splits = read_manifest(folder)["splits"]
    shards = [Shard(**shard) for split in splits.values() for shard in split["shards"]]
    return all(os.path.getsize(folder / shard.path) >= shard.end_byte for shard in shards) and all(
      is_whole_npy(folder / f"{split}-{name}.npy")
      for split in splits
      for name in ("documents", "pieces")
    )
  except (OSError, ValueError, KeyError, TypeError):
    return False


def is_whole_npy(path: Path) -> bool:
  """Whether a .npy file is as long as its header says."""
  try:
    np.load(path, mmap_mode="r")
  except (OSError, ValueError, EOFError):
    return False
  return True


class TokenWriter:
  """Writes one split of a built folder, in memory that does not grow; a context manager.

  Args:
    folder: an existing folder.
    split: "train" or "valid".
    end_id: written after each document, or None.
    dtype: of the shards.
  """

  def __init__(self, folder: Path, split: str, end_id: int | None, dtype: str):
    self.folder, self.split, self.dtype = folder, split, dtype
    self._end = None if end_id is None else np.array([end_id], dtype)
    self._files = contextlib.ExitStack()
    self._documents = self._files.enter_context(NpyWriter(folder / f"{split}-documents.npy"))
    self._pieces = self._files.enter_context(NpyWriter(folder / f"{split}-pieces.npy", (4,)))
    self._shards: list[int] = []
    self._file = None
    self._num_tokens = self._text_bytes = 0
    self._index = None

  def append(self, document: Document, ids: np.ndarray) -> None:
    """Adds a document, or a piece of one, with its ids."""
    if document.index != self._index:
      self._documents.append([self._num_tokens])
      self._index = document.index
    place = [self._num_tokens, document.source, document.start_byte, document.end_byte]
    self._pieces.append(place)
    self._text_bytes += len(document.text.encode())
    self._write(ids.astype(self.dtype))
    if document.is_end and self._end is not None:
      self._write(self._end)

  def __enter__(self) -> "TokenWriter":
    return self

  def __exit__(self, *error: object) -> None:
    self._files.close()

  def finish(self) -> dict[str, Any]:
    """Ends the last document and returns the split's entry of the manifest."""
    num_documents = self._documents.length
    self._documents.append([self._num_tokens])
    shards = [Shard(self._name(i), 0, count, self.dtype) for i, count in enumerate(self._shards)]
    return split_entry(shards, num_documents, self._text_bytes)

  def _write(self, ids: np.ndarray) -> None:
    self._num_tokens += len(ids)
    while len(ids):
      if not self._shards or self._shards[-1] == SHARD_TOKENS:
        path = self.folder / self._name(len(self._shards))
        self._file = self._files.enter_context(path.open("wb"))
        self._shards.append(0)
      now, ids = np.split(ids, [SHARD_TOKENS - self._shards[-1]])
      self._file.write(now.tobytes())
      self._shards[-1] += len(now)

  def _name(self, number: int) -> str:
    return f"{self.split}-{number:05d}.bin"


class NpyWriter:
  """Writes an int64 .npy of rows whose number is not known beforehand; a context manager."""

  def __init__(self, path: Path, row_shape: tuple[int, ...] = ()):
    self.length = 0
    self._row_shape = row_shape
    self._file = open(path, "wb")  # noqa: SIM115, closed by __exit__
    self._write_header()

  def append(self, values: Sequence[int] | np.ndarray) -> None:
    """Adds the values of one or several rows, flattened."""
    data = np.asarray(values, np.int64)
    self.length += data.size // int(np.prod(self._row_shape))
    self._file.write(data.tobytes())

  def __enter__(self) -> "NpyWriter":
    return self

  def __exit__(self, *error: object) -> None:
    # numpy leaves room in the header for the first axis to grow in place.
    self._file.seek(0)
    self._write_header()
    self._file.close()

  def _write_header(self) -> None:
    header = {"descr": "<i8", "fortran_order": False, "shape": (self.length, *self._row_shape)}
    np.lib.format.write_array_header_1_0(self._file, header)


def split_entry(shards: Sequence[Shard], num_documents: int, text_bytes: int) -> dict[str, Any]:
  """Describes one split for the manifest."""
  return {
    "shards": [dataclasses.asdict(shard) for shard in shards],
    "num_tokens": sum(shard.num_tokens for shard in shards),
    "num_documents": num_documents,
    "text_bytes": text_bytes,
  }


def find_shard(path: str) -> Shard:
  """Recognises an existing token file: llm.c's by its header, otherwise nanoGPT's raw uint16.

  Raises:
    DataError: the length does not fit the header, the version is unknown, or the file is empty.
  """
  try:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
      header = file.read(_HEADER_BYTES)
  except OSError as error:
    raise DataError(f'token file "{path}" cannot be read: {error.strerror}') from error
  magic, version, count = struct.unpack("<3i", header[:12]) if len(header) >= 12 else (0, 0, 0)
  if magic in _LLMC_FORMATS:
    known_version, dtype = _LLMC_FORMATS[magic]
    shard = Shard(path, _HEADER_BYTES, count, dtype)
    if version != known_version:
      raise DataError(
        f'token file "{path}" is of llm.c version {version}; only {known_version} is known'
      )
    if shard.end_byte != size:
      raise DataError(
        f'token file "{path}" has {size} bytes; its header promises {shard.end_byte}'
        f" ({shard.num_tokens} tokens); copy it again"
      )
    return shard
  if size == 0:
    raise DataError(f'token file "{path}" is empty; there are no tokens in it')
  if size % 2:
    raise DataError(f'token file "{path}" has {size} bytes; raw uint16 tokens need an even number')
  return Shard(path, 0, size // 2, "uint16")


def slice_shards(shards: Sequence[Shard], start: int, stop: int) -> list[Shard]:
  """Returns the shards of tokens [start, stop) of a run of shards."""
  sliced, first = [], 0
  for shard in shards:
    low, high = max(start - first, 0), min(stop - first, shard.num_tokens)
    if low < high:
      offset = shard.offset_bytes + low * shard.itemsize
      sliced.append(dataclasses.replace(shard, offset_bytes=offset, num_tokens=high - low))
    first += shard.num_tokens
  return sliced


def describe_shards(
  folder: Path,
  split: str,
  shards: Sequence[Shard],
  sources: Mapping[str, int],
  end_id: int | None,
  bytes_of_token: np.ndarray,
) -> dict[str, Any]:
  """Writes the tables of a split whose tokens stay in existing files; returns its entry.

  Args:
    folder: where documents.npy and pieces.npy go.
    sources: number of each file.
    end_id: marks the end of documents, or None: all is one document.
    bytes_of_token: int64 [vocab_size], `Tokenizer.bytes_of_token`.

  Raises:
    DataError: a token that is not in the vocabulary.
  """
  with (
    NpyWriter(folder / f"{split}-documents.npy") as documents,
    NpyWriter(folder / f"{split}-pieces.npy", (4,)) as pieces,
  ):
    position, text_bytes, is_start = 0, 0, True
    for shard in shards:
      pieces.append([position, sources[shard.path], shard.offset_bytes, shard.end_byte])
      for tokens in scan_shard(shard):
        if tokens.max() >= len(bytes_of_token):
          raise DataError(
            f'token file "{shard.path}" holds token {tokens.max()}; the tokenizer has'
            f" {len(bytes_of_token)}: set data.tokenizer to the one the file was made with"
          )
        counts = np.bincount(tokens, minlength=len(bytes_of_token))
        text_bytes += int(counts @ bytes_of_token)
        if is_start:
          documents.append([position])
        ends = np.flatnonzero(tokens == end_id) + 1 if end_id is not None else np.zeros(0, np.int64)
        is_start = bool(len(ends)) and ends[-1] == len(tokens)
        documents.append(position + (ends[:-1] if is_start else ends))
        position += len(tokens)
    num_documents = documents.length
    documents.append([position])
  return split_entry(shards, num_documents, text_bytes)


def scan_shard(shard: Shard) -> Iterator[np.ndarray]:
  """Streams the tokens of an existing file in bounded chunks."""
  tokens = map_tokens(Path(shard.path), shard)
  for start in range(0, len(tokens), SCAN_TOKENS):
    yield tokens[start : start + SCAN_TOKENS]
