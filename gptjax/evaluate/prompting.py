"""Questions put to a language model as text: zero-shot and few-shot, with the protocol.

Source: Brown et al. 2020, section 2.4: each example has shots of its own, drawn from the training
set. GPT-1's heuristics (Radford et al. 2018, section 5) are templates.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.checkpoint.models import DTYPES, Loaded, to_stderr
from gptjax.data.examples import Example, make_examples
from gptjax.data.records import Record, read_files, read_hub
from gptjax.data.task_format import TaskFormat
from gptjax.errors import ConfigError, DataError, check_choice
from gptjax.evaluate.answers import Answers, Judge, Question
from gptjax.evaluate.protocol import STARTS
from gptjax.evaluate.receipt import identify, make_receipt
from gptjax.evaluate.scoring import Scorer
from gptjax.evaluate.statistics import error_of_mean
from gptjax.evaluate.templates import Template
from gptjax.evaluate.texts import HUB, hash_documents


@dataclasses.dataclass(frozen=True)
class PromptProtocol:
  """How examples are put to a model, in full.

  Attributes:
    name: of the template.
    template: what it says.
    shots: solved examples before each question.
    orders: how many orders of the shots of a question are tried.
    seed: of the draws of shots and orders.
    train: files of the examples that shots are drawn from, or that a threshold is fitted to; ()
      draws from the data itself, but for the one in question.
    limit: examples that are asked about, the first so many; None is all.
    start: a token put before each prompt: "none", "bos" or "end".
    dtype: of parameters and products.
  """

  name: str
  template: Template
  shots: int = 0
  orders: int = 1
  seed: int = 0
  train: tuple[str, ...] = ()
  limit: int | None = None
  start: str = "none"
  dtype: str = "float32"

  def __post_init__(self):
    check_choice("start", self.start, STARTS)
    check_choice("dtype", self.dtype, DTYPES)
    if self.shots < 0:
      raise ConfigError(f"shots is {self.shots}; it must be at least 0")
    if not 0 <= self.seed < 2**32:
      raise ConfigError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
    if self.limit is not None and self.limit < 1:
      raise ConfigError(f"limit is {self.limit}; it must be at least 1")
    if not 1 <= self.orders <= math.factorial(min(self.shots, 12)):
      raise ConfigError(
        f"orders is {self.orders}, and {self.shots} shots have"
        f" {math.factorial(min(self.shots, 12))}; lower it"
      )
    fits = self.template.decide == "threshold"
    if fits and self.shots:
      raise ConfigError(
        f'shots is {self.shots}, which has no effect with decide "threshold"; leave it out'
      )
    if fits and (self.template.threshold is None) != bool(self.train):
      raise ConfigError(
        "the template's threshold is given, and train has no effect; leave it out"
        if self.train
        else f'template "{self.name}" fits a threshold to training examples; name them as train'
      )
    if self.train and not (self.shots or fits):
      raise ConfigError("train has no effect without shots; leave it out")


def measure_prompts(
  data: Sequence[str],
  model: Loaded,
  scorer: Scorer,
  protocol: PromptProtocol,
  say: Callable[[str], None] = to_stderr,
  keep: Callable[[dict[str, Any]], None] = lambda line: None,
) -> dict[str, Any]:
  """Asks a model about examples and returns the receipt.

  Args:
    data: files of examples, globs, or "hub:NAME[:CONFIGURATION]@SPLIT".
    model, scorer: what answers.
    protocol: how it is asked.
    say: takes lines about what a reader of the figures should know.
    keep: takes, of each order and example, what was answered.

  Returns:
    The metrics of the task by name, the mean over orders with its deviation where there are
    several; those of each normalization; counts; and the receipt's own.

  Raises:
    DataError: examples that are missing or not as the template says.
    ConfigError: more shots than there are examples, or a start token that the model lacks.
  """
  template = protocol.template
  given = _read(template, data, say)
  examples = given[: protocol.limit]
  pool = _read(template, protocol.train, say) if protocol.train else given
  judge = Judge(template, model, scorer, protocol.start)
  fitted = {}
  if template.decide == "threshold" and template.threshold is None:
    judge.fit(pool)
    fitted = {"threshold": judge.threshold}
  found = []
  for order, questions in enumerate(ask(examples, pool, protocol)):
    found.append(judge.ask(questions))
    for line in found[-1].lines:
      keep({"order": order, **line} if protocol.orders > 1 else line)
  counts = _count(found, examples, pool, protocol)
  if counts["prompts_cut"]:
    say(
      f"{counts['prompts_cut']} of {counts['prompts']} prompts are longer than the context of the"
      " model, and lose their beginnings"
    )
  read = given if protocol.shots else examples
  if protocol.train:
    read = examples + pool
  return make_receipt(
    "fewshot" if protocol.shots else "choice",
    identify(model),
    {**figures(found), **fitted, "counts": counts},
    protocol=dataclasses.asdict(protocol),
    data_hash=hash_documents(json.dumps(dataclasses.asdict(e)).encode() for e in read),
  )


def _read(template: Template, data: Sequence[str], say: Callable[[str], None]) -> list[Example]:
  """Reads examples, with their labels wherever a template has answers."""
  needs_labels = template.has_answers or template.decide != "completion"
  examples, notes = make_examples(
    template.data, _records(template.data, data), needs_labels=needs_labels
  )
  for note in notes:
    say(note)
  return examples


def _records(form: TaskFormat, data: Sequence[str]) -> Iterator[Record]:
  for name in data:
    if name.startswith(HUB):
      hub, _, split = name.removeprefix(HUB).rpartition("@")
      if not hub:
        raise DataError(f'"{name}" names no split; write "{name}@test"')
      yield from read_hub(hub, split)
    else:
      yield from read_files([name], form.file_format, form.column_names, header=form.text_columns)


def ask(
  examples: Sequence[Example], pool: Sequence[Example], protocol: PromptProtocol
) -> list[list[Question]]:
  """Puts shots before each example, in every order that is asked for.

  Args:
    examples: what is asked about.
    pool: what shots are drawn from. Without `protocol.train` it begins with `examples`, and the
      one in question is never drawn.
    protocol: of shots, orders and seed.

  Returns:
    [orders][examples].

  Raises:
    ConfigError: more shots than can be drawn.
  """
  is_own = not protocol.train
  available = len(pool) - is_own
  if protocol.shots > available:
    raise ConfigError(
      f"shots is {protocol.shots}, and there are {available} examples to draw them from; lower it,"
      " or give more"
    )
  orders: list[list[Question]] = [[] for _ in range(protocol.orders)]
  for index, example in enumerate(examples):
    generator = np.random.default_rng((protocol.seed, index))
    drawn = generator.choice(available, protocol.shots, replace=False)
    if is_own:
      drawn += drawn >= index
    for questions, order in zip(orders, _draw_orders(drawn, protocol.orders, generator)):
      questions.append(Question(example, tuple(pool[shot] for shot in order)))
  return orders


def _draw_orders(
  drawn: np.ndarray, count: int, generator: np.random.Generator
) -> list[tuple[int, ...]]:
  """Returns different orders of what was drawn; the first is that of the draw."""
  orders = {tuple(drawn.tolist()): None}
  while len(orders) < count:
    orders[tuple(generator.permutation(drawn).tolist())] = None
  return list(orders)


def figures(found: Sequence[Answers]) -> dict[str, Any]:
  """Puts the figures of all orders together.

  Returns:
    {metric: mean}, with the standard error over examples of an accuracy, and, where there are
    several orders, each metric's deviation (of a sample) and `orders`, the metrics of each; and
    by_normalization, {normalization: {metric: mean}}.
  """
  names = found[0].metrics
  means = _mean([answers.metrics for answers in found])
  if found[0].is_right_N is not None:
    name = "exact_match" if "exact_match" in names else "accuracy"
    is_right_N = np.mean([answers.is_right_N for answers in found], axis=0)
    means[name] = float(is_right_N.mean())
    means[f"{name}_standard_error"] = error_of_mean(is_right_N)
  if len(found) > 1:
    for name in names:
      values = [answers.metrics[name] for answers in found]
      means[f"{name}_deviation"] = float(np.std(values, ddof=1))
    means["orders"] = [answers.metrics for answers in found]
  if found[0].by_normalization:
    means["by_normalization"] = {
      normalization: _mean([answers.by_normalization[normalization] for answers in found])
      for normalization in found[0].by_normalization
    }
  return means


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
  return {name: float(np.mean([of_one[name] for of_one in metrics])) for name in metrics[0]}


def _count(
  found: Sequence[Answers],
  examples: Sequence[Example],
  pool: Sequence[Example],
  protocol: PromptProtocol,
) -> dict[str, int]:
  counts = {
    "examples": len(examples),
    "prompts": sum(answers.num_prompts for answers in found),
    "prompts_cut": sum(answers.num_cut for answers in found),
  }
  return counts | ({"training_examples": len(pool)} if protocol.train else {})
