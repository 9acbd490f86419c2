"""Continuous batching: rows join a running batch, and leave it, while the others go on.

A prompt is read into a slot a chunk at a time, between the steps of the rows that run, without
choosing anything: the next step reads its last token again, with that of every other row, and
chooses. So only the step depends on options, and it is compiled three times for all: for greedy
rows, for sampled ones, and for rows of which one has rules or asks for alternatives; what a row
does not use has the value that changes nothing.

Letters as in sampling.py; Q counts the tokens of a chunk.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import ConfigError, DataError
from gptjax.generate import programs, sampling
from gptjax.generate.cache import Cache, extend
from gptjax.generate.candidates import Sampling, make_sampling
from gptjax.generate.generator import Generator, draw_seed
from gptjax.generate.options import DecodingOptions, is_sampled, strategy
from gptjax.generate.rules import Rules, make_rules, pad_lists
from gptjax.generate.sampling import Controls, Texts
from gptjax.generate.writer import Writer
from gptjax.model.config import ModelConfig
from gptjax.model.heads import lm_logits

PyTree = Any

# Tokens of a chunk; between two steps at most the largest of them is read.
_CHUNKS = (16, 64, 256)
_IDLE = DecodingOptions(eos_token_id=())
# What changes nothing, where it is not -1.
_NEUTRAL = {
  "bias_RN": 0.0,
  "repetition_R": 1.0,
  "frequency_R": 0.0,
  "presence_R": 0.0,
  "ngram_R": 0,
  "min_length_R": 0,
  "limit_R": 0,
  "cut_mass_R": -1.0,
  "min_p_R": 0.0,
  "typical_mass_R": 2.0,
}
_RIGHT_ALIGNED = ("biased_RNW", "bad_RNW")


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
  prompt: Prompt
  writer: Writer
  is_running: bool = False


@dataclasses.dataclass
class _Reading:
  """A prompt of which `position` tokens are read, into the first of its slots."""

  prompt: Prompt
  slots: list[int]
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
    self._seen: dict[str, np.ndarray] = {}
    self._width: int | None = None
    self._controls: tuple[Controls, int] | None = None
    self._num_alternatives = 0
    self._cache = _empty_cache(self._config, num_slots, num_positions)
    # Arrays of their own: they are donated.
    self._texts = sampling.new_texts(
      jnp.zeros((num_slots, num_positions), jnp.int32),
      jnp.ones(num_slots, jnp.int32),
      jnp.ones(num_slots, jnp.int32),
      jax.random.split(jax.random.key(0), num_slots),
      None,
      0,
    ).replace(
      length_R=jnp.ones(num_slots, jnp.int32),
      finish_R=jnp.full(num_slots, sampling.LENGTH, jnp.int32),
    )

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
      raise DataError(
        f"a prompt of {len(ids)} tokens {grows}, but the slots have {self.num_positions}"
        " positions; shorten it, or lower max_new_tokens"
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
    slots, seed = free[:copies], draw_seed(prompt.options)
    tokens_S = np.zeros(self.num_positions, np.int32)
    tokens_S[: len(prompt.ids)] = prompt.ids
    length, limit = np.int32(len(prompt.ids)), np.int32(prompt.limit)
    for copy, slot in enumerate(slots):
      self._texts = _write_row(
        self._texts, np.int32(slot), tokens_S, length, limit, seed, prompt_index, copy
      )
      writer = Writer(self._generator.tokenizer, prompt.options.stop)
      self._rows[slot] = _Row(prompt, writer)
    self._readings.append(_Reading(prompt, list(slots)))
    self._controls = None
    return slots

  def step(self) -> list[Produced | Read]:
    """Reads on in prompts that wait for it, and gives every running slot its next token.

    Slots whose texts end are free afterwards.
    """
    events: list[Produced | Read] = [*self._read_prompts()]
    running = [slot for slot in self.active if self._rows[slot].is_running]
    if not running:
      return events
    controls, num_alternatives = self._current_controls()
    with jax.default_matmul_precision("highest"):
      self._texts, self._cache, news = _step(
        self._generator.weights, self._texts, self._cache, controls, num_alternatives, self._config
      )
    arrays = jax.device_get(news)
    events += [self._produce(slot, *(array[slot] for array in arrays)) for slot in running]
    return events

  def release(self, slot: int) -> None:
    """Frees a slot before its row has ended; one that is free stays so."""
    if self._rows[slot] is None:
      return
    self._mark(slot, sampling.LENGTH)
    # The step goes on with the controls it has: those of a row that has ended change nothing.
    self._rows[slot] = None
    for reading in [reading for reading in self._readings if slot in reading.slots]:
      if reading.slots[0] == slot and reading.position and len(reading.slots) > 1:
        self._cache = _copy_row(self._cache, np.int32(slot), np.int32(reading.slots[1]))
      reading.slots.remove(slot)
      if not reading.slots:
        self._readings.remove(reading)

  def warm_up(
    self,
    options: Sequence[DecodingOptions] = (DecodingOptions(),),
    progress: Callable[[int, int], None] = lambda done, total: None,
  ) -> None:
    """Compiles what reads prompts and the steps of rows with these options, while all is free.

    Args:
      options: later rows find the step with the rules of all of them.
      progress: told (programs done, programs in all).
    """
    if self.active:
      raise ConfigError("slots are warmed up before they are used; release their rows first")
    sizes = self._chunk_sizes
    total = len(options) + len(sizes)
    for done, row_options in enumerate(options, 1):
      self._run_alone(dataclasses.replace(row_options, num_return_sequences=1), 1)
      progress(done, total)
    for done, size in enumerate(sizes, len(options) + 1):
      self._run_alone(DecodingOptions(), min(size, self.num_positions), is_continued=False)
      progress(done, total)
    self._cache = _copy_row(self._cache, np.int32(0), np.int32(0))
    jax.block_until_ready(self._cache)

  def _run_alone(self, options: DecodingOptions, length: int, is_continued: bool = True) -> None:
    """Reads a prompt, in every way, and goes one step on."""
    for wants in ("scores", "embedding"):
      self.admit(self.check([0] * length, options, wants=wants, is_continued=is_continued))
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
    weights, slot = self._generator.weights, np.int32(reading.slots[0])
    with jax.default_matmul_precision("highest"):
      hidden_QD, self._cache = _read(
        weights, tokens_1Q, slot, np.int32(start), self._cache, self._config
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
      found = _score(
        self._generator.weights, hidden_QD, targets_Q, self._num_alternatives, self._config
      )
    logprob_Q, ids_QX, logprobs_QX = jax.device_get(found)
    count = reading.prompt.options.top_logprobs
    for place, target in enumerate(targets):
      pairs = _pairs(ids_QX[place], logprobs_QX[place], count)
      reading.alternatives.append(pairs)
      reading.logprobs.append(dict(pairs).get(target, float(logprob_Q[place])))

  def _finish_reading(self, reading: _Reading) -> Read:
    first, *others = reading.slots
    is_continued = reading.prompt.is_continued
    for slot in others:
      self._cache = _copy_row(self._cache, np.int32(first), np.int32(slot))
    for slot in reading.slots:
      if is_continued:
        self._mark(slot, sampling.RUNNING)
        self._rows[slot].is_running = True
      else:
        self._rows[slot] = None
    is_embedded = reading.prompt.wants == "embedding"
    mean_D = reading.sum_D / np.float32(len(reading.prompt.ids)) if is_embedded else None
    return Read(reading.slots, reading.logprobs, reading.alternatives, mean_D, not is_continued)

  def _produce(self, slot: int, token, logprob, code, ids_X, logprobs_X) -> Produced:
    row, token, code = self._rows[slot], int(token), int(code)
    is_end, is_last = code == sampling.END_TOKEN, code != sampling.RUNNING
    text = row.writer.step(token, is_last=is_last, is_end=is_end)
    reason = {sampling.RUNNING: None, sampling.LENGTH: "length"}.get(code, "stop")
    if row.writer.is_stopped:
      self.release(slot)
      reason = "stop"
    elif is_last:
      self._rows[slot] = None
    pairs = _pairs(ids_X, logprobs_X, row.prompt.options.top_logprobs)
    # The very number that stands among the alternatives.
    logprob = dict(pairs).get(token, float(logprob))
    return Produced(slot, token, logprob, pairs, text, reason, is_end)

  def _mark(self, slot: int, code: int) -> None:
    finish_R = _set(self._texts.finish_R, np.int32(slot), np.int32(code))
    self._texts = self._texts.replace(finish_R=finish_R)

  def _grow_alternatives(self, count: int) -> None:
    """Has programs find as many alternatives at a place, and keeps them so."""
    if count > self._num_alternatives:
      self._num_alternatives = min(1 << (count - 1).bit_length(), self._config.vocab_size)

  def _current_controls(self) -> tuple[Controls, int]:
    """Returns (controls of all rows, how many alternatives the step is to find)."""
    if self._controls is None:
      controls, num_alternatives = self._make_controls()
      self._controls = jax.device_put(controls), num_alternatives
    return self._controls

  def _make_controls(self) -> tuple[Controls, int]:
    prompts = [Prompt([], _IDLE, 0, 1) if row is None else row.prompt for row in self._rows]
    options = [prompt.options for prompt in prompts]
    rules = make_rules(
      options,
      model_end_id=None,
      min_length_R=[prompt.min_length for prompt in prompts],
      limit_R=[prompt.limit for prompt in prompts],
    )
    is_plain = not jax.tree.leaves(rules) and not any(row.top_logprobs for row in options)
    controls = Controls(
      rules=rules if is_plain else self._widen(rules),
      sampling=self._sampling(options, is_needed=not is_plain),
      end_RE=self._keep_size("ends", pad_lists(row.eos_token_id for row in options)),
    )
    return controls, 0 if is_plain else self._num_alternatives

  def _sampling(self, options: Sequence[DecodingOptions], is_needed: bool) -> Sampling | None:
    drawn = [is_sampled(row) for row in options]
    if not any(drawn) and (self._width is None or not is_needed):
      return None

    def values(name: str, greedy: float) -> list:
      return [getattr(row, name) if is_drawn else greedy for row, is_drawn in zip(options, drawn)]

    # One candidate is enough for a greedy row, so that it does not widen those of others.
    made = make_sampling(
      self._config.vocab_size,
      values("temperature", 0.0),
      values("top_k", 1),
      values("top_p", 1.0),
      values("min_p", 0.0),
      values("typical_p", 1.0),
    )
    # 0 is the whole vocabulary.
    widths = {made.width, made.width if self._width is None else self._width}
    self._width = 0 if 0 in widths else max(widths)
    return self._widen(made.replace(width=self._width))

  def _widen(self, made: Rules | Sampling) -> Rules | Sampling:
    """Keeps what any earlier row needed, so that rows that come and go compile nothing."""
    arrays = {
      field.name: self._keep_size(field.name, getattr(made, field.name))
      for field in dataclasses.fields(made)
      if field.metadata.get("pytree_node", True)
    }
    return made.replace(**arrays)

  def _keep_size(self, name: str, array: np.ndarray | None) -> np.ndarray | None:
    seen = self._seen.get(name)
    if seen is None:
      seen = array
    if seen is None:
      return None
    off = self._config.vocab_size if name == "top_k_R" else _NEUTRAL.get(name, -1)
    shape = seen.shape if array is None else np.maximum(seen.shape, array.shape)
    wide = np.full(shape, off, seen.dtype)
    if array is not None:
      width = wide.shape[-1] - array.shape[-1]
      if name in _RIGHT_ALIGNED:
        wide[:, : array.shape[1], width:] = array
      else:
        wide[tuple(map(slice, array.shape))] = array
    self._seen[name] = wide
    return wide


def _pairs(ids_X: np.ndarray, logprobs_X: np.ndarray, count: int) -> list[tuple[int, float]]:
  return list(zip(ids_X[:count].tolist(), logprobs_X[:count].tolist()))


@functools.partial(jax.jit, donate_argnames="texts")
def _write_row(
  texts: Texts,
  slot: jax.Array,
  tokens_S: jax.Array,
  length: jax.Array,
  limit: jax.Array,
  seed: jax.Array,
  prompt_index: jax.Array,
  copy: jax.Array,
) -> Texts:
  """Writes a prompt over what was in a slot; the row stays idle until it is marked.

  While it is, steps write at its last token, which is read again before it counts.
  """
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt_index), copy)
  return texts.replace(
    tokens_RS=texts.tokens_RS.at[slot].set(tokens_S),
    prompt_length_R=texts.prompt_length_R.at[slot].set(length),
    length_R=texts.length_R.at[slot].set(length),
    limit_R=texts.limit_R.at[slot].set(limit),
    finish_R=texts.finish_R.at[slot].set(sampling.LENGTH),
    keys_R=texts.keys_R.at[slot].set(key),
  )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _read(
  weights: PyTree,
  tokens_1Q: jax.Array,
  slot: jax.Array,
  position: jax.Array,
  cache: Cache,
  config: ModelConfig,
) -> tuple[jax.Array, Cache]:
  """Reads a chunk of a prompt into a slot; returns its hidden states [Q, D] and the cache."""
  programs.report("reading into slots", tokens=tokens_1Q.shape[1])
  row = jax.tree.map(lambda whole: jax.lax.dynamic_slice_in_dim(whole, slot, 1), cache)
  hidden_1QD, row = extend(weights, tokens_1Q, position[None], row, config)
  cache = jax.tree.map(
    lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, slot, 0), cache, row
  )
  return hidden_1QD[0], cache


@functools.partial(jax.jit, donate_argnums=0)
def _copy_row(cache: Cache, source: jax.Array, target: jax.Array) -> Cache:
  return jax.tree.map(lambda whole: whole.at[target].set(whole[source]), cache)


@functools.partial(jax.jit, donate_argnums=0)
def _set(array_R: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
  return array_R.at[slot].set(value)


@functools.partial(jax.jit, static_argnames=("num_alternatives", "config"))
def _score(
  weights: PyTree,
  hidden_QD: jax.Array,
  targets_Q: jax.Array,
  num_alternatives: int,
  config: ModelConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (log-probabilities of the targets, the likeliest ids, and theirs)."""
  programs.report("scores of a prompt", tokens=len(targets_Q), alternatives=num_alternatives)
  log_probs_QV = jax.nn.log_softmax(lm_logits(weights, hidden_QD, config), axis=-1)
  logprobs_QX, ids_QX = jax.lax.top_k(log_probs_QV, num_alternatives)
  return jnp.take_along_axis(log_probs_QV, targets_Q[:, None], axis=1)[:, 0], ids_QX, logprobs_QX


