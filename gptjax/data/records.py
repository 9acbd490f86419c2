"""Records of labelled sets: tables with and without a header, JSON, parquet, the hub.

A record is a mapping from columns to values, with the place it came from. Imports no jax, and
`datasets` only for a hub name.
"""

import csv
import dataclasses
import gzip
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from gptjax.data.corpus import find_files, open_hub, parse_json, readable
from gptjax.data.task_format import FILE_FORMATS
from gptjax.errors import DataError, did_you_mean

# What the end of a name says for certain, and what it says unless a format says otherwise.
_CERTAIN = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_USUAL = {".tsv": "tsv", ".csv": "csv"}


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """One record.

  Attributes:
    place: the file and line, or the like, for messages.
    values: by column.
    unequal: where it has more or fewer columns than it should, how many; else "".
  """

  place: str
  values: Mapping[str, Any]
  unequal: str = ""


def read_files(
  patterns: Iterable[str],
  file_format: str = "",
  column_names: Sequence[str] = (),
  header: Sequence[str] = (),
) -> Iterator[Record]:
  """Streams the records of files, in order.

  Args:
    patterns: paths and globs.
    file_format: of FILE_FORMATS, or "" to go by the name; see TaskFormat.
    column_names: of tables whose first line names no columns.
    header: columns that tell a first line that does.

  Raises:
    DataError: no such file, one that cannot be read, of an unknown kind, or empty.
  """
  for path in find_files(patterns):
    kind = _kind_of(path, file_format)
    with readable(path):
      if kind == "parquet":
        yield from _read_parquet(path)
        continue
      with _open_text(path, newline="" if kind == "csv" else "\n") as file:
        if kind == "json":
          yield from _read_json(file, path)
        else:
          rows = _quoted_rows(file) if kind == "csv" else _plain_rows(file)
          yield from _read_table(rows, path, column_names, header)


def read_hub(name: str, split: str) -> Iterator[Record]:
  """Streams the records of a split of a hub data set; classes are spelled by their names."""
  records = open_hub(name, split, is_streamed=False)
  classes = {
    column: feature.names
    for column, feature in (records.features or {}).items()
    if hasattr(feature, "names")
  }
  for number, record in enumerate(records, 1):
    named = {
      column: names[record[column]] if record[column] in range(len(names)) else None
      for column, names in classes.items()
    }
    yield Record(f'"{name}" {split} record {number}', record | named)


def look_up(values: Mapping[str, Any], column: str, place: str) -> Any:
  """Returns the value of a column; "a.b" is b of a, or of each record of the list a.

  Raises:
    DataError: there is no such column.
  """
  if column in values:
    return values[column]
  name, _, rest = column.partition(".")
  if not rest or name not in values:
    raise DataError(f'{place} has no column "{column}"{did_you_mean(column, map(str, values))}')
  inner = values[name]
  if isinstance(inner, list) and all(isinstance(entry, Mapping) for entry in inner):
    return [look_up(entry, rest, place) for entry in inner]
  if not isinstance(inner, Mapping):
    raise DataError(f'{place} has no column "{column}": "{name}" is {inner!r:.40}')
  return look_up(inner, rest, place)


def _kind_of(path: str, file_format: str) -> str:
  suffix = os.path.splitext(path.lower().removesuffix(".gz"))[1]
  kind = _CERTAIN.get(suffix) or file_format or _USUAL.get(suffix)
  if kind is None:
    raise DataError(
      f'"{path}" is of an unknown kind; name it {", ".join([*_USUAL, *_CERTAIN])}, or set'
      f" data.file_format to one of: {', '.join(FILE_FORMATS)}"
    )
  return kind


def _open_text(path: str, newline: str) -> TextIO:
  opener = gzip.open if path.lower().endswith(".gz") else open
  return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def _plain_rows(file: TextIO) -> Iterator[tuple[int, list[str]]]:
  """Yields (line, fields) of a table in which a tab is a tab and a quote a quote."""
  for number, line in enumerate(file, 1):
    if line.strip():
      yield number, line.rstrip("\r\n").split("\t")


def _quoted_rows(file: TextIO) -> Iterator[tuple[int, list[str]]]:
  csv.field_size_limit(sys.maxsize)
  reader = csv.reader(file)
  for fields in reader:
    if len(fields) > 1 or any(map(str.strip, fields)):
      yield reader.line_num, fields


def _read_table(
  rows: Iterator[tuple[int, list[str]]],
  path: str,
  column_names: Sequence[str],
  header: Sequence[str],
) -> Iterator[Record]:
  first = next(rows, None)
  if first is None:
    raise DataError(f'"{path}" is empty')
  names, is_exact = first[1], True
  if column_names and not set(header) <= set(names):
    names, is_exact, rows = list(column_names), False, itertools.chain([first], rows)
  if twice := {name for name in names if name and names.count(name) > 1}:
    raise DataError(f'"{path}" has two columns "{min(twice)}"; name them differently')
  for number, fields in rows:
    place = f'"{path}" line {number}'
    unequal = ""
    if len(fields) < len(names) or (is_exact and len(fields) > len(names)):
      unequal = f"{len(fields)} columns where {len(names)} are named"
    yield Record(place, dict(zip(names, fields)), unequal)


def _read_json(file: TextIO, path: str) -> Iterator[Record]:
  """Reads a list of records, a record a line, or one record over several lines."""
  lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
  first = next(lines, None)
  if first is None:
    raise DataError(f'"{path}" is empty')
  if _is_object(first[1]):
    for number, line in itertools.chain([first], lines):
      place = f'"{path}" line {number}'
      yield Record(place, parse_json(line, place))
    return
  file.seek(0)
  content = json.load(file)
  for number, values in enumerate(content if isinstance(content, list) else [content], 1):
    if not isinstance(values, dict):
      raise DataError(f'"{path}" record {number} is {values!r:.40}; it must be a JSON object')
    yield Record(f'"{path}" record {number}', values)


def _is_object(line: str) -> bool:
  try:
    return isinstance(json.loads(line), dict)
  except ValueError:
    return False


def _read_parquet(path: str) -> Iterator[Record]:
  import pyarrow.parquet

  numbers = itertools.count(1)
  for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
    for values in batch.to_pylist():
      yield Record(f'"{path}" record {next(numbers)}', values)
