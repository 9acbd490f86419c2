"""What is scored: texts or token files, with the counts that scores are divided by, and its hash.

Documents are held in memory whole, as text and as ids; corpora of some GB fit.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from gptjax.checkpoint.models import Loaded
from gptjax.data.corpus import BYTES_OF, PIECE_CHARS, Source, find_files, read_documents
from gptjax.data.token_files import find_shard, scan_shard
from gptjax.data.tokenizer import Tokenizer, cut_text
from gptjax.errors import ConfigError, DataError
from gptjax.evaluate.detokenizers import detokenize
from gptjax.evaluate.protocol import Protocol
from gptjax.evaluate.scoring import check_ids

HUB = "hub:"
TOKEN_SUFFIX = ".bin"


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """Documents as ids, and the size of the text they were made from.

  Attributes:
    documents: int32 ids of each, after the start token of the protocol.
    words, bytes, characters: of the original text, before the detokenizer; None for a token file
      and a model without tokenizer.
    data_hash: of the original texts, wherever they lie, or of the tokens of token files.
  """

  documents: list[np.ndarray]
  words: int | None
  bytes: int | None
  characters: int | None
  data_hash: str


def read_corpus(data: Sequence[str], model: Loaded, protocol: Protocol) -> Corpus:
  """Reads what `--data` names, as a protocol says.

  Args:
    data: paths and globs of texts (.jsonl, .jsonl.gz, .csv and .parquet hold records, any other
      name a text), of token files (.bin), or "hub:NAME[:CONFIGURATION]@SPLIT".
    model: its tokenizer makes the ids.
    protocol: of documents, detokenizer, words and start.

  Raises:
    DataError: nothing there, nothing to score, not UTF-8, or a tokenizer that is missing or does
      not fit the model.
    ConfigError: a start token that the model does not have, or an option without effect on tokens.
  """
  start = start_ids(model, protocol.start)
  if any(pattern.endswith(TOKEN_SUFFIX) for pattern in data):
    return _token_corpus(data, model, protocol, start)
  texts = read_texts(data, protocol.documents, protocol.text_column)
  ids = encode([detokenize(text, protocol.detokenizer) for text in texts], model)
  counts = _count(texts, protocol.words)
  return Corpus(_begin(ids, start, data), *counts, hash_documents(text.encode() for text in texts))


def read_texts(
  data: Sequence[str], documents: str = "whole", text_column: str = "text"
) -> list[str]:
  """Returns the documents of files or of a hub data set; see `read_corpus`.

  Raises:
    DataError: nothing there, or empty; or a file that cannot be read or is not UTF-8.
  """
  sources = _find_sources(data, text_column)
  texts = []
  # A detokenizer must see a document whole; the pieces of one are joined again.
  for _, pieces in itertools.groupby(read_documents(sources), key=lambda piece: piece.index):
    pieces = list(pieces)
    text = "".join(piece.text for piece in pieces)
    is_parted = documents == "lines" and sources[pieces[0].source].kind == "txt"
    # Lines keep their ends, which are scored as in a whole text.
    lines = re.findall(r"[^\n]*\n|[^\n]+", text) if is_parted else [text]
    texts += [line for line in lines if line.strip()] if is_parted else lines
  if not texts:
    raise DataError(f"{_name(data)} is empty; there is nothing to score")
  return texts


def _find_sources(data: Sequence[str], text_column: str) -> list[Source]:
  sources = [
    Source("hub", name.removeprefix(HUB), text_column) for name in data if name.startswith(HUB)
  ]
  for source in sources:
    if "@" not in source.path:
      raise DataError(f'"{HUB}{source.path}" names no split; write "{HUB}{source.path}@test"')
  for path in find_files(name for name in data if not name.startswith(HUB)):
    kinds = (kind for kind in BYTES_OF if path.lower().endswith(f".{kind}"))
    sources.append(Source(next(kinds, "txt"), path, text_column))
  return sources


def encode(texts: Sequence[str], model: Loaded) -> list[np.ndarray]:
  """Returns int32 ids of each text, on all cores.

  Raises:
    DataError: the model has no tokenizer, or one with ids that it does not have.
  """
  tokenizer = need_tokenizer(model)
  documents = []
  for text in texts:
    pieces = tokenizer.encode_arrays(list(cut_text(text, PIECE_CHARS, tokenizer.cuts)))
    documents.append(np.concatenate([*pieces, np.zeros(0, np.int32)]))
    check_ids(documents[-1], model.config.vocab_size)
  return documents


def encode_pairs(
  pairs: Sequence[tuple[str, str]], model: Loaded
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns ids of (context, continuation) pairs, parted from the ids of the two texts joined.

  A word is thus tokenised as it is in a text; a token with letters of both belongs to the
  continuation. Raises DataError as `encode`.
  """
  contexts = encode([context for context, _ in pairs], model)
  joined = encode([context + continuation for context, continuation in pairs], model)
  cuts = [_shared(*both) for both in zip(contexts, joined)]
  return [(ids[:cut], ids[cut:]) for ids, cut in zip(joined, cuts)]


