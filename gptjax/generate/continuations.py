"""What an editor's TAB key needs: likely continuations at a cursor, each decoded on greedily.

The prompt's cache is kept from one prompt to the next, and only what differs is read. The
continuations of a prompt are branches of one tree (branches.py), which holds the prompt once; to
lengthen them, the loop goes on where it stood.

N counts continuations, T their tokens; L and M are tokens and slots of the prompt.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import ConfigError, DataError
from gptjax.generate import programs
from gptjax.generate.branches import Tree, make_extend, plant
from gptjax.generate.cache import Cache, extend, prefill
from gptjax.generate.candidates import make_sampling, warp
from gptjax.generate.generator import Generator
from gptjax.generate.options import DecodingOptions
from gptjax.model.config import ModelConfig
from gptjax.model.heads import lm_logits

PyTree = Any

_SCORED_AT_ONCE = 32
# Enough for the bytes of one character and the space before a word.
_TOKENS_BEFORE = 8


@dataclasses.dataclass(frozen=True)
class Continuation:
  """One way to go on; those of a prompt differ in their first tokens.

  Attributes:
    probability: of the first token.
    tokens, logprobs: of the text, an end token that ends it included.
    text: whole characters only; None without a tokenizer.
  """

  probability: float
  tokens: list[int]
  logprobs: list[float]
  text: str | None


@dataclasses.dataclass(frozen=True)
class NextToken:
  """A token that may follow: its probability under the model, and whether the options cut it."""

  token: int
  probability: float
  is_cut: bool


@dataclasses.dataclass
class _Branches:
  """Continuations on the device: tokens_NT and logprobs_NT count up to num_new."""

  tree: Tree
  tokens_NT: jax.Array
  logprobs_NT: jax.Array
  num_new: int


class Continuations:
  """Continuations at one place of a text that is being written.

  Args:
    generator: whose model, tokenizer and end tokens.
  """

  def __init__(self, generator: Generator):
    self._generator, self._config = generator, generator.config
    self._ids: list[int] = []
    self._cache: Cache | None = None
    self._hidden_1MD: jax.Array | None = None
    self._surprise: list[float] = []
    self._branches: _Branches | None = None

  def open(self, prompt: Any) -> int:
    """Reads a prompt and returns how many of its tokens had to be run.

    Args:
      prompt: a text or ids; what it has in common with the one before is not read again.

    Raises:
      UserError: an empty prompt, one that fills the context, or ids outside the vocabulary.
    """
    [ids], _, _ = self._generator.read([prompt], DecodingOptions(max_new_tokens=1))
    same = _common(self._ids, ids)
    if ids == self._ids:
      return 0
    num_slots = programs.bucket(len(ids), self._config.context_length)
    # The last token is always read: its hidden state may belong to no earlier prompt's.
    same = min(same, len(ids) - 1)
    new_1Q = np.zeros((1, programs.bucket(len(ids) - same)), np.int32)
    new_1Q[0, : len(ids) - same] = ids[same:]
    with jax.default_matmul_precision("highest"):
      if same == 0:
        prompt_1L = np.zeros((1, num_slots), np.int32)
        prompt_1L[0, : len(ids)] = ids
        state = _read(self._generator.weights, prompt_1L, self._config)
      else:
        room = max(0, num_slots - self._hidden_1MD.shape[1])
        old = _make_room(self._hidden_1MD, self._cache, room)
        state = _read_on(self._generator.weights, new_1Q, np.int32(same), *old, self._config)
    self._hidden_1MD, self._cache = state
    self._ids, self._branches = ids, None
    del self._surprise[same:]
    return len(ids) - same

  def options(self, n: int, m: int) -> list[Continuation]:
    """Returns the n likeliest first tokens, the likeliest first, each decoded on to m tokens.

    Raises:
      UserError: no open prompt, or numbers out of range.
    """
    self._check_open()
    vocab_size = self._config.vocab_size
    if not 1 <= n <= vocab_size or m < 1:
      raise ConfigError(f"{n} continuations of {m} tokens; there are 1 to {vocab_size}, of 1 on")
    total, length = self._cap(m), np.int32(len(self._ids))
    with jax.default_matmul_precision("highest"):
      found = _first(
        self._generator.weights,
        self._hidden_1MD,
        self._cache,
        length,
        n,
        programs.bucket(total),
        self._config,
      )
    self._branches = _Branches(*found, num_new=1)
    return self._decode(total)

  def lengthen(self, m: int) -> list[Continuation]:
    """Decodes the continuations of `options` on by m tokens; nothing is computed again.

    Raises:
      UserError: no continuations yet.
    """
    if self._branches is None or m < 1:
      raise ConfigError("there is nothing to lengthen by tokens; call options first, and give 1 on")
    return self._decode(self._cap(self._branches.num_new + m))

  def next_tokens(self, n: int, options: DecodingOptions | None = None) -> list[NextToken]:
    """Returns the n likeliest next tokens, and which of them the options' warpers cut."""
    self._check_open()
    options = options or DecodingOptions()
    logits_1V = _logits(
      self._generator.weights, self._hidden_1MD, np.int32(len(self._ids) - 1), self._config
    )
    made = make_sampling(
      self._config.vocab_size,
      [options.temperature],
      [options.top_k],
      [options.top_p],
      [options.min_p],
      [options.typical_p],
    )
    candidates = jax.device_get(_warp(logits_1V, made))
    kept = set(candidates.ids_RC[0][candidates.log_probs_RC[0] > -np.inf].tolist())
    probs_V = np.asarray(jax.nn.softmax(logits_1V[0]))
    order = np.argsort(-probs_V, kind="stable")[:n].tolist()
    return [NextToken(token, float(probs_V[token]), token not in kept) for token in order]

  def surprise(self) -> list[float]:
    """Returns -log p, in nats, of each token of the prompt but the first; old ones are kept."""
    self._check_open()
    # Entry 0 stands for the first token, which nothing precedes.
    scored = max(len(self._surprise), 1)
    for start in range(scored, len(self._ids), _SCORED_AT_ONCE):
      ids = self._ids[start : start + _SCORED_AT_ONCE]
      padded_T = np.zeros(_SCORED_AT_ONCE, np.int32)
      padded_T[: len(ids)] = ids
      surprise_T = _score(
        self._generator.weights, self._hidden_1MD, np.int32(start - 1), padded_T, self._config
      )
      self._surprise = (self._surprise or [0.0]) + np.asarray(surprise_T)[: len(ids)].tolist()
    return self._surprise[1:]

  def _check_open(self) -> None:
    if not self._ids:
      raise DataError("no prompt is open; call open first")

  def _cap(self, total: int) -> int:
    return min(total, self._config.context_length - len(self._ids))

  def _decode(self, total: int) -> list[Continuation]:
    now, prompt_slots = self._branches, self._hidden_1MD.shape[1]
    width = now.tokens_NT.shape[1]
    length = np.int32(len(self._ids))
    with jax.default_matmul_precision("highest"):
      if total > width:
        room = programs.bucket(total) - width
        now.tree, now.tokens_NT, now.logprobs_NT = _widen(
          now.tree, now.tokens_NT, now.logprobs_NT, length, prompt_slots, room
        )
      now.tree, now.tokens_NT, now.logprobs_NT = _go_on(
        self._generator.weights,
        now.tree,
        now.tokens_NT,
        now.logprobs_NT,
        np.int32(now.num_new),
        np.int32(total),
        length,
        prompt_slots,
        self._config,
      )
    now.num_new = total
    tokens_NT, logprobs_NT = jax.device_get((now.tokens_NT, now.logprobs_NT))
    rows = zip(tokens_NT[:, :total].tolist(), logprobs_NT[:, :total].tolist())
    return [self._answer(tokens, logprobs) for tokens, logprobs in rows]

  def _answer(self, tokens: list[int], logprobs: list[float]) -> Continuation:
    ends = self._generator.end_ids
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    text = None
    if self._generator.tokenizer is not None:
      stream = self._generator.tokenizer.decode_stream(skip_special_tokens=True)
      for token in self._ids[-_TOKENS_BEFORE:]:
        stream.step(token)
      text = "".join(stream.step(token) for token in tokens[:last])
    kept = slice(0, last + 1)
    return Continuation(float(np.exp(logprobs[0])), tokens[kept], logprobs[kept], text)


