"""Text to token ids and back: characters, byte-level BPE, any tokenizer.json, GPT-2's files.

Everything is one `tokenizers.Tokenizer`, saved as one tokenizer.json. Text is only ever text: a
corpus that spells `<|endoftext|>` is tokenised letter by letter, and the token itself is written
by its id. Imports no jax, because the processes that build token files import this.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import (
  AddedToken,
  Regex,
  decoders,
  models,
  pre_tokenizers,
  trainers,
)
from tokenizers import (
  Tokenizer as Backend,
)

from gptjax.errors import DataError, did_you_mean

KNOWN_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_ONE_CHARACTER = r"[\s\S]"


class Tokenizer:
  """A `tokenizers.Tokenizer` that reads text as text and refuses ids it does not have.

  Attributes:
    backend: the wrapped `tokenizers.Tokenizer`.
    end_token, end_id: the token that ends a document, or None where documents have no end token.
    vocab_size: one more than the largest id.
    cuts: where a text may be cut so that its parts are tokenised as the whole is: "anywhere"
      (characters), "before_space" (GPT-2's pre-tokenisation never joins a space to what precedes
      it), or "nowhere" that we can prove.
  """

  def __init__(self, backend: Backend, end_token: str | None = None):
    backend.no_padding()
    backend.no_truncation()
    vocab = backend.get_vocab(with_added_tokens=True)
    if end_token is not None:
      if end_token not in vocab:
        raise DataError(
          f'data.end_token "{end_token}" is not in the tokenizer; set it to "" or to a token it has'
          + did_you_mean(end_token, _special_tokens(backend))
        )
      backend.add_special_tokens([AddedToken(end_token, special=True, normalized=False)])
    backend.encode_special_tokens = True
    self.backend = backend
    self.end_token = end_token
    self.end_id: int | None = None if end_token is None else vocab[end_token]
    self.vocab_size: int = max(vocab.values()) + 1
    self._spec = json.loads(backend.to_str())
    self._is_char = _is_character_spec(self._spec)
    self.cuts = self._find_cuts()

  @functools.cached_property
  def fingerprint(self) -> str:
    """sha256 of all that decides the ids of a text."""
    spec = json.dumps([self._spec, self.end_token], sort_keys=True)
    return hashlib.sha256(spec.encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Returns the ids of one text, without an end token."""
    return self.encode_arrays([text])[0].tolist()

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of several texts, on all cores."""
    return [ids.tolist() for ids in self.encode_arrays(texts)]

  def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns int32 ids [tokens] of each text, on all cores.

    Raises:
      DataError: a character that a character tokenizer does not have, or invalid text.
    """
    if self._is_char:
      return [self._encode_characters(text) for text in texts]
    try:
      encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
    except UnicodeEncodeError as error:
      raise DataError(f"text holds {error.object[error.start]!r}, half of a character") from error
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
    """Returns the text of token ids.

    Raises:
      DataError: an id that is not in the vocabulary, such as one of the rows that pad it.
    """
    ids = [int(token) for token in ids]
    for token in ids:
      if token not in self._known_ids:
        raise DataError(
          f"token id {token} is not in the vocabulary; ids are below {self.vocab_size}"
        )
    return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

  def byte_spans(self, text: str) -> np.ndarray:
    """Returns int64 [tokens, 2]: the UTF-8 bytes of `text` that each token was made from."""
    char_bytes = np.array([len(char.encode()) for char in text], np.int64)
    ends = np.concatenate([[0], np.cumsum(char_bytes)])
    if self._is_char:
      return np.stack([ends[:-1], ends[1:]], axis=1)
    offsets = self.backend.encode(text, add_special_tokens=False).offsets
    return ends[np.array(offsets, np.int64).reshape(-1, 2)]

  @functools.cached_property
  def bytes_of_token(self) -> np.ndarray:
    """UTF-8 bytes that each id adds to a text, int64 [vocab_size]; special tokens add none.

    Exact for characters and byte-level tokenizers, where a token may be part of a character.
    """
    sizes = np.zeros(self.vocab_size, np.int64)
    added = self.backend.get_added_tokens_decoder()
    is_byte_level = (self._spec["decoder"] or {}).get("type") == "ByteLevel"
    for token, index in self.backend.get_vocab(with_added_tokens=True).items():
      if index in added:
        sizes[index] = 0 if added[index].special else len(token.encode())
      else:
        # ByteLevel writes each byte as one printable character.
        sizes[index] = len(token) if is_byte_level else len(self.backend.decode([index]).encode())
    return sizes

  def save(self, path: str | Path) -> None:
    """Writes one tokenizer.json, which `load_tokenizer` reads back."""
    Path(path).write_text(self.backend.to_str(pretty=True), encoding="utf-8")

  @functools.cached_property
  def _known_ids(self) -> frozenset[int]:
    return frozenset(self.backend.get_vocab(with_added_tokens=True).values())

  @functools.cached_property
  def _id_of_codepoint(self) -> np.ndarray:
    special = _special_tokens(self.backend)
    table = np.full(0x110000, -1, np.int32)
    for char, index in self.backend.get_vocab(with_added_tokens=True).items():
      if char not in special:
        table[ord(char)] = index
    return table

  def _encode_characters(self, text: str) -> np.ndarray:
    codepoints = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    ids = self._id_of_codepoint[codepoints]
    if ids.size and ids.min() < 0:
      char = text[int(ids.argmin())]
      raise DataError(
        f"character {char!r} (U+{ord(char):04X}) is not among the {self.vocab_size} of the"
        ' tokenizer; remove it, or use data.tokenizer "bpe"'
      )
    return ids

  def _find_cuts(self) -> str:
    if self._is_char:
      return "anywhere"
    steps, added = self._spec["pre_tokenizer"] or {}, self._spec["added_tokens"]
    is_gpt2 = (
      steps.get("type") == "ByteLevel"
      and steps.get("use_regex", True)
      and not steps["add_prefix_space"]
      and self._spec["normalizer"] is None
      and all(token["special"] for token in added)
    )
    return "before_space" if is_gpt2 else "nowhere"