def _shared(left: np.ndarray, right: np.ndarray) -> int:
  """Counts the ids with which both begin."""
  size = min(len(left), len(right))
  differ = np.flatnonzero(left[:size] != right[:size])
  return int(differ[0]) if differ.size else size


def need_tokenizer(model: Loaded) -> Tokenizer:
  """Returns the tokenizer of a model. Raises DataError where it has none."""
  if model.tokenizer is None:
    raise DataError("the model has no tokenizer, and text needs one; give --tokenizer")
  return model.tokenizer


class TokenTexts:
  """The texts of single tokens; "" for an id that only pads the vocabulary. Remembers them."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._texts: dict[int, str] = {}

  def __call__(self, index: int) -> str:
    if index not in self._texts:
      try:
        self._texts[index] = self._tokenizer.decode([index])
      except DataError:
        self._texts[index] = ""
    return self._texts[index]


def start_ids(model: Loaded, start: str) -> list[int]:
  """Returns the ids that a protocol puts before each document, none or one.

  Raises:
    ConfigError: the model has no such token.
  """
  if start == "none":
    return []
  ids = model.token_ids[{"bos": "bos", "end": "eos"}[start]]
  if not ids:
    raise ConfigError(f'start is "{start}", and the model has no such token; set it to "none"')
  return [ids[0]]


def _token_corpus(
  data: Sequence[str], model: Loaded, protocol: Protocol, start: list[int]
) -> Corpus:
  """Reads token files, each one document; words and bytes are those of the text they decode to."""
  for option, off in (("detokenizer", "none"), ("documents", "whole")):
    if getattr(protocol, option) != off:
      raise ConfigError(
        f'{option} is "{getattr(protocol, option)}", which has no effect on token files; set it to'
        f' "{off}"'
      )
  documents = []
  for path in find_files(data):
    if not path.endswith(TOKEN_SUFFIX):
      raise DataError(f'"{path}" is text, and others are token files; score them apart')
    documents.append(np.concatenate([*scan_shard(find_shard(path))]).astype(np.int32))
    check_ids(documents[-1], model.config.vocab_size)
  counts = (None, None, None)
  if model.tokenizer is not None:
    texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in documents]
    counts = _count(texts, protocol.words)
  return Corpus(
    _begin(documents, start, data), *counts, hash_documents(ids.tobytes() for ids in documents)
  )


def _begin(documents: list[np.ndarray], start: list[int], data: Sequence[str]) -> list[np.ndarray]:
  """Puts the start token first; of a document of one token nothing is scored."""
  begun = [np.array([*start, *ids], np.int32) for ids in documents]
  if max(map(len, begun)) < 2:
    raise DataError(
      f"{_name(data)} has one token, and nothing comes before it; give more text, or a start token"
    )
  return begun


def _count(texts: Iterable[str], words: str) -> tuple[int, int, int]:
  """Counts words, UTF-8 bytes and characters."""
  counts = [
    (
      len(text.split()) + (text.count("\n") if words == "spaces_and_newlines" else 0),
      len(text.encode()),
      len(text),
    )
    for text in texts
  ]
  return tuple(map(sum, zip(*counts)))


def hash_documents(documents: Iterable[bytes]) -> str:
  """Hashes documents and where they end."""
  digest = hashlib.sha256()
  for document in documents:
    digest.update(len(document).to_bytes(8, "little"))
    digest.update(document)
  return digest.hexdigest()


def _name(data: Sequence[str]) -> str:
  return f'"{data[0]}"' if len(data) == 1 else f"the text of {len(data)} files"
