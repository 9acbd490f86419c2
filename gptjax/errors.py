"""Errors a user can cause. The command line prints their one line and exits with status 2.

Each message gives the value, what was expected, and what to change.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """Something the user can mend: one clear line, no traceback in the command line."""


class ConfigError(UserError):
  """A config key or value that does not exist, does not fit, or contradicts another."""


class TooLongError(ConfigError):
  """A prompt and its new tokens have more tokens than there is room for.

  Args:
    message: what is too long, for what, and what to shorten.
    otherwise: what else may help; not for those who cannot set it.
  """

  def __init__(self, message: str, otherwise: str = ""):
    super().__init__(message + otherwise)
    self.message = message


class DataError(UserError):
  """A corpus, tokenizer, or token file that is missing, empty, or malformed."""


class UnknownTokenizerError(DataError):
  """No tokenizer there, or one of a kind that gptjax does not know: a model loads without it."""


class CheckpointError(UserError):
  """A run directory or checkpoint that is missing, damaged, or of another model."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
  """Returns `; did you mean "x"?` for the nearest candidate, or the list of all of them."""
  candidates = sorted(candidates)
  near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
  if near:
    return f'; did you mean "{near[0]}"?'
  return f"; it must be one of: {', '.join(candidates)}" if candidates else ""


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
  """Raises ConfigError unless `value` is one of `choices`."""
  choices = list(choices)
  if value not in choices:
    raise ConfigError(f'{key} is "{value}"{did_you_mean(str(value), choices)}')
