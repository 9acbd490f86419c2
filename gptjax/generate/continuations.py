"""What an editor's TAB key needs: likely continuations at a cursor, each decoded on greedily.

The prompt's cache is kept from one prompt to the next, and only what differs is read, in blocks of
few sizes into few numbers of slots, so that few programs serve every text. The continuations of a
prompt are branches of one tree (branches.py), which holds the prompt once; to lengthen them, the
loop goes on where it stood.

N counts continuations, T their tokens; Q and M are new tokens and slots of the prompt.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import ConfigError, DataError
from gptjax.generate import programs
from gptjax.generate.branches import Tree, make_extend, plant
from gptjax.generate.cache import Cache, extend
from gptjax.generate.candidates import make_sampling, warp
from gptjax.generate.generator import Generator
from gptjax.generate.options import DecodingOptions
from gptjax.model.config import ModelConfig
from gptjax.model.heads import lm_logits

PyTree = Any

# Tokens of a prompt that are read at once: the largest block that they fill by three quarters.
READ_AT_ONCE = (256, 64, 16)
_FEWEST_SLOTS = 1024
_FEWEST_NEW_TOKENS = 32
_SCORED_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Continuation:
  """One way to go on; those of a prompt differ in their first tokens.

  Attributes:
    probability: of the first token.
    tokens, logprobs: of the text, an end token that ends it included.
    pieces: of the text, the whole characters that each token completes, an end token excepted; None
      without a tokenizer.
  """

  probability: float
  tokens: list[int]
  logprobs: list[float]
  pieces: list[str] | None

  @property
  def text(self) -> str | None:
    return None if self.pieces is None else "".join(self.pieces)


@dataclasses.dataclass(frozen=True)
class NextToken:
  """A token that may follow.

  Attributes:
    token, probability: under the model.
    is_cut: by the decoding options.
    text: the whole characters that it completes; None without a tokenizer.
  """

  token: int
  probability: float
  is_cut: bool
  text: str | None


@dataclasses.dataclass
class _Branches:
  """Continuations on the device: tokens_NT and logprobs_NT count up to num_new."""

  tree: Tree
  tokens_NT: jax.Array
  logprobs_NT: jax.Array
  num_new: int
  only_V: np.ndarray


class Continuations:
  """Continuations at one place of a text that is being written.

  Args:
    generator: whose model, tokenizer and end tokens.
  """

  def __init__(self, generator: Generator):
    self._generator, self._config = generator, generator.config
    # What the cache holds; the open prompt is the beginning of it.
    self._read: list[int] = []
    self._ids: list[int] = []
    self._cache: Cache | None = None
    self._hidden_1MD: jax.Array | None = None
    self._surprise: list[float] = []
    self._branches: _Branches | None = None

  @property
  def num_bytes(self) -> int:
    """How much of the device's memory is held."""
    held = [self._hidden_1MD, self._cache]
    if self._branches is not None:
      held.append(self._branches.tree)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(held))

  def num_known(self, ids: list[int]) -> int:
    """Returns how many tokens of a prompt need not be run."""
    return _common(self._read, ids)

  def open(self, prompt: Any) -> int:
    """Reads a prompt and returns how many of its tokens had to be run.

    Args:
      prompt: a text or ids; what it has in common with what was read last is not read again.

    Raises:
      UserError: an empty prompt, one that fills the context, or ids outside the vocabulary.
    """
    [ids], _, _ = self._generator.read([prompt], DecodingOptions(max_new_tokens=1))
    known = self.num_known(ids)
    if known < len(ids):
      self._make_room(len(ids))
      del self._surprise[known:]
      self._read = ids[:known]
      with jax.default_matmul_precision("highest"):
        for start, block_1Q in _blocks(ids, known):
          self._hidden_1MD, self._cache = _read_on(
            self._generator.weights, block_1Q, start, self._hidden_1MD, self._cache, self._config
          )
      self._read = ids
    if ids != self._ids:
      self._ids, self._branches = ids, None
    return len(ids) - known

  def _make_room(self, length: int) -> None:
    num_slots = min(_round_up(length, _FEWEST_SLOTS), self._config.context_length)
    if self._cache is None:
      self._hidden_1MD, self._cache = _empty(num_slots, self._config)
    elif num_slots > self._hidden_1MD.shape[1]:
      room = num_slots - self._hidden_1MD.shape[1]
      self._hidden_1MD, self._cache = _widen_prompt(self._hidden_1MD, self._cache, room)

  def options(self, n: int, m: int, only_V: np.ndarray | None = None) -> list[Continuation]:
    """Returns the n likeliest first tokens, the likeliest first, each decoded on to m tokens.

    Asked again with a larger m, the same continuations go on from where they were.

    Args:
      n, m: continuations, and tokens of each.
      only_V: bool, the tokens that may come first; probabilities are those among them, and
        continuations are fewer where they are. None is all.

    Raises:
      UserError: no open prompt, or numbers out of range.
    """
    self._check_open()
    vocab_size = self._config.vocab_size
    if not 1 <= n <= vocab_size or m < 1:
      raise ConfigError(f"{n} continuations of {m} tokens; there are 1 to {vocab_size}, of 1 on")
    only_V = self._all_V if only_V is None else only_V
    total = min(m, self._config.context_length - len(self._ids))
    now = self._branches
    if now is None or len(now.tokens_NT) != n or not np.array_equal(now.only_V, only_V):
      with jax.default_matmul_precision("highest"):
        found = _first(
          self._generator.weights,
          self._hidden_1MD,
          self._cache,
          np.int32(len(self._ids)),
          only_V,
          n,
          _round_up(total, _FEWEST_NEW_TOKENS),
          self._config,
        )
      self._branches = _Branches(*found, num_new=1, only_V=only_V)
    return self._decode(total)

  def next_tokens(
    self, n: int, options: DecodingOptions | None = None, only_V: np.ndarray | None = None
  ) -> list[NextToken]:
    """Returns the n likeliest next tokens, and which of them the options' warpers cut.

    Args:
      n: how many at most.
      options: whose temperature, top_k, top_p, min_p and typical_p; None cuts nothing.
      only_V: as for `options`.
    """
    self._check_open()
    options = options or DecodingOptions()
    only_V = self._all_V if only_V is None else only_V
    place = np.int32(len(self._ids) - 1)
    with jax.default_matmul_precision("highest"):
      logits_1V = _logits(self._generator.weights, self._hidden_1MD, place, only_V, self._config)
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
    order = np.argsort(-probs_V, kind="stable")[: min(n, only_V.sum())].tolist()
    return [
      NextToken(token, float(probs_V[token]), token not in kept, self._text(token))
      for token in order
    ]

  def surprise(self) -> list[float]:
    """Returns -log p, in nats, of each token of the prompt but the first; old ones are kept."""
    self._check_open()
    # Entry 0 stands for the first token, which nothing precedes.
    scored = max(len(self._surprise), 1)
    for start in range(scored, len(self._ids), _SCORED_AT_ONCE):
      ids = self._ids[start : start + _SCORED_AT_ONCE]
      padded_T = np.zeros(_SCORED_AT_ONCE, np.int32)
      padded_T[: len(ids)] = ids
      with jax.default_matmul_precision("highest"):
        surprise_T = _score(
          self._generator.weights, self._hidden_1MD, np.int32(start - 1), padded_T, self._config
        )
      self._surprise = (self._surprise or [0.0]) + np.asarray(surprise_T)[: len(ids)].tolist()
    return self._surprise[1 : len(self._ids)]

  @functools.cached_property
  def _all_V(self) -> np.ndarray:
    return np.ones(self._config.vocab_size, bool)

  def _check_open(self) -> None:
    if not self._ids:
      raise DataError("no prompt is open; call open first")

  def _decode(self, total: int) -> list[Continuation]:
    now, prompt_slots = self._branches, self._hidden_1MD.shape[1]
    width = now.tokens_NT.shape[1]
    length = np.int32(len(self._ids))
    with jax.default_matmul_precision("highest"):
      if total > width:
        room = _round_up(total, _FEWEST_NEW_TOKENS) - width
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
    now.num_new = max(now.num_new, total)
    tokens_NT, logprobs_NT = jax.device_get((now.tokens_NT, now.logprobs_NT))
    rows = zip(tokens_NT[:, :total].tolist(), logprobs_NT[:, :total].tolist())
    return [self._answer(*row) for row in rows if row[1][0] > -np.inf]

  def _answer(self, tokens: list[int], logprobs: list[float]) -> Continuation:
    ends = self._generator.end_ids
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    pieces = self._decode_pieces(tokens[:last])
    kept = slice(0, last + 1)
    return Continuation(float(np.exp(logprobs[0])), tokens[kept], logprobs[kept], pieces)

  def _text(self, token: int) -> str | None:
    pieces = self._decode_pieces([token])
    return pieces and pieces[0]

  def _decode_pieces(self, tokens: list[int]) -> list[str] | None:
    """Returns the whole characters that each token after the prompt completes."""
    if self._generator.tokenizer is None:
      return None
    stream = self._generator.tokenizer.decode_stream(before=self._ids)
    return [stream.step(token) for token in tokens]


