"""Continuous batching: rows join a running batch, and leave it, while the others go on.

A prompt is read into a slot without choosing anything: the next step reads its last token again,
with that of every other row, and chooses. So only the step depends on options, and it is compiled
once for all: what a row does not use has the value that changes nothing.

Letters as in sampling.py; C counts texts of one prompt.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import ConfigError
from gptjax.generate import programs, sampling
from gptjax.generate.cache import Cache, prefill
from gptjax.generate.candidates import Sampling, make_sampling
from gptjax.generate.generator import Generator, draw_seed
from gptjax.generate.options import DecodingOptions, is_sampled, strategy
from gptjax.generate.rules import Rules, make_rules, pad_lists
from gptjax.generate.sampling import Alternatives, Controls, Texts
from gptjax.generate.stopping import Stops
from gptjax.model.config import ModelConfig

PyTree = Any

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
class Produced:
  """One more token of a slot.

  Attributes:
    slot: whose; it is free again where finish_reason is not None.
    token, logprob: the token and what the model alone thought of it.
    alternatives: (token, logprob), best first, as many as `top_logprobs`.
    finish_reason: "stop" or "length" of a last token, else None.
    is_end_token: the token ends the text and is no part of it.
  """

  slot: int
  token: int
  logprob: float
  alternatives: list[tuple[int, float]]
  finish_reason: str | None
  is_end_token: bool


@dataclasses.dataclass(frozen=True)
class _Row:
  options: DecodingOptions = _IDLE
  min_length: int = 0
  limit: int = 1


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
    self._seen: dict[str, np.ndarray] = {}
    self._width: int | None = None
    self._strings: list[str] = []
    self._stops: Stops | None = None
    self._controls: Controls | None = None
    self._cache = _empty_cache(self._config, num_slots, num_positions)
    self._texts = sampling.new_texts(
      jnp.zeros((num_slots, num_positions), jnp.int32),
      jnp.ones(num_slots, jnp.int32),
      jnp.ones(num_slots, jnp.int32),
      _keys(0, 0, num_slots),
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
    """Slots whose rows run."""
    return [slot for slot, row in enumerate(self._rows) if row is not None]

  def admit(self, prompt: Any, options: DecodingOptions, *, prompt_index: int = 0) -> list[int]:
    """Reads one prompt into a slot for each of its texts; the next step gives their first tokens.

    Args:
      prompt: a text or ids.
      options: greedy search or sampling; num_return_sequences texts share one reading.
      prompt_index: the prompt's place in its request, for its random stream.

    Raises:
      UserError: as `Generator.generate`, a strategy that slots do not have, or too few free slots.
    """
    _check_strategy(options)
    [ids], options, lengths = self._generator.read([prompt], options)
    [min_length], [limit] = lengths.min_lengths, lengths.limits
    if limit > self.num_positions:
      raise ConfigError(
        f"a prompt of {len(ids)} tokens may grow to {limit}, but the slots have"
        f" {self.num_positions} positions; shorten it, or lower max_new_tokens"
      )
    copies = options.num_return_sequences
    free = [slot for slot, row in enumerate(self._rows) if row is None]
    if copies > len(free):
      raise ConfigError(f"{copies} texts need as many free slots, and there are {len(free)}")
    slots = free[:copies]
    stop_state_1Z = self._find_stops(options.stop, ids)
    self._read_prompt(ids, slots, limit, options, stop_state_1Z, prompt_index)
    for slot in slots:
      self._rows[slot] = _Row(options, min_length, limit)
    self._controls = None
    return slots

  def step(self) -> list[Produced]:
    """Gives every active slot its next token; those that end are free afterwards."""
    active = self.active
    if not active:
      return []
    with jax.default_matmul_precision("highest"):
      self._texts, self._cache, news = _step(
        self._generator.weights, self._texts, self._cache, self._current_controls(), self._config
      )
    token_R, logprob_R, finish_R, alternatives = jax.device_get(news)
    produced = []
    for slot in active:
      code, count = int(finish_R[slot]), self._rows[slot].options.top_logprobs
      pairs = []
      if count:
        ids_X, logprobs_X = (x[slot, :count] for x in (alternatives[0], alternatives[1]))
        pairs = list(zip(ids_X.tolist(), logprobs_X.tolist()))
      reason = {sampling.RUNNING: None, sampling.LENGTH: "length"}.get(code, "stop")
      is_end = code == sampling.END_TOKEN
      produced.append(
        Produced(slot, int(token_R[slot]), float(logprob_R[slot]), pairs, reason, is_end)
      )
      if reason:
        self._vacate(slot)
    return produced

  def release(self, slot: int) -> None:
    """Frees a slot before its row has ended; one that is free stays so."""
    if self._rows[slot] is not None:
      finish_R = self._texts.finish_R.at[slot].set(sampling.LENGTH)
      self._texts = self._texts.replace(finish_R=finish_R)
      self._vacate(slot)

  def warm_up(
    self,
    prompt_lengths: Iterable[int],
    options: Sequence[DecodingOptions] = (DecodingOptions(),),
    progress: Callable[[int, int], None] = lambda done, total: None,
  ) -> None:
    """Compiles the programs of prompts of these lengths and of these options, while all is free.

    Args:
      prompt_lengths: the buckets that they fall in are compiled.
      options: the last ones leave the step as later rows find it, rules of all of them included.
      progress: told (programs done, programs in all).
    """
    if self.active:
      raise ConfigError("slots are warmed up before they are used; release their rows first")
    longest = self.num_positions - 1
    sizes = sorted({programs.bucket(min(n, longest), self.num_positions) for n in prompt_lengths})
    total = len(options) + len(sizes)
    for done, row_options in enumerate(options, 1):
      self.admit([0], dataclasses.replace(row_options, num_return_sequences=1))
      self.step()
      for slot in self.active:
        self.release(slot)
      progress(done, total)
    for done, size in enumerate(sizes, len(options) + 1):
      [slot] = self.admit([0] * min(size, longest), DecodingOptions(max_new_tokens=1))
      self.release(slot)
      progress(done, total)
    jax.block_until_ready(self._cache)

  def _vacate(self, slot: int) -> None:
    # The step goes on with the controls it has: those of a row that has ended change nothing.
    self._rows[slot] = None

  def _read_prompt(self, ids, slots, limit, options, stop_state_1Z, prompt_index) -> None:
    copies = 1 << (len(slots) - 1).bit_length()
    length = programs.bucket(len(ids), self.num_positions)
    prompt_1L = np.zeros((1, length), np.int32)
    prompt_1L[0, : len(ids)] = ids
    tokens_CS = np.zeros((copies, self.num_positions), np.int32)
    tokens_CS[:, : len(ids)] = ids
    self._grow_alternatives(options.top_logprobs)
    alternatives = self._texts.alternatives
    rows = sampling.new_texts(
      tokens_CS,
      np.full(copies, len(ids), np.int32),
      np.full(copies, limit, np.int32),
      _keys(draw_seed(options), prompt_index, copies),
      None if stop_state_1Z is None else np.repeat(stop_state_1Z, copies, axis=0),
      0 if alternatives is None else alternatives.ids_RSX.shape[2],
    )
    # Texts beyond the last are written to no slot.
    slot_C = np.full(copies, self.num_slots, np.int32)
    slot_C[: len(slots)] = slots
    with jax.default_matmul_precision("highest"):
      self._texts, self._cache = _admit(
        self._generator.weights, prompt_1L, rows, slot_C, self._texts, self._cache, self._config
      )

  def _grow_alternatives(self, count: int) -> None:
    old = self._texts.alternatives
    have = 0 if old is None else old.ids_RSX.shape[2]
    if count <= have:
      return
    width = min(1 << (count - 1).bit_length(), self._config.vocab_size)
    # Those of steps gone by were handed out: nothing of them is kept.
    shape = (self.num_slots, self.num_positions, width)
    empty = Alternatives(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    self._texts = self._texts.replace(alternatives=empty)

  def _find_stops(self, stop: Sequence[str], ids: list[int]) -> np.ndarray | None:
    """Gives stop texts their places and returns the state of new rows, [1, Z]."""
    if stop and self._generator.tokenizer is None:
      raise ConfigError("stop needs a tokenizer, and the model has none; use eos_token_id")
    if not stop and not self._strings:
      return None
    used = {text for row in self._rows if row is not None for text in row.options.stop}
    used.update(stop)
    strings = list(self._strings)
    for text in sorted(set(stop) - set(strings)):
      free = [place for place, old in enumerate(strings) if old not in used]
      if free:
        strings[free[0]] = text
      else:
        strings += [text, *[""] * len(strings)]
    stops, state_1Z = self._generator.stop_strings.make([stop], [ids], strings)
    if strings != self._strings or self._stops is None:
      self._strings = strings
      self._stops = jax.device_put(_keep_states(stops, self._stops))
      self._widen_stop_state(state_1Z.shape[1])
    return state_1Z

  def _widen_stop_state(self, width: int) -> None:
    old_RZ = self._texts.stop_state_RZ
    if old_RZ is None:
      old_RZ = jnp.zeros((self.num_slots, 0), jnp.int32)
    room = ((0, 0), (0, width - old_RZ.shape[1]))
    self._texts = self._texts.replace(stop_state_RZ=jnp.pad(old_RZ, room))

  def _current_controls(self) -> Controls:
    if self._controls is None:
      self._controls = jax.device_put(self._make_controls())
    return self._controls

  def _make_controls(self) -> Controls:
    rows = [row or _Row() for row in self._rows]
    options = [row.options for row in rows]
    rules = make_rules(
      options,
      model_end_id=None,
      min_length_R=[row.min_length for row in rows],
      limit_R=[row.limit for row in rows],
    )
    stops = self._stops
    if stops is not None:
      active_RZ = np.array([[text in row.stop for text in self._strings] for row in options])
      room = len(stops.final_Z) - active_RZ.shape[1]
      stops = stops.replace(active_RZ=np.pad(active_RZ, ((0, 0), (0, room))))
    return Controls(
      rules=self._widen(rules),
      sampling=self._sampling(options),
      end_RE=self._keep_size("ends", pad_lists(row.eos_token_id for row in options)),
      stops=stops,
    )

  def _sampling(self, options: Sequence[DecodingOptions]) -> Sampling | None:
    drawn = [is_sampled(row) for row in options]
    if not any(drawn) and self._width is None:
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


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("texts", "cache"))
def _admit(
  weights: PyTree,
  prompt_1L: jax.Array,
  rows: Texts,
  slot_C: jax.Array,
  texts: Texts,
  cache: Cache,
  config: ModelConfig,
) -> tuple[Texts, Cache]:
  """Reads a prompt and writes its rows over what was in their slots."""
  length = prompt_1L.shape[1]
  programs.report("reading into slots", texts=len(slot_C), slots=length)
  _, read = prefill(weights, prompt_1L, length, config)
  cache = jax.tree.map(
    lambda whole, part: whole.at[slot_C, :, :length].set(part, mode="drop"), cache, read
  )
  texts = jax.tree.map(lambda all_, new: all_.at[slot_C].set(new, mode="drop"), texts, rows)
  return texts, cache


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("texts", "cache"))
def _step(
  weights: PyTree, texts: Texts, cache: Cache, controls: Controls, config: ModelConfig
) -> tuple[Texts, Cache, tuple]:
  """Returns (texts, cache, (token_R, logprob_R, finish_R, (ids_RX, logprobs_RX) or None))."""
  programs.report_texts("a step of slots", texts)
  texts, cache = sampling.step(weights, texts, cache, controls, config)
  last = jnp.arange(len(texts.length_R)), texts.length_R - 1
  alternatives = texts.alternatives
  if alternatives is not None:
    alternatives = alternatives.ids_RSX[last], alternatives.logprobs_RSX[last]
  news = texts.tokens_RS[last], texts.logprobs_RS[last], texts.finish_R, alternatives
  return texts, cache, news


@functools.partial(jax.jit, static_argnums=2)
def _keys(seed: int, prompt_index: int, copies: int) -> jax.Array:
  """The streams that `Generator.generate` gives a prompt's texts."""
  key = jax.random.fold_in(jax.random.key(seed), prompt_index)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(copies))


def _empty_cache(config: ModelConfig, num_rows: int, num_slots: int) -> Cache:
  shape = (num_rows, config.num_heads, num_slots, config.head_width)

  def layers():
    return tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.num_layers))

  return Cache(layers(), layers())


def _keep_states(stops: Stops, old: Stops | None) -> Stops:
  """Keeps the number of states from shrinking, which would compile anew."""
  missing = 0 if old is None else max(0, old.next_ZSV.shape[1] - stops.next_ZSV.shape[1])
  return stops.replace(next_ZSV=np.pad(stops.next_ZSV, ((0, 0), (0, missing), (0, 0))))


def _check_strategy(options: DecodingOptions) -> None:
  if strategy(options) not in ("greedy", "sample"):
    raise ConfigError("slots run greedy search and sampling; leave beams and speculation out")
  if options.beyond_context == "slide":
    raise ConfigError('slots end with their positions; leave beyond_context="slide" out')
  if options.allowed_tokens is not None:
    raise ConfigError("slots call no function of allowed_tokens; leave it out")
