"""allowed_tokens: the user's function, asked on the host between two steps.

A compiled loop that calls back into Python can wait for itself: the arguments of the call are jax
arrays, and reading them needs the threads that the loop holds. So rows under a constraint go one
dispatch a token, and what may follow is an argument of the step.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from gptjax.errors import ConfigError
from gptjax.generate.options import DecodingOptions
from gptjax.generate.sampling import Controls


@dataclasses.dataclass(frozen=True)
class Constraint:
  """What may follow the rows of a batch.

  Attributes:
    function: (number of the prompt, ids so far) to the ids that may follow.
    prompt_R: int, the number of each row's prompt.
    vocab_size: V.
  """

  function: Callable[[int, list[int]], Iterable[int]]
  prompt_R: np.ndarray
  vocab_size: int

  def apply(
    self, controls: Controls, tokens_RS: np.ndarray, length_R: np.ndarray, is_running_R: np.ndarray
  ) -> Controls:
    """Returns the controls of the next token; nothing is asked about rows that have ended.

    Raises:
      ConfigError: the function returned no ids, or one out of the vocabulary.
    """
    allowed_RV = np.ones((len(length_R), self.vocab_size), bool)
    for row in np.flatnonzero(is_running_R):
      ids = self._ask(int(self.prompt_R[row]), tokens_RS[row, : length_R[row]].tolist())
      allowed_RV[row] = False
      allowed_RV[row, ids] = True
    return controls.replace(rules=controls.rules.replace(allowed_RV=allowed_RV))

  def _ask(self, prompt: int, tokens: list[int]) -> list[int]:
    ids = [int(token) for token in self.function(prompt, tokens)]
    if not ids:
      raise ConfigError(
        f"allowed_tokens returned no ids for prompt {prompt} after {len(tokens)} tokens;"
        " return at least one, such as an end token"
      )
    if not 0 <= min(ids) <= max(ids) < self.vocab_size:
      wrong = min(ids) if min(ids) < 0 else max(ids)
      raise ConfigError(
        f"allowed_tokens returned {wrong}, but the model's tokens are 0 to {self.vocab_size - 1}"
      )
    return ids


def make_constraint(
  options: DecodingOptions, prompt_R: np.ndarray, vocab_size: int
) -> Constraint | None:
  """Returns the constraint of rows with these options, or None."""
  if options.allowed_tokens is None:
    return None
  return Constraint(options.allowed_tokens, prompt_R, vocab_size)
