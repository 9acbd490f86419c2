"""TaskDataConfig: which labelled examples, what they look like, how they become sequences."""

import dataclasses
import functools
from typing import Any

from gptjax.data.adapters import ADAPTERS
from gptjax.data.task_format import (
  CLASS_METRICS,
  SCORE_METRICS,
  Task,
  TaskFormat,
  check_format,
)
from gptjax.errors import ConfigError, check_choice

MARKS = ("start", "delimiter", "extract")


@dataclasses.dataclass(frozen=True)
class TaskDataConfig(TaskFormat):
  """The labelled examples of a fine-tuning run, and how they become sequences.

  What a set looks like is the adapter's, but for the fields of TaskFormat that are set here.

  Attributes:
    adapter: a key of ADAPTERS, or "".
    files: training examples: paths and globs of tsv, csv, txt, jsonl, json, parquet.
    valid_files: validation examples.
    hub: a `datasets` hub name, "name" or "name:configuration", instead of files.
    hub_split, hub_valid_split: its splits; no validation split means valid_fraction.
    valid_fraction: without validation examples, this fraction of the training examples is drawn
      for validation. Those that share their first text stay together.
    max_length: most tokens of a sequence, special ones included; None is the model's context.
    num_buckets: padded lengths of the training batches; each is a program to compile.
    marks: which tokens mark a sequence. All of MARKS are GPT-1's; () leaves the text alone, of
      which the last token is read, as transformers' classifiers do.
    start_token, delimiter_token, extract_token: tokens of the tokenizer that are these marks; ""
      adds a new one, which no text can spell.
  """

  adapter: str = ""
  files: tuple[str, ...] = ()
  valid_files: tuple[str, ...] = ()
  hub: str = ""
  hub_split: str = "train"
  hub_valid_split: str = ""
  valid_fraction: float = 0.1
  max_length: int | None = None
  num_buckets: int = 4
  marks: tuple[str, ...] = MARKS
  start_token: str = ""
  delimiter_token: str = ""
  extract_token: str = ""

  def __post_init__(self):
    if self.adapter:
      check_choice("data.adapter", self.adapter, ADAPTERS)
    if not 0 < self.valid_fraction < 1:
      raise ConfigError(f"data.valid_fraction is {self.valid_fraction}; it must be in (0, 1)")
    if self.files and self.hub:
      raise ConfigError("data.files and data.hub are both set; keep one")
    if self.valid_files and self.hub:
      raise ConfigError("data.valid_files has no effect with data.hub; set data.hub_valid_split")
    for key in ("hub_split", "hub_valid_split"):
      if not self.hub and (value := getattr(self, key)) != getattr(type(self), key):
        raise ConfigError(f'data.{key} is "{value}", which has no effect without data.hub')
    if self.num_buckets < 1:
      raise ConfigError(f"data.num_buckets is {self.num_buckets}; it must be at least 1")
    if self.max_length is not None and self.max_length < 8:
      raise ConfigError(f"data.max_length is {self.max_length}; it must be at least 8")
    for mark in self.marks:
      check_choice("data.marks", mark, MARKS)
    for mark in set(MARKS) - set(self.marks):
      if token := getattr(self, f"{mark}_token"):
        raise ConfigError(
          f'data.{mark}_token is "{token}", which has no effect without "{mark}" in data.marks'
        )
    if self.format.family:
      check_format(self.format)

  @functools.cached_property
  def format(self) -> TaskFormat:
    """What the set looks like: this config, else its adapter, else what is usual."""
    said = ADAPTERS.get(self.adapter, TaskFormat())
    names = [field.name for field in dataclasses.fields(TaskFormat)]
    said = dataclasses.replace(said, **{n: getattr(self, n) for n in names if getattr(self, n)})
    usual = _usual(said.family, said.target or "class")
    return dataclasses.replace(said, **{n: v for n, v in usual.items() if not getattr(said, n)})

  @property
  def task(self) -> Task:
    """What is asked of a model; its labels are those of this config, or not known yet."""
    form = self.format
    return Task(form.family, form.target, form.labels, form.score_range, form.metrics)


def _usual(family: str, target: str) -> dict[str, Any]:
  """What a format is taken to be where nothing is said."""
  usual = {
    "target": target,
    "metrics": SCORE_METRICS if target == "score" else CLASS_METRICS[:1],
    "text_columns": ("text",),
    "label_column": "label",
  }
  if family in ("entailment", "similarity"):
    usual["text2_columns"] = ("text2",)
  if family == "multiple_choice":
    usual["choice_columns"] = ("choices",)
  return usual
