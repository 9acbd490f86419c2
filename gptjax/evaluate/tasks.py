"""The tasks that a receipt can be repeated for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptjax.checkpoint.models import Loaded
from gptjax.config import from_mapping
from gptjax.evaluate.childrens_book import measure_childrens_book
from gptjax.evaluate.lambada import measure_lambada
from gptjax.evaluate.perplexity import measure_perplexity
from gptjax.evaluate.prompting import PromptProtocol, measure_prompts
from gptjax.evaluate.protocol import Protocol, TextProtocol
from gptjax.evaluate.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class Task:
  """A task by what its receipt says.

  Attributes:
    protocol: the dataclass of the receipt's protocol, which has the `dtype` of the model.
    measure: (data, model, scorer, protocol) -> receipt.
  """

  protocol: type
  measure: Callable[[Sequence[str], Loaded, Scorer, Any], dict[str, Any]]


TASKS = {
  "perplexity": Task(Protocol, measure_perplexity),
  "lambada": Task(TextProtocol, measure_lambada),
  "cbt": Task(TextProtocol, measure_childrens_book),
  "choice": Task(PromptProtocol, measure_prompts),
  "fewshot": Task(PromptProtocol, measure_prompts),
}


def protocol_of(receipt: Mapping[str, Any]) -> Any:
  """Returns the protocol of a receipt. Raises ConfigError for a field that there is not."""
  return from_mapping(TASKS[receipt["task"]].protocol, receipt["protocol"], "protocol.")
