"""Log-likelihoods of tokens: rows in, a number for each scored token out, on all local devices.

Everything the room measures is made of this. A row's numbers depend on its own tokens alone:
padding lies at the right, where causal attention does not look, and what a batch, a bucket or a
device adds is rows and slots of weight 0. Only float32's order of sums is left to differ.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.batch import Batch
from gptjax.errors import ConfigError, DataError
from gptjax.generate import programs
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_logits
from gptjax.parallel import Parallel, make_parallel

PyTree = Any

# Tokens of a batch where no batch size is given.
BATCH_TOKENS = 8192
# Tokens whose logits exist at once: at 50k vocabulary they take 50 MB.
CHUNK_TOKENS = 256


class Scored(Protocol):
  """What is scored: `gptjax.checkpoint.models.Loaded`, or a `gptjax.Model`."""

  config: ModelConfig
  params: PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
  """Tokens of which the last ones are scored, each given all before it.

  Attributes:
    tokens: ids, 2 to context_length + 1 of them.
    num_scored: 1 to len(tokens) - 1.
  """

  tokens: Sequence[int] | np.ndarray
  num_scored: int


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
  """What a model thinks of the scored tokens of a row.

  Attributes:
    logprobs_S: float32, natural logarithms, at most 0.
    is_greedy_S: bool, whether the token is the likeliest of the vocabulary.
    alternatives_SX, alternative_logprobs_SX: int32 and float32, the likeliest X tokens, best first;
      [S, 0] where none are asked for.
  """

  logprobs_S: np.ndarray
  is_greedy_S: np.ndarray
  alternatives_SX: np.ndarray
  alternative_logprobs_SX: np.ndarray

  @property
  def logprob(self) -> float:
    """Of all scored tokens together, summed in float64."""
    return float(self.logprobs_S.sum(dtype=np.float64))

  @property
  def is_greedy(self) -> bool:
    """Whether greedy search would have written the scored tokens."""
    return bool(self.is_greedy_S.all())


def continuation_row(
  context: Sequence[int], continuation: Sequence[int], context_length: int
) -> Row:
  """Makes the row that scores a continuation; a context that is too long loses its beginning.

  Args:
    context: ids, at least one (the end token, where a text stands by itself).
    continuation: ids, 1 to context_length of them.
    context_length: of the model.

  Raises:
    DataError: one of them is empty, or the continuation is too long.
  """
  if not len(context) or not len(continuation):
    empty = "continuation" if len(context) else "context"
    raise DataError(f"the {empty} is empty; give at least one token")
  if len(continuation) > context_length:
    raise DataError(
      f"a continuation has {len(continuation)} tokens, and the context of the model is"
      f" {context_length}; shorten it"
    )
  tokens = [*context, *continuation][-context_length - 1 :]
  return Row(tokens, len(continuation))


class Scorer:
  """Scores rows with one model; programs are compiled once for each length of a bucket.

  Args:
    model: config and parameters, which are computed with as they are (float32 is exact).
    batch_size: rows of a whole context in a batch, over all devices; shorter rows come in
      proportion more. None makes batches of 8,192 tokens. Changes speed and memory only.
    parallel: where the parameters lie; None copies them to every local device.

  Attributes:
    config: of the model.
  """

  def __init__(
    self, model: Scored, batch_size: int | None = None, parallel: Parallel | None = None
  ):
    if batch_size is not None and batch_size < 1:
      raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    self.config = model.config
    self._parallel = parallel or make_parallel("pmap", devices=jax.local_devices())
    self._params = model.params if parallel else self._parallel.adopt(model.params)
    context_length = self.config.context_length
    self._batch_tokens = batch_size * context_length if batch_size else BATCH_TOKENS
    self._programs: dict[int, Callable] = {}

  def score(
    self,
    rows: Sequence[Row],
    num_alternatives: int = 0,
    advance: Callable[[int], None] = lambda num_rows: None,
  ) -> list[Scores]:
    """Scores rows of any lengths.

    Args:
      rows: in any order; they are sorted into batches of like length here.
      num_alternatives: of the likeliest tokens to return for each scored one.
      advance: called with the number of rows done, as they are done.

    Returns:
      One for each row, in their order.

    Raises:
      DataError: a row that is too long or too short, or a token that is not in the vocabulary.
      ConfigError: more alternatives than the vocabulary has tokens.
    """
    for row in rows:
      _check(row, self.config)
    if not 0 <= num_alternatives <= self.config.vocab_size:
      raise ConfigError(
        f"alternatives is {num_alternatives}; it must be from 0 to {self.config.vocab_size},"
        " the size of the vocabulary"
      )
    results: list[Scores | None] = [None] * len(rows)
    running = collections.deque()

    def finish():
      indices, outputs = running.popleft()
      arrays = self._parallel.collect_rows(outputs, len(indices))
      for index, *of_row in zip(indices, *arrays):
        num_inputs = len(rows[index].tokens) - 1
        scored = slice(num_inputs - rows[index].num_scored, num_inputs)
        results[index] = Scores(*(array[scored] for array in of_row))
      advance(len(indices))

    for indices, batch in self._batches(rows):
      running.append((indices, self._run(batch, num_alternatives)))
      # A batch is fetched while the next one runs.
      if len(running) > 1:
        finish()
    while running:
      finish()
    return results

  def _run(self, batch: Batch, num_alternatives: int) -> PyTree:
    if num_alternatives not in self._programs:
      self._programs[num_alternatives] = self._parallel.compile_map(self._make(num_alternatives))
    # True float32 on every device; products of bfloat16 are exact in any case.
    with jax.default_matmul_precision("highest"):
      return self._programs[num_alternatives](
        self._params, self._parallel.shard_batch(batch, accumulation=1)
      )

  def _make(self, num_alternatives: int) -> Callable:
    def score(params, batch, *, axis_name):
      del axis_name
      batch = batch.map(lambda array_1BL: array_1BL[0])
      num_rows, length = batch.tokens_BL.shape
      programs.report("the scores", rows=num_rows, slots=length)
      arrays = score_batch(params, batch, num_alternatives, self.config)
      return jax.tree.map(lambda array: array[None], arrays)

    return score

  def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], Batch]]:
    """Groups rows by bucket, the longest first, so that what does not fit fails at once."""
    limit = self.config.context_length
    buckets = collections.defaultdict(list)
    for index, row in enumerate(rows):
      buckets[programs.bucket(len(row.tokens) - 1, limit)].append(index)
    for length in sorted(buckets, reverse=True):
      members = buckets[length]
      most = max(1, self._batch_tokens // length)
      # A power of two, so that few rows are no full batch and yet compile in few sizes.
      size = min(most, 1 << (len(members) - 1).bit_length())
      for start in range(0, len(members), size):
        indices = members[start : start + size]
        yield indices, _stack([rows[index] for index in indices], size, length)


def _check(row: Row, config: ModelConfig) -> None:
  tokens = np.asarray(row.tokens)
  if not 2 <= len(tokens) <= config.context_length + 1:
    raise DataError(
      f"a row has {len(tokens)} tokens; it must have 2 to {config.context_length + 1}, one more"
      " than the context of the model"
    )
  if not 1 <= row.num_scored < len(tokens):
    raise DataError(
      f"{row.num_scored} of {len(tokens)} tokens are to be scored; the first has nothing before it"
    )
  check_ids(tokens, config.vocab_size)


def check_ids(tokens: np.ndarray, vocab_size: int) -> None:
  """Raises DataError for a token that the model does not have."""
  outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
  if outside.size:
    raise DataError(
      f"token id {outside[0]} is not in the vocabulary of the model, whose ids are 0 to"
      f" {vocab_size - 1}; the tokenizer is not the one it was trained with"
    )


def _stack(rows: Sequence[Row], num_rows: int, length: int) -> Batch:
  """Pads rows at the right to [num_rows, length]; weight 1 marks what is scored."""
  tokens_BL, targets_BL = np.zeros((2, num_rows, length), np.int32)
  weights_BL = np.zeros((num_rows, length), np.float32)
  for index, row in enumerate(rows):
    num_inputs = len(row.tokens) - 1
    tokens_BL[index, :num_inputs] = row.tokens[:-1]
    targets_BL[index, :num_inputs] = row.tokens[1:]
    weights_BL[index, num_inputs - row.num_scored : num_inputs] = 1
  return Batch(tokens_BL, targets_BL, weights_BL)


def score_batch(
  params: PyTree, batch: Batch, num_alternatives: int, config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Computes the scores of a batch; the head sees the scored tokens only, a chunk at a time.

  Args:
    params: the whole tree.
    batch: tokens, targets, and weights that are not 0 where a target is scored.
    num_alternatives: X.
    config: the architecture.

  Returns:
    logprobs_BL float32, is_greedy_BL bool, alternatives_BLX int32, alternative_logprobs_BLX
    float32, of `Scores`; zeros where nothing is scored.
  """
  shape = batch.tokens_BL.shape
  num_tokens, num_scored = batch.tokens_BL.size, jnp.count_nonzero(batch.weights_BL)
  hidden_TD = hidden_states(params["decoder"], batch, config).reshape(num_tokens, -1)
  targets_T = batch.targets_BL.reshape(-1)
  chunk = min(CHUNK_TOKENS, num_tokens)
  # The scored places first; what fills the last chunk lies outside, where reads are clipped and
  # writes dropped.
  slots = -(-num_tokens // chunk) * chunk
  (places_T,) = jnp.nonzero(batch.weights_BL.reshape(-1), size=slots, fill_value=num_tokens)
  outputs = (
    jnp.zeros(num_tokens, jnp.float32),
    jnp.zeros(num_tokens, bool),
    jnp.zeros((num_tokens, num_alternatives), jnp.int32),
    jnp.zeros((num_tokens, num_alternatives), jnp.float32),
  )

  def score_chunk(index, outputs):
    places_C = lax.dynamic_slice_in_dim(places_T, index * chunk, chunk)
    hidden_CD = hidden_TD.at[places_C].get(mode="clip")
    targets_C = targets_T.at[places_C].get(mode="clip")
    log_probs_CV = jax.nn.log_softmax(lm_logits(params, hidden_CD, config), axis=-1)
    values_CX, ids_CX = lax.top_k(log_probs_CV, num_alternatives)
    found = (
      jnp.take_along_axis(log_probs_CV, targets_C[:, None], axis=-1)[:, 0],
      jnp.argmax(log_probs_CV, axis=-1) == targets_C,
      ids_CX,
      values_CX,
    )
    return tuple(
      output.at[places_C].set(values, mode="drop") for output, values in zip(outputs, found)
    )

  outputs = lax.fori_loop(0, -(-num_scored // chunk), score_chunk, outputs)
  return tuple(output.reshape(*shape, *output.shape[1:]) for output in outputs)
