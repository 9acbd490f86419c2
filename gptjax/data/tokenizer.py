"""Text to token ids and back: characters, byte-level BPE, GPT-1's, SentencePiece, tokenizer.json.

Everything is one `tokenizers.Tokenizer`, saved as one tokenizer.json. Text is only ever text: a
corpus that spells `<|endoftext|>` is tokenised letter by letter, and the token itself is written
by its id, unless a caller asks otherwise. What a tokenizer.json cannot say is noted in it: the
roles of special tokens, and that `gpt1-paper` works on text in Python first (`special_tokens`).
Imports no jax, because the processes that build token files import this.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from gptjax.data.gpt1_tokenizer import TEXT_NOTE, WORD_END, paper_words
from gptjax.data.special_tokens import (
  ROLES,
  add_special,
  check_given,
  known_roles,
  read_notes,
  special_tokens,
  usual_roles,
  write_notes,
)
from gptjax.data.text_stream import TextStream
from gptjax.data.tokenizer_files import byte_level, read_backend, split_mode
from gptjax.errors import ConfigError, DataError, UserError, did_you_mean

_ONE_CHARACTER = r"[\s\S]"


class Tokenizer:
  """A `tokenizers.Tokenizer` that reads text as text and refuses ids it does not have.

  Attributes:
    backend: the wrapped `tokenizers.Tokenizer`.
    roles: {role: token}, with transformers' names: bos_token, eos_token, unk_token, ...
    end_token, end_id: the eos_token, or None where documents have no end token.
    bos_id, unk_id, pad_id: ids of those roles, or None.
    added_tokens: {token: id} of those that were in no file, and got ids after all others.
    vocab_size: one more than the largest id.
    cuts: where a text may be cut so that its parts are tokenised as the whole is: "anywhere"
      (characters), "before_space" (GPT-2's pre-tokenisation never joins a space to what precedes
      it), or "nowhere" that we can prove.
  """

  def __init__(
    self,
    backend: Backend,
    end_token: str | None = None,
    roles: Mapping[str, str] | None = None,
    added_tokens: Mapping[str, int] | None = None,
  ):
    backend.no_padding()
    backend.no_truncation()
    vocab = backend.get_vocab(with_added_tokens=True)
    if end_token is not None:
      if end_token not in vocab:
        raise DataError(
          f'data.end_token "{end_token}" is not in the tokenizer; set it to "" or to a token it has'
          + did_you_mean(end_token, special_tokens(backend))
        )
      backend.add_special_tokens([AddedToken(end_token, special=True, normalized=False)])
    backend.encode_special_tokens = True
    named = dict(usual_roles(backend) if roles is None else roles) | {"eos_token": end_token}
    self.roles = {role: token for role, token in named.items() if token is not None}
    if self.roles and self.roles != known_roles(backend):
      write_notes(backend, self.roles)
    self._spec = json.loads(backend.to_str())
    self.backend = backend
    self.added_tokens = dict(added_tokens or {})
    self.end_token = end_token
    self.end_id, self.bos_id, self.unk_id, self.pad_id = (
      vocab.get(self.roles.get(role))
      for role in ("eos_token", "bos_token", "unk_token", "pad_token")
    )
    self.vocab_size: int = max(vocab.values()) + 1
    self._is_char = _is_character_spec(self._spec)
    self._is_byte_level = (self._spec["decoder"] or {}).get("type") == "ByteLevel"
    self._takes_words = read_notes(backend).get(TEXT_NOTE) == "gpt1-paper"
    self.cuts = self._find_cuts()

  @functools.cached_property
  def fingerprint(self) -> str:
    """sha256 of all that decides the ids of a text."""
    spec = json.dumps([self._spec, self.end_token], sort_keys=True)
    return hashlib.sha256(spec.encode()).hexdigest()

  def encode(
    self, text: str, *, parse_special_tokens: bool = False, add_special_tokens: bool = False
  ) -> list[int]:
    """Returns the ids of one text, without an end token.

    Args:
      parse_special_tokens: text that spells a special token becomes it, as in transformers; for
        prompts that their author wrote with such tokens, never for text from elsewhere.
      add_special_tokens: what the tokenizer.json's post-processor puts around a text, if it does.
    """
    if not (parse_special_tokens or add_special_tokens) or self._is_char or self._takes_words:
      parts = self._special_pattern.split(text) if parse_special_tokens else [text]
      # Every second part is a special token.
      ids = [
        [self.backend.token_to_id(part)] if i % 2 else self.encode_arrays([part])[0].tolist()
        for i, part in enumerate(parts)
      ]
      return list(itertools.chain(*ids))
    backend = self._parsing_backend if parse_special_tokens else self.backend
    with _half_characters_named([text]):
      return backend.encode(text, add_special_tokens=add_special_tokens).ids

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
    with _half_characters_named(texts):
      inputs = [paper_words(text) for text in texts] if self._takes_words else list(texts)
      encodings = self.backend.encode_batch_fast(
        inputs, is_pretokenized=self._takes_words, add_special_tokens=False
      )
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

  def decode_after(
    self, before: Sequence[int], ids: Iterable[int], skip_special_tokens: bool = True
  ) -> str:
    """Returns what ids add to the text of those before them, the space between two words too.

    GPT-1's tokenizer and SentencePiece leave out the space that begins a text.
    """
    stream = self.decode_stream(skip_special_tokens, before)
    return "".join(map(stream.step, ids)) + stream.finish()

  def decode_stream(
    self, skip_special_tokens: bool = True, before: Sequence[int] = ()
  ) -> TextStream:
    """Starts the decoding of ids one by one into pieces of text.

    Args:
      before: ids of the text that they continue; those that are not in the vocabulary add nothing.
    """
    known = [token for token in before if token in self._known_ids]
    return TextStream(self.backend, skip_special_tokens, known)

  def byte_spans(self, text: str) -> np.ndarray:
    """Returns int64 [tokens, 2]: the UTF-8 bytes of `text` that each token was made from.

    Raises:
      DataError: gpt1-paper, which rewrites the text first.
    """
    if self._takes_words:
      raise DataError(
        "gpt1-paper rewrites text before it is tokenised, so its tokens have no place in it;"
        " use gpt1-hf where places are needed"
      )
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
    for token, index in self.backend.get_vocab(with_added_tokens=True).items():
      if index in added:
        sizes[index] = 0 if added[index].special else len(token.encode())
      else:
        # ByteLevel writes each byte as one printable character.
        sizes[index] = len(token) if self._is_byte_level else len(_surface(token).encode())
    return sizes

  @functools.cached_property
  def begins_with_space(self) -> np.ndarray:
    """bool [vocab_size]: ids whose text begins with a space; a space alone is one of them."""
    spaces = (" ", "▁", "Ġ") if self._is_byte_level else (" ", "▁")
    begins = np.zeros(self.vocab_size, bool)
    for token, index in self.backend.get_vocab(with_added_tokens=True).items():
      begins[index] = token.startswith(spaces)
    return begins

  def save(self, path: str | Path) -> None:
    """Writes one tokenizer.json, which `load_tokenizer` reads back."""
    Path(path).write_text(self.backend.to_str(pretty=True), encoding="utf-8")

  @functools.cached_property
  def _parsing_backend(self) -> Backend:
    """Our backend switched to parse special tokens; a switch is not for threads to share."""
    backend = Backend.from_str(self.backend.to_str())
    backend.encode_special_tokens = False
    return backend

  @functools.cached_property
  def _special_pattern(self) -> re.Pattern:
    longest_first = sorted(special_tokens(self.backend), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first or ["(?!)"])) + ")")

  @functools.cached_property
  def _known_ids(self) -> frozenset[int]:
    return frozenset(self.backend.get_vocab(with_added_tokens=True).values())

  @functools.cached_property
  def _id_of_codepoint(self) -> np.ndarray:
    special = special_tokens(self.backend)
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


def load_tokenizer(
  path: str | Path,
  end_token: str | None = None,
  *,
  do_lower_case: bool | None = None,
  **given: str | Sequence[str],
) -> Tokenizer:
  """Loads a tokenizer of any kind that gptjax knows.

  Args:
    path: a tokenizer.json, a SentencePiece .model, or a folder with one of them, with
      encoder.json + vocab.bpe, vocab.json + merges.txt, BERT's vocab.txt, or GPT-1's
      encoder_bpe_40000.json + vocab_40000.bpe. GPT-1's text handling is `gpt1-paper` for OpenAI's
      own files and `gpt1-hf` for others with `</w>`; "gpt1-paper:PATH" or "gpt1-hf:PATH" says
      which.
    end_token: text of the end token, which the tokenizer must have; "" for none; None finds it:
      eos_token given here, noted in the file or in tokenizer_config.json, or
      `special_tokens.usual_roles`.
    do_lower_case: lower-case text for a SentencePiece model or BERT's; None does what
      tokenizer_config.json says.
    given: special tokens by role, as transformers' `AutoTokenizer.from_pretrained` takes them:
      bos_token="[BOS]", pad_token=..., additional_special_tokens=[...]. Those that the vocabulary
      lacks are added after its last id (`Tokenizer.added_tokens`).

  Raises:
    UnknownTokenizerError: no tokenizer there, or none of a known kind.
    DataError: a damaged one, or one without that end token.
    ConfigError: a special token with a misspelt role, or two end tokens.
  """
  roles, others = check_given(given)
  if end_token is not None and roles.get("eos_token", end_token) != end_token:
    raise ConfigError(f'end_token "{end_token}" and eos_token "{roles["eos_token"]}" are one thing')
  mode, path = split_mode(path)
  with _damage_named(path):
    backend, said = read_backend(path, mode, do_lower_case)
  roles = known_roles(backend) | said | roles
  if end_token is not None:
    roles.pop("eos_token", None)
  added = add_special(backend, [*(roles[role] for role in ROLES if role in roles), *others])
  return Tokenizer(backend, roles.get("eos_token") or end_token or None, roles, added)


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
  if end_token in pre_tokenizers.ByteLevel.alphabet():
    raise DataError(f'data.end_token "{end_token}" is how a byte is written; make it longer')
  backend = byte_level(models.BPE())
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


def _surface(token: str) -> str:
  """The text that a token of SentencePiece or GPT-1 stands for."""
  if re.fullmatch("<0x[0-9A-F]{2}>", token):
    return "x"
  return token.replace("▁", " ").replace(WORD_END, " ")


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
def _half_characters_named(texts: Sequence[str]) -> Iterator[None]:
  try:
    yield
  except (UnicodeEncodeError, TypeError) as error:
    # A batch fails with a TypeError that does not say which text it was.
    half = next(filter(None, map(re.compile("[\ud800-\udfff]").search, texts)), None)
    if half is None:
      raise
    raise DataError(f"text holds {half.group()!r}, half of a character") from error


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
  try:
    yield
  except UserError:
    raise
  # tokenizers raises bare Exception for whatever it cannot parse, and panics for some of it.
  except BaseException as error:
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise DataError(f'tokenizer "{path}" cannot be read: {error}') from error
