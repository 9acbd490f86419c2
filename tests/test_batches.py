"""Batches: a function of (seed, k, schedule), whole epochs, exact targets, back to the bytes."""

import itertools
import json

import jax
import numpy as np
import pytest

from gptjax.data import packing, prepare
from gptjax.data.batch_schedule import BatchSchedule
from gptjax.data.batches import BatchSource, StreamRows, valid_batches
from gptjax.data.config import CorpusConfig, DataConfig
from gptjax.data.packing import open_packing_plan, pack_best_fit
from gptjax.errors import ConfigError, DataError

LENGTH = 8


def prepare_data(tmp_path, **keys):
  keys = {"cache_dir": str(tmp_path / "cache"), "vocab_size": 280, **keys}
  return prepare.prepare_data(DataConfig(**keys), report=lambda line: None)


@pytest.fixture
def numbers(tmp_path):
  """A stream in which every token is its own position."""
  np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
  np.arange(77, dtype=np.uint16).tofile(tmp_path / "valid.bin")
  (tmp_path / "tokenizer.json").write_text(
    json.dumps(
      {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {str(i): i for i in range(1000)}, "unk_token": "0"},
      }
    )
  )
  return prepare_data(
    tmp_path,
    token_files=(f"{tmp_path}/train.bin",),
    valid_token_files=(f"{tmp_path}/valid.bin",),
    tokenizer=f"{tmp_path}/tokenizer.json",
    end_token="",
  )


@pytest.fixture
def documents(tmp_path):
  """Documents of many lengths, packed."""
  file = tmp_path / "a.jsonl"
  texts = ["ab" * (1 + 7 * i % 23) + "xyz"[i % 3] for i in range(60)]
  file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return prepare_data(
    tmp_path, files=(str(file),), tokenizer="char", end_token="<end>", rows="packed"
  )


def assert_equal(one, two):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), one, two)


def source(prepared, seed=3, rows=4, **keys):
  return BatchSource(prepared, LENGTH, seed, BatchSchedule(rows, LENGTH, **keys))


def test_rows_are_consecutive_tokens_and_targets_are_the_next(numbers):
  batch = source(numbers).batch(5)
  assert batch.tokens_BL.dtype == batch.targets_BL.dtype == np.int32
  np.testing.assert_array_equal(batch.tokens_BL, batch.tokens_BL[:, :1] + np.arange(LENGTH))
  np.testing.assert_array_equal(batch.targets_BL, batch.tokens_BL + 1)
  np.testing.assert_array_equal(batch.weights_BL, np.ones((4, LENGTH), np.float32), strict=True)


def test_an_epoch_shows_every_row_once_and_the_next_shifts_them(numbers):
  batches = source(numbers, rows=1)
  count = batches.rows_per_epoch
  assert count == (1000 - LENGTH) // LENGTH
  first, second = (
    [int(batches.batch(epoch * count + k).tokens_BL[0, 0]) for k in range(count)]
    for epoch in range(2)
  )
  for starts in (first, second):
    np.testing.assert_array_equal(np.diff(sorted(starts)), LENGTH)
    assert starts != sorted(starts)
  assert min(first) != min(second)
  assert np.argsort(first).tolist() != np.argsort(second).tolist()


def test_a_batch_is_a_function_of_seed_and_number(numbers):
  assert_equal(source(numbers).batch(7), source(numbers).batch(7))
  assert_equal(next(source(numbers).batches(7)), source(numbers).batch(7))
  others = [source(numbers).batch(8), source(numbers, seed=4).batch(7)]
  for other in others:
    assert not np.array_equal(other.tokens_BL, source(numbers).batch(7).tokens_BL)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_a_batch_in_order(numbers, count):
  whole = source(numbers).batch(9)
  parts = [source(numbers).batch(9, index, count) for index in range(count)]
  assert_equal(jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts), whole)
  with pytest.raises(ConfigError, match=r"4 rows .* among 3 .* make train.batch_rows a multiple"):
    source(numbers).batch(9, 0, 3)
  with pytest.raises(ConfigError, match=r"4 rows .* among 3 .* make eval.batch_rows a multiple"):
    next(valid_batches(numbers, LENGTH, 4, process_count=3))


def test_processes_that_cannot_share_a_ramp_are_told_which_key_to_change():
  ramp = BatchSchedule(12, LENGTH, ramp_start_rows=6, ramp_tokens=1000)
  ramp.check_processes(3)
  with pytest.raises(ConfigError, match=r"6 rows .* 4 processes; make train.ramp_start_rows"):
    ramp.check_processes(4)
  with pytest.raises(ConfigError, match=r"12 rows .* 5 processes; make train.batch_rows"):
    BatchSchedule(12, LENGTH).check_processes(5)


def test_validation_scores_every_target_once(numbers):
  batches = list(valid_batches(numbers, LENGTH, 4))
  assert {batch.tokens_BL.shape for batch in batches} == {(4, LENGTH)}
  scored = [
    target for batch in batches for target in batch.targets_BL[batch.weights_BL > 0].tolist()
  ]
  assert scored == list(range(1, 77))


