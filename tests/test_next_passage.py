"""The next-passage task: right answers follow in the book, the others are of its same part."""

import collections
import json
import re
import subprocess
import sys

import pytest

from gptjax.data.next_passage import NUM_CHOICES, Cut, cut_books, write_task
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.tasks import load_task
from gptjax.errors import ConfigError, DataError

CUT = Cut(text_units=5, choice_units=3, valid_fraction=0.25)


def book(prefix, num_words=800):
  return "\n".join(f"{prefix}{number}" for number in range(num_words))


def test_the_right_answer_follows_and_the_others_follow_others():
  books = {"one": book("a"), "two": book("b")}
  rows = cut_books(books, CUT)
  assert (len(rows["train"]), len(rows["valid"])) == (150, 50)
  right = collections.Counter()
  for split, of_split in rows.items():
    for row in of_split:
      text = books[row["id"].split("-")[0]].replace("\n", " ")
      answers = [f"{row['text']} {choice}" in text for choice in row["choices"]]
      assert answers == [place == row["label"] for place in range(NUM_CHOICES)]
      right[split, row["choices"][row["label"]]] += 1
  # Every other answer is right for another row of the part: no text is in both.
  for split, of_split in rows.items():
    for row in of_split:
      assert len(set(row["choices"])) == NUM_CHOICES
      assert all(right[split, choice] == 1 for choice in row["choices"])
  labels = collections.Counter(row["label"] for row in rows["train"])
  assert min(labels.values()) > 150 / NUM_CHOICES / 2


def test_validation_is_the_end_of_the_book():
  rows = cut_books({"one": book("a")}, CUT)
  places = {
    split: [int(number) for row in of_split for number in re.findall(r"a(\d+)", str(row))]
    for split, of_split in rows.items()
  }
  assert max(places["train"]) < min(places["valid"])


def test_rows_depend_on_books_and_seed_alone():
  books = {"one": book("a"), "two": book("b")}
  assert cut_books(books, CUT) == cut_books(books, CUT)
  other = Cut("words", 5, 3, 0.25, seed=1)
  assert cut_books(books, CUT)["train"] != cut_books(books, other)["train"]


def test_languages_without_spaces_are_cut_by_characters():
  text = "".join(chr(0x4E00 + number) + "\n" * (number % 7 == 0) for number in range(400))
  (row, *_) = cut_books({"zh": text}, Cut("characters", 5, 3, 0.25))["train"]
  whole = row["text"] + row["choices"][row["label"]]
  assert whole.replace(" ", "") == "".join(chr(0x4E00 + number) for number in range(8))


def test_the_files_are_a_task_without_an_adapter(tmp_path):
  (tmp_path / "one.txt").write_text(book("a"))
  assert write_task([f"{tmp_path}/*.txt"], tmp_path / "task", CUT) == {"train": 75, "valid": 25}
  data = load_task(
    TaskDataConfig(
      family="multiple_choice",
      files=(f"{tmp_path}/task/train.jsonl",),
      valid_files=(f"{tmp_path}/task/valid.jsonl",),
      id_columns=("id",),
    )
  )
  assert (len(data.train), len(data.valid)) == (75, 25)
  rows = [json.loads(line) for line in (tmp_path / "task/train.jsonl").read_text().splitlines()]
  assert [example.label for example in data.train] == [row["label"] for row in rows]


def test_what_does_not_fit_is_one_line(tmp_path):
  with pytest.raises(DataError, match='"one" gives 3 passages to train'):
    cut_books({"one": book("a", 32)}, CUT)
  with pytest.raises(ConfigError, match="valid-fraction"):
    Cut(valid_fraction=1)
  with pytest.raises(ConfigError, match="at least 1"):
    Cut(choice_units=0)
  command = [sys.executable, "-m", "gptjax.data.next_passage", f"{tmp_path}/no.txt", "--out", "x"]
  result = subprocess.run(command, capture_output=True, text=True)
  assert result.returncode == 2
  assert "no file matches" in result.stderr and result.stderr.count("\n") == 1
