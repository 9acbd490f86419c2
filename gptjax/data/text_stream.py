"""Decoding ids one by one, as they are generated."""

from collections.abc import Sequence

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

# Enough for the bytes of one character and the space before a word.
_TOKENS_BEFORE = 8


class TextStream:
  """Decodes ids one by one, and never gives half a character.

  The pieces joined are what the ids add to the text before them. A character that the last id
  leaves unfinished is shown by `finish` as U+FFFD, as decoding all ids at once shows it.
  """

  def __init__(self, backend: Backend, skip_special_tokens: bool, before: Sequence[int] = ()):
    self._backend = backend
    self._skip = skip_special_tokens
    self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
    self._ids: list[int] = []
    self._num_chars = 0
    for token in before[-_TOKENS_BEFORE:]:
      self.step(token)

  def step(self, token: int) -> str:
    """Returns the text that one more id completes, which may be none."""
    piece = self._stream.step(self._backend, int(token)) or ""
    self._ids.append(int(token))
    self._num_chars += len(piece)
    return piece

  def finish(self) -> str:
    """Returns the text that is left when no more ids come."""
    text = self._backend.decode(self._ids, skip_special_tokens=self._skip)
    return text[self._num_chars :]
