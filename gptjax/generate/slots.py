"""Continuous batching: rows join a running batch, and leave it, while the others go on.

A prompt is read a chunk at a time, between the steps of the rows that run, without choosing
anything: the next step reads its last token again, with that of every other row, and chooses. So
only the step depends on options, and it is compiled once for all of them: what a row does not use
has the value that changes nothing, and what no row uses is stepped over.

Letters as in sampling.py; Q counts the tokens of a chunk.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gptjax.errors import ConfigError, TooLongError
from gptjax.generate import sampling, slot_programs
from gptjax.generate.generator import Generator, draw_seed
from gptjax.generate.options import DecodingOptions, strategy
from gptjax.generate.sampling import Controls
from gptjax.generate.slot_batch import SlotBatch, make_sizes
from gptjax.generate.slot_controls import IDLE, ControlsMaker, Uses
from gptjax.generate.writer import Writer

# Tokens of a chunk; between two steps at most the largest of them is read.
_CHUNKS = (16, 64, 256)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt that was found good, by `Slots.check`, and how it is to be continued.

  Attributes:
    ids: its tokens.
    options: greedy search or sampling; num_return_sequences texts share one reading.
    min_length, limit: tokens of prompt and text together.
    wants: "scores", what the model thinks of the prompt itself, with `options.top_logprobs`
      alternatives; "embedding", the mean of its hidden states; or nothing.
  """

  ids: list[int]
  options: DecodingOptions
  min_length: int
  limit: int
  wants: str = ""

  @property
  def is_continued(self) -> bool:
    """Whether the prompt is not only to be read."""
    return self.limit > len(self.ids)


@dataclasses.dataclass(frozen=True)
class Produced:
  """One more token of a slot.

  Attributes:
    slot: whose; it is free again where finish_reason is not None.
    token, logprob: the token and what the model alone thought of it.
    alternatives: (token, logprob), best first, as many as `top_logprobs`.
    text: what may be shown now: whole characters, nothing of a stop text.
    finish_reason: "stop" or "length" of a last token, else None.
    is_end_token: the token ends the text and is no part of it.
  """

  slot: int
  token: int
  logprob: float
  alternatives: list[tuple[int, float]]
  text: str
  finish_reason: str | None
  is_end_token: bool

  @property
  def is_last(self) -> bool:
    """Whether nothing more comes of the slot."""
    return self.finish_reason is not None


@dataclasses.dataclass(frozen=True)
class Read:
  """A prompt has been read, by the step before that of its first tokens.

  Attributes:
    slots: of its texts; free again where is_last.
    logprobs: of each token but the first, under the model; of prompts that want scores.
    alternatives: the likeliest at the place of each of these, as of `Produced`.
    mean_D: float32, the mean of the hidden states; of a prompt that wants an embedding.
    is_last: nothing more comes of the slots; the prompt was only to be read.
  """

  slots: list[int]
  logprobs: list[float]
  alternatives: list[list[tuple[int, float]]]
  mean_D: np.ndarray | None
  is_last: bool


@dataclasses.dataclass
class _Row:
  """A slot in use; it runs where it has a place in the batch."""

  prompt: Prompt
  writer: Writer
  place: int | None = None


@dataclasses.dataclass
class _Reading:
  """A prompt of which `position` tokens are read; its texts are numbered by `slots`."""

  prompt: Prompt
  slots: dict[int, int]
  prompt_index: int
  position: int = 0
  logprobs: list[float] = dataclasses.field(default_factory=list)
  alternatives: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
  sum_D: np.ndarray | float = 0.0


