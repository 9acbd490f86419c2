"""The labelled examples of a run: training and validation, and the labels they have.

Imports no jax.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

from gptjax.data.adapters import NOT_RUN
from gptjax.data.examples import (
  HIDDEN_LABELS,
  Example,
  is_unequal,
  label_of,
  make_examples,
  spell_label,
  split_records,
)
from gptjax.data.records import Record, read_files, read_hub
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.task_format import Task
from gptjax.errors import ConfigError, DataError

# More different labels than this are a sign that the column holds something else.
MOST_FOUND_LABELS = 200

Records = Callable[[], Iterator[Record]]


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


def load_task(config: TaskDataConfig) -> TaskData:
  """Reads the training and the validation examples of a run.

  Raises:
    ConfigError: the config does not say which task, or which files.
    DataError: a file, column, label or text that is not as the config says; see `make_examples`.
  """
  train_records, valid_records = _open_splits(config)
  config = _with_labels(config, train_records)
  train, notes = make_examples(config.format, train_records(), needs_labels=True)
  if config.adapter in NOT_RUN:
    notes += (f'adapter "{config.adapter}" has not met a real file yet: look at some examples',)
  if valid_records is None:
    train, valid = _draw_valid(train, config.valid_fraction)
    notes += (f"{len(valid):,} of the training examples are drawn for validation",)
  else:
    valid, valid_notes = make_examples(config.format, valid_records(), needs_labels=True)
    notes += tuple(f"validation: {note}" for note in valid_notes)
  return TaskData(config, config.task, train, valid, notes)


def read_examples(
  config: TaskDataConfig, files: Sequence[str], *, needs_labels: bool = False
) -> tuple[list[Example], tuple[str, ...]]:
  """Reads examples of a task whose labels are known from files of its format.

  Args:
    config: `TaskData.config`; its own files are not read.
    files: paths and globs.
    needs_labels, Returns, Raises: as `make_examples`.
  """
  return make_examples(config.format, _file_records(config, files), needs_labels=needs_labels)


def _open_splits(config: TaskDataConfig) -> tuple[Records, Records | None]:
  """Returns what streams the records of training, and of validation where there are any."""
  if not config.format.family:
    raise ConfigError('data.family is ""; name the family of the task, or a data.adapter')
  if config.hub:
    opened = functools.partial(read_hub, config.hub)
    train, valid = config.hub_split, config.hub_valid_split
  else:
    opened = functools.partial(_file_records, config)
    train, valid = config.files, config.valid_files
  if not train:
    raise ConfigError("data.files is empty; name the files of the examples, or a data.hub")
  return functools.partial(opened, train), functools.partial(opened, valid) if valid else None


def _file_records(config: TaskDataConfig, files: Sequence[str]) -> Iterator[Record]:
  form = config.format
  return read_files(files, form.file_format, form.column_names, header=form.text_columns)


def _with_labels(config: TaskDataConfig, records: Records) -> TaskDataConfig:
  """Fills in the labels that training has, where they are not named."""
  form = config.format
  if form.target == "score" or form.family == "multiple_choice" or form.labels:
    return config
  unlabelled, found = {*map(spell_label, form.skipped_labels), *HIDDEN_LABELS}, set()
  for item in split_records(form, records()):
    if not is_unequal(form, item):
      found.add(label_of(item, form.label_column))
    if len(found) > MOST_FOUND_LABELS:
      raise DataError(
        f'"{form.label_column}" has more than {MOST_FOUND_LABELS} different values; name the'
        ' labels in data.labels, or set data.target "score" if they are scores'
      )
  if not found:
    return config  # there is no example, which make_examples says
  labels = sorted(found - unlabelled, key=_numbers_first)
  if len(labels) < 2:
    raise DataError(
      f'"{form.label_column}" has {len(labels)} different values in training; a task has at least'
      " two labels: name them in data.labels"
    )
  return dataclasses.replace(config, labels=tuple(labels))


def _numbers_first(label: str) -> tuple[float, str]:
  try:
    return float(label), label
  except ValueError:
    return math.inf, label


def _draw_valid(examples: list[Example], fraction: float) -> tuple[list[Example], list[Example]]:
  """Draws a fraction of the first texts; all examples that have them are for validation.

  What is drawn is a function of the texts, whatever their order.
  """
  texts = sorted({example.text[0] for example in examples}, key=_digest)
  if len(texts) < 2:
    raise DataError("all examples have one text, and none can be held out; give data.valid_files")
  drawn = set(texts[: min(math.ceil(fraction * len(texts)), len(texts) - 1)])
  parts = {False: [], True: []}
  for example in examples:
    parts[example.text[0] in drawn].append(example)
  return parts[False], parts[True]


def _digest(text: str) -> bytes:
  return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
