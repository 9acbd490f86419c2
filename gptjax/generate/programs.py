"""The compiled programs of generation, and the sizes they are compiled for.

Prompts and caches come in few sizes, so that a second call like the first compiles nothing. What is
compiled is told to `on_compile`, with the sizes that made it necessary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.generate import beams, sampling, speculation
from gptjax.generate.beams import BeamPlan
from gptjax.generate.branches import Tree, make_extend, plant
from gptjax.generate.cache import Cache, prefill
from gptjax.generate.candidates import shortlist
from gptjax.generate.rules import apply_rules
from gptjax.generate.sampling import Controls, Texts
from gptjax.model.config import ModelConfig
from gptjax.model.heads import lm_logits

PyTree = Any

_SMALLEST_BUCKET = 16
_listeners: list[Callable[[str], None]] = []


def bucket(size: int, limit: int | None = None) -> int:
  """Rounds a number of slots up to 16, 24, 32, 48, 64, 96, ..., at most to `limit`."""
  power = max(_SMALLEST_BUCKET, 1 << (size - 1).bit_length())
  rounded = power * 3 // 4 if power > _SMALLEST_BUCKET and size <= power * 3 // 4 else power
  return rounded if limit is None else max(size, min(rounded, limit))


def on_compile(listener: Callable[[str], None]) -> Callable[[], None]:
  """Calls `listener` with a line for each program that is compiled; returns how to stop that."""
  _listeners.append(listener)
  return lambda: _listeners.remove(listener)


def report(program: str, **sizes: int) -> None:
  """Tells the listeners; called while a program is traced, which is once for each size."""
  said = ", ".join(f"{size} {name.replace('_', ' ')}" for name, size in sizes.items())
  for listener in list(_listeners):
    listener(f"compiling {program} for {said}")


def report_texts(program: str, texts: Texts) -> None:
  """Tells the listeners of a program over rows."""
  rows, slots = texts.tokens_RS.shape
  report(program, rows=rows, slots=slots)


@functools.partial(jax.jit, static_argnames="config")
def start(
  weights: PyTree, prompts_PL: jax.Array, texts: Texts, controls: Controls, config: ModelConfig
) -> tuple[Texts, Cache]:
  """`sampling.start`, compiled."""
  report_texts(f"the first token after prompts of {prompts_PL.shape[1]} slots", texts)
  return sampling.start(weights, prompts_PL, texts, controls, config)


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("texts", "cache"))
def step(
  weights: PyTree, texts: Texts, cache: Cache, controls: Controls, config: ModelConfig
) -> tuple[Texts, Cache]:
  """`sampling.step`, compiled; texts and cache are donated."""
  report_texts("one more token", texts)
  return sampling.step(weights, texts, cache, controls, config)


@functools.partial(jax.jit, static_argnames="config")
def sample(
  weights: PyTree, prompts_PL: jax.Array, texts: Texts, controls: Controls, config: ModelConfig
) -> Texts:
  """Greedy search or sampling from the prompts to the end of all rows."""
  report_texts(f"texts after prompts of {prompts_PL.shape[1]} slots", texts)
  texts, cache = sampling.start(weights, prompts_PL, texts, controls, config)
  return sampling.run(weights, texts, cache, controls, config)


@functools.partial(jax.jit, static_argnames=("num_guesses", "config"))
def speculate(
  weights: PyTree,
  prompts_PL: jax.Array,
  texts: Texts,
  controls: Controls,
  draft: speculation.Draft | None,
  num_guesses: int,
  config: ModelConfig,
) -> tuple[Texts, jax.Array]:
  """What `sample` does, with guesses: `speculation.run`, compiled."""
  guesses = f"{num_guesses} {'looked-up' if draft is None else 'drafted'} guesses"
  report_texts(f"texts with {guesses} after prompts of {prompts_PL.shape[1]} slots", texts)
  return speculation.run(weights, prompts_PL, texts, controls, draft, num_guesses, config)


@struct.dataclass
class BeamTask:
  """What a beam search is told; rules and sampling of `controls` are of rows, the rest of prompts.

  Attributes:
    prompt_length_B, max_new_B: int32 tokens.
    ranking: how finished texts compare.
    controls: of the next token.
    keys_B: random streams.
  """

  prompt_length_B: jax.Array
  max_new_B: jax.Array
  ranking: beams.Ranking
  controls: Controls
  keys_B: jax.Array


@functools.partial(jax.jit, static_argnames=("plan", "num_new_slots", "config"))
def search_beams(
  weights: PyTree,
  prompts_BL: jax.Array,
  stop_state_BZ: jax.Array | None,
  task: BeamTask,
  plan: BeamPlan,
  num_new_slots: int,
  config: ModelConfig,
) -> beams.Texts:
  """Beam search or beam-sample.

  Args:
    num_new_slots: at least the largest of max_new_B.
  """
  _report_beams("a beam search", prompts_BL, plan)
  tokens_BS, first_BV, tree = _plant(weights, prompts_BL, task, plan, num_new_slots, config)
  extend = _make_extend(weights, task, prompts_BL.shape[1], config)
  game = _make_game(task, plan)
  return beams.search(
    tokens_BS, task.prompt_length_B, stop_state_BZ, first_BV, extend, tree, game, plan
  )


@functools.partial(jax.jit, static_argnames=("plan", "num_new_slots", "config"))
def start_beams(
  weights: PyTree,
  prompts_BL: jax.Array,
  stop_state_BZ: jax.Array | None,
  task: BeamTask,
  plan: BeamPlan,
  num_new_slots: int,
  config: ModelConfig,
) -> tuple[beams.Search, Tree]:
  """The first step of `search_beams`; `step_beams` goes on."""
  _report_beams("the first tokens of beams", prompts_BL, plan)
  tokens_BS, first_BV, tree = _plant(weights, prompts_BL, task, plan, num_new_slots, config)
  game = _make_game(task, plan)
  return beams.start(tokens_BS, task.prompt_length_B, stop_state_BZ, first_BV, game, plan), tree


@functools.partial(
  jax.jit, static_argnames=("num_prompt_slots", "plan", "config"), donate_argnames=("state", "tree")
)
def step_beams(
  weights: PyTree,
  state: beams.Search,
  tree: Tree,
  task: BeamTask,
  num_prompt_slots: int,
  plan: BeamPlan,
  config: ModelConfig,
) -> tuple[beams.Search, Tree]:
  """One more token of every beam; state and tree are donated."""
  report("one more token of beams", prompts=len(task.max_new_B), beams=plan.num_beams)
  extend = _make_extend(weights, task, num_prompt_slots, config)
  return beams.step(state, tree, extend, _make_game(task, plan), plan)


def _report_beams(program: str, prompts_BL: jax.Array, plan: BeamPlan) -> None:
  num_prompts, num_slots = prompts_BL.shape
  report(program, prompts=num_prompts, beams=plan.num_beams, slots=num_slots)


def _plant(
  weights: PyTree,
  prompts_BL: jax.Array,
  task: BeamTask,
  plan: BeamPlan,
  num_new_slots: int,
  config: ModelConfig,
) -> tuple[jax.Array, jax.Array, Tree]:
  """Reads the prompts; returns (prompts with room, first logits [B, V], memory)."""
  (num_prompts, num_prompt_slots), num_beams = prompts_BL.shape, plan.num_beams
  num_slots = num_prompt_slots + (num_new_slots - 1) * num_beams
  hidden_BLD, cache = prefill(weights, prompts_BL, num_slots, config)
  last_BD = hidden_BLD[jnp.arange(num_prompts), task.prompt_length_B - 1]
  tree = plant(cache.keys, cache.values, task.prompt_length_B, num_prompt_slots, num_beams)
  tokens_BS = jnp.pad(prompts_BL, ((0, 0), (0, num_new_slots)))
  return tokens_BS, lm_logits(weights, last_BD, config), tree


def _make_extend(
  weights: PyTree, task: BeamTask, num_prompt_slots: int, config: ModelConfig
) -> Callable:
  def logits(hidden_XD):
    return lm_logits(weights, hidden_XD, config)

  return make_extend(weights, logits, task.prompt_length_B, num_prompt_slots, config)


def _make_game(task: BeamTask, plan: BeamPlan) -> beams.Game:
  controls = task.controls
  prompt_length_R = jnp.repeat(task.prompt_length_B, plan.num_beams)

  def process(log_probs_RV, tokens_RS, length_R):
    scores_RV = apply_rules(log_probs_RV, tokens_RS, length_R, prompt_length_R, controls.rules)
    if controls.sampling is None:
      return scores_RV, None
    return shortlist(scores_RV, controls.sampling, max(2, 1 + plan.num_end_tokens))

  def end(stop_state_RZ, token_R):
    copies = len(token_R) // len(task.prompt_length_B)
    end_RE, stops = controls.end_RE, controls.stops
    if end_RE is not None:
      end_RE = jnp.repeat(end_RE, copies, axis=0)
    if stops is not None:
      stops = stops.replace(active_RZ=jnp.repeat(stops.active_RZ, copies, axis=0))
    return sampling.find_end(stop_state_RZ, token_R, end_RE, stops)

  return beams.Game(process, end, task.ranking, task.max_new_B, task.keys_B)


@functools.partial(jax.jit, static_argnames=("num_alternatives", "config"))
def find_alternatives(
  weights: PyTree, tokens_RS: jax.Array, num_alternatives: int, config: ModelConfig
) -> sampling.Alternatives:
  """Scores whole texts: the likeliest tokens at every place, the first excepted (zeros)."""
  report("the alternatives", rows=tokens_RS.shape[0], slots=tokens_RS.shape[1])

  def score(tokens_S):
    hidden_1SD, _ = prefill(weights, tokens_S[None], len(tokens_S), config)
    log_probs_SV = jax.nn.log_softmax(lm_logits(weights, hidden_1SD[0], config), axis=-1)
    logprobs_SX, ids_SX = jax.lax.top_k(log_probs_SV, num_alternatives)
    return jnp.roll(ids_SX, 1, axis=0), jnp.roll(logprobs_SX, 1, axis=0)

  return sampling.Alternatives(*jax.lax.map(score, tokens_RS))
