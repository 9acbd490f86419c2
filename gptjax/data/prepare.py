"""From a DataConfig to token files: what is built, when it is built again, and how it is split.

Everything is built once, in `data.cache_dir`, in a folder named by the fingerprint of its inputs:
first in a temporary folder, then renamed. Imports no jax.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.building import build_once, disk_errors_named, show_progress
from gptjax.data.config import CorpusConfig, DataConfig
from gptjax.data.corpus import Document, Source, find_files, find_sources, read_documents
from gptjax.data.encoding import encode_documents
from gptjax.data.token_files import (
  TokenFiles,
  TokenWriter,
  describe_shards,
  find_shard,
  is_whole,
  slice_shards,
)
from gptjax.data.tokenizer import Tokenizer, load_tokenizer, make_char_tokenizer, train_bpe
from gptjax.errors import ConfigError, DataError

FORMAT_VERSION = 1
SPLITS = ("train", "valid")

# What only one kind of text has.
OWNERS = {
  "valid_files": "files",
  "valid_token_files": "token_files",
  "hub_split": "hub",
  "hub_valid_split": "hub",
}
# Smaller corpora are tokenised before a process would have started.
PROCESSES_FROM_BYTES = 32 << 20
# Larger ones train their BPE on a sample. Where words are not parted by spaces nearly every word
# is distinct, and training takes about 140 bytes of memory for each byte of them.
BPE_SAMPLE_CHARS = 32 << 20
# Files up to this size are known by their content, larger ones by size and time of change.
HASHED_FILE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """A tokenizer and the token files of every corpus.

  Attributes:
    tokenizer: of all corpora.
    corpora: {name: (training split, validation split)}; a validation split may have no tokens.
    weights: {name: share of the training rows}, not normalised.
    rows: "stream" or "packed".
    bytes_per_token: UTF-8 bytes of the text of all validation targets, divided by their number
      (of the training split where nothing is held out). Bits per byte are
      nats per token / ln 2 / bytes_per_token.
  """

  tokenizer: Tokenizer
  corpora: Mapping[str, tuple[TokenFiles, TokenFiles]]
  weights: Mapping[str, float]
  rows: str
  bytes_per_token: float

  @property
  def valid_tokens(self) -> int:
    return sum(valid.num_tokens for _, valid in self.corpora.values())


def prepare_data(config: DataConfig, *, report: Callable[[str], None] = print) -> PreparedData:
  """Builds the tokenizer and token files of a config, or finds them built already.

  Args:
    config: see DataConfig.
    report: receives a few lines of what was found.

  Raises:
    ConfigError: no corpus, or options that contradict each other.
    DataError: missing, empty or malformed input, or a cache folder that cannot be written.
  """
  inputs = {name: _find_inputs(name, corpus) for name, corpus in config.corpora.items()}
  cache = Path(config.cache_dir).expanduser()
  with disk_errors_named(config.cache_dir):
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer = _make_tokenizer(config, inputs, cache)
    report(f"tokenizer: {config.tokenizer}, {tokenizer.vocab_size:,} entries")
    folders = {
      name: _build_corpus(name, given, tokenizer, config, cache) for name, given in inputs.items()
    }
  corpora = {
    name: (TokenFiles(folder, "train"), TokenFiles(folder, "valid"))
    for name, folder in folders.items()
  }
  for name, splits in corpora.items():
    report(_describe(name, *splits))
  return PreparedData(
    tokenizer=tokenizer,
    corpora=corpora,
    weights={name: corpus.weight for name, corpus in config.corpora.items()},
    rows=config.rows,
    bytes_per_token=measure_bytes_per_token(corpora.values(), tokenizer, config.rows),
  )


def measure_bytes_per_token(
  corpora: Iterable[tuple[TokenFiles, TokenFiles]], tokenizer: Tokenizer, rows: str
) -> float:
  """Divides the UTF-8 bytes of all validation targets by their number.

  What is only ever an input is no target: the first token of a stream, or in packed rows the
  first of each document. Where validation has no text to score, the training splits are measured.
  """
  for splits in reversed(tuple(zip(*corpora, strict=True))):
    num_bytes = num_targets = 0
    for split in filter(lambda split: split.num_tokens, splits):
      starts = split.document_starts[:-1] if rows == "packed" else np.zeros(1, np.int64)
      first_bytes = tokenizer.bytes_of_token[split.gather(starts)].sum()
      num_bytes += split.text_bytes - int(first_bytes)
      num_targets += split.num_tokens - len(starts)
    if num_bytes:
      return num_bytes / num_targets
  raise DataError("the corpus has no text to score; it is empty or one token long")


@dataclasses.dataclass(frozen=True)
class _Inputs:
  """What a corpus is made from.

  Attributes:
    train, valid: sources of text, or token files as sources of kind "tokens".
    valid_fraction: drawn for validation if `valid` is empty.
    identity: JSON of all that decides its documents and their split.
  """

  train: tuple[Source, ...]
  valid: tuple[Source, ...]
  valid_fraction: float
  identity: Mapping[str, Any]

  @property
  def sources(self) -> tuple[Source, ...]:
    return self.train + self.valid

  @property
  def is_tokens(self) -> bool:
    return self.train[0].kind == "tokens"

  @property
  def num_bytes(self) -> int | None:
    """Bytes to read, None where a hub or compression hides it."""
    if any(source.kind not in ("txt", "jsonl", "csv") for source in self.sources):
      return None
    return sum(os.path.getsize(source.path) for source in self.sources)


def _find_inputs(name: str, corpus: CorpusConfig) -> _Inputs:
  kinds = [key for key in ("files", "token_files", "hub") if getattr(corpus, key)]
  if not kinds:
    raise ConfigError(
      f'data has no text for "{name}"; set data.files, data.token_files or data.hub'
    )
  if len(kinds) > 1:
    raise ConfigError(f'data.{kinds[0]} and data.{kinds[1]} are both set for "{name}"; keep one')
  for key, owner in OWNERS.items():
    if getattr(corpus, key) != getattr(CorpusConfig, key) and kinds != [owner]:
      raise ConfigError(f"data.{key} has no effect without data.{owner}; leave it out")
  if corpus.token_files:
    train, valid = (
      [Source("tokens", path, "") for path in find_files(patterns)]
      for patterns in (corpus.token_files, corpus.valid_token_files)
    )
  else:
    train, valid = find_sources(corpus)
  kinds_of_source = {source.kind for source in (*train, *valid)}
  if corpus.text_column != CorpusConfig.text_column and kinds_of_source <= {"txt", "tokens"}:
    raise ConfigError(
      f'data.text_column is "{corpus.text_column}", which has no effect: no file of "{name}" has'
      " columns; leave it out"
    )
  identity = {
    "train": [_identify(source) for source in train],
    "valid": [_identify(source) for source in valid],
    "valid_fraction": None if valid else corpus.valid_fraction,
  }
  return _Inputs(tuple(train), tuple(valid), corpus.valid_fraction, identity)


def _identify(source: Source) -> dict[str, Any]:
  """Describes a source so that a change of it shows; a hub split is known by its name alone."""
  described = dataclasses.asdict(source)
  if source.kind == "hub":
    return described
  try:
    status = os.stat(source.path)
    described["bytes"] = status.st_size
    if status.st_size > HASHED_FILE_BYTES:
      described["mtime_ns"] = status.st_mtime_ns
    else:
      described["sha256"] = hashlib.sha256(Path(source.path).read_bytes()).hexdigest()
  except OSError as error:
    raise DataError(f'"{source.path}" cannot be read: {error.strerror}') from error
  return described


def _fingerprint(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _make_tokenizer(config: DataConfig, inputs: Mapping[str, _Inputs], cache: Path) -> Tokenizer:
  if config.tokenizer not in ("char", "bpe"):
    return load_tokenizer(config.tokenizer, config.end_token)
  texts = [given for given in inputs.values() if not given.is_tokens]
  if not texts:
    raise ConfigError(
      f'data.tokenizer is "{config.tokenizer}" but there is no text to make it from;'
      " set it to the tokenizer that the token files were made with"
    )
  identity = {
    "format": FORMAT_VERSION,
    "library": importlib.metadata.version("tokenizers"),
    "corpora": [given.identity for given in texts],
    "kind": config.tokenizer,
    "vocab_size": config.vocab_size if config.tokenizer == "bpe" else None,
    "end_token": config.end_token,
  }
  file = cache / f"tokenizer-{_fingerprint(identity)[:16]}.json"

  def build(temporary: Path) -> None:
    with show_progress(f"{config.tokenizer} tokenizer") as advance:
      if config.tokenizer == "char":
        made = make_char_tokenizer(_all_texts(texts, advance), config.end_token)
      else:
        sample = _bpe_texts(texts, advance)
        made = train_bpe(sample, config.vocab_size, config.end_token)
    made.save(temporary)

  build_once(file, _is_json, build)
  return load_tokenizer(file, config.end_token)


def _is_json(path: Path) -> bool:
  """Whether a file is there and was written to its end."""
  try:
    json.loads(path.read_bytes())
  except (OSError, ValueError):
    return False
  return True


def _all_texts(inputs: Iterable[_Inputs], advance: Callable[[int], None]) -> Iterator[str]:
  for given in inputs:
    for document in read_documents(given.sources, "anywhere"):
      advance(len(document.text))
      yield document.text


def _bpe_texts(inputs: Sequence[_Inputs], advance: Callable[[int], None]) -> Iterator[str]:
  """Streams training text: all of it, or of large corpora pieces evenly spread.

  Where the size is not known beforehand, the first part instead.
  """
  share = BPE_SAMPLE_CHARS // len(inputs)
  for given in inputs:
    stride = math.ceil((given.num_bytes or 0) / share) or 1
    documents = split_documents(given, "before_space")
    documents = (document for document in documents if document.split == "train")
    num_chars = 0
    for document in itertools.islice(documents, 0, None, stride):
      num_chars += len(document.text)
      advance(len(document.text))
      yield document.text
      if num_chars >= share:
        break


def split_documents(given: _Inputs, cuts: str) -> Iterator[Document]:
  """Streams a corpus with the split of each document, in order.

  Held-out sources are the validation split; without them whole documents are drawn by a hash of
  their number, and of a single document the last `valid_fraction` of its characters.
  """
  fraction = 0.0 if given.valid else given.valid_fraction
  # Beyond so many documents a draw that holds out none is out of the question.
  limit = math.ceil(8 / fraction) if fraction else 0
  count, num_chars = _count(read_documents(given.sources, "anywhere"), limit)
  documents = read_documents(given.sources, cuts)
  if count == 1:
    yield from _split_single(documents, int(num_chars * (1 - fraction)))
    return
  drawn = _draw(count, fraction) if 1 < count < limit else None
  for document in documents:
    if given.valid:
      is_valid = document.source >= len(given.train)
    elif drawn:
      is_valid = document.index in drawn
    else:
      is_valid = _uniform(document.index) < fraction
    yield dataclasses.replace(document, split="valid") if is_valid else document


def _count(documents: Iterator[Document], limit: int) -> tuple[int, int]:
  """Counts documents up to `limit`, and the characters of what was read."""
  count = num_chars = 0
  while count < limit and (document := next(documents, None)):
    num_chars += len(document.text)
    count += document.is_end
  return count, num_chars


def _split_single(documents: Iterable[Document], train_chars: int) -> Iterator[Document]:
  position = 0
  for document in documents:
    cut = min(max(train_chars - position, 0), len(document.text))
    position += len(document.text)
    head, tail = document.text[:cut], document.text[cut:]
    # The range of a record is that of all of it; only in a txt file can it be parted.
    is_exact = document.end_byte - document.start_byte == len(document.text.encode())
    middle = document.start_byte + len(head.encode())
    if head:
      end = middle if is_exact else document.end_byte
      is_end = document.is_end and not tail
      yield dataclasses.replace(document, text=head, end_byte=end, is_end=is_end)
    if tail:
      start = middle if is_exact else document.start_byte
      yield dataclasses.replace(document, text=tail, start_byte=start, split="valid")


def _draw(count: int, fraction: float) -> frozenset[int]:
  """Chooses which of a few documents are held out: at least one, and not all."""
  size = min(max(round(count * fraction), 1), count - 1)
  return frozenset(sorted(range(count), key=_uniform)[:size])


def _uniform(index: int) -> float:
  """Hashes a document's number to [0, 1)."""
  digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8).digest()
  return int.from_bytes(digest, "little") / 2**64


