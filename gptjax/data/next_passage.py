"""A multiple-choice task cut out of books: which of four passages comes next?

    python -m gptjax.data.next_passage BOOK.txt ... --out data/tasks/next_passage

Every row is a passage and four answers: the one that follows it in the book, and three that follow
other passages of the same part of the same book, so that no answer is likelier by itself. The end
of each book is for validation, and no text is in both. Keep these books out of pretraining.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gptjax.data.corpus import find_files, readable
from gptjax.errors import ConfigError, DataError, UserError

NUM_CHOICES = 4
_UNITS = {"words": r"\S+", "characters": r"\S"}


@dataclasses.dataclass(frozen=True)
class Cut:
  """How books are cut.

  Attributes:
    unit: "words" between spaces, or "characters" for languages that write without them.
    text_units: length of the passage that is shown.
    choice_units: length of each answer.
    valid_fraction: of each book, at its end.
    seed: of what is drawn.
  """

  unit: str = "words"
  text_units: int = 60
  choice_units: int = 20
  valid_fraction: float = 0.1
  seed: int = 0

  def __post_init__(self):
    if min(self.text_units, self.choice_units) < 1:
      raise ConfigError("--text-units and --choice-units must be at least 1")
    if not 0 < self.valid_fraction < 1:
      raise ConfigError(f"--valid-fraction is {self.valid_fraction}; it must be in (0, 1)")


def cut_books(books: dict[str, str], cut: Cut) -> dict[str, list[dict]]:
  """Cuts books into rows.

  Args:
    books: {name: text}.
    cut: how.

  Returns:
    {"train": rows, "valid": rows}: id, text, choices, label (index of the right choice). The same
    for the same books and cut.

  Raises:
    DataError: a book that is too short for a row with other answers in each part.
  """
  rows = {"train": [], "valid": []}
  for number, (name, text) in enumerate(books.items()):
    pairs = list(_pairs(text, cut))
    num_valid = round(cut.valid_fraction * len(pairs))
    parts = {"train": pairs[: len(pairs) - num_valid], "valid": pairs[len(pairs) - num_valid :]}
    draws = np.random.PCG64(np.random.SeedSequence([cut.seed, number]))
    for split, part in parts.items():
      if len(part) < NUM_CHOICES:
        raise DataError(
          f'"{name}" gives {len(part)} passages to {split}, and needs {NUM_CHOICES}: take a longer'
          " book, or shorter passages"
        )
      rows[split] += [
        {"id": f"{name}-{split}-{place}", "text": part[place][0]} | _choices(part, place, draws)
        for place in range(len(part))
      ]
  return rows


def _pairs(text: str, cut: Cut) -> Iterator[tuple[str, str]]:
  """Yields (passage, what follows it), side by side; line breaks become spaces."""
  units = [match.span() for match in re.finditer(_UNITS[cut.unit], text)]
  size = cut.text_units + cut.choice_units

  def passage(first: int, last: int) -> str:
    return " ".join(text[units[first][0] : units[last - 1][1]].split())

  for start in range(0, len(units) - size + 1, size):
    middle = start + cut.text_units
    yield passage(start, middle), passage(middle, start + size)


def _choices(part: Sequence[tuple[str, str]], place: int, draws: np.random.PCG64) -> dict:
  """Draws the other answers and the order of all."""
  others = np.argsort(draws.random_raw(len(part) - 1))[: NUM_CHOICES - 1]
  places = [place, *(other + (other >= place) for other in others)]
  order = np.argsort(draws.random_raw(NUM_CHOICES))
  return {
    "choices": [part[places[index]][1] for index in order],
    "label": int(np.flatnonzero(order == 0)[0]),
  }


def write_task(patterns: Sequence[str], folder: Path, cut: Cut) -> dict[str, int]:
  """Cuts files of books into train.jsonl and valid.jsonl of a folder; returns their rows.

  Raises:
    DataError: a missing or unreadable book, or as `cut_books`.
  """
  books = {}
  for path in find_files(patterns):
    with readable(path):
      books[Path(path).stem] = Path(path).read_text(encoding="utf-8-sig")
  rows = cut_books(books, cut)
  folder.mkdir(parents=True, exist_ok=True)
  for split, of_split in rows.items():
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in of_split)
    (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
  return {split: len(of_split) for split, of_split in rows.items()}


def main() -> int:
  parser = argparse.ArgumentParser(description="Cuts a next-passage task out of books.")
  parser.add_argument("books", nargs="+", help="text files, which pretraining must not read")
  parser.add_argument("--out", required=True, type=Path, help="folder for train and valid.jsonl")
  parser.add_argument("--unit", default=Cut.unit, choices=list(_UNITS))
  parser.add_argument("--text-units", type=int, default=Cut.text_units)
  parser.add_argument("--choice-units", type=int, default=Cut.choice_units)
  parser.add_argument("--valid-fraction", type=float, default=Cut.valid_fraction)
  parser.add_argument("--seed", type=int, default=Cut.seed)
  options = vars(parser.parse_args())
  books, folder = options.pop("books"), options.pop("out")
  try:
    counts = write_task(books, folder, Cut(**options))
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  said = f"{counts['train']:,} rows to train on and {counts['valid']:,} to validate"
  print(f"{said} are in {folder}", file=sys.stderr)
  return 0


if __name__ == "__main__":
  sys.exit(main())
