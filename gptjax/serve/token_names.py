"""How answers name tokens: by the text they add, or its bytes where that is no whole character."""

from gptjax.data.tokenizer import Tokenizer
from gptjax.generate.stopping import token_text


class TokenNames:
  """Names the tokens of one model.

  Args:
    tokenizer: None names tokens by number.
  """

  def __init__(self, tokenizer: Tokenizer | None):
    self._text = None if tokenizer is None else token_text(tokenizer, skip_special_tokens=False)

  def bytes_of(self, token: int, context: int = 0) -> bytes | None:
    """Returns the UTF-8 bytes that a token adds to a text; None where it stands for no text."""
    if self._text is None or token >= len(self._text.bytes_of[context]):
      return None
    return self._text.bytes_of[context][token]

  def name(self, token: int, context: int = 0) -> str:
    """Returns the text a token adds, or as OpenAI `bytes:\\xe3\\x81` for half a character."""
    added = self.bytes_of(token, context)
    if added is None:
      return f"token_id:{token}"
    try:
      return added.decode()
    except UnicodeDecodeError:
      return "bytes:" + "".join(f"\\x{byte:02x}" for byte in added)

  def after(self, token: int, context: int) -> int:
    """Returns the context of the next token: what it adds may depend on this one."""
    if self._text is None or token >= len(self._text.context_after_V):
      return context
    after = int(self._text.context_after_V[token])
    return context if after < 0 else after

  def num_characters(self, token: int, context: int = 0) -> int:
    """Counts the characters that begin in a token."""
    # Every byte of a character but its first is 10xxxxxx.
    return sum(byte & 0xC0 != 0x80 for byte in self.bytes_of(token, context) or b"")