def _build_corpus(
  name: str, given: _Inputs, tokenizer: Tokenizer, config: DataConfig, cache: Path
) -> Path:
  identity = {"format": FORMAT_VERSION, "tokenizer": tokenizer.fingerprint, **given.identity}
  folder = cache / f"{name}-{_fingerprint(identity)[:16]}"

  def build(temporary: Path) -> None:
    temporary.mkdir()
    if given.is_tokens:
      splits = _describe_tokens(given, tokenizer, temporary)
    else:
      splits = _write_tokens(name, given, tokenizer, config.build_processes, temporary)
    for split, sources in (("train", given.train), ("valid", given.valid)):
      if sources and not splits[split]["num_tokens"]:
        raise DataError(f'corpus "{name}" is empty: there is no text in {_names(sources)}')
    tokenizer.save(temporary / "tokenizer.json")
    manifest = {
      **identity,
      "vocab_size": tokenizer.vocab_size,
      "end_id": tokenizer.end_id,
      "sources": [dataclasses.asdict(source) for source in given.sources],
      "splits": splits,
    }
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")

  build_once(folder, is_whole, build)
  return folder


def _write_tokens(
  name: str, given: _Inputs, tokenizer: Tokenizer, processes: int | None, folder: Path
) -> dict[str, Any]:
  dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
  num_bytes = given.num_bytes
  if processes is None:
    is_small = num_bytes is not None and num_bytes < PROCESSES_FROM_BYTES
    processes = 0 if is_small else os.cpu_count() or 1
  encoded = encode_documents(split_documents(given, tokenizer.cuts), tokenizer, processes)
  with contextlib.ExitStack() as stack:
    advance = stack.enter_context(show_progress(name, num_bytes))
    writers = {
      split: stack.enter_context(TokenWriter(folder, split, tokenizer.end_id, dtype))
      for split in SPLITS
    }
    for documents, arrays in encoded:
      for document, ids in zip(documents, arrays, strict=True):
        writers[document.split].append(document, ids)
      advance(sum(len(document.text.encode()) for document in documents))
    return {split: writer.finish() for split, writer in writers.items()}


def _describe_tokens(given: _Inputs, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
  train = [find_shard(source.path) for source in given.train]
  valid = [find_shard(source.path) for source in given.valid]
  if not valid and given.valid_fraction:
    total = sum(shard.num_tokens for shard in train)
    cut = int(total * (1 - given.valid_fraction))
    train, valid = slice_shards(train, 0, cut), slice_shards(train, cut, total)
  numbers = {source.path: number for number, source in enumerate(given.sources)}
  return {
    split: describe_shards(
      folder, split, shards, numbers, tokenizer.end_id, tokenizer.bytes_of_token
    )
    for split, shards in zip(SPLITS, (train, valid), strict=True)
  }


def _describe(name: str, train: TokenFiles, valid: TokenFiles) -> str:
  text_bytes = train.text_bytes + valid.text_bytes
  num_tokens = train.num_tokens + valid.num_tokens
  return (
    f"{name}: {train.num_tokens:,} training and {valid.num_tokens:,} validation tokens of"
    f" {text_bytes / num_tokens:.3f} bytes each"
  )


def _names(sources: Iterable[Source]) -> str:
  names = [source.path for source in sources]
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
