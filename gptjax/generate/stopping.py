"""Stop strings: found on the device, across the borders of tokens, in new text only.

A stop string is an automaton over bytes (Knuth, Morris and Pratt 1977). The host runs it over the
bytes of every token from every state, so that on the device one look-up a token advances it. UTF-8
lets no character begin inside another, so that bytes match where characters do.

What a token adds to a text may depend on what is before it: SentencePiece drops the space that
begins a text, and GPT-1 writes the space of `</w>` when the next token comes. The states of the
automaton carry this context, so that a string is found exactly when decoding shows it.

Z counts stop strings of a batch, S states.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from gptjax.data.gpt1_tokenizer import WORD_END
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError

_SMALLEST_STATES = 16
# A GPT-2 table of a string of 20 characters is 1.6 MB.
_TABLES_KEPT = 64
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


@struct.dataclass
class Stops:
  """Automata of the stop strings of a batch, one program for strings of about the same length.

  Attributes:
    next_ZSV: uint8 or uint16, the state after each token.
    final_Z: int32, the state that has seen the string; it is never left.
    active_RZ: bool, which strings stop which row.
  """

  next_ZSV: jax.Array
  final_Z: jax.Array
  active_RZ: jax.Array


def advance(state_RZ: jax.Array, token_R: jax.Array, stops: Stops) -> tuple[jax.Array, jax.Array]:
  """Returns (int32 state_RZ, bool is_stopped_R) after one more token a row."""
  string_1Z = jnp.arange(len(stops.final_Z))[None, :]
  state_RZ = stops.next_ZSV[string_1Z, state_RZ, token_R[:, None]].astype(jnp.int32)
  is_seen_RZ = (state_RZ == stops.final_Z[None, :]) & stops.active_RZ
  return state_RZ, jnp.any(is_seen_RZ, axis=1)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
  """Returns new text up to where the first of the stop strings begins."""
  places = [text.find(stop) for stop in stops]
  return text[: min((place for place in places if place >= 0), default=len(text))]


def count_undecided(text: str, stops: Sequence[str]) -> int:
  """Counts the characters at the end of a text that may yet turn out to begin a stop string."""
  lengths = (
    size
    for stop in stops
    for size in range(min(len(stop) - 1, len(text)), 0, -1)
    if text.endswith(stop[:size])
  )
  return max(lengths, default=0)


@dataclasses.dataclass(frozen=True)
class TokenText:
  """What each token adds to a text.

  Attributes:
    bytes_of: for each context, the bytes that each id adds in it.
    context_after_V: int64, the context after each id; -1 is the one before it. A text begins in
      context 0.
  """

  bytes_of: tuple[list[bytes], ...]
  context_after_V: np.ndarray

  def context(self, ids: Sequence[int]) -> int:
    """Returns the context after a text."""
    contexts = self.context_after_V[np.asarray(ids, np.int64)]
    known = contexts[contexts >= 0]
    return int(known[-1]) if known.size else 0


def token_text(tokenizer: Tokenizer, skip_special_tokens: bool = True) -> TokenText:
  """Finds what each token adds to a text, for every kind of tokenizer.

  Bytes that are no valid UTF-8 are U+FFFD in decoded text and themselves here, so that a stop
  string with U+FFFD in it does not stop them.
  """
  backend = tokenizer.backend
  spec = json.loads(backend.to_str())["decoder"] or {}
  vocab = backend.get_vocab(with_added_tokens=True)
  if skip_special_tokens:
    added = backend.get_added_tokens_decoder()
    vocab = {token: i for token, i in vocab.items() if i not in added or not added[i].special}
  kinds = {spec.get("type")} | {step["type"] for step in spec.get("decoders", [])}
  if kinds == {"ByteLevel"}:
    pieces, contexts = (_byte_level_pieces(vocab),), dict.fromkeys(vocab, 0)
  elif kinds == {"BPEDecoder"} and spec["suffix"] == WORD_END:
    core = {token: token.removesuffix(WORD_END).encode() for token in vocab}
    pieces = core, {token: b" " + text for token, text in core.items()}
    contexts = {token: int(token.endswith(WORD_END)) for token in vocab}
  else:
    pieces, contexts = _decoded_pieces(backend, vocab), dict.fromkeys(vocab, 1)
  context_after_V = np.full(tokenizer.vocab_size, -1)
  bytes_of = tuple([b""] * tokenizer.vocab_size for _ in pieces)
  for token, index in vocab.items():
    context_after_V[index] = contexts[token]
    for texts, piece in zip(bytes_of, pieces):
      texts[index] = piece[token]
  return TokenText(bytes_of, context_after_V)


def _byte_level_pieces(vocab: dict[str, int]) -> dict[str, bytes]:
  """Tokens that spell each byte as one printable character; others stand for themselves."""
  byte_of = _byte_of_character()
  return {
    token: bytes(byte_of[char] for char in token)
    if all(char in byte_of for char in token)
    else token.encode()
    for token in vocab
  }


def _byte_of_character() -> dict[str, int]:
  """The bytes that byte-level tokenizers write as each printable character.

  Source: openai/gpt-2, encoder.py: printable bytes are themselves, the others follow from U+0100.
  """
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  same = {char: ord(char) for char in alphabet if ord(char) < 256}
  others = sorted(set(range(256)) - set(same.values()))
  return same | {chr(256 + i): byte for i, byte in enumerate(others)}


def _decoded_pieces(
  backend: Backend, vocab: dict[str, int]
) -> tuple[dict[str, bytes], dict[str, bytes]]:
  """What decoding shows of each token at the start of a text, and after another token."""
  before = next((t for t in vocab if t.isalnum() and t.isascii()), next(iter(vocab), ""))
  ids = list(vocab.values())

  def decode(texts):
    return backend.decode_batch(texts, skip_special_tokens=False)

  first = dict(zip(vocab, (text.encode() for text in decode([[i] for i in ids]))))
  pairs = decode([[vocab[before], i] for i in ids])
  skipped = len(decode([[vocab[before]]])[0])
  later = dict(zip(vocab, (text[skipped:].encode() for text in pairs)))
  for token in vocab:
    # Half a character, which decoding cannot show.
    if (byte := _BYTE_TOKEN.fullmatch(token)) and int(byte[1], 16) > 127:
      first[token] = later[token] = bytes([int(byte[1], 16)])
  return first, later


class StopStrings:
  """Makes the stop strings of batches, for one tokenizer; remembers tables that it made.

  Args:
    tokenizer: of the model.
    vocab_size: of the model's logits; ids that the tokenizer does not have change nothing.
    skip_special_tokens: whether texts are decoded without special tokens.
  """

  def __init__(self, tokenizer: Tokenizer, vocab_size: int, skip_special_tokens: bool = True):
    self.text = token_text(tokenizer, skip_special_tokens)
    self._vocab_size = max(vocab_size, tokenizer.vocab_size)
    self._table = functools.lru_cache(_TABLES_KEPT)(self._make_table)

  def make(
    self, stops_of_rows: Sequence[Sequence[str]], prompts: Sequence[Sequence[int]]
  ) -> tuple[Stops, np.ndarray] | tuple[None, None]:
    """Returns (stops, int32 state_RZ before the first new token), or Nones where nothing stops.

    Args:
      stops_of_rows: the stop strings of each row.
      prompts: ids of each row, of which only the context of new text is used.

    Raises:
      UserError: an empty stop string.
    """
    if any(not stop for row in stops_of_rows for stop in row):
      raise UserError('a stop string is ""; it must have a character, or be left out')
    strings = sorted({stop for row in stops_of_rows for stop in row})
    if not strings:
      return None, None
    # Few sizes, so that few programs are compiled.
    strings = [*strings, *[""] * ((1 << (len(strings) - 1).bit_length()) - len(strings))]
    tables = [self._table(stop) for stop in strings]
    num_states = max(_SMALLEST_STATES, 1 << (max(map(len, tables)) - 1).bit_length())
    shape = (len(tables), num_states, self._vocab_size)
    next_ZSV = np.zeros(shape, np.result_type(*tables))
    for table_SV, next_SV in zip(tables, next_ZSV):
      next_SV[: len(table_SV)] = table_SV
    stops = Stops(
      next_ZSV=next_ZSV,
      final_Z=np.array([len(table_SV) - 1 for table_SV in tables], np.int32),
      active_RZ=np.array([[stop in row for stop in strings] for row in stops_of_rows]),
    )
    contexts_R = np.array([self.text.context(prompt) for prompt in prompts], np.int32)
    return stops, np.repeat(contexts_R[:, None], len(strings), axis=1)

  def _make_table(self, stop: str) -> np.ndarray:
    """Returns the states after each token, [S, V]; the last state has seen the string.

    State s * contexts + c has seen s bytes of the string, in context c.
    """
    step_SB = _byte_automaton(stop.encode())
    num_seen, num_contexts = len(step_SB) - 1, len(self.text.bytes_of)
    final = num_seen * num_contexts
    # Every state as it was before, for ids that add nothing.
    table_SV = np.zeros((final + 1, self._vocab_size), np.min_scalar_type(final))
    table_SV[:] = np.arange(final + 1)[:, None]
    for context, (order, sizes, bytes_VX) in enumerate(self._byte_matrices):
      seen_SV = np.repeat(np.arange(num_seen)[:, None], len(order), axis=1).astype(step_SB.dtype)
      for place in range(bytes_VX.shape[1]):
        # Longest first, so that those still to be read are at the front.
        left = int(np.searchsorted(-sizes, -place))
        seen_SV[:, :left] = step_SB[seen_SV[:, :left], bytes_VX[:left, place]]
      after_V = self.text.context_after_V[order]
      after_V = np.where(after_V < 0, context, after_V)
      rows = np.arange(num_seen)[:, None] * num_contexts + context
      table_SV[rows, order] = np.where(
        seen_SV == num_seen, final, seen_SV.astype(np.int64) * num_contexts + after_V
      )
    return table_SV

  @functools.cached_property
  def _byte_matrices(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each context: ids from the longest text down, its bytes, and these padded, [V, X]."""
    matrices = []
    for texts in self.text.bytes_of:
      sizes = np.array([len(text) for text in texts])
      order = np.argsort(-sizes, kind="stable")
      longest = int(sizes.max(initial=0))
      padded = b"".join(texts[i].ljust(longest, b"\0") for i in order)
      bytes_VX = np.frombuffer(padded, np.uint8).reshape(len(texts), longest)
      matrices.append((order, sizes[order], bytes_VX))
    return matrices


def _byte_automaton(stop: bytes) -> np.ndarray:
  """Returns the number of bytes of `stop` seen after each byte, [len + 1, 256].

  Source: Knuth, Morris and Pratt 1977, as a table: where a byte does not continue the string, what
  it does is what it does after the longest proper suffix that begins the string again.
  """
  step_SB = np.zeros((len(stop) + 1, 256), np.min_scalar_type(len(stop)))
  restart = 0
  for seen, byte in enumerate(stop):
    step_SB[seen] = step_SB[restart]
    if seen:
      restart = step_SB[restart, byte]
    step_SB[seen, byte] = seen + 1
  step_SB[-1] = len(stop)
  return step_SB