@functools.partial(
  jax.jit, static_argnames=("num_alternatives", "config"), donate_argnames=("texts", "cache")
)
def _step(
  weights: PyTree,
  texts: Texts,
  cache: Cache,
  controls: Controls,
  num_alternatives: int,
  config: ModelConfig,
) -> tuple[Texts, Cache, tuple[jax.Array, ...]]:
  """Returns (texts, cache, (token_R, logprob_R, finish_R, ids_RX and logprobs_RX))."""
  programs.report_texts("a step of slots", texts)
  hidden_RD, cache = sampling.read_last(weights, texts, cache, config)
  logits_RV = lm_logits(weights, hidden_RD, config)
  scores_RV = sampling.score(logits_RV, texts, controls.rules)
  token_R = sampling.pick(scores_RV, texts, controls.sampling)
  texts = sampling.append(texts, token_R, logits_RV, controls)
  logits_RX, ids_RX = jax.lax.top_k(logits_RV, num_alternatives)
  logprobs_RX = logits_RX - jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
  last = jnp.arange(len(token_R)), texts.length_R - 1
  news = texts.tokens_RS[last], texts.logprobs_RS[last], texts.finish_R, ids_RX, logprobs_RX
  return texts, cache, news


def _empty_cache(config: ModelConfig, num_rows: int, num_slots: int) -> Cache:
  shape = (num_rows, config.num_heads, num_slots, config.head_width)

  def layers():
    return tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.num_layers))

  return Cache(layers(), layers())


def _check_strategy(options: DecodingOptions) -> None:
  if strategy(options) not in ("greedy", "sample"):
    raise ConfigError("slots run greedy search and sampling; leave beams and speculation out")
  if options.beyond_context == "slide":
    raise ConfigError('slots end with their positions; leave beyond_context="slide" out')
  if options.allowed_tokens is not None:
    raise ConfigError("slots call no function of allowed_tokens; leave it out")
