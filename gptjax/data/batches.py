"""Batches of rows: which rows make batch k, and how rows are cut from token files.

Batch k is a function of (seed, k, schedule) alone. The order is grain's shuffle of row numbers,
new in every epoch and without replacement within one; no state is kept, so resuming replays
nothing and any batch can be looked up again.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Protocol

import grain
import jax
import numpy as np

from gptjax.batch import Batch
from gptjax.data.batch_schedule import BatchSchedule, check_divides
from gptjax.data.locate import Span, find_spans
from gptjax.data.packing import open_packing_plan
from gptjax.data.prepare import PreparedData
from gptjax.data.token_files import TokenFiles
from gptjax.errors import ConfigError, DataError


class Rows(Protocol):
  """The rows of one split of one corpus. Index e * num_rows + r is row r in epoch e."""

  num_rows: int

  def take(self, indices_B: np.ndarray) -> Batch:
    """Returns the rows of int64 indices [B]: int32 tokens, targets, places, float32 weights."""

  def token_ranges(self, index: int) -> list[tuple[int, int]]:
    """Returns where a row's tokens and targets lie in the split: [start, stop) of each segment."""


class StreamRows:
  """Rows cut one after another from documents joined by their end tokens.

  The first row starts at another token in every epoch, so that rows differ between epochs. Up to
  one row at the end of the stream is left over by that.

  Args:
    seed: of the starts; None: always at the first token, and a last, shorter row is kept, so that
      every target is in exactly one row.
  """

  def __init__(self, tokens: TokenFiles, context_length: int, seed: int | None):
    self._tokens, self._length, self._seed = tokens, context_length, seed
    targets = max(tokens.num_tokens - 1, 0)
    if seed is None:
      self.num_rows = -(-targets // context_length)
      self._slack = 0
    else:
      self.num_rows = max((targets + 1) // context_length - 1, min(targets // context_length, 1))
      self._slack = min(targets - self.num_rows * context_length, context_length - 1)

  def take(self, indices_B: np.ndarray) -> Batch:
    positions_BL = self._starts(indices_B)[:, None] + np.arange(self._length + 1)
    last = self._tokens.num_tokens - 1
    tokens_BL = self._tokens.gather(np.minimum(positions_BL, last))
    return Batch(
      tokens_BL=np.ascontiguousarray(tokens_BL[:, :-1]),
      targets_BL=np.ascontiguousarray(tokens_BL[:, 1:]),
      weights_BL=(positions_BL[:, 1:] <= last).astype(np.float32),
    )

  def token_ranges(self, index: int) -> list[tuple[int, int]]:
    start = int(self._starts(np.array([index]))[0])
    return [(start, min(start + self._length + 1, self._tokens.num_tokens))]

  def _starts(self, indices_B: np.ndarray) -> np.ndarray:
    epochs_B, rows_B = np.divmod(indices_B, self.num_rows)
    if self._slack:
      epochs, inverse_B = np.unique(epochs_B, return_inverse=True)
      offsets = np.array([self._offset(int(epoch)) for epoch in epochs])
      return rows_B * self._length + offsets[inverse_B]
    return rows_B * self._length

  def _offset(self, epoch: int) -> int:
    digest = hashlib.blake2b(f"{self._seed} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % (self._slack + 1)


class PackedRows:
  """Rows of segments side by side, as the packing plan says; each row starts with segment 1."""

  def __init__(self, tokens: TokenFiles, context_length: int):
    self._tokens, self._length = tokens, context_length
    self._plan = open_packing_plan(tokens, context_length)
    self.num_rows = self._plan.num_rows

  def take(self, indices_B: np.ndarray) -> Batch:
    rows_B = indices_B % self.num_rows
    first_B = self._plan.row_starts[rows_B]
    counts_B = self._plan.row_starts[rows_B + 1] - first_B
    # S: the segments of all rows; T: their tokens.
    row_S, number_S = _runs(counts_B)
    starts_S, lengths_S = self._plan.segments[first_B[row_S] + number_S].T
    segment_T, position_T = _runs(lengths_S)
    before_S = np.cumsum(lengths_S) - lengths_S
    row_before_B = before_S[np.cumsum(counts_B) - counts_B]
    place_S = row_S * self._length + before_S - row_before_B[row_S]
    source_T = starts_S[segment_T] + position_T
    place_T = place_S[segment_T] + position_T

    def scatter(values, dtype=np.int32):
      array_BL = np.zeros((len(rows_B), self._length), dtype)
      array_BL.reshape(-1)[place_T] = values
      return array_BL

    return Batch(
      tokens_BL=scatter(self._tokens.gather(source_T)),
      targets_BL=scatter(self._tokens.gather(source_T + 1)),
      weights_BL=scatter(1, np.float32),
      positions_BL=scatter(position_T),
      segment_ids_BL=scatter(number_S[segment_T] + 1),
    )

  def token_ranges(self, index: int) -> list[tuple[int, int]]:
    first, last = self._plan.row_starts[[index % self.num_rows, index % self.num_rows + 1]]
    return [
      (int(start), int(start + length) + 1) for start, length in self._plan.segments[first:last]
    ]


class BatchSource:
  """The training batches of prepared data.

  For packed rows the plans of both splits are made here, if they are not there yet: it may take
  minutes, which an evaluation in the middle of a run should not.

  Args:
    prepared: from `prepare_data`.
    context_length: tokens of a row.
    seed: of the order of rows.
    schedule: how many rows each batch has.

  Attributes:
    rows_per_epoch: rows of all corpora that take part, together.

  Raises:
    DataError: a corpus is shorter than a row.
  """

  def __init__(
    self, prepared: PreparedData, context_length: int, seed: int, schedule: BatchSchedule
  ):
    self.schedule = schedule
    self._prepared = prepared
    self._names = [name for name, weight in prepared.weights.items() if weight > 0]
    if not self._names:
      raise ConfigError("every data weight is 0; give one corpus a positive weight")
    self._rows = [
      _open_rows(prepared, prepared.corpora[name][0], context_length, f"{seed} {name}")
      for name in self._names
    ]
    for name, rows in zip(self._names, self._rows, strict=True):
      if not rows.num_rows:
        num_tokens = prepared.corpora[name][0].num_tokens
        raise DataError(
          f'corpus "{name}" has {num_tokens} training tokens; a row of model.context_length'
          f" {context_length} needs {context_length + 1}: use more text or a shorter context"
        )
    if prepared.rows == "packed":
      for _, valid in prepared.corpora.values():
        open_packing_plan(valid, context_length)
    self.rows_per_epoch = sum(rows.num_rows for rows in self._rows)
    weights = [prepared.weights[name] for name in self._names]
    self._order = _row_order([rows.num_rows for rows in self._rows], weights, seed)

  def batch(self, batch: int, process_index: int = 0, process_count: int = 1) -> Batch:
    """Returns this process's rows of a batch, numpy; the processes' rows in turn are the batch.

    Raises:
      ConfigError: the rows of the batch do not divide among the processes.
    """
    self.schedule.check_processes(process_count)
    indices = _share(self.schedule.rows(batch), process_index, process_count)
    first = self.schedule.rows_before(batch)
    return _take(self._rows, [self._order[first + index] for index in indices])

  def batches(
    self, first: int = 0, process_index: int = 0, process_count: int = 1
  ) -> Iterator[Batch]:
    """Yields batches from number `first` on, without end."""
    for number in itertools.count(first):
      yield self.batch(number, process_index, process_count)

  def locate(self, batch: int, row: int) -> list[Span]:
    """Finds the text and the source bytes of one row of a batch.

    Raises:
      DataError: the batch has no such row, or a source changed since it was tokenised.
    """
    num_rows = self.schedule.rows(batch)
    if not 0 <= row < num_rows:
      raise DataError(f"row {row} is not in that batch; its rows are 0 to {num_rows - 1}")
    corpus, index = self._order[self.schedule.rows_before(batch) + row]
    tokens, _ = self._prepared.corpora[self._names[corpus]]
    ranges = self._rows[corpus].token_ranges(index)
    return [
      span
      for start, stop in ranges
      for span in find_spans(tokens, self._prepared.tokenizer, start, stop)
    ]


def valid_batches(
  prepared: PreparedData,
  context_length: int,
  batch_rows: int,
  max_rows: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Yields the validation splits of all corpora, in rows that do not overlap.

  Every target is scored once. The last batch is filled up with rows of weight 0.

  Args:
    batch_rows: rows of a batch over all processes.
    max_rows: at most so many rows, evenly spread; 0 is all.

  Raises:
    ConfigError: batch_rows do not divide among the processes.
  """
  rows = [
    _open_rows(prepared, valid, context_length, None) for _, valid in prepared.corpora.values()
  ]
  every = [(corpus, row) for corpus, part in enumerate(rows) for row in range(part.num_rows)]
  if 0 < max_rows < len(every):
    every = [every[i * len(every) // max_rows] for i in range(max_rows)]
  check_divides(batch_rows, process_count, "eval.batch_rows")
  share = _share(batch_rows, process_index, process_count)
  for first in range(0, len(every), batch_rows):
    places = [every[min(first + index, len(every) - 1)] for index in share]
    batch = _take(rows, places)
    is_real_B = np.array([first + index < len(every) for index in share], np.float32)
    yield batch.replace(weights_BL=batch.weights_BL * is_real_B[:, None])


class _RowNumbers(grain.MapDataset):
  """Its own indices, those beyond the first epoch too."""

  def __init__(self, num_rows: int):
    super().__init__()
    self._num_rows = num_rows

  def __len__(self) -> int:
    return self._num_rows

  def __getitem__(self, index: int) -> int:
    return index


def _row_order(
  num_rows: list[int], weights: list[float], seed: int
) -> Mapping[int, tuple[int, int]]:
  """Returns (corpus, row index) by place in the run; see `Rows` for the index."""
  shuffled = [
    _RowNumbers(count)
    .seed((seed + number) % 2**32)
    .shuffle()
    .repeat()
    .map(functools.partial(_with_corpus, number))
    for number, count in enumerate(num_rows)
  ]
  return shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, weights)


def _with_corpus(corpus: int, index: int) -> tuple[int, int]:
  return corpus, index


def _open_rows(
  prepared: PreparedData, tokens: TokenFiles, context_length: int, seed: str | None
) -> Rows:
  if prepared.rows == "packed":
    return PackedRows(tokens, context_length)
  return StreamRows(tokens, context_length, seed)


def _share(num_rows: int, process_index: int, process_count: int) -> range:
  """Returns this process's rows of a batch."""
  size = num_rows // process_count
  return range(process_index * size, (process_index + 1) * size)


def _take(rows: list[Rows], places: list[tuple[int, int]]) -> Batch:
  """Cuts (corpus, row index) places into one batch, in their order."""
  corpus_B, index_B = np.array(places, np.int64).T
  corpora = np.unique(corpus_B)
  parts = [rows[corpus].take(index_B[corpus_B == corpus]) for corpus in corpora]
  if len(parts) == 1:
    return parts[0]
  place_B = np.argsort(np.argsort(corpus_B, kind="stable"))
  return jax.tree.map(lambda *arrays: np.concatenate(arrays)[place_B], *parts)


def _runs(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Counts out runs: [2, 3] gives the runs [0, 0, 1, 1, 1] and the places [0, 1, 0, 1, 2]."""
  run = np.repeat(np.arange(len(lengths)), lengths)
  return run, np.arange(len(run)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