def _common(old: list[int], new: list[int]) -> int:
  pairs = enumerate(zip(old, new))
  return next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))


@functools.partial(jax.jit, static_argnames="config")
def _read(weights: PyTree, prompt_1M: jax.Array, config: ModelConfig) -> tuple[jax.Array, Cache]:
  programs.report("reading a prompt", slots=prompt_1M.shape[1])
  return prefill(weights, prompt_1M, prompt_1M.shape[1], config)


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("hidden_1MD", "cache"))
def _read_on(
  weights: PyTree,
  new_1Q: jax.Array,
  position: jax.Array,
  hidden_1MD: jax.Array,
  cache: Cache,
  config: ModelConfig,
) -> tuple[jax.Array, Cache]:
  """Reads what is new from `position` on; padding beyond the slots is lost."""
  programs.report("reading on", tokens=new_1Q.shape[1], slots=hidden_1MD.shape[1])
  hidden_1QD, cache = extend(weights, new_1Q, position[None], cache, config)
  places_Q = position + jnp.arange(new_1Q.shape[1])
  return hidden_1MD.at[:, places_Q].set(hidden_1QD, mode="drop"), cache


@functools.partial(jax.jit, static_argnums=2)
def _make_room(hidden_1MD: jax.Array, cache: Cache, room: int) -> tuple[jax.Array, Cache]:
  hidden_1MD = jnp.pad(hidden_1MD, ((0, 0), (0, room), (0, 0)))
  return hidden_1MD, jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))), cache)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _first(
  weights: PyTree,
  hidden_1MD: jax.Array,
  cache: Cache,
  length: jax.Array,
  n: int,
  num_tokens: int,
  config: ModelConfig,
) -> tuple[Tree, jax.Array, jax.Array]:
  """Returns (the tree with room for num_tokens each, tokens_NT, logprobs_NT) of first tokens."""
  num_slots = hidden_1MD.shape[1]
  programs.report("first tokens", continuations=n, tokens=num_tokens, slots=num_slots)
  log_probs_V = jax.nn.log_softmax(lm_logits(weights, hidden_1MD[0, length - 1], config))
  logprob_N, token_N = jax.lax.top_k(log_probs_V, n)
  _, cache = _make_room(hidden_1MD, cache, n * num_tokens)
  tree = plant(cache.keys, cache.values, length[None], num_slots, n)
  room = ((0, 0), (0, num_tokens - 1))
  return tree, jnp.pad(token_N[:, None], room), jnp.pad(logprob_N[:, None], room)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _widen(
  tree: Tree,
  tokens_NT: jax.Array,
  logprobs_NT: jax.Array,
  length: jax.Array,
  num_prompt_slots: int,
  room: int,
) -> tuple[Tree, jax.Array, jax.Array]:
  """Makes room for more tokens of each continuation."""
  slots = room * len(tokens_NT)
  pads = ((0, 0), (0, 0), (0, slots), (0, 0))
  keys, values = ([jnp.pad(x, pads) for x in side] for side in (tree.keys, tree.values))
  wide = plant(keys, values, length[None], num_prompt_slots, len(tokens_NT))
  seen_BWM = jnp.pad(tree.seen_BWM, pads[:3])
  pad = ((0, 0), (0, room))
  return wide.replace(seen_BWM=seen_BWM), jnp.pad(tokens_NT, pad), jnp.pad(logprobs_NT, pad)


