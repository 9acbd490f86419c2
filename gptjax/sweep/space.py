"""What a sweep varies: choices and ranges of config keys, some of them under a condition.

A domain is written as plain data beside the config key whose values it has: a list of choices,
{"low": .., "high": .., "log": .., "step": ..}, or {"choices": [..]}; "when": {key: value} makes it
exist only where another key has that value (or one of a list). Imports neither jax nor Optuna.
"""

import dataclasses
import graphlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptjax.config import field_type
from gptjax.errors import ConfigError, did_you_mean

Setting = dict[str, Any]  # {dotted config key: value}

MOST_COMBINATIONS = 64  # tried before a value counts as refused
_DOMAIN_KEYS = ("choices", "low", "high", "log", "step", "when")


@dataclasses.dataclass(frozen=True)
class Domain:
  """The values of one key: choices, or a range.

  Attributes:
    choices: () is a range.
    low, high: ends of the range, both included.
    is_log: equal ratios are equally likely.
    step: distance of the values from low on; None is any number, of whole numbers 1.
    is_int: whole numbers only.
    when: ((other key, the values of it where this key exists), ...).
  """

  choices: tuple[Any, ...] = ()
  low: float = 0
  high: float = 0
  is_log: bool = False
  step: float | None = None
  is_int: bool = False
  when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

  def is_active(self, setting: Mapping[str, Any]) -> bool:
    """Says whether the key exists beside the values of the others."""
    return all(key in setting and setting[key] in values for key, values in self.when)

  def extremes(self) -> tuple[Any, ...]:
    """Returns the values that show whether the domain lies within the key's: choices, or ends."""
    return self.choices or (self.low, self.high)

  def values(self, key: str) -> tuple[Any, ...]:
    """Returns all values. Raises ConfigError for a range without a step: it has too many."""
    if self.choices:
      return self.choices
    step = self.step or (1 if self.is_int and not self.is_log else None)
    if step is None:
      raise ConfigError(
        f'the range of "{key}" has no end of values, and method "grid" visits all; list choices,'
        ' give a "step", or choose "random" or "tpe"'
      )
    count = math.floor((self.high - self.low) / step + 1e-9) + 1
    return tuple(self.low + i * step for i in range(count))


Space = dict[str, Domain]


def parse_space(written: Mapping[str, Any], config_class: type) -> Space:
  """Reads a space as get_sweep writes it; keys come after those that their conditions name.

  Args:
    written: {dotted config key: domain as plain data}; the keys exist.
    config_class: whose keys they are; it tells whole numbers from others.

  Raises:
    ConfigError: a domain that cannot be read, or conditions that nothing can meet.
  """
  space = {key: _parse_domain(key, domain, config_class) for key, domain in written.items()}
  for key, domain in space.items():
    for other, values in domain.when:
      if other not in space or not space[other].choices:
        raise ConfigError(
          f'"{key}" has the condition "{other}", which is not a key with choices of this'
          f" space{did_you_mean(other, [k for k, d in space.items() if d.choices])}"
        )
      for value in values:
        if value not in space[other].choices:
          raise ConfigError(
            f'"{key}" has the condition {other}={value!r}, and {other} is one of'
            f" {', '.join(map(repr, space[other].choices))}"
          )
  graph = {key: [other for other, _ in domain.when] for key, domain in space.items()}
  try:
    return {key: space[key] for key in graphlib.TopologicalSorter(graph).static_order()}
  except graphlib.CycleError as error:
    raise ConfigError(f"conditions go in a circle: {' -> '.join(error.args[1])}") from error


def grid(space: Space) -> list[Setting]:
  """Lists every setting of a space once."""
  return [*_combine({key: (domain, domain.values(key)) for key, domain in space.items()})]


def product(choices: Mapping[str, Sequence[Any]]) -> list[Setting]:
  """Lists all combinations, for get_sweep's "settings"; lists of settings add with +."""
  return [
    dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
  ]


def settings_with_each_value(space: Space) -> Iterator[tuple[str, Any, Iterator[Setting]]]:
  """Yields (key, value, settings with it): what shows whether a value is in its key's domain.

  Values are choices and ends of ranges. The first setting has the value alone, with what its
  conditions need; the others combine it with values of the other keys.
  """
  for key, domain in space.items():
    for value in domain.extremes():
      alone = _needed(space, key) | {key: value}
      values = {
        other: (another, (alone[other],) if other in alone else another.extremes())
        for other, another in space.items()
      }
      combined = itertools.islice(_combine(values), MOST_COMBINATIONS)
      yield key, value, itertools.chain([alone], (s for s in combined if key in s))