def load_tokenizer(path: str | Path, end_token: str | None = None) -> Tokenizer:
  """Loads a tokenizer.json, a folder with one, or a folder with GPT-2's two files.

  Args:
    path: a file, or a folder with tokenizer.json, encoder.json + vocab.bpe, or
      vocab.json + merges.txt.
    end_token: text of the end token; "" for none; None finds it: tokenizer_config.json's
      eos_token, the only special token, or a usual name among several.

  Raises:
    DataError: no tokenizer there, a damaged one, or one without that end token.
  """
  path = Path(path).expanduser()
  file = path / "tokenizer.json" if path.is_dir() else path
  pairs = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
  pair = next((p for p in pairs if all((path / name).is_file() for name in p)), None)
  with _damage_named(path):
    if file.is_file():
      backend = Backend.from_str(file.read_text(encoding="utf-8"))
    elif pair:
      backend = _read_gpt2_files(path / pair[0], path / pair[1])
    else:
      raise DataError(
        f'no tokenizer in "{path}"; give "char", "bpe", a tokenizer.json, or a folder with one'
        " or with encoder.json and vocab.bpe"
      )
  if end_token is None:
    return Tokenizer(backend, _find_end_token(backend, file.with_name("tokenizer_config.json")))
  return Tokenizer(backend, end_token or None)


def train_bpe(texts: Iterable[str], vocab_size: int, end_token: str = "<|endoftext|>") -> Tokenizer:
  """Trains a byte-level BPE, lossless on any text.

  Args:
    texts: a stream; memory grows with its distinct words, not with its length.
    vocab_size: entries wanted, the 256 bytes and the end token included; a small corpus may
      have fewer pairs to merge.
    end_token: text of the end token, which gets id 0; "" for none.

  Raises:
    DataError: vocab_size is too small to hold every byte.

  Source: Radford et al. 2019, section 2.2, with GPT-2's pre-tokenisation.
  """
  special = [end_token] if end_token else []
  if vocab_size < 256 + len(special):
    raise DataError(
      f"data.vocab_size is {vocab_size}; a byte-level BPE needs at least {256 + len(special)}"
    )
  backend = _byte_level(models.BPE())
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    special_tokens=special,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  return Tokenizer(backend, end_token or None)


