"""The ConfigDict edge: experiments speak ConfigDict, everything below speaks frozen dataclasses.

Owns the conversion both ways, overrides from the command line, experiment files and their `:arg`.
Defaults are written once, in the dataclasses of the rooms; an experiment starts from
`to_config_dict(PretrainConfig())` and changes what it means to change. Imports no jax.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import re
import traceback
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from gptjax.details import details_without_effect
from gptjax.errors import ConfigError, UserError, did_you_mean

DataclassT = TypeVar("DataclassT")

# Keys of `data` that say which text it is, as data/config.py's defaults have them. They belong
# together: see apply_overrides.
CORPUS_DEFAULTS = {
  "files": (),
  "token_files": (),
  "hub": "",
  "hub_split": "train",
  "hub_valid_split": "",
  "text_column": "text",
  "valid_files": (),
  "valid_token_files": (),
  "mixture": {},
}
# Whatever is counted is less, and fits 64 bits.
LARGEST_NUMBER = 10**18
CORPUS_NAMES = ("files", "token_files", "hub", "mixture")
HELD_OUT_NAMES = ("valid_files", "valid_token_files", "hub_valid_split")


def to_config_dict(value: Any) -> ConfigDict:
  """Converts a (nested) frozen dataclass to a ConfigDict.

  The groups, which are dataclasses, are locked to their keys; mappings take any key.
  """
  config = ConfigDict(_to_plain(value), type_safe=False)
  config.lock()
  _unlock_mappings(value, config)
  return config


def _unlock_mappings(value: Any, config: ConfigDict) -> None:
  for field in dataclasses.fields(value):
    item = getattr(value, field.name)
    if dataclasses.is_dataclass(item):
      _unlock_mappings(item, config[field.name])
    elif isinstance(item, Mapping):
      config[field.name].unlock()


def to_json(value: Any) -> str:
  """Writes a (nested) dataclass as indented JSON; `from_json` reads it back to an equal value."""
  return json.dumps(_to_plain(value), indent=2, ensure_ascii=False) + "\n"


def from_json(cls: type[DataclassT], text: str) -> DataclassT:
  """Rebuilds the dataclass that `to_json` wrote. Raises ConfigError on an unknown key or type."""
  return from_mapping(cls, json.loads(text))


def from_config_dict(cls: type[DataclassT], config: ConfigDict) -> DataclassT:
  """Freezes an experiment's ConfigDict into `cls`; every key must be a field of the right type."""
  return from_mapping(cls, config.copy_and_resolve_references().to_dict())


def from_mapping(cls: type[DataclassT], values: Mapping[str, Any], path: str = "") -> DataclassT:
  """Builds dataclass `cls` from nested mappings, checking names and types.

  Args:
    cls: a dataclass whose fields are annotated with int, float, str, bool, tuple[X, ...],
      Mapping[str, X], `X | None`, Any, or other dataclasses.
    values: may leave out fields that have defaults.
    path: dotted prefix for messages.

  Raises:
    ConfigError: an unknown key (with the nearest one), a wrong type, a missing value.
  """
  hints = typing.get_type_hints(cls)
  known = {field.name: field for field in dataclasses.fields(cls)}
  for name in values:
    if name not in known:
      raise ConfigError(f'unknown config key "{path}{name}"{did_you_mean(name, known)}')
  converted = {
    name: _convert(hints[name], value, f"{path}{name}") for name, value in values.items()
  }
  try:
    return cls(**converted)
  except TypeError as error:
    raise ConfigError(f"config {path.rstrip('.') or cls.__name__}: {error}") from error


def _to_plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {key: _to_plain(item) for key, item in value.items()}
  if isinstance(value, tuple):
    return tuple(_to_plain(item) for item in value)
  return value