@functools.partial(jax.jit, static_argnums=(7, 8), donate_argnums=(1, 2, 3))
def _go_on(
  weights: PyTree,
  tree: Tree,
  tokens_NT: jax.Array,
  logprobs_NT: jax.Array,
  num_new: jax.Array,
  total: jax.Array,
  length: jax.Array,
  num_prompt_slots: int,
  config: ModelConfig,
) -> tuple[Tree, jax.Array, jax.Array]:
  """Decodes every continuation from num_new tokens to `total`."""
  programs.report("continuations", rows=len(tokens_NT), tokens=tokens_NT.shape[1])
  grow = make_extend(
    weights, lambda x: lm_logits(weights, x, config), length[None], num_prompt_slots, config
  )
  own_1N = jnp.arange(len(tokens_NT))[None]

  def add(carry):
    num_new, tree, tokens_NT, logprobs_NT = carry
    logits_1NV, tree = grow(tokens_NT[None, :, num_new - 1], own_1N, num_new, tree)
    log_probs_NV = jax.nn.log_softmax(logits_1NV[0])
    token_N = jnp.argmax(log_probs_NV, axis=-1).astype(jnp.int32)
    tokens_NT = tokens_NT.at[:, num_new].set(token_N)
    logprobs_NT = logprobs_NT.at[:, num_new].set(jnp.max(log_probs_NV, axis=-1))
    return num_new + 1, tree, tokens_NT, logprobs_NT

  carry = num_new, tree, tokens_NT, logprobs_NT
  return jax.lax.while_loop(lambda carry: carry[0] < total, add, carry)[1:]


@functools.partial(jax.jit, static_argnums=3)
def _logits(weights: PyTree, hidden_1MD: jax.Array, place: jax.Array, config: ModelConfig):
  return lm_logits(weights, hidden_1MD[:, place], config)


_warp = jax.jit(warp)


@functools.partial(jax.jit, static_argnums=4)
def _score(
  weights: PyTree,
  hidden_1MD: jax.Array,
  start: jax.Array,
  ids_T: jax.Array,
  config: ModelConfig,
) -> jax.Array:
  """Returns -log p of tokens, the first of them after place `start`."""
  places_T = jnp.minimum(start + jnp.arange(len(ids_T)), hidden_1MD.shape[1] - 1)
  log_probs_TV = jax.nn.log_softmax(lm_logits(weights, hidden_1MD[0, places_T], config))
  return -jnp.take_along_axis(log_probs_TV, ids_T[:, None], axis=1)[:, 0]
