"""What all routes share: the model by its name, its engine, and its tokenizer."""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from gptjax.data.special_tokens import special_tokens
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError
from gptjax.evaluate.classify import Classifier
from gptjax.serve.chat_template import ChatTemplate
from gptjax.serve.engine import Engine
from gptjax.serve.failures import ApiError
from gptjax.serve.token_names import TokenNames


@dataclasses.dataclass(frozen=True)
class Served:
  """A model that is served.

  Attributes:
    engine: what runs it.
    aliases: names that requests may call it, beside `engine.model_name`.
    template: what makes a prompt of a chat.
    classifier: of a model that was fine-tuned on a task, else None.
    created: when it was loaded, in seconds since 1970.
  """

  engine: Engine
  aliases: tuple[str, ...] = ()
  template: ChatTemplate = ChatTemplate()
  classifier: Classifier | None = None
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))

  @staticmethod
  def now() -> int:
    """Returns the time of an answer, in seconds since 1970."""
    return int(time.time())

  @property
  def name(self) -> str:
    """What answers call the model."""
    return self.engine.model_name

  @functools.cached_property
  def names(self) -> TokenNames:
    """How answers name tokens."""
    return TokenNames(self.engine.generator.tokenizer)

  @functools.cached_property
  def _special_tokens(self) -> list[str]:
    tokenizer = self.engine.generator.tokenizer
    return [] if tokenizer is None else special_tokens(tokenizer.backend)

  def check_model(self, name: str | None) -> None:
    """Raises ApiError unless a request means this model."""
    if name is not None and name not in (self.name, *self.aliases):
      raise ApiError(
        404,
        f'the model "{name}" is not served here; "{self.name}" is',
        code="model_not_found",
        param="model",
      )

  async def parse_prompts(self, prompts: Sequence[Any]) -> list[Any]:
    """Makes ids of those texts that spell special tokens, which become them; others stay texts.

    Raises:
      DataError: a text that the tokenizer cannot spell.
    """
    return [
      await asyncio.to_thread(self.tokenizer.encode, prompt, parse_special_tokens=True)
      if isinstance(prompt, str) and any(token in prompt for token in self._special_tokens)
      else prompt
      for prompt in prompts
    ]

  def text_of(self, prompt: str | list[int]) -> str:
    """Returns a prompt as text; nothing of ids where there is no tokenizer."""
    if isinstance(prompt, str):
      return prompt
    if self.engine.generator.tokenizer is None:
      return ""
    # Spare rows of a vocabulary have ids that no tokenizer knows.
    return self.tokenizer.decode([i for i in prompt if i < self.tokenizer.vocab_size])

  @property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer of the model; raises DataError where it has none."""
    tokenizer = self.engine.generator.tokenizer
    if tokenizer is None:
      raise DataError("the model has no tokenizer; send and read token ids")
    return tokenizer


def as_list(prompts: Any) -> list[Any]:
  """Returns a list of texts and lists of ids, whichever way one or several were given."""
  is_one = isinstance(prompts, str) or isinstance(prompts[0], int)
  return [prompts] if is_one else list(prompts)


def stream_of(model: type[BaseModel]) -> dict[int, dict[str, Any]]:
  """Describes an answer that may also be a stream of `model`, for OpenAPI."""
  text = f"with stream: data lines of {model.__name__} objects, [DONE] last"
  content = {"text/event-stream": {"schema": {"type": "string", "description": text}}}
  return {200: {"content": content}}