def field_type(cls: type, dotted: str) -> type:
  """Returns the type of a dotted key of a dataclass, without "or None"."""
  for name in dotted.split("."):
    hint = typing.get_type_hints(cls)[name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
      (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    cls = hint
  return cls


def _convert(hint: Any, value: Any, path: str) -> Any:
  if hint is Any:
    return value
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None:
      return None
    (hint,) = [arg for arg in args if arg is not type(None)]
    return _convert(hint, value, path)
  if dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    _require(isinstance(value, Mapping), path, value, "a group of keys")
    return from_mapping(hint, value, f"{path}.")
  if origin is tuple:
    _require(isinstance(value, list | tuple), path, value, "a list")
    return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
  if origin is not None and issubclass(origin, Mapping):
    _require(isinstance(value, Mapping), path, value, "a mapping")
    return {str(key): _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
  if hint is float:
    _require(
      isinstance(value, int | float) and not isinstance(value, bool), path, value, "a number"
    )
    _require(not math.isinf(value), path, value, "finite")
    return float(value)
  if hint is int and isinstance(value, float) and value.is_integer():
    value = int(value)
  if hint is int and isinstance(value, int):
    _require(abs(value) < LARGEST_NUMBER, path, value, f"below {LARGEST_NUMBER:.0e}")
  _require(
    isinstance(value, hint) and (hint is bool or not isinstance(value, bool)),
    path,
    value,
    {"int": "a whole number", "str": "a string", "bool": "True or False"}.get(hint.__name__, "?"),
  )
  return value


def _require(condition: bool, path: str, value: Any, expected: str) -> None:
  if not condition:
    raise ConfigError(f"config key {path} is {value!r}; it must be {expected}")


def apply_overrides(config: ConfigDict, overrides: Mapping[str, str]) -> None:
  """Sets dotted keys of `config` from command-line text, in place; see `apply_values`.

  Args:
    config: as an experiment's get_config returned it.
    overrides: {"model.num_layers": "3", "data.files": '["a.txt"]'}; values are Python or JSON
      literals, and text that is neither is a string.
  """
  apply_values(
    config,
    {
      dotted: parse_literal(text, wants_text=isinstance(_find(config, dotted), str))
      for dotted, text in overrides.items()
    },
  )


def apply_values(config: ConfigDict, values: Mapping[str, Any]) -> None:
  """Sets dotted keys of `config`, in place.

  A value that names another text (CORPUS_NAMES) takes the place of all of the experiment's:
  of CORPUS_DEFAULTS, keys without a value of their own go back to their defaults. So do the
  details of a choice (`gptjax.details`) that another choice does not use.

  Raises:
    ConfigError: the key does not exist (with the nearest one), a group is overwritten, or
      data.valid_fraction is set where held-out text is named.
  """
  for dotted, value in values.items():
    old = _find(config, dotted)
    if isinstance(old, ConfigDict) and (old.is_locked or not isinstance(value, dict)):
      raise ConfigError(f'config key "{dotted}" is a group; set one of its keys instead')
    if isinstance(value, bool) and isinstance(old, int | float) and not isinstance(old, bool):
      raise ConfigError(f'config key "{dotted}" is {value!r}; it must be a number')
    _set(config, dotted, value)
  for dotted, default in details_without_effect(values).items():
    _set(config, dotted, default)
  named = {key for key in CORPUS_NAMES if f"data.{key}" in values and config.data[key]}
  if named:
    # In a mixture each corpus has a valid_fraction of its own.
    defaults = CORPUS_DEFAULTS | ({"valid_fraction": 0.1} if "mixture" in named else {})
    given = {key.split(".")[1] for key in values if key.startswith("data.")}
    # The labelled examples of a task have some of these keys.
    stale = [key for key in defaults if key in config.data and key not in given]
    _set_keys(config.data, {key: defaults[key] for key in stale})
  if "data.valid_fraction" in values:
    for key in HELD_OUT_NAMES:
      if config.data.get(key):
        raise ConfigError(
          f"data.valid_fraction has no effect beside data.{key}; leave it out, or set"
          f" data.{key} to nothing too"
        )


def _find(config: ConfigDict, dotted: str) -> Any:
  """Returns the value of a dotted key; raises ConfigError, with the nearest, if there is none."""
  value, names = config, dotted.split(".")
  for depth, name in enumerate(names):
    if not isinstance(value, ConfigDict) or name not in value:
      keys = [".".join([*names[:depth], key]) for key in value] if hasattr(value, "keys") else []
      raise ConfigError(f'unknown config key "{dotted}"{did_you_mean(dotted, keys)}')
    value = value[name]
  return value


def _set(config: ConfigDict, dotted: str, value: Any) -> None:
  *groups, key = dotted.split(".")
  for name in groups:
    config = config[name]
  try:
    config[key] = value
  except ValueError as error:  # a mapping with dots in its keys
    raise ConfigError(f'config key "{dotted}": {error}') from error


def _set_keys(group: ConfigDict, values: Mapping[str, Any]) -> None:
  for key, value in values.items():
    group[key] = value  # update() would leave a mapping what it had


def parse_literal(text: str, wants_text: bool = False) -> Any:
  """Reads a command-line value: JSON's true/false/null, Python literals, otherwise text."""
  words = {"true": True, "false": False, "null": None, "none": None}
  if wants_text and not (text[:1] in "'\"" and text[-1:] == text[:1]):
    return text
  if text.lower() in words:
    return words[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    try:
      return json.loads(text)
    except json.JSONDecodeError:
      return text


def load_experiment(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
  """Runs `get_config` of an experiment file given as `path/to/file.py[:arg]`.

  Raises:
    ConfigError: no such file, no get_config in it, or an override that does not fit.
  """
  path, _, arg = spec.partition(":")
  module = load_experiment_module(path)
  with _mistakes_named(path):
    config = module.get_config(arg or None)
  if not isinstance(config, ConfigDict):
    raise ConfigError(
      f'get_config of "{path}" returned a {type(config).__name__}; it must be a ConfigDict, as'
      " gptjax.config.to_config_dict makes it"
    )
  apply_overrides(config, overrides or {})
  return config


def load_variants(
  spec: str, overrides: Mapping[str, str] | None = None
) -> dict[str, tuple[ConfigDict, dict[str, Any]]]:
  """Runs `get_config` of an experiment file, and its `get_variants(config)` if it has one.

  Returns:
    {name: (config, what the variant sets: {dotted key: value})}; of an experiment without
    variants its config alone, under the name "".
  """
  config = load_experiment(spec, overrides)
  module = load_experiment_module(spec.partition(":")[0])
  with _mistakes_named(spec.partition(":")[0]):
    variants = module.get_variants(config) if hasattr(module, "get_variants") else {"": {}}
  configs = {}
  for name, settings in variants.items():
    variant = config.copy_and_resolve_references()
    apply_values(variant, settings)
    configs[name] = (variant, settings)
  return configs


def load_sweep(spec: str) -> Any:
  """Runs `get_sweep` of an experiment file given as `path/to/file.py[:arg]`.

  It may take the argument, as get_config does, or none.

  Raises:
    ConfigError: no such file, or no get_sweep in it.
  """
  path, _, arg = spec.partition(":")
  module = load_experiment_module(path)
  if not hasattr(module, "get_sweep"):
    raise ConfigError(f'"{path}" has no get_sweep(); see docs/sweep.md')
  takes_argument = inspect.signature(module.get_sweep).parameters
  with _mistakes_named(path):
    return module.get_sweep(arg or None) if takes_argument else module.get_sweep()


@functools.cache
def load_experiment_module(path: str) -> types.ModuleType:
  """Imports an experiment file from its path."""
  file = Path(path)
  if not file.is_file() or file.suffix != ".py":
    siblings = [str(p) for p in file.parent.glob("*.py")] if path and file.parent.is_dir() else []
    raise ConfigError(f'no experiment file "{path}"{did_you_mean(path, siblings)}')
  module_spec = importlib.util.spec_from_file_location(f"gptjax_experiment_{file.stem}", file)
  module = importlib.util.module_from_spec(module_spec)
  with _mistakes_named(path):
    module_spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ConfigError(f'"{path}" has no get_config(arg); see experiments/shakespeare.py')
  return module


@contextlib.contextmanager
def _mistakes_named(path: str) -> Iterator[None]:
  """Turns what an experiment file raises into one line that says where."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == Path(path).absolute()]
    lines = lines or [frame.lineno for frame in frames if Path(frame.filename) == Path(path)]
    if isinstance(error, SyntaxError):
      lines = [error.lineno]
    where = f" line {lines[-1]}" if lines else ""
    said = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', str(error))  # a ConfigDict's
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if said:
      reason = f'unknown config key "{said[2]}"; did you mean "{said[1]}"?'
    raise ConfigError(f'"{path}"{where}: {reason[:200]}') from error


def shrink(config: ConfigDict) -> None:
  """Makes a recipe of any size run in seconds on a CPU, offline, in place: what `:tiny` means.

  The text it names gives way to Shakespeare's works, which `make data` fetches.
  """
  config.model.update(
    vocab_size=None,
    context_length=32,
    num_layers=2,
    model_dim=32,
    num_heads=2,
    compute_dtype="float32",
  )
  config.optimizer.update(warmup_steps=4, warmup_tokens=None, warmup_fraction=None)
  config.optimizer.update(decay_steps=None, decay_tokens=None)
  config.train.update(num_steps=40, num_tokens=None, num_epochs=None, batch_rows=8, accumulation=1)
  config.train.update(ramp_start_rows=0, ramp_tokens=0, save_every_steps=None, keep_every_steps=0)
  config.eval.update(every_steps=20, max_rows=64, sample_tokens=40)
  config.data.update(tokenizer="bpe", vocab_size=512)
  if any(config.data[key] for key in CORPUS_NAMES):
    _set_keys(config.data, CORPUS_DEFAULTS)
    config.data.files = ("data/shakespeare/train/*.txt",)
    config.data.valid_files = ("data/shakespeare/valid/*.txt",)


def set_for_accelerators(config: ConfigDict) -> None:
  """Sets what long runs on GPUs and TPUs share, in place: bfloat16, rare and bounded evaluation."""
  config.model.compute_dtype = "bfloat16"
  config.train.host_devices = 1
  config.train.save_every_steps = 1_000
  config.eval.every_steps = 1_000
  config.eval.max_rows = 1_024


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
  """Reads an experiment's `:arg`: `tiny`, `size=medium,steps=100`, or `medium`.

  Args:
    arg: comma-separated `key=value`, or a bare word: a boolean's name switches it on, and one
      other bare word, first, is the value of the first key that is not a boolean.
    **defaults: every admissible key with its default, whose type the value must have.

  Raises:
    ConfigError: a leftover, with the nearest key.
  """
  values = dict(defaults)
  unnamed = next((key for key, value in defaults.items() if not isinstance(value, bool)), None)
  for i, item in enumerate(filter(None, (arg or "").split(","))):
    key, has_value, text = item.partition("=")
    if not has_value and isinstance(defaults.get(key), bool):
      values[key] = True
    elif not has_value and i == 0 and unnamed:
      values[unnamed] = _convert(type(defaults[unnamed]), parse_literal(key), unnamed)
    elif has_value and key in defaults:
      kind = type(defaults[key])
      values[key] = _convert(kind, parse_literal(text, wants_text=kind is str), key)
    else:
      raise ConfigError(f'experiment argument "{item}" is unknown{did_you_mean(key, defaults)}')
  return types.SimpleNamespace(**values)
