"""Decoding ids one by one, as they are generated."""

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream


class TextStream:
  """Decodes ids one by one, and never gives half a character.

  The pieces joined are the text of all ids. A character that the last id leaves unfinished is
  shown by `finish` as U+FFFD, as decoding all ids at once shows it.
  """

  def __init__(self, backend: Backend, skip_special_tokens: bool):
    self._backend = backend
    self._skip = skip_special_tokens
    self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
    self._ids: list[int] = []
    self._num_chars = 0

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
