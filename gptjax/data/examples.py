"""Examples of a task, made from records one by one; what is wrong with one is said with its place.

Imports no jax.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gptjax.data.records import Record, look_up
from gptjax.data.task_format import TaskFormat
from gptjax.errors import DataError, did_you_mean

# How benchmarks mark examples whose label they keep to themselves.
HIDDEN_LABELS = ("", "-1", "?")
# A whole number that was written as another: tables do so where some labels are missing.
_WHOLE = re.compile(r"^(-?\d+)\.0+$")


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


def make_examples(
  form: TaskFormat, records: Iterable[Record], *, needs_labels: bool
) -> tuple[list[Example], tuple[str, ...]]:
  """Makes an example of each record, or of each part of it.

  Args:
    form: its labels are known.
    records: of one split.
    needs_labels: refuse examples without a label, which else have the label None.

  Returns:
    (examples, notes for the user on those left out).

  Raises:
    DataError: a missing column, a label outside of the set, an empty text, one answer only,
      unequal columns, an id that is there twice, no example. The message names the place.
  """
  maker = _Maker(form, needs_labels)
  examples, places, left_out = [], {}, collections.Counter()
  for number, item in enumerate(split_records(form, records)):
    if fault := maker.find_fault(item):
      left_out[fault] += 1
      continue
    example = maker.make(item, number)
    earlier = places.setdefault(example.id, item.place)
    if earlier is not item.place:
      raise DataError(f'{item.place} has the id "{example.id}" of {earlier}; ids must differ')
    examples.append(example)
  if not examples:
    raise DataError(
      "there is no example in the data, or none that is not left out; give at least 1"
    )
  notes = [f"{count:,} examples left out: {fault}" for fault, count in left_out.items()]
  return examples, tuple(notes)


@dataclasses.dataclass(frozen=True, slots=True)
class Item(Record):
  """A record, or the part of a record that is one example.

  Attributes:
    part: number of the part, "" of a whole record.
  """

  part: str = ""


def split_records(form: TaskFormat, records: Iterable[Record]) -> Iterator[Item]:
  """Parts the records that hold several examples.

  Raises:
    DataError: a missing column, or lists that do not match.
  """
  for record in records:
    # Whoever needs a label says that it is missing.
    columns = [c for c in form.list_columns if c != form.label_column or _has(record, c)]
    if not columns or record.unequal:
      yield Item(record.place, record.values, record.unequal)
      continue
    lists = {column: look_up(record.values, column, record.place) for column in columns}
    for column, entries in lists.items():
      if not isinstance(entries, list):
        raise DataError(f'{record.place}: "{column}" is {entries!r:.40}; it must be a list')
    sizes = {column: len(entries) for column, entries in lists.items()}
    if len(set(sizes.values())) > 1:
      counts = ", ".join(f'{size} of "{column}"' for column, size in sizes.items())
      raise DataError(f"{record.place} has {counts}; there must be as many of each")
    for number, entries in enumerate(zip(*lists.values()), 1):
      values = {**record.values, **dict(zip(lists, entries))}
      yield Item(f"{record.place} entry {number}", values, part=str(number))


def is_unequal(form: TaskFormat, item: Record) -> bool:
  """Says whether an item is to be left out for its columns; raises DataError if it may not be."""
  if item.unequal and "unequal_columns" not in form.skipped_faults:
    raise DataError(
      f"{item.place} has {item.unequal}; mend the line, or leave such lines out by"
      ' data.skipped_faults ["unequal_columns"]'
    )
  return bool(item.unequal)


def label_of(item: Record, column: str) -> str:
  """Returns the label of an item as it is spelled; "" is none.

  Raises:
    DataError: there is no such column, or it holds several labels.
  """
  value = look_up(item.values, column, item.place)
  if not (value is None or isinstance(value, str | int | float)):
    raise DataError(f'{item.place}: "{column}" is {value!r:.40}; it must be one label')
  return spell_label(value)


def spell_label(value: Any) -> str:
  """Spells a label alike in all kinds of files: true for True, 1 for "1.0", "" for None and NaN."""
  if value is None or value != value:
    return ""
  text = str(value).lower() if isinstance(value, bool) else str(value).strip()
  return _WHOLE.sub(r"\1", text)


class _Maker:
  """Makes examples of one format."""

  def __init__(self, form: TaskFormat, needs_labels: bool):
    self._form = form
    self._needs_labels = needs_labels
    self._skipped = {spell_label(value) for value in form.skipped_labels}
    self._classes = {
      spell_label(name): index
      for names in (form.labels, form.label_values)
      for index, name in enumerate(names)
    }

  def find_fault(self, item: Item) -> str:
    """Says why an item is to be left out, or ""; raises DataError for a fault not to be skipped."""
    form = self._form
    if is_unequal(form, item):
      return "unequal columns"
    if self._skipped and (label := self._label_text(item)) in self._skipped:
      return f'label "{label}"'
    for column, value in self._texts(item):
      if _is_empty(value):
        if "empty_text" not in form.skipped_faults:
          raise DataError(
            f'{item.place} has an empty "{column}"; give it a text, or leave such examples out by'
            ' data.skipped_faults ["empty_text"]'
          )
        return "empty text"
    return ""

  def make(self, item: Item, number: int) -> Example:
    """Makes the example of an item, which is number `number` of its split."""
    form, labels = self._form, self._classes
    choices = ()
    if form.family == "multiple_choice":
      choices = tuple(self._say(*answer, item) for answer in self._answers(item))
      labels = self._choice_labels(item, len(choices))
    names = [str(look_up(item.values, column, item.place)) for column in form.id_columns]
    if names and item.part:
      names.append(item.part)
    text, text2 = (
      tuple(self._say(column, look_up(item.values, column, item.place), item) for column in columns)
      for columns in (form.text_columns, form.text2_columns)
    )
    label = self._label(item, labels)
    return Example("-".join(names) or str(number), text, text2, choices, label)

  def _texts(self, item: Item) -> Iterator[tuple[str, Any]]:
    """Yields (column, value) of every text of an example."""
    for column in (*self._form.text_columns, *self._form.text2_columns):
      yield column, look_up(item.values, column, item.place)
    if self._form.family == "multiple_choice":
      yield from self._answers(item)

  def _say(self, column: str, value: Any, item: Item) -> str:
    if not isinstance(value, str | int | float):
      raise DataError(f'{item.place}: "{column}" is {value!r:.40}; it must be a text')
    text = str(value).strip()
    words = self._form.wording.get(column)
    if words is None:
      return text
    if text not in words:
      hint = did_you_mean(text, words)
      raise DataError(f'{item.place}: data.wording has no words for {column} "{text}"{hint}')
    return words[text]

  def _answers(self, item: Item) -> list[tuple[str, Any]]:
    """Returns (column, value) of each answer.

    A table has a column for each of the most answers: of fewer, the last columns are empty.
    """
    columns = self._form.choice_columns
    found = [look_up(item.values, column, item.place) for column in columns]
    if len(columns) == 1:
      if not isinstance(found[0], list):
        raise DataError(
          f'{item.place}: "{columns[0]}" is {found[0]!r:.40}; it must be a list of answers, or'
          " name a column for each answer in data.choice_columns"
        )
      columns, found = columns * len(found[0]), found[0]
    else:
      while found and _is_empty(found[-1]):
        found.pop()
    if len(found) < 2:
      count = "one answer" if found else "no answers"
      raise DataError(f"{item.place} has {count} to choose from; it must have at least two")
    return list(zip(columns, found))

  def _choice_labels(self, item: Item, num_choices: int) -> dict[str, int]:
    """Returns {spelling: index} of the answers of one example."""
    form = self._form
    spellings: Sequence[Any] = form.label_values or range(num_choices)
    if form.choice_label_column:
      spellings = look_up(item.values, form.choice_label_column, item.place)
      if not isinstance(spellings, list) or len(spellings) != num_choices:
        raise DataError(
          f'{item.place}: "{form.choice_label_column}" is {spellings!r:.60}; it must be a list with'
          f" the label of each of the {num_choices} answers"
        )
    return {spell_label(value): index for index, value in enumerate(spellings[:num_choices])}

  def _label_text(self, item: Item) -> str:
    column = self._form.label_column
    if not self._needs_labels and not _has(item, column):
      return ""
    return label_of(item, column)

  def _label(self, item: Item, labels: Mapping[str, int]) -> int | float | None:
    form, text = self._form, self._label_text(item)
    is_score = form.target == "score"
    lowest = form.score_range[0] if form.score_range else -math.inf
    is_label = text in labels or (is_score and text == "-1" and lowest <= -1)
    if text in HIDDEN_LABELS and not is_label:
      if self._needs_labels:
        hint = f', or name "{text}" in data.labels if it is one' * bool(text and form.labels)
        raise DataError(
          f'{item.place} has no "{form.label_column}", but "{text}"; give it a label{hint}'
        )
      return None
    if is_score:
      return self._score(item, text)
    if text not in labels:
      hint = did_you_mean(text, labels)
      raise DataError(f'{item.place}: "{form.label_column}" is "{text}", not in the set{hint}')
    return labels[text]

  def _score(self, item: Item, text: str) -> float:
    try:
      score = float(text)
    except ValueError:
      score = math.nan
    low, high = self._form.score_range or (-math.inf, math.inf)
    if not (math.isfinite(score) and low <= score <= high):
      within = f" from {low:g} to {high:g}" if self._form.score_range else ""
      column = self._form.label_column
      raise DataError(f'{item.place}: "{column}" is "{text}"; a score must be a number{within}')
    return score


def _has(item: Record, column: str) -> bool:
  return column in item.values or column.partition(".")[0] in item.values


def _is_empty(value: Any) -> bool:
  return value is None or value != value or (isinstance(value, str) and not value.strip())
