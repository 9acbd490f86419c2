"""Beam search and beam-sample: one loop on the device, equal to transformers 5.23 token for token.

Letters of this file: B prompts, W beams of a prompt, R = B * W rows (a prompt's beams lie side by
side), C candidates of a prompt, X choices of a row, S places of a text, Z stop strings.

Source: `_beam_search` of transformers 5.23 (generation/utils.py), whose order of operations is
kept, also where scores of -1e9 mark what is out of the game. Each prompt ends by itself, as if it
were alone: nothing here depends on its companions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

OUT = -1e9  # transformers' score of what is out of the game; sums with it are compared, so finite
RUNNING = 0  # Texts.finish_BW of a text that may go on
LENGTH = -1  # Texts.finish_BW of a text that the limit ended; end() gives codes above 0


@dataclasses.dataclass(frozen=True)
class BeamPlan:
  """What a compiled search is made for.

  Attributes:
    num_beams: W >= 1.
    num_end_tokens: how many ids end a text; the more there are, the more candidates are looked at.
    do_sample: draw the candidates, without replacement, instead of taking the best.
  """

  num_beams: int
  num_end_tokens: int = 0
  do_sample: bool = False

  @property
  def num_candidates(self) -> int:
    """C: so many that W go on even if every beam's likeliest tokens all are end tokens."""
    return max(2, 1 + self.num_end_tokens) * self.num_beams


@struct.dataclass
class Ranking:
  """How finished texts compare, and when the search for better ones ends.

  Attributes:
    length_penalty: float32 exponent: a score is the sum divided by num_new ** length_penalty.
    stops_when_full: bool, W finished texts are enough.
    hopes_for_longest: bool, running texts are judged as if they kept their score up to the limit;
      else as if they ended now.
  """

  length_penalty: jax.Array
  stops_when_full: jax.Array
  hopes_for_longest: jax.Array


def make_ranking(length_penalty: float, early_stopping: bool | str) -> Ranking:
  """Translates transformers' options; early_stopping is False, True or "never"."""
  return Ranking(
    length_penalty=np.float32(length_penalty),
    stops_when_full=np.bool_(early_stopping is True),
    hopes_for_longest=np.bool_(early_stopping == "never" and length_penalty > 0),
  )


@struct.dataclass
class Texts:
  """W (or C) texts of each of B prompts, the best first.

  Attributes:
    tokens_BWS: int32, left-aligned, prompt included.
    log_probs_BWS: float32, under the model alone, of the new tokens at their places; 0 elsewhere.
    length_BW: int32, how many of the tokens are valid.
    score_BW: float32: summed scores of running texts, of finished ones divided by the penalty.
    finish_BW: int32, why it ended (the caller's codes), RUNNING if it has not.
    stop_state: pytree of [B, W, ...], the caller's, advanced by each token.
  """

  tokens_BWS: jax.Array
  log_probs_BWS: jax.Array
  length_BW: jax.Array
  score_BW: jax.Array
  finish_BW: jax.Array
  stop_state: Any


@struct.dataclass
class Search:
  """The state of the loop.

  Attributes:
    running: W texts of each prompt, to be continued.
    finished: the W best that ended; empty places have the score -1e9 and the finish RUNNING.
    parent_BW: int32, the beam of the step before that each running text continues.
    is_done_B: bool; the finished of a prompt that is done do not change any more.
    num_new: int32, how many tokens the running texts have after the prompt.
  """

  running: Texts
  finished: Texts
  parent_BW: jax.Array
  is_done_B: jax.Array
  num_new: jax.Array


@dataclasses.dataclass(frozen=True)
class Game:
  """What a search is told by its caller: functions over traced arrays, all of them pure.

  Attributes:
    process: (log_probs_RV, tokens_RS, length_R) -> (scores_RX, ids_RX, or None where X is V):
      rules, and for beam-sample the warping; the scores that remain are not normalised again.
    end: (stop_state, token_R) -> (stop_state, finish_R): whether the text ends with this token.
    ranking: traced.
    max_new_B: int32, after how many tokens each prompt's texts end at the latest.
    keys_B: one stream a prompt; used by beam-sample only.
  """

  process: Callable
  end: Callable
  ranking: Ranking
  max_new_B: jax.Array
  keys_B: jax.Array


