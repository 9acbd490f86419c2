"""Labelled examples: records of files or of the hub, checked one by one."""

import dataclasses

from gptjax.data.task_config import TaskDataConfig
from gptjax.data.task_format import Task


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
  """One example of a task.

  Attributes:
    id: its name, unique in its split.
    text: the text, premise, first text, or context; a part for each column.
    text2: the hypothesis or second text; () of other families.
    choices: the answers to choose from; () of other families.
    label: index of the class or of the right answer, or the score; None where it is not known.
  """

  id: str
  text: tuple[str, ...]
  text2: tuple[str, ...] = ()
  choices: tuple[str, ...] = ()
  label: int | float | None = None


@dataclasses.dataclass(frozen=True)
class TaskData:
  """The examples of a run.

  Attributes:
    config: as it was given, but with the labels that were found, so that it says all of the task.
    task: what is asked; `config.task`.
    train, valid: examples, all labelled.
    notes: lines for the user, such as how many examples were left out and why.
  """

  config: TaskDataConfig
  task: Task
  train: list[Example]
  valid: list[Example]
  notes: tuple[str, ...]
