"""TaskFormat: what a labelled data set looks like, and Task: what a model is asked to tell.

Imports nothing but errors.
"""

import dataclasses
from collections.abc import Mapping

from gptjax.errors import ConfigError, check_choice

FAMILIES = ("classification", "entailment", "similarity", "multiple_choice")
CLASS_METRICS = ("accuracy", "f1", "macro_f1", "matthews")
SCORE_METRICS = ("pearson", "spearman")
FILE_FORMATS = ("tsv", "csv", "json")
FAULTS = ("empty_text", "unequal_columns")


@dataclasses.dataclass(frozen=True)
class TaskFormat:
  """What a labelled set looks like. A field left empty is not said.

  A column is a name in a table's header or a key of a JSON record; "question.choices.text" goes
  down into records, and through lists, of which it makes a list.

  Attributes:
    family: "classification" (one text), "entailment" (premise and hypothesis), "similarity" (two
      texts without an order), "multiple_choice" (a context and answers to choose from).
    target: "class", or "score" for a number. Multiple choice has classes, its answers.
    text_columns: of the text, the premise, the first text, or the context; several are joined.
    text2_columns: of the hypothesis or the second text.
    choice_columns: one for each answer, or one that holds a list of them.
    choice_label_column: what the label calls the answers, in their order; see label_values.
    label_column: of the label.
    id_columns: of what names an example; joined. Without any it is the number of its record.
    list_columns: columns that hold lists with an entry for each of several examples of a record.
    column_names: of a table without a header line, from the left; others are ignored.
    labels: names of the classes, in order. Without any they are the values found in training.
    label_values: how files spell the labels; without any, as `labels` does. Of multiple choice,
      how they spell the first answer, the second, ...; without any, 0, 1, ...
    skipped_labels: values that mark examples without a label that is agreed on.
    score_range: lowest and highest score; others are refused.
    metrics: of CLASS_METRICS or SCORE_METRICS; the first tells which of two models is better.
    file_format: how .csv, .tsv and .txt files are read. A "tsv" has no quotes; a "json" is a
      record, a list of records, or a record a line. Without one the name of a file tells.
    wording: {column: {value: text}}, what to say for a value of a text column.
    skipped_faults: faults of which an example is left out, and not refused: "empty_text",
      "unequal_columns".
  """

  family: str = ""
  target: str = ""
  text_columns: tuple[str, ...] = ()
  text2_columns: tuple[str, ...] = ()
  choice_columns: tuple[str, ...] = ()
  choice_label_column: str = ""
  label_column: str = ""
  id_columns: tuple[str, ...] = ()
  list_columns: tuple[str, ...] = ()
  column_names: tuple[str, ...] = ()
  labels: tuple[str, ...] = ()
  label_values: tuple[str, ...] = ()
  skipped_labels: tuple[str, ...] = ()
  score_range: tuple[float, ...] = ()
  metrics: tuple[str, ...] = ()
  file_format: str = ""
  wording: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
  skipped_faults: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
  """What a model is asked to tell of an example.

  Attributes:
    family: one of FAMILIES.
    target: "class" or "score".
    labels: names of the classes, in order; () of scores and of multiple choice.
    score_range: (lowest, highest) where that is known, or ().
    metrics: the first tells which of two models is better; more is better of all of them.
  """

  family: str
  target: str
  labels: tuple[str, ...]
  score_range: tuple[float, ...]
  metrics: tuple[str, ...]

  @property
  def is_choice(self) -> bool:
    """Whether an example has answers to choose from, and so a sequence for each."""
    return self.family == "multiple_choice"

  @property
  def num_outputs(self) -> int:
    """Outputs of the head for an example, or for each of its answers."""
    return len(self.labels) or 1


def check_format(form: TaskFormat) -> None:
  """Checks a format to which nothing is to be added.

  Raises:
    ConfigError: a value of no kind that is known, or one that has no effect beside another.
  """
  check_choice("data.family", form.family, FAMILIES)
  check_choice("data.target", form.target, ("class", "score"))
  if form.family == "multiple_choice" and form.target == "score":
    raise ConfigError('data.target is "score", and multiple choice has classes; use "class"')
  if form.file_format:
    check_choice("data.file_format", form.file_format, FILE_FORMATS)
  for fault in form.skipped_faults:
    check_choice("data.skipped_faults", fault, FAULTS)
  for metric in form.metrics:
    known = SCORE_METRICS if form.target == "score" else CLASS_METRICS
    known = known[:1] if form.family == "multiple_choice" else known
    check_choice(f"data.metrics of a {form.target}", metric, known)
  if "f1" in form.metrics and len(form.labels) > 2:
    raise ConfigError(
      f'data.metrics has "f1", which is of two classes, and there are {len(form.labels)};'
      ' use "macro_f1"'
    )
  _check_labels(form)
  _refuse_stray(form)


def _check_labels(form: TaskFormat) -> None:
  for key in ("labels", "label_values"):
    values = getattr(form, key)
    if len(set(values)) < len(values):
      raise ConfigError(f"data.{key} is {list(values)}; each must be there once")
  if len(form.labels) == 1:
    raise ConfigError(f"data.labels is {list(form.labels)}; a task has at least two")
  if form.labels and form.label_values and len(form.labels) != len(form.label_values):
    raise ConfigError(
      f"data.label_values has {len(form.label_values)} entries and data.labels"
      f" {len(form.labels)}; give each label its value"
    )
  if form.score_range and (len(form.score_range) != 2 or not _rises(form.score_range)):
    raise ConfigError(f"data.score_range is {list(form.score_range)}; it must be [lowest, highest]")


def _rises(pair: tuple[float, ...]) -> bool:
  return pair[0] < pair[1]


def _refuse_stray(form: TaskFormat) -> None:
  """Refuses what another choice leaves without effect."""
  is_choice, is_score = form.family == "multiple_choice", form.target == "score"
  has_second = form.family in ("entailment", "similarity")
  stray = {
    "text2_columns": not has_second,
    "choice_columns": not is_choice,
    "choice_label_column": not is_choice,
    "labels": is_choice or is_score,
    "label_values": is_score or bool(form.choice_label_column) or not (form.labels or is_choice),
    "score_range": not is_score,
  }
  for key, has_no_effect in stray.items():
    if has_no_effect and (value := getattr(form, key)):
      raise ConfigError(
        f"data.{key} is {value!r}, which has no effect with data.family"
        f' "{form.family}" and data.target "{form.target}"; leave it out'
      )
  texts = (*form.text_columns, *form.text2_columns, *form.choice_columns)
  if form.label_column in texts:
    raise ConfigError(f'data.label_column is "{form.label_column}", which is a text column too')
  for column in form.wording:
    if column not in texts:
      raise ConfigError(f'data.wording is of "{column}", which is none of the text columns')