def test_validation_is_the_same_for_several_processes_and_can_be_a_sample(numbers):
  for whole, *parts in zip(
    valid_batches(numbers, LENGTH, 4),
    *(valid_batches(numbers, LENGTH, 4, process_index=i, process_count=2) for i in range(2)),
    strict=True,
  ):
    assert_equal(jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts), whole)
  (sample,) = valid_batches(numbers, LENGTH, 4, max_rows=3)
  assert sample.tokens_BL[:3, 0].tolist() == [0, 24, 48]
  assert sample.weights_BL.sum(axis=1).tolist() == [LENGTH] * 3 + [0]


def test_a_corpus_shorter_than_a_row_says_both_numbers(numbers):
  with pytest.raises(DataError, match=r"has 1000 training tokens.* 1000 needs 1001"):
    BatchSource(numbers, 1000, 0, BatchSchedule(1, 1000))
  one = BatchSource(numbers, 999, 0, BatchSchedule(2, 999))
  assert one.rows_per_epoch == 1
  assert one.batch(3).tokens_BL[:, 0].tolist() == [0, 0]


def test_every_length_of_stream_gives_rows_inside_it(numbers):
  tokens, _ = numbers.corpora["corpus"]
  for length in range(1, 1000, 37):
    rows = StreamRows(tokens, length, "seed")
    batch = rows.take(np.arange(3 * rows.num_rows))
    assert batch.targets_BL.max() <= 999
    assert batch.weights_BL.min() == 1
    assert rows.num_rows * length > 999 - 2 * length


def test_packed_rows_hold_every_target_once_and_never_cross(documents):
  train, _ = documents.corpora["corpus"]
  batches = source(documents, rows=1)
  end = documents.tokenizer.end_id
  seen = 0
  for k in range(batches.rows_per_epoch):
    batch = jax.tree.map(lambda array: array[0], batches.batch(k))
    seen += int(batch.weights_BL.sum())
    np.testing.assert_array_equal(batch.weights_BL > 0, batch.segment_ids_BL > 0)
    assert batch.segment_ids_BL[0] == 1
    for segment in range(1, batch.segment_ids_BL.max() + 1):
      inside = batch.segment_ids_BL == segment
      tokens, targets = batch.tokens_BL[inside], batch.targets_BL[inside]
      np.testing.assert_array_equal(tokens[1:], targets[:-1])
      np.testing.assert_array_equal(batch.positions_BL[inside], np.arange(inside.sum()))
      assert end not in tokens
      assert targets[-1] == end or inside.sum() == LENGTH
  assert seen == train.num_tokens - train.num_documents


def test_all_packing_plans_are_made_with_the_source(documents, tmp_path):
  BatchSource(documents, LENGTH, 3, BatchSchedule(4, LENGTH))
  plans = {folder.name for folder in tmp_path.glob("cache/corpus-*/*-packed-*")}
  assert {f"train-packed-{LENGTH}", f"valid-packed-{LENGTH}"} <= plans


def test_packed_rows_need_no_validation(tmp_path):
  file = tmp_path / "a.txt"
  file.write_text("some text to be packed")
  keys = {"tokenizer": "char", "rows": "packed", "valid_fraction": 0.0}
  prepared = prepare_data(tmp_path, files=(str(file),), **keys)
  assert BatchSource(prepared, LENGTH, 3, BatchSchedule(1, LENGTH)).rows_per_epoch == 3
  assert list(valid_batches(prepared, LENGTH, 1)) == []


def test_packed_validation_counts_the_targets_of_bits_per_byte(documents):
  _, valid = documents.corpora["corpus"]
  scored = sum(batch.weights_BL.sum() for batch in valid_batches(documents, LENGTH, 4))
  assert scored == valid.num_tokens - valid.num_documents
  assert documents.bytes_per_token == (valid.text_bytes - valid.num_documents) / scored


def test_packing_is_best_fit_and_made_once(documents):
  assert pack_best_fit([5, 4, 3, 2, 6], 8) == [[0, 2], [1], [3, 4]]
  train, _ = documents.corpora["corpus"]
  plan = open_packing_plan(train, LENGTH)
  again = open_packing_plan(train, LENGTH)
  np.testing.assert_array_equal(plan.segments, again.segments, strict=True)
  lengths = [
    plan.segments[first:last, 1].sum() for first, last in itertools.pairwise(plan.row_starts)
  ]
  assert max(lengths) <= LENGTH
  assert np.mean(lengths) > 0.9 * LENGTH


def test_a_document_of_more_segments_than_a_window_is_packed_whole(documents, monkeypatch):
  train, _ = documents.corpora["corpus"]
  expected = open_packing_plan(train, LENGTH).segments
  monkeypatch.setattr(packing, "WINDOW_SEGMENTS", 2)
  windows = list(packing.segment_windows(train.document_starts, LENGTH))
  assert max(map(len, windows)) == 2
  segments = np.concatenate(windows)
  np.testing.assert_array_equal(segments, np.sort(expected.view("i8,i8"), axis=0).view("i8"))


