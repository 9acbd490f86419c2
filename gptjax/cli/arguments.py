"""What the verbs' arguments have in common: models, experiment configs and their overrides."""

import argparse
from collections.abc import Sequence
from typing import Any

from gptjax.config import from_config_dict, load_experiment
from gptjax.errors import ConfigError, did_you_mean

CONFIG_PREFIX = "--config."
MODEL_HELP = "run directory, Hugging Face folder, other library's file, or hub name"


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are UserErrors."""

  def error(self, message: str):
    raise ConfigError(f"{message} (see {self.prog} --help)")

  def _check_value(self, action: argparse.Action, value: Any) -> None:
    # argparse lists all choices, and ours are spelled wrong more often than unknown.
    if action.choices is not None and value not in action.choices:
      name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
      raise ConfigError(f'{name} is "{value}"{did_you_mean(str(value), map(str, action.choices))}')


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of the arguments."""
  rest, overrides, pending = [], {}, None
  for argument in arguments:
    if pending is not None:
      overrides[pending], pending = argument, None
    elif argument.startswith(CONFIG_PREFIX):
      key, has_value, value = argument.removeprefix(CONFIG_PREFIX).partition("=")
      if has_value:
        overrides[key] = value
      else:
        pending = key
    else:
      rest.append(argument)
  if pending is not None:
    raise ConfigError(
      f"{CONFIG_PREFIX}{pending} has no value; write {CONFIG_PREFIX}{pending}=VALUE"
    )
  return rest, overrides


def add_json(parser: argparse.ArgumentParser) -> None:
  """Adds --json."""
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_config(parser: argparse.ArgumentParser) -> None:
  """Adds --config; `split_overrides` has taken its overrides out."""
  parser.add_argument("--config", required=True, help="experiment file, FILE.py or FILE.py:arg")
  parser.add_argument_group(
    "config overrides", "--config.GROUP.KEY=VALUE sets any key of the experiment's config"
  )


def add_workdir(parser: argparse.ArgumentParser) -> None:
  """Adds --workdir."""
  parser.add_argument("--workdir", required=True, help="run directory, local or gs://")


def check_workdir(options: argparse.Namespace) -> None:
  """Raises ConfigError for an empty --workdir: it would be the current folder."""
  if not options.workdir:
    raise ConfigError("--workdir is empty; give a folder for the run")


def read_config(options: argparse.Namespace, cls: type) -> Any:
  """Returns the experiment's config with the overrides, as dataclass `cls`."""
  return from_config_dict(cls, load_experiment(options.config, options.overrides))