class Slots:
  """A batch of constant size, whose rows are of requests that come and go.

  Args:
    generator: whose model, tokenizer and end tokens.
    num_slots: rows.
    num_positions: tokens of a row, prompt included; at most the context.
  """

  def __init__(self, generator: Generator, num_slots: int, num_positions: int):
    context = generator.config.context_length
    if not 1 <= num_positions <= context:
      raise ConfigError(f"num_positions is {num_positions}; it must be 1 to the context, {context}")
    if num_slots < 1:
      raise ConfigError(f"num_slots is {num_slots}; it must be at least 1")
    self.num_slots, self.num_positions = num_slots, num_positions
    self._generator, self._config = generator, generator.config
    self._rows: list[_Row | None] = [None] * num_slots
    self._readings: collections.deque[_Reading] = collections.deque()
    self._maker = ControlsMaker(self._config.vocab_size)
    self._controls: tuple[Controls, Uses] | None = None
    self._num_alternatives = 0
    self._prompt_cache = slot_programs.empty_cache(self._config, 1, num_positions)
    sizes = make_sizes(num_slots, num_positions)
    self._batch = SlotBatch(generator.weights, self._config, sizes)

  @property
  def num_free(self) -> int:
    """Slots that a prompt can be admitted to."""
    return self._rows.count(None)

  @property
  def active(self) -> list[int]:
    """Slots whose rows run, or whose prompt is being read."""
    return [slot for slot, row in enumerate(self._rows) if row is not None]

  def check(
    self,
    prompt: Any,
    options: DecodingOptions,
    *,
    wants: str = "",
    is_continued: bool = True,
  ) -> Prompt:
    """Looks at a prompt and its options, without the device; any thread may call it.

    Args:
      prompt: a text or ids.
      options: how it is to be continued.
      wants: what of the prompt itself: "scores", "embedding", or nothing.
      is_continued: it is not only to be read, of which options on lengths say nothing.

    Raises:
      UserError: as `Generator.generate`, a strategy that slots do not have, or what is longer or
        more than the slots.
    """
    _check_strategy(options)
    if not is_continued:
      # As if there were room for a new token behind a prompt that fills the context.
      options = dataclasses.replace(options, max_new_tokens=1, beyond_context="slide")
    [ids], options, lengths = self._generator.read([prompt], options)
    [min_length], [limit] = lengths.min_lengths, lengths.limits
    if options.stop and self._generator.tokenizer is None:
      raise ConfigError("stop needs a tokenizer, and the model has none; use eos_token_id")
    if not is_continued:
      limit = len(ids)
    if limit > self.num_positions:
      grows = f"may grow to {limit}" if is_continued else "is longer"
      raise TooLongError(
        f"a prompt of {len(ids)} tokens {grows}, but the slots have {self.num_positions}"
        " positions; shorten it, or ask for fewer new tokens"
      )
    if options.num_return_sequences > self.num_slots:
      raise ConfigError(
        f"{options.num_return_sequences} texts of a prompt need as many slots, and there are"
        f" {self.num_slots}"
      )
    return Prompt(ids, options, min_length, limit, wants)

  def admit(self, prompt: Prompt, *, prompt_index: int = 0) -> list[int]:
    """Gives a prompt a slot for each of its texts; the steps that follow read it, and go on.

    Args:
      prompt: from `check`.
      prompt_index: its place in its request, for its random stream.

    Raises:
      ConfigError: too few free slots.
    """
    copies = prompt.options.num_return_sequences
    free = [slot for slot, row in enumerate(self._rows) if row is None]
    if copies > len(free):
      raise ConfigError(f"{copies} texts need as many free slots, and there are {len(free)}")
    self._grow_alternatives(prompt.options.top_logprobs)
    slots = free[:copies]
    for slot in slots:
      writer = Writer(self._generator.tokenizer, prompt.options.stop, prompt.ids)
      self._rows[slot] = _Row(prompt, writer)
    copy_of = {slot: copy for copy, slot in enumerate(slots)}
    self._readings.append(_Reading(prompt, copy_of, prompt_index))
    return slots

  def step(self) -> list[Produced | Read]:
    """Reads on in prompts that wait for it, and gives every running slot its next token.

    Slots whose texts end are free afterwards.
    """
    events: list[Produced | Read] = [*self._read_prompts()]
    places = {slot: self._rows[slot].place for slot in self.active}
    running = {slot: place for slot, place in places.items() if place is not None}
    if not running:
      return events
    arrays = self._batch.step(*self._current_controls(), self._num_alternatives)
    for slot, place in running.items():
      events.append(self._produce(slot, *(array[place] for array in arrays)))
    self._fit()
    return events

  def release(self, slot: int) -> None:
    """Frees a slot before its row has ended; one that is free stays so."""
    for reading in [reading for reading in self._readings if slot in reading.slots]:
      del reading.slots[slot]
      if not reading.slots:
        self._readings.remove(reading)
    self._vacate(slot, has_ended=False)

  def warm_up(
    self,
    options: DecodingOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
  ) -> None:
    """Compiles what reads prompts, and the step of every size, while all is free.

    Args:
      options: the step is ready for rows that use no more than these.
      progress: told (programs done, programs in all).
    """
    if self.active:
      raise ConfigError("slots are warmed up before they are used; release their rows first")
    options = dataclasses.replace(options, num_return_sequences=1)
    self._grow_alternatives(options.top_logprobs)
    chunks, sizes = self._chunk_sizes, self._batch.sizes
    total = len(chunks) + len(sizes)
    for done, length in enumerate(chunks, 1):
      self._run_alone(DecodingOptions(), min(length, self.num_positions), is_continued=False)
      progress(done, total)
    for done, size in enumerate(sizes, len(chunks) + 1):
      self._batch.resize(size)
      self._run_alone(options, 1)
      progress(done, total)
    for size, other in itertools.permutations(sizes, 2):
      self._batch.resize(size)
      self._batch.resize(other)
    self._batch.resize(sizes[0])

  def _run_alone(self, options: DecodingOptions, length: int, is_continued: bool = True) -> None:
    """Reads a prompt, scores it, and goes one step on, in arrays of the size that they have."""
    self.admit(self.check([0] * length, options, wants="scores", is_continued=is_continued))
    self.step()
    for slot in self.active:
      self.release(slot)

  @property
  def _chunk_sizes(self) -> list[int]:
    return [size for size in _CHUNKS if size <= max(_CHUNKS[0], self.num_positions)]

  def _read_prompts(self) -> list[Read]:
    """Reads chunks of the prompts that were admitted first, as much as may delay a step."""
    finished, budget = [], _CHUNKS[-1]
    while self._readings:
      reading = self._readings[0]
      size = self._chunk_size(len(reading.prompt.ids) - reading.position)
      if size > budget:
        break
      budget -= size
      self._read_chunk(reading, size)
      if reading.position == len(reading.prompt.ids):
        self._readings.popleft()
        finished.append(self._finish_reading(reading))
    return finished

  def _chunk_size(self, num_left: int) -> int:
    """The smallest chunk that takes all that is left, unless more than half would be padding."""
    sizes = self._chunk_sizes
    for smaller, size in zip([0, *sizes], sizes):
      if num_left <= size:
        return size if num_left > size // 2 or not smaller else smaller
    return sizes[-1]

  def _read_chunk(self, reading: _Reading, size: int) -> None:
    start, ids = reading.position, reading.prompt.ids
    chunk = ids[start : start + size]
    tokens_1Q = np.zeros((1, size), np.int32)
    tokens_1Q[0, : len(chunk)] = chunk
    with jax.default_matmul_precision("highest"):
      hidden_QD, self._prompt_cache = slot_programs.read(
        self._generator.weights, tokens_1Q, np.int32(start), self._prompt_cache, self._config
      )
    reading.position += len(chunk)
    if reading.prompt.wants == "scores":
      self._score(reading, hidden_QD, ids[start + 1 : start + size + 1])
    elif reading.prompt.wants == "embedding":
      reading.sum_D = reading.sum_D + np.asarray(hidden_QD, np.float32)[: len(chunk)].sum(axis=0)

  def _score(self, reading: _Reading, hidden_QD: jax.Array, targets: list[int]) -> None:
    targets_Q = np.zeros(len(hidden_QD), np.int32)
    targets_Q[: len(targets)] = targets
    with jax.default_matmul_precision("highest"):
      found = slot_programs.score(
        self._generator.weights, hidden_QD, targets_Q, self._num_alternatives, self._config
      )
    logprob_Q, ids_QX, logprobs_QX = jax.device_get(found)
    count = reading.prompt.options.top_logprobs
    for place, target in enumerate(targets):
      pairs = _pairs(ids_QX[place], logprobs_QX[place], count)
      reading.alternatives.append(pairs)
      reading.logprobs.append(dict(pairs).get(target, float(logprob_Q[place])))

  def _finish_reading(self, reading: _Reading) -> Read:
    prompt = reading.prompt
    if prompt.is_continued:
      self._fit(is_needed=True)
      seed = draw_seed(prompt.options)
      for slot, copy in reading.slots.items():
        self._rows[slot].place = self._batch.join(
          prompt.ids, prompt.limit, seed, reading.prompt_index, copy, self._prompt_cache
        )
      self._controls = None
    else:
      for slot in reading.slots:
        self._rows[slot] = None
    is_embedded = prompt.wants == "embedding"
    mean_D = reading.sum_D / np.float32(len(prompt.ids)) if is_embedded else None
    return Read(
      list(reading.slots),
      reading.logprobs,
      reading.alternatives,
      mean_D,
      is_last=not prompt.is_continued,
    )

  def _fit(self, is_needed: bool = False) -> None:
    """Gives the batch the size that suits all rows that run, or will after they are read."""
    rows = [row for row in self._rows if row is not None and row.prompt.is_continued]
    if not rows:
      return
    longest = max(row.prompt.limit for row in rows)
    moved = self._batch.fit(len(rows), longest, is_needed=is_needed)
    if moved is not None:
      for row in rows:
        row.place = None if row.place is None else moved[row.place]
      self._controls = None

  def _produce(self, slot: int, token, logprob, code, ids_X, logprobs_X) -> Produced:
    row, token, code = self._rows[slot], int(token), int(code)
    is_end, is_last = code == sampling.END_TOKEN, code != sampling.RUNNING
    text = row.writer.step(token, is_last=is_last, is_end=is_end)
    reason = {sampling.RUNNING: None, sampling.LENGTH: "length"}.get(code, "stop")
    if row.writer.is_stopped:
      reason = "stop"
    if reason is not None:
      self._vacate(slot, has_ended=is_last)
    pairs = _pairs(ids_X, logprobs_X, row.prompt.options.top_logprobs)
    # The very number that stands among the alternatives.
    logprob = dict(pairs).get(token, float(logprob))
    return Produced(slot, token, logprob, pairs, text, reason, is_end)

  def _vacate(self, slot: int, *, has_ended: bool) -> None:
    # The step goes on with the controls it has: those of a row that has ended change nothing.
    row, self._rows[slot] = self._rows[slot], None
    if row is not None and row.place is not None:
      self._batch.vacate(row.place, has_ended=has_ended)

  def _grow_alternatives(self, count: int) -> None:
    """Has programs find as many alternatives at a place, and keeps them so."""
    if count > self._num_alternatives:
      self._num_alternatives = min(1 << (count - 1).bit_length(), self._config.vocab_size)

  def _current_controls(self) -> tuple[Controls, Uses]:
    if self._controls is None:
      at = {row.place: row.prompt for row in self._rows if row is not None}
      prompts = [at.get(place) for place in range(self._batch.size.num_rows)]
      self._controls = jax.device_put(
        self._maker.make(
          [IDLE if prompt is None else prompt.options for prompt in prompts],
          [0 if prompt is None else prompt.min_length for prompt in prompts],
          [1 if prompt is None else prompt.limit for prompt in prompts],
        )
      )
    return self._controls


def _pairs(ids_X: np.ndarray, logprobs_X: np.ndarray, count: int) -> list[tuple[int, float]]:
  return list(zip(ids_X[:count].tolist(), logprobs_X[:count].tolist()))


def _check_strategy(options: DecodingOptions) -> None:
  if strategy(options) not in ("greedy", "sample"):
    raise ConfigError("slots run greedy search and sampling; leave beams and speculation out")
  if options.beyond_context == "slide":
    raise ConfigError('slots end with their positions; leave beyond_context="slide" out')
  if options.allowed_tokens is not None:
    raise ConfigError("slots call no function of allowed_tokens; leave it out")