def _round_up(size: int, fewest: int) -> int:
  """Returns the power of two that holds `size`, at least `fewest`."""
  return max(fewest, 1 << (size - 1).bit_length())


def _blocks(ids: list[int], known: int) -> Iterator[tuple[np.int32, np.ndarray]]:
  """Cuts what is new into (its place, block_1Q), the last one padded."""
  while known < len(ids):
    left = len(ids) - known
    size = next((size for size in READ_AT_ONCE if left >= size * 3 // 4), READ_AT_ONCE[-1])
    block_1Q = np.zeros((1, size), np.int32)
    block_1Q[0, : min(left, size)] = ids[known : known + size]
    yield np.int32(known), block_1Q
    known += size


def _common(old: list[int], new: list[int]) -> int:
  pairs = enumerate(zip(old, new))
  return next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(num_slots: int, config: ModelConfig) -> tuple[jax.Array, Cache]:
  """Returns (hidden_1MD, the cache) of no prompt."""
  dtype, num_layers = config.compute_dtype, config.num_layers
  shape = (1, config.num_heads, num_slots, config.head_width)
  keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)) for _ in range(2))
  return jnp.zeros((1, num_slots, config.model_dim), dtype), Cache(keys, values)


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
  programs.report("reading", tokens=new_1Q.shape[1], slots=hidden_1MD.shape[1])
  hidden_1QD, cache = extend(weights, new_1Q, position[None], cache, config)
  places_Q = position + jnp.arange(new_1Q.shape[1])
  return hidden_1MD.at[:, places_Q].set(hidden_1QD, mode="drop"), cache


