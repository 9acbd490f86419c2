"""Tokens in, text out, as they come: whole characters only, and nothing of a stop text."""

from collections.abc import Sequence

from gptjax.data.tokenizer import Tokenizer
from gptjax.generate.stopping import count_undecided, cut_at_stop


class Writer:
  """Turns streamed tokens into text, holding back what may be the beginning of a stop text.

  Args:
    tokenizer: None writes nothing.
    stops: texts that end the new text, and are cut off.
    prompt: ids that the new text continues.

  Attributes:
    is_stopped: a stop text has come; what follows it is not shown.
  """

  def __init__(
    self, tokenizer: Tokenizer | None, stops: Sequence[str] = (), prompt: Sequence[int] = ()
  ):
    self.is_stopped = False
    self._stream = None if tokenizer is None else tokenizer.decode_stream(before=prompt)
    self._vocab_size = 0 if tokenizer is None else tokenizer.vocab_size
    self._stops = stops
    self._held = ""

  def step(self, token: int, *, is_last: bool, is_end: bool) -> str:
    """Returns the text that may be shown now.

    Args:
      token: the next one; those that the tokenizer does not have add nothing.
      is_last: no other follows.
      is_end: it is an end token, which is no text.
    """
    if self._stream is None:
      return ""
    if not is_end and token < self._vocab_size:
      self._held += self._stream.step(token)
      self.is_stopped = any(stop in self._held for stop in self._stops)
    if is_last and not self.is_stopped:
      self._held += self._stream.finish()
    if is_last or self.is_stopped:
      return cut_at_stop(self._held, self._stops)
    keep = count_undecided(self._held, self._stops)
    shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
    return shown