def _combine(
  values: Mapping[str, tuple[Domain, Sequence[Any]]], setting: Setting | None = None
) -> Iterator[Setting]:
  """Yields all combinations of values, each key where its conditions hold."""
  setting = setting or {}
  if not values:
    yield setting
    return
  (key, (domain, choices)), *rest = values.items()
  for extended in (
    ({**setting, key: value} for value in choices) if domain.is_active(setting) else (setting,)
  ):
    yield from _combine(dict(rest), extended)


def spell(value: Any) -> str:
  """Writes a value as a reader of tables wants it: 0.003, 1e-05, adamw, none, [1, 2]."""
  if isinstance(value, float):
    return f"{value:.4g}"
  if value is None:
    return "none"
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def spell_setting(setting: Mapping[str, Any]) -> str:
  """Writes a setting in one line, by the last parts of its keys where they are clear."""
  return ", ".join(f"{name} {spell(setting[key])}" for key, name in short_names(setting).items())


def short_names(keys: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
  """Returns {dotted key: its last part}, or the whole key where two have the same."""
  lasts = [key.rsplit(".", 1)[-1] for key in keys]
  return {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts)}


def _needed(space: Space, key: str) -> Setting:
  """Returns values of other keys that make a key exist."""
  needed: Setting = {}
  for other, values in space[key].when:
    needed |= _needed(space, other) | {other: values[0]}
  return needed


def _parse_domain(key: str, written: Any, config_class: type) -> Domain:
  if isinstance(written, list | tuple):
    written = {"choices": written}
  if not isinstance(written, Mapping):
    raise ConfigError(
      f'the domain of "{key}" is {written!r}; it must be a list of choices or a range,'
      ' {"low": .., "high": ..}'
    )
  for name in written:
    if name not in _DOMAIN_KEYS:
      raise ConfigError(f'the domain of "{key}" has "{name}"{did_you_mean(name, _DOMAIN_KEYS)}')
  if ("choices" in written) == any(name in written for name in ("low", "high", "log", "step")):
    raise ConfigError(f'the domain of "{key}" needs either "choices" or "low" and "high"')
  domain = _parse_choices(key, written) if "choices" in written else None
  domain = domain or _parse_range(key, written, field_type(config_class, key))
  return dataclasses.replace(domain, when=_parse_when(key, written.get("when", {})))


def _parse_choices(key: str, written: Mapping[str, Any]) -> Domain:
  choices = written["choices"]
  if not isinstance(choices, list | tuple) or not choices:
    raise ConfigError(f'the choices of "{key}" are {choices!r}; give a list with at least one')
  if len({json.dumps(choice) for choice in choices}) < len(choices):
    raise ConfigError(f'the choices of "{key}" are {list(choices)}, one of them twice')
  return Domain(choices=tuple(choices))


def _parse_range(key: str, written: Mapping[str, Any], kind: type) -> Domain:
  if kind not in (int, float):
    raise ConfigError(f'"{key}" has a range, and its values are no numbers; list choices')
  for name in ("low", "high"):
    if name not in written:
      raise ConfigError(f'the range of "{key}" has no "{name}"')
  numbers = {name: written[name] for name in ("low", "high", "step") if name in written}
  for name, value in numbers.items():
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or (kind is int and value != int(value)):
      expected = "a whole number" if kind is int else "a finite number"
      raise ConfigError(f'the range of "{key}" has {name} {value!r}; it must be {expected}')
  is_log = written.get("log", False)
  if not isinstance(is_log, bool):
    raise ConfigError(f'the range of "{key}" has log {is_log!r}; it must be True or False')
  low, high, step = kind(written["low"]), kind(written["high"]), written.get("step")
  if low > high:
    raise ConfigError(f'the range of "{key}" goes from {low} to {high}; low must not be above high')
  if is_log and low <= 0:
    raise ConfigError(f'the range of "{key}" has log and low {low}; it must be above 0')
  if step is not None and (is_log or step <= 0):
    raise ConfigError(f'the range of "{key}" has step {step}; it must be above 0, and without log')
  return Domain(low=low, high=high, is_log=is_log, step=step and kind(step), is_int=kind is int)


def _parse_when(key: str, written: Any) -> tuple[tuple[str, tuple[Any, ...]], ...]:
  if not isinstance(written, Mapping):
    raise ConfigError(f'the condition of "{key}" is {written!r}; write {{other key: value}}')
  return tuple(
    (other, tuple(values) if isinstance(values, list | tuple) else (values,))
    for other, values in written.items()
  )