def test_mixtures_follow_their_weights(tmp_path):
  for name, letter in (("a", "x"), ("b", "y"), ("c", "z")):
    (tmp_path / f"{name}.txt").write_text(letter * 400)
  mixture = {
    name: CorpusConfig(files=(f"{tmp_path}/{name}.txt",), weight=weight)
    for name, weight in (("a", 3.0), ("b", 1.0), ("c", 0.0))
  }
  prepared = prepare_data(tmp_path, mixture=mixture, tokenizer="char", end_token="")
  batches = source(prepared, rows=40)
  counts = np.bincount(batches.batch(2).tokens_BL[:, 0], minlength=3)
  assert counts.tolist() == [30, 10, 0]
  texts = [batches.locate(0, row)[0].path[-5] for row in range(40)]
  letters = [prepared.tokenizer.decode(row[:1]) for row in batches.batch(0).tokens_BL]
  assert [{"a": "x", "b": "y"}[name] for name in texts] == letters
  assert sum(batch.weights_BL.sum() for batch in valid_batches(prepared, LENGTH, 4)) == 3 * 39


def test_a_row_is_found_in_its_file(tmp_path, monkeypatch):
  monkeypatch.setattr("gptjax.data.corpus.PIECE_CHARS", 30)
  text = "日本語の文。 the quick brown fox\n" * 30
  (tmp_path / "a.txt").write_text(text)
  prepared = prepare_data(tmp_path, files=(f"{tmp_path}/a.txt",), end_token="")
  batches = source(prepared)
  row = batches.batch(1)
  raw = (tmp_path / "a.txt").read_bytes()
  for number in range(4):
    spans = batches.locate(1, number)
    joined = b"".join(raw[span.start_byte : span.end_byte] for span in spans)
    ids = [*row.tokens_BL[number], row.targets_BL[number, -1]]
    # A row may begin or end inside a character, whose bytes are then named whole.
    assert prepared.tokenizer.decode(ids).strip("\ufffd") in joined.decode()
    assert len(joined) <= prepared.tokenizer.bytes_of_token[ids].sum() + 4
  with pytest.raises(DataError, match="row 4 is not in that batch"):
    batches.locate(1, 4)
  (tmp_path / "a.txt").write_text(text.replace("quick", "quiet"))
  with pytest.raises(DataError, match="has changed since"):
    for number in range(4):
      batches.locate(1, number)


def test_rows_of_records_and_token_files_are_found(documents, numbers):
  spans = source(documents).locate(0, 0)
  assert all(span.path.endswith("a.jsonl") for span in spans)
  for span in spans:
    with open(span.path, "rb") as file:
      record = json.loads(file.read()[span.start_byte : span.end_byte])
    assert span.text.removesuffix("<end>") in record["text"]
  (span,) = source(numbers).locate(0, 0)
  with open(span.path, "rb") as file:
    tokens = np.frombuffer(file.read()[span.start_byte : span.end_byte], np.uint16)
  np.testing.assert_array_equal(tokens[:-1], source(numbers).batch(0).tokens_BL[0])


def test_schedule_without_a_ramp():
  schedule = BatchSchedule(12, 64)
  assert [schedule.rows(k) for k in (0, 5)] == [12, 12]
  assert schedule.rows_before(5) == 60
  assert schedule.tokens_before(5) == 60 * 64
  assert [schedule.batches_for(rows) for rows in (0, 1, 12, 13)] == [0, 1, 1, 2]


def test_ramp_doubles_along_a_line_in_tokens_up_to_the_full_batch():
  schedule = BatchSchedule(72, 10, ramp_start_rows=8, ramp_tokens=5000, multiple=4)
  rows = [schedule.rows(k) for k in range(60)]
  assert sorted(set(rows)) == [8, 16, 32, 64, 72]
  assert rows == sorted(rows)
  for k, count in enumerate(rows):
    assert schedule.rows_before(k) == sum(rows[:k])
    assert schedule.batches_for(sum(rows[:k]) + 1) == k + 1
    line = 8 + 64 * min(schedule.tokens_before(k) / 5000, 1)
    assert line / 2 < count <= line


def test_a_ramp_that_starts_full_is_none():
  assert {BatchSchedule(8, 10, 8, 5000).rows(k) for k in range(100)} == {8}


def test_a_ramp_changes_batches_but_not_the_order_of_rows(numbers):
  ramped = source(numbers, rows=8, ramp_start_rows=2, ramp_tokens=200)
  fixed = source(numbers, rows=8)

  def first_rows(batches):
    starts = itertools.chain.from_iterable(batch.tokens_BL[:, 0] for batch in batches.batches())
    return list(itertools.islice(starts, 80))

  assert ramped.batch(0).num_rows == 2
  assert first_rows(ramped) == first_rows(fixed)


@pytest.mark.parametrize(
  "keys",
  [
    {"ramp_start_rows": 2},
    {"ramp_start_rows": 16, "ramp_tokens": 9},
    {"ramp_start_rows": 3, "ramp_tokens": 9, "multiple": 2},
    {"multiple": 3},
  ],
)
def test_impossible_schedules_are_one_line(keys):
  with pytest.raises(ConfigError, match=r"train\."):
    BatchSchedule(8, 4, **keys)
