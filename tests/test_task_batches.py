"""Batches of examples: an epoch has each once, order by seed and number, and rows as documented."""

import itertools

import numpy as np
import pytest

from gptjax.data.task_batches import (
  PADDING,
  TaskBatches,
  choose_buckets,
  make_batch,
  padded_lengths,
  scoring_batches,
)
from gptjax.data.task_inputs import EncodedTask
from gptjax.errors import ConfigError

BUCKETS = (8, 16, 32)


def encoded(num_examples=53, num_sequences=1, longest=30):
  """Example n is made of tokens n + 1, its sequences of different lengths."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, longest + 1, (num_examples, num_sequences))
  sequences = [
    [(np.full(1, n + 1, np.int32), np.full(size - 1, n + 1, np.int32)) for size in sizes]
    for n, sizes in enumerate(lengths)
  ]
  return EncodedTask(sequences, np.arange(num_examples, dtype=np.int32) % 3, 0)


def epoch(batches, number):
  first = number * batches.batches_per_epoch
  return [batches.examples(first + k) for k in range(batches.batches_per_epoch)]


@pytest.mark.parametrize("num_examples", [1, 7, 8, 53, 64])
def test_an_epoch_has_every_example_once(num_examples):
  batches = TaskBatches(encoded(num_examples), 8, seed=3, bucket_lengths=BUCKETS)
  assert batches.batches_per_epoch == -(-num_examples // 8)
  for number in (0, 5):
    every = np.concatenate(epoch(batches, number))
    assert sorted(every[every != PADDING]) == list(range(num_examples))
    assert len(every) == 8 * batches.batches_per_epoch


def test_the_order_is_new_in_every_epoch_and_for_every_seed():
  task = encoded()
  one, same, other = (TaskBatches(task, 8, seed, BUCKETS) for seed in (1, 1, 2))
  assert np.array_equal(np.stack(epoch(one, 3)), np.stack(epoch(same, 3)))
  assert not np.array_equal(np.stack(epoch(one, 3)), np.stack(epoch(one, 4)))
  assert not np.array_equal(np.stack(epoch(one, 3)), np.stack(epoch(other, 3)))


def test_the_order_of_a_seed_stays_what_it_was():
  batches = TaskBatches(encoded(12), 4, seed=1, bucket_lengths=BUCKETS)
  assert np.stack(epoch(batches, 0)).tolist() == [[0, 11, 10, 1], [7, 5, 8, 6], [2, 4, 3, 9]]


def test_a_batch_is_found_without_those_before_it():
  task = encoded(num_sequences=2)
  batches = TaskBatches(task, 8, 1, BUCKETS)
  for later in itertools.islice(batches.batches(9), 3):
    assert later.tokens_BL.shape[0] == 16
  (again,) = itertools.islice(TaskBatches(task, 8, 1, BUCKETS).batches(11), 1)
  assert np.array_equal(later.tokens_BL, again.tokens_BL)


def test_processes_share_a_batch_by_whole_examples():
  batches = TaskBatches(encoded(num_sequences=2), 8, 1, BUCKETS)
  whole = batches.batch(2)
  parts = [batches.batch(2, index, 4) for index in range(4)]
  assert np.array_equal(whole.tokens_BL, np.concatenate([part.tokens_BL for part in parts]))
  assert np.array_equal(whole.labels_B, np.concatenate([part.labels_B for part in parts]))
  with pytest.raises(ConfigError, match="does not divide among 3 processes"):
    batches.batch(0, 0, 3)


def test_examples_are_padded_little():
  task = encoded(400)
  batches = TaskBatches(task, 8, 1, BUCKETS)
  least = np.array(BUCKETS)[np.searchsorted(BUCKETS, task.lengths_N)].sum()
  padded = sum(batches.batch(k).tokens_BL.size for k in range(batches.batches_per_epoch))
  # At most a batch of each length goes up to the next.
  assert least <= padded <= least + 8 * sum(BUCKETS)
  assert padded < 0.8 * 400 * BUCKETS[-1]


def test_rows_of_a_batch():
  pieces = [np.array(piece, np.int32) for piece in ([7], [1, 2], [9])]
  task = EncodedTask([[pieces, pieces[1:]], [pieces[:2]]], np.array([1.5, 2.5], np.float32), 0)
  batch = make_batch(task, np.array([1, 0, PADDING]), 5)
  padding = [0, 0, 0, 0, 0]
  assert batch.tokens_BL.tolist() == [
    [7, 1, 2, 0, 0],
    padding,
    [7, 1, 2, 9, 0],
    [1, 2, 9, 0, 0],
    padding,
    padding,
  ]
  assert batch.targets_BL[2].tolist() == [1, 2, 9, 0, 0]
  # As the original's M[:, 1:]: every token but the first is predicted, the marks too.
  assert batch.weights_BL.tolist()[:4] == [
    [1, 1, 0, 0, 0],
    padding,
    [1, 1, 1, 0, 0],
    [1, 1, 0, 0, 0],
  ]
  assert batch.segment_ids_BL.tolist()[:3] == [[1, 1, 1, 0, 0], padding, [1, 1, 1, 1, 0]]
  assert not batch.weights_BL[4:].any() and not batch.segment_ids_BL[4:].any()
  assert batch.labels_B.tolist() == [2.5, 1.5, 0] and batch.labels_B.dtype == np.float32
  assert batch.positions_BL is None


def test_scoring_has_every_example_once_in_few_shapes():
  task = encoded(53, num_sequences=3)
  seen, shapes = [], set()
  for indices_E, batch in scoring_batches(task, 8, BUCKETS):
    shapes.add(batch.tokens_BL.shape)
    seen += [index for index in indices_E if index != PADDING]
    for place, index in enumerate(indices_E):
      rows_SL = batch.tokens_BL[3 * place : 3 * place + 3]
      assert set(rows_SL[rows_SL > 0]) == ({index + 1} if index != PADDING else set())
  assert sorted(seen) == list(range(53))
  assert shapes <= {(24, length) for length in BUCKETS}


def test_buckets_waste_least():
  lengths_N = np.array([5] * 90 + [9] * 5 + [40] * 20 + [70])
  assert padded_lengths(70) == [8, 12, 16, 24, 32, 48, 64, 70]
  assert choose_buckets(lengths_N, 3, 70) == (8, 48, 70)
  assert choose_buckets(lengths_N, 1, 512) == (96,)
  assert choose_buckets(lengths_N, 20, 512) == (8, 12, 16, 24, 32, 48, 64, 96)

  def padded(buckets):
    return np.array(buckets)[np.searchsorted(buckets, lengths_N)].sum()

  ladder = [length for length in padded_lengths(512) if length < 96]
  best = min(padded((*pair, 96)) for pair in itertools.combinations(ladder, 2))
  assert padded(choose_buckets(lengths_N, 3, 512)) == best
