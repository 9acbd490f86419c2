"""Batches of examples: training in a shuffled order, scoring in theirs, padded to few lengths.

An example is S neighbouring rows, one for each sequence of the example that has the most; rows
that an example lacks, and all rows of an example that only fills a batch, are padding. Batch k is
a function of (seed, k) alone. Imports jax only through the batch.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from gptjax.batch import Batch
from gptjax.data.batch_schedule import check_divides
from gptjax.data.task_inputs import EncodedTask

PADDING = -1


def choose_buckets(lengths_N: np.ndarray, num_buckets: int, max_length: int) -> tuple[int, ...]:
  """Chooses the padded lengths that waste least, rising; the last holds every example.

  They are of `padded_lengths`, so that other data finds them again.

  Args:
    lengths_N: of the examples.
    num_buckets: lengths wanted at most; each is a program to compile.
    max_length: most tokens of a sequence.
  """
  ladder = padded_lengths(max_length)
  place_N = np.searchsorted(ladder, lengths_N)
  ladder = ladder[: place_N.max() + 1]
  counts = np.bincount(place_N, minlength=len(ladder))

  def padded_tokens(chosen: tuple[int, ...]) -> int:
    fits = np.searchsorted(chosen, ladder)
    return int(np.sum(np.array(chosen)[fits] * counts))

  size = min(num_buckets, len(ladder)) - 1
  choices = ((*smaller, ladder[-1]) for smaller in itertools.combinations(ladder[:-1], size))
  return min(choices, key=padded_tokens)


def padded_lengths(max_length: int) -> list[int]:
  """Returns the lengths that rows may be padded to: 8, 12, 16, 24, 32, 48, ..., max_length."""
  powers = (2**power for power in range(3, max_length.bit_length()))
  rungs = itertools.chain(*((power, power * 3 // 2) for power in powers))
  return [*(rung for rung in rungs if rung < max_length), max_length]


class TaskBatches:
  """The training batches of a task.

  In every epoch each example is in one batch, with others that are padded to the same length;
  those that are left over in the end of a length go with longer ones. The last batch of the last
  length is filled up with padding.

  Args:
    encoded: the training examples.
    batch_examples: examples of a batch, of all processes.
    seed: of the order.
    bucket_lengths: from `choose_buckets`.

  Attributes:
    batches_per_epoch: so many see every example once.
  """

  def __init__(
    self,
    encoded: EncodedTask,
    batch_examples: int,
    seed: int,
    bucket_lengths: Sequence[int],
  ):
    self.batches_per_epoch = -(-encoded.num_examples // batch_examples)
    self._encoded, self._batch_examples, self._seed = encoded, batch_examples, seed
    self._lengths = list(bucket_lengths)
    self._bucket_N = np.searchsorted(self._lengths, encoded.lengths_N)
    self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

  def examples(self, batch: int) -> np.ndarray:
    """Returns the numbers [E] of the examples of a batch; PADDING fills the last of an epoch."""
    return self._at(batch)[1]

  def batch(self, batch: int, process_index: int = 0, process_count: int = 1) -> Batch:
    """Returns this process's examples of a batch; the processes' in turn are the batch.

    Raises:
      ConfigError: the examples do not divide among the processes.
    """
    check_divides(self._batch_examples, process_count, "train.batch_rows")
    length, indices_E = self._at(batch)
    share = np.split(indices_E, process_count)[process_index]
    return make_batch(self._encoded, share, length)

  def batches(
    self, first: int = 0, process_index: int = 0, process_count: int = 1
  ) -> Iterator[Batch]:
    """Yields batches from number `first` on, without end."""
    for number in itertools.count(first):
      yield self.batch(number, process_index, process_count)

  def _at(self, batch: int) -> tuple[int, np.ndarray]:
    epoch, place = divmod(batch, self.batches_per_epoch)
    return self._epoch(epoch)[place]

  def _make_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
    """Returns (padded length, examples [E]) of each batch of an epoch."""
    draws = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
    order_N = _shuffled(self._encoded.num_examples, draws)
    batches, left = [], order_N[:0]
    for bucket, length in enumerate(self._lengths):
      waiting = np.concatenate([left, order_N[self._bucket_N[order_N] == bucket]])
      num_full = len(waiting) // self._batch_examples
      full, left = np.split(waiting, [num_full * self._batch_examples])
      batches += [(length, part) for part in full.reshape(num_full, self._batch_examples)]
    if len(left):
      batches.append((self._lengths[-1], _fill(left, self._batch_examples)))
    return [batches[place] for place in _shuffled(len(batches), draws)]


def scoring_batches(
  encoded: EncodedTask, batch_examples: int, bucket_lengths: Sequence[int]
) -> Iterator[tuple[np.ndarray, Batch]]:
  """Yields every example once, with others that are padded to the same length.

  Yields:
    (numbers [E] of the examples, the batch); the last batch of a length is filled with PADDING.
  """
  bucket_N = np.searchsorted(bucket_lengths, encoded.lengths_N)
  for bucket, length in enumerate(bucket_lengths):
    (members,) = np.nonzero(bucket_N == bucket)
    for first in range(0, len(members), batch_examples):
      indices_E = _fill(members[first : first + batch_examples], batch_examples)
      yield indices_E, make_batch(encoded, indices_E, length)


def make_batch(encoded: EncodedTask, indices_E: np.ndarray, length: int) -> Batch:
  """Makes the batch of some examples.

  Args:
    encoded: the examples.
    indices_E: which; PADDING is an example without tokens.
    length: L, at least that of the longest of them.

  Returns:
    Rows [E * S, L]. Targets are the next tokens, weighted 1, the marking ones too, as in the
    original; segment ids are 1 on tokens and 0 on padding; labels_B has one of each example, 0
    where it is not known.
  """
  num_rows = len(indices_E) * encoded.num_sequences
  tokens_BL = np.zeros((num_rows, length), np.int32)
  lengths_B = np.zeros(num_rows, np.int32)
  for place, index in enumerate(indices_E):
    sequences = encoded.sequences[index] if index != PADDING else ()
    for row, sequence in enumerate(sequences, place * encoded.num_sequences):
      joined = np.concatenate(sequence)
      tokens_BL[row, : len(joined)] = joined
      lengths_B[row] = len(joined)
  columns_L = np.arange(length)
  return Batch(
    tokens_BL=tokens_BL,
    targets_BL=np.pad(tokens_BL[:, 1:], ((0, 0), (0, 1))),
    weights_BL=(columns_L < lengths_B[:, None] - 1).astype(np.float32),
    segment_ids_BL=(columns_L < lengths_B[:, None]).astype(np.int32),
    labels_B=np.where(indices_E == PADDING, 0, encoded.labels_N[indices_E]).astype(
      encoded.labels_N.dtype
    ),
  )


def _shuffled(count: int, draws: np.random.PCG64) -> np.ndarray:
  """Returns 0 .. count - 1 in an order drawn; raw draws are the same in every release of NumPy."""
  return np.argsort(draws.random_raw(count), kind="stable")


def _fill(indices: np.ndarray, size: int) -> np.ndarray:
  return np.pad(indices, (0, size - len(indices)), constant_values=PADDING)
