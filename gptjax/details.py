"""Keys of a config that only some values of another key use: the details of a choice.

A detail that cannot have an effect is refused, and an override of a choice takes with it the
experiment's details of the choice before. What is merely switched off keeps its details:
eval.sample_tokens=0 says nothing against eval.sample_prompts. Imports nothing but errors.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Details:
  """Some keys that belong together.

  Attributes:
    group, choice: the key that decides, "optimizer" and "name".
    users: its values that use the details; of a tuple, one of them is enough.
    defaults: {key of the same group: its default, which the dataclass of the group has too}.
  """

  group: str
  choice: str
  users: tuple[str, ...]
  defaults: Mapping[str, Any]

  def are_used(self, value: Any) -> bool:
    """Says whether this value of the choice uses them."""
    values = value if isinstance(value, tuple | list) else (value,)
    return any(value in self.users for value in values)


DETAILS = (
  Details("data", "tokenizer", ("bpe",), {"vocab_size": 4096}),
  Details("model", "attention_pattern", ("local",), {"window_size": 256}),
  Details(
    "model",
    "positions",
    ("rotary",),
    {"rotary_dim": None, "rotary_style": "interleaved", "rotary_base": 10_000.0},
  ),
  Details(
    "optimizer",
    "name",
    ("muon",),
    {"muon_learning_rate": 0.02, "muon_momentum": 0.95, "muon_steps": 5},
  ),
  Details(
    "optimizer",
    "schedule",
    ("cosine", "linear", "wsd"),
    {"end_fraction": 0.1, "decay_steps": None, "decay_tokens": None},
  ),
)


def check_details(config: Any) -> None:
  """Raises ConfigError for a detail that is set beside a choice that does not use it.

  Args:
    config: a dataclass with the groups of DETAILS; a group may lack a choice and its details.
  """
  for details in DETAILS:
    group = getattr(config, details.group)
    if not hasattr(group, details.choice):
      continue
    choice = getattr(group, details.choice)
    if details.are_used(choice):
      continue
    for key, default in details.defaults.items():
      if (value := getattr(group, key)) != default:
        raise ConfigError(
          f"{details.group}.{key} is {value!r}, which has no effect with"
          f" {details.group}.{details.choice} {choice!r} (but with {', '.join(details.users)});"
          f" leave it at its default, {default!r}"
        )


def details_without_effect(overrides: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {dotted key: default} of the details that overridden choices no longer use.

  Args:
    overrides: {dotted key: new value}; details among them are left to `check_details`.
  """
  return {
    f"{details.group}.{key}": default
    for details in DETAILS
    if (choice := f"{details.group}.{details.choice}") in overrides
    and not details.are_used(overrides[choice])
    for key, default in details.defaults.items()
    if f"{details.group}.{key}" not in overrides
  }