def search(
  tokens_BS: jax.Array,
  prompt_length_B: jax.Array,
  stop_state: Any,
  first_logits_BV: jax.Array,
  extend: Callable,
  memory: Any,
  game: Game,
  plan: BeamPlan,
) -> Texts:
  """Searches until every prompt is done.

  Args:
    tokens_BS: int32 prompts, left-aligned, with room for the new tokens.
    prompt_length_B: int32 >= 1.
    stop_state: pytree of [B, ...], before the first new token.
    first_logits_BV: float32, after the prompts.
    extend: (token_BW, parent_BW, num_new, memory) -> (logits_BWV, memory): what the model says
      after each token, which follows beam `parent` of the call before and is the num_new-th.
    memory: of the model, a pytree of arrays.
    game: rules and limits.
    plan: sizes and modes.

  Returns:
    The W finished texts of each prompt; num_return_sequences of them are the first.
  """
  state = start(tokens_BS, prompt_length_B, stop_state, first_logits_BV, game, plan)

  def body(carry):
    return step(*carry, extend, game, plan)

  state, _ = jax.lax.while_loop(lambda carry: ~carry[0].is_done_B.all(), body, (state, memory))
  return state.finished


def start(
  tokens_BS: jax.Array,
  prompt_length_B: jax.Array,
  stop_state: Any,
  first_logits_BV: jax.Array,
  game: Game,
  plan: BeamPlan,
) -> Search:
  """Gives the beams of each prompt their first tokens; arguments as for `search`."""
  state = _seed(tokens_BS, prompt_length_B, stop_state, plan)
  logits_BWV = jnp.repeat(first_logits_BV[:, None], plan.num_beams, axis=1)
  return _choose(state, logits_BWV, game, plan)


def step(
  state: Search, memory: Any, extend: Callable, game: Game, plan: BeamPlan
) -> tuple[Search, Any]:
  """Gives every beam one more token; arguments as for `search`."""
  last_BW1 = state.running.length_BW[:, :, None] - 1
  token_BW = jnp.take_along_axis(state.running.tokens_BWS, last_BW1, axis=2)[:, :, 0]
  logits_BWV, memory = extend(token_BW, state.parent_BW, state.num_new, memory)
  return _choose(state, logits_BWV, game, plan), memory


def _seed(tokens_BS, prompt_length_B, stop_state, plan: BeamPlan) -> Search:
  """Returns W copies of each prompt, of which only the first is in the game."""
  (num_prompts, _), num_beams = tokens_BS.shape, plan.num_beams

  def copies(array):
    return jnp.repeat(array[:, None], num_beams, axis=1)

  shape = (num_prompts, num_beams)
  texts = Texts(
    tokens_BWS=copies(tokens_BS),
    log_probs_BWS=jnp.zeros((*shape, tokens_BS.shape[1]), jnp.float32),
    length_BW=copies(prompt_length_B),
    score_BW=jnp.full(shape, OUT, jnp.float32),
    finish_BW=jnp.full(shape, RUNNING, jnp.int32),
    stop_state=jax.tree.map(copies, stop_state),
  )
  return Search(
    running=texts.replace(score_BW=texts.score_BW.at[:, 0].set(0)),
    finished=texts,
    parent_BW=jnp.zeros(shape, jnp.int32),
    is_done_B=jnp.zeros(num_prompts, bool),
    num_new=jnp.int32(0),
  )


def _choose(state: Search, logits_BWV: jax.Array, game: Game, plan: BeamPlan) -> Search:
  """Adds one token to every text, keeps the best that go on and the best that have ended."""
  num_new = state.num_new + 1
  candidates, parent_BC = _candidates(state, logits_BWV, game, plan)
  has_ended_BC = candidates.finish_BW != RUNNING

  scores_BC = candidates.score_BW + has_ended_BC * jnp.float32(OUT)
  scores_BW, best_BW = jax.lax.top_k(scores_BC, plan.num_beams)
  running = _take(candidates, best_BW).replace(score_BW=scores_BW)
  parent_BW = jnp.take_along_axis(parent_BC, best_BW, axis=1)

  finished = _finish(state.finished, candidates, num_new, game, plan)
  finished = jax.tree.map(
    lambda old, new: jnp.where(state.is_done_B.reshape(-1, *[1] * (new.ndim - 1)), old, new),
    state.finished,
    finished,
  )
  is_done_B = state.is_done_B | has_ended_BC.all(axis=1)
  is_done_B |= ~_can_improve(running, finished, num_new, game)
  is_done_B |= game.ranking.stops_when_full & (finished.finish_BW != RUNNING).all(axis=1)
  return Search(running, finished, parent_BW, is_done_B, num_new)