@functools.partial(jax.jit, static_argnums=2)
def _widen_prompt(hidden_1MD: jax.Array, cache: Cache, room: int) -> tuple[jax.Array, Cache]:
  return jnp.pad(hidden_1MD, ((0, 0), (0, room), (0, 0))), _pad_slots(cache, room)


def _pad_slots(tree: PyTree, room: int) -> PyTree:
  """Pads arrays [B, H, M, K]."""
  return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))), tree)


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _first(
  weights: PyTree,
  hidden_1MD: jax.Array,
  cache: Cache,
  length: jax.Array,
  only_V: jax.Array,
  n: int,
  num_tokens: int,
  config: ModelConfig,
) -> tuple[Tree, jax.Array, jax.Array]:
  """Returns (the tree with room for num_tokens each, tokens_NT, logprobs_NT) of first tokens."""
  num_slots = hidden_1MD.shape[1]
  programs.report("first tokens", continuations=n, tokens=num_tokens, slots=num_slots)
  logits_V = lm_logits(weights, hidden_1MD[0, length - 1], config)
  log_probs_V = jax.nn.log_softmax(jnp.where(only_V, logits_V, -jnp.inf))
  logprob_N, token_N = jax.lax.top_k(log_probs_V, n)
  cache = _pad_slots(cache, n * num_tokens)
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
  keys, values = _pad_slots((tree.keys, tree.values), slots)
  wide = plant(keys, values, length[None], num_prompt_slots, len(tokens_NT))
  seen_BWM = jnp.pad(tree.seen_BWM, ((0, 0), (0, 0), (0, slots)))
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


@functools.partial(jax.jit, static_argnums=4)
def _logits(
  weights: PyTree, hidden_1MD: jax.Array, place: jax.Array, only_V: jax.Array, config: ModelConfig
) -> jax.Array:
  return jnp.where(only_V[None], lm_logits(weights, hidden_1MD[:, place], config), -jnp.inf)


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
