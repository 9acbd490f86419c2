"""From the messages of a chat to a prompt: by the template of a tokenizer, or a plain one of ours.

Templates are programs of whoever published the model: they run in jinja2's sandbox, which lets them
reach nothing but the messages.

Source: the templates' contract is that of transformers, "Chat templates": messages,
add_generation_prompt, the special tokens by role, raise_exception.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptjax.data.special_tokens import read_json
from gptjax.errors import DataError

_PLAIN = """{%- for message in messages -%}
{{ message.role | capitalize }}: {{ message.content }}
{% endfor -%}
Assistant:"""
# Where the plain template's answer ends: what would be the next message.
_PLAIN_STOPS = ("\nUser:", "\nSystem:", "\nAssistant:")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """How a model wants to be talked to.

  Attributes:
    source: a jinja2 template; None is the plain one, a line `Role: text` for each message.
    special_tokens: {role: token}, which a template may write.
  """

  source: str | None = None
  special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    """What answers call it: "model" or "plain"."""
    return "plain" if self.source is None else "model"

  @property
  def text(self) -> str:
    """The template itself."""
    return _PLAIN if self.source is None else self.source

  @property
  def stops(self) -> tuple[str, ...]:
    """Texts that end an answer, beside what the request says."""
    return _PLAIN_STOPS if self.source is None else ()

  def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
    """Writes the prompt of a chat.

    Args:
      messages: each has a role, a content, and maybe a name.

    Raises:
      DataError: the template refuses the messages, or is broken.
    """
    try:
      template = _environment().from_string(self.text)
      return template.render(
        messages=messages, add_generation_prompt=True, tools=None, **self.special_tokens
      )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
      raise DataError(f"the chat template of the model refuses these messages: {error}") from error


def read_template(folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate:
  """Finds the template in the folder of a model; where it has none it is the plain one.

  Raises:
    DataError: files that cannot be read.
  """
  file = folder / "chat_template.jinja"
  if file.is_file():
    return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens)
  said = read_json(folder / "chat_template.json").get("chat_template")
  said = said or read_json(folder / "tokenizer_config.json").get("chat_template")
  if isinstance(said, list):
    named = {each["name"]: each["template"] for each in said}
    said = named.get("default")
  return ChatTemplate(said, special_tokens)


def _environment() -> ImmutableSandboxedEnvironment:
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
  )
  # Jinja's own would write < > & ' as escapes, which are for HTML.
  environment.filters["tojson"] = _to_json
  environment.globals |= {
    "raise_exception": _refuse,
    "strftime_now": lambda layout: datetime.now().strftime(layout),
  }
  return environment


def _to_json(value: Any, indent: int | None = None) -> str:
  return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
  raise TemplateError(message)