def _candidates(
  state: Search, logits_BWV: jax.Array, game: Game, plan: BeamPlan
) -> tuple[Texts, jax.Array]:
  """Returns C continuations by one token, best first, and their beams [B, C]."""
  running = state.running
  (num_prompts, num_beams), vocab_size = running.score_BW.shape, logits_BWV.shape[2]
  log_probs_RV = jax.nn.log_softmax(logits_BWV.reshape(-1, vocab_size), axis=-1)
  tokens_RS = running.tokens_BWS.reshape(len(log_probs_RV), -1)
  scores_RX, ids_RX = game.process(log_probs_RV, tokens_RS, running.length_BW.reshape(-1))

  totals_BWX = scores_RX.reshape(num_prompts, num_beams, -1) + running.score_BW[:, :, None]
  weighed_BWX = totals_BWX
  if plan.do_sample:
    # The C largest sums with Gumbel noise are C draws without replacement.
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(game.keys_B, state.num_new)
    weighed_BWX += jax.vmap(lambda key: jax.random.gumbel(key, totals_BWX.shape[1:]))(keys_B)
  parent_BC, choice_BC = _top(weighed_BWX, plan.num_candidates)

  prompts_B1 = jnp.arange(num_prompts)[:, None]
  if plan.do_sample:
    order_BC = jnp.argsort(totals_BWX[prompts_B1, parent_BC, choice_BC], axis=1, descending=True)
    parent_BC, choice_BC = parent_BC[prompts_B1, order_BC], choice_BC[prompts_B1, order_BC]
  places = prompts_B1, parent_BC
  row_BC = prompts_B1 * num_beams + parent_BC
  token_BC = choice_BC if ids_RX is None else ids_RX[row_BC, choice_BC]
  texts = jax.tree.map(lambda array: array[places], running)
  texts = _append(texts, token_BC, log_probs_RV[row_BC, token_BC], state.num_new + 1, game)
  return texts.replace(score_BW=totals_BWX[*places, choice_BC]), parent_BC


def _top(scores_BWX: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Returns (beams, choices), int32 [B, count], of the largest: first of each beam, then of all."""
  num_prompts, _, num_choices = scores_BWX.shape
  width = min(count, num_choices)
  scores_BWK, choices_BWK = jax.lax.top_k(scores_BWX, width)
  _, index_BC = jax.lax.top_k(scores_BWK.reshape(num_prompts, -1), count)
  choices = choices_BWK.reshape(num_prompts, -1)
  return index_BC // width, jnp.take_along_axis(choices, index_BC, axis=1)


def _append(texts: Texts, token_BC, log_prob_BC, num_new, game: Game) -> Texts:
  """Writes one token to each text and asks whether it ends there."""
  is_place_BCS = jnp.arange(texts.tokens_BWS.shape[2])[None, None] == texts.length_BW[:, :, None]
  stop_state, finish_R = game.end(
    jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), texts.stop_state), token_BC.reshape(-1)
  )
  finish_BC = finish_R.reshape(token_BC.shape)
  is_last_B1 = (num_new >= game.max_new_B)[:, None]
  return texts.replace(
    tokens_BWS=jnp.where(is_place_BCS, token_BC[:, :, None], texts.tokens_BWS),
    log_probs_BWS=jnp.where(is_place_BCS, log_prob_BC[:, :, None], texts.log_probs_BWS),
    length_BW=texts.length_BW + 1,
    finish_BW=jnp.where((finish_BC == RUNNING) & is_last_B1, LENGTH, finish_BC),
    stop_state=jax.tree.map(lambda a: a.reshape(*token_BC.shape, *a.shape[1:]), stop_state),
  )


def _finish(finished: Texts, candidates: Texts, num_new, game: Game, plan: BeamPlan) -> Texts:
  """Returns the W best ended texts of the old and the new.

  Only the first W candidates may enter; the others are there so that W texts can go on.
  """
  is_first_C = jnp.arange(plan.num_candidates) < plan.num_beams
  enters_BC = (candidates.finish_BW != RUNNING) & is_first_C[None]
  scores_BC = candidates.score_BW / jnp.float32(num_new) ** game.ranking.length_penalty
  offered = candidates.replace(
    score_BW=scores_BC + ~enters_BC * jnp.float32(OUT),
    finish_BW=jnp.where(enters_BC, candidates.finish_BW, RUNNING),
  )
  merged = jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), finished, offered)
  _, best_BW = jax.lax.top_k(merged.score_BW, plan.num_beams)
  return _take(merged, best_BW)


def _can_improve(running: Texts, finished: Texts, num_new, game: Game) -> jax.Array:
  """Returns whether the best running text could beat the worst finished one: bool [B].

  A place that is empty yet is beaten by every text in the game.
  """
  length_B = jnp.where(game.ranking.hopes_for_longest, game.max_new_B, num_new).astype(jnp.float32)
  hoped_B = running.score_BW[:, 0] / length_B**game.ranking.length_penalty
  worst_B1 = finished.score_BW.min(axis=1, keepdims=True)
  return (hoped_B[:, None] > jnp.where(finished.finish_BW != RUNNING, worst_B1, OUT)).any(axis=1)


def _take(tree: Any, index_BX: jax.Array) -> Any:
  """Gathers [B, X, ...] of arrays [B, W, ...]."""
  rows_B1 = jnp.arange(len(index_BX))[:, None]
  return jax.tree.map(lambda array: array[rows_B1, index_BX], tree)