def make_char_tokenizer(texts: Iterable[str], end_token: str = "") -> Tokenizer:
  """Makes a tokenizer with one id for each character of the texts, in order of code point.

  Args:
    texts: a stream.
    end_token: text of the end token, which gets the last id; "" for none.

  Raises:
    DataError: the end token is a character of the texts, or there is no text.
  """
  characters = set()
  for text in texts:
    characters.update(text)
  if not characters:
    raise DataError("the corpus is empty; data.files must hold some text")
  if end_token in characters:
    raise DataError(f'data.end_token "{end_token}" is a character of the corpus; make it longer')
  backend = Backend(models.WordLevel({char: i for i, char in enumerate(sorted(characters))}))
  backend.pre_tokenizer = pre_tokenizers.Split(Regex(_ONE_CHARACTER), "isolated")
  backend.decoder = decoders.Fuse()
  if end_token:
    backend.add_special_tokens([AddedToken(end_token, special=True, normalized=False)])
  return Tokenizer(backend, end_token or None)


def cut_text(text: str, size: int, cuts: str) -> Iterator[str]:
  """Cuts a text into parts of about `size` characters that are tokenised as the whole is.

  Args:
    cuts: `Tokenizer.cuts`.
  """
  start = 0
  while len(text) - start > size:
    cut = find_cut(text, start + size, cuts)
    if cut is None:
      break
    yield text[start:cut]
    start = cut
  if start < len(text):
    yield text[start:]


def find_cut(text: str, position: int, cuts: str) -> int | None:
  """Returns the first admissible cut at or after `position`, or None.

  GPT-2's pattern has no word with a space after its first character, and its one look-ahead
  concerns runs of spaces, so the place between a non-space and a space always parts two words.
  The spaces named are those on which Python's and the tokenizer's idea of a space agree.
  """
  if cuts == "anywhere":
    return position if position < len(text) else None
  if cuts == "before_space":
    match = _SPACE_AFTER_WORD.search(text, max(position, 1) - 1)
    return match.start() + 1 if match else None
  return None


_SPACE_AFTER_WORD = re.compile(r"\S(?=[ \t\n\r\u3000])")


def _byte_level(model: models.Model) -> Backend:
  backend = Backend(model)
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return backend


def _read_gpt2_files(vocab_file: Path, merges_file: Path) -> Backend:
  backend = _byte_level(models.BPE.from_file(str(vocab_file), str(merges_file)))
  if "<|endoftext|>" in backend.get_vocab():
    backend.add_special_tokens(["<|endoftext|>"])
  return backend


def _special_tokens(backend: Backend) -> list[str]:
  added = backend.get_added_tokens_decoder()
  return [token.content for _, token in sorted(added.items()) if token.special]


def _find_end_token(backend: Backend, config_file: Path) -> str | None:
  special = _special_tokens(backend)
  if config_file.is_file():
    named = json.loads(config_file.read_text(encoding="utf-8")).get("eos_token")
    named = named["content"] if isinstance(named, dict) else named
    if named in special:
      return named
  if len(special) == 1:
    return special[0]
  return next((token for token in KNOWN_END_TOKENS if token in special), None)


def _is_character_spec(spec: dict) -> bool:
  pre = spec["pre_tokenizer"] or {}
  return (
    spec["model"]["type"] == "WordLevel"
    and spec["normalizer"] is None
    and pre.get("type") == "Split"
    and pre["pattern"] == {"Regex": _ONE_CHARACTER}
    and all(len(token) == 1 for token in spec["model"]["vocab"])
  )


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
  try:
    yield
  except DataError:
    raise
  # tokenizers raises bare Exception for whatever it cannot parse.
  except Exception as error:
    raise DataError(f'tokenizer "{path}" cannot be read: {error}') from error
