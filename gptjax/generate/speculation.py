"""Speculation: tokens are guessed, and the model reads all guesses at once to see which were right.

What comes out is what would come out without: greedy tokens are the same, and draws have the same
distribution. A guess that is wrong costs nothing but time, and its place in the cache is written
over. Each row goes at its own pace.

Guesses come from the row itself (prompt lookup) or from a smaller model, the draft. A row's rules,
ends and limits are applied token by token as ever, by `sampling.append`: a row whose guess was
wrong waits until the round is over.

Letters as in sampling.py; G counts guesses, Q = G + 1 the tokens that a round can give.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gptjax.generate import sampling
from gptjax.generate.cache import Cache, extend, prefill
from gptjax.generate.candidates import Candidates, Sampling, draw, warp
from gptjax.generate.sampling import RUNNING, Controls, Texts
from gptjax.model.config import ModelConfig
from gptjax.model.heads import lm_logits

PyTree = Any

_WAITING = -1  # Texts.finish_R within a round
_NO_GUESS = -1
_LONGEST_MATCH = 3
# Of a row's key; the tokens that it draws count from 0.
_DRAFT_STREAM, _ACCEPT_STREAM = np.uint32(1 << 31), np.uint32((1 << 31) + 1)


@struct.dataclass
class Guesses:
  """What may come next in each row.

  Attributes:
    tokens_RG: int32; after the first _NO_GUESS of a row come no others.
    probs_RGV: float32, the distribution that each was drawn from; None: they were not drawn.
  """

  tokens_RG: jax.Array
  probs_RGV: jax.Array | None = None


@struct.dataclass
class Draft:
  """A smaller model with the vocabulary of the large one, and all that its context must hold."""

  weights: PyTree
  config: ModelConfig = struct.field(pytree_node=False)


def run(
  weights: PyTree,
  prompts_PL: jax.Array,
  texts: Texts,
  controls: Controls,
  draft: Draft | None,
  num_guesses: int,
  config: ModelConfig,
) -> tuple[Texts, jax.Array]:
  """Generates from the prompts to the end of all rows.

  Args:
    weights, prompts_PL, texts, controls, config: as for `sampling.start`.
    draft: who guesses; None looks up in the rows themselves.
    num_guesses: of each row in each round, at least 1.

  Returns:
    (texts, int32 [R] rounds of each row: how often the model read it after its prompt).
  """
  num_slots = texts.tokens_RS.shape[1]
  num_guesses = min(num_guesses, num_slots)
  texts, cache = sampling.start(weights, prompts_PL, texts, controls, config)
  memory = None if draft is None else _read_prompts(draft, prompts_PL, texts)

  def is_running(carry):
    return jnp.any(carry[0].finish_R == RUNNING)

  def play_round(carry):
    texts, cache, memory, rounds_R = carry
    if draft is None:
      guesses = Guesses(look_up(texts.tokens_RS, texts.length_R, num_guesses))
    else:
      guesses, memory = ask(draft, texts, memory, controls, num_guesses)
    rounds_R += texts.finish_R == RUNNING
    texts, cache = verify(weights, texts, cache, guesses, controls, config)
    return texts, cache, memory, rounds_R

  carry = texts, cache, memory, jnp.zeros_like(texts.length_R)
  texts, _, _, rounds_R = jax.lax.while_loop(is_running, play_round, carry)
  return texts, rounds_R


def look_up(tokens_RS: jax.Array, length_R: jax.Array, num_guesses: int) -> jax.Array:
  """Guesses that a row goes on as it did the last time it said what it says now.

  The longest ending that was there before counts, of up to three tokens, and its last place. Where
  what followed reaches the end of the row, it goes on as a repetition of itself.

  Args:
    length_R: int32, tokens of each row.

  Returns:
    int32 [R, G]; _NO_GUESS where the last token is new.

  Source: Saxena 2023, "Prompt Lookup Decoding".
  """
  slots_1S = jnp.arange(tokens_RS.shape[1])[None]
  last_R1 = length_R[:, None] - 1
  is_match_RS = slots_1S < last_R1
  match_length_RS = jnp.zeros_like(tokens_RS)
  for back in range(_LONGEST_MATCH):
    before_R1 = jnp.take_along_axis(tokens_RS, jnp.maximum(last_R1 - back, 0), axis=1)
    is_match_RS &= (jnp.roll(tokens_RS, back, axis=1) == before_R1) & (slots_1S >= back)
    match_length_RS += is_match_RS
  longest_R1 = jnp.max(match_length_RS, axis=1, keepdims=True)
  place_R1 = jnp.max(
    jnp.where(match_length_RS == longest_R1, slots_1S, 0), axis=1, keepdims=True, initial=0
  )
  period_R1 = jnp.maximum(last_R1 - place_R1, 1)
  source_RG = place_R1 + 1 + jnp.arange(num_guesses)[None] % period_R1
  return jnp.where(longest_R1 > 0, _take(tokens_RS, source_RG), _NO_GUESS)


def ask(
  draft: Draft, texts: Texts, memory: Cache, controls: Controls, num_guesses: int
) -> tuple[Guesses, Cache]:
  """Lets the draft go on with each row by the row's own options, to its end at most.

  Args:
    memory: the draft's cache: all but the two last tokens of each row are in it.
  """
  num_slots = texts.tokens_RS.shape[1]
  # The last guess of a round is not read by the draft. Where it was right, that is due now.
  due_R = texts.length_R - 2
  due_R1 = _take(texts.tokens_RS, due_R[:, None])
  _, memory = extend(draft.weights, due_R1, due_R, memory, draft.config)
  imagined = texts.replace(alternatives=None, keys_R=_stream(texts.keys_R, _DRAFT_STREAM))

  def guess(carry, _):
    texts, memory = carry
    last_R = texts.length_R - 1
    last_R1 = _take(texts.tokens_RS, last_R[:, None])
    hidden_R1D, memory = extend(draft.weights, last_R1, last_R, memory, draft.config)
    logits_RV = lm_logits(draft.weights, hidden_R1D[:, 0], draft.config)
    scores_RV = sampling.score(logits_RV, texts, controls.rules)
    probs_RV = None
    if controls.sampling is None:
      token_R = sampling.pick(scores_RV, texts, None)
    else:
      candidates = warp(scores_RV, controls.sampling)
      token_R = draw(candidates, texts.keys_R, texts.length_R - texts.prompt_length_R)
      probs_RV = _spread(candidates, logits_RV.shape[1])
    return (sampling.append(texts, token_R, logits_RV, controls), memory), probs_RV

  (imagined, memory), probs_GRV = jax.lax.scan(guess, (imagined, memory), None, length=num_guesses)
  place_RG = texts.length_R[:, None] + jnp.arange(num_guesses)[None]
  tokens_RG = _take(imagined.tokens_RS, jnp.minimum(place_RG, num_slots - 1))
  tokens_RG = jnp.where(place_RG < imagined.length_R[:, None], tokens_RG, _NO_GUESS)
  probs_RGV = None if probs_GRV is None else jnp.swapaxes(probs_GRV, 0, 1)
  return Guesses(tokens_RG, probs_RGV), memory


def verify(
  weights: PyTree,
  texts: Texts,
  cache: Cache,
  guesses: Guesses,
  controls: Controls,
  config: ModelConfig,
) -> tuple[Texts, Cache]:
  """Reads the last token and the guesses of every row, and appends the tokens that come of it.

  These are the guesses before the first wrong one, and one token of the model's own.
  """
  position_R = texts.length_R - 1
  last_R1 = _take(texts.tokens_RS, position_R[:, None])
  read_RQ = jnp.concatenate([last_R1, jnp.maximum(guesses.tokens_RG, 0)], axis=1)
  hidden_RQD, cache = extend(weights, read_RQ, position_R, cache, config)
  logits_XV = lm_logits(weights, hidden_RQD.reshape(-1, config.model_dim), config)
  logits_RQV = logits_XV.reshape(*read_RQ.shape, -1)
  # The last place has no guess, so that no row runs on after it.
  guess_RQ = jnp.pad(guesses.tokens_RG, ((0, 0), (0, 1)), constant_values=_NO_GUESS)
  choose = _chooser(guesses, controls.sampling)

  def is_running(carry):
    return jnp.any(carry[0].finish_R == RUNNING)

  def judge(carry):
    texts, place = carry
    logits_RV, guess_R = logits_RQV[:, place], guess_RQ[:, place]
    token_R = choose(sampling.score(logits_RV, texts, controls.rules), texts, guess_R, place)
    after = _append(texts, token_R, logits_RV, controls)
    is_wrong_R = (after.finish_R == RUNNING) & (token_R != guess_R)
    return after.replace(finish_R=jnp.where(is_wrong_R, _WAITING, after.finish_R)), place + 1

  texts, _ = jax.lax.while_loop(is_running, judge, (texts, jnp.zeros((), jnp.int32)))
  finish_R = jnp.where(texts.finish_R == _WAITING, RUNNING, texts.finish_R)
  return texts.replace(finish_R=finish_R), cache


def _chooser(guesses: Guesses, options: Sampling | None) -> Callable[..., jax.Array]:
  """Returns how (scores_RV, texts, guess_R, place) becomes the next token of each row."""
  if guesses.probs_RGV is None:
    # To draw as ever and to compare is to accept a guess with its probability.
    return lambda scores_RV, texts, guess_R, place: sampling.pick(scores_RV, texts, options)

  def choose(scores_RV, texts, guess_R, place):
    probs_RV = guesses.probs_RGV[:, jnp.minimum(place, guesses.probs_RGV.shape[1] - 1)]
    return accept_or_draw(warp(scores_RV, options), guess_R, probs_RV, texts)

  return choose


def accept_or_draw(
  candidates: Candidates, guess_R: jax.Array, probs_RV: jax.Array, texts: Texts
) -> jax.Array:
  """Accepts a guess with probability min(1, p / q), or draws from max(p - q, 0), normalised.

  Args:
    candidates: of the model, p.
    guess_R: int32, drawn from q; without a guess p alone is drawn from.
    probs_RV: float32, q.
    texts: whose next tokens these are.

  Returns:
    int32 [R], distributed as p.

  Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
  algorithm 1 and appendix A.1.
  """
  index_R = texts.length_R - texts.prompt_length_R
  p_RC = jnp.exp(candidates.log_probs_RC)
  has_guess_R1 = (guess_R != _NO_GUESS)[:, None]
  q_RC = jnp.where(has_guess_R1, _take(probs_RV, candidates.ids_RC), 0.0)
  is_guess_RC = candidates.ids_RC == guess_R[:, None]
  p_R, q_R = (jnp.sum(jnp.where(is_guess_RC, x_RC, 0.0), axis=1) for x_RC in (p_RC, q_RC))
  step_keys_R = jax.vmap(jax.random.fold_in)(_stream(texts.keys_R, _ACCEPT_STREAM), index_R)
  is_accepted_R = jax.vmap(jax.random.uniform)(step_keys_R) * q_R < p_R
  rest_RC = jnp.maximum(p_RC - q_RC, 0.0)
  # Nothing is left where p and q differ in rounding only.
  has_rest_R1 = jnp.sum(rest_RC, axis=1, keepdims=True) > 0
  rest_RC = jnp.where(has_rest_R1, rest_RC, p_RC)
  drawn_R = draw(Candidates(candidates.ids_RC, jnp.log(rest_RC)), texts.keys_R, index_R)
  return jnp.where(is_accepted_R, guess_R, drawn_R)


def _append(texts: Texts, token_R: jax.Array, logits_RV: jax.Array, controls: Controls) -> Texts:
  """`sampling.append`, but rows that wait remember of stop strings what they did."""
  after = sampling.append(texts, token_R, logits_RV, controls)
  if texts.stop_state_RZ is None:
    return after
  is_running_R1 = (texts.finish_R == RUNNING)[:, None]
  kept_RZ = jnp.where(is_running_R1, after.stop_state_RZ, texts.stop_state_RZ)
  return after.replace(stop_state_RZ=kept_RZ)


def _read_prompts(draft: Draft, prompts_PL: jax.Array, texts: Texts) -> Cache:
  num_rows, num_slots = texts.tokens_RS.shape
  # The draft's context may be shorter than what fills prompts up, though not than the prompts.
  context = draft.config.context_length
  _, memory = prefill(draft.weights, prompts_PL[:, :context], min(num_slots, context), draft.config)
  copies = num_rows // len(prompts_PL)
  return jax.tree.map(lambda array: jnp.repeat(array, copies, axis=0), memory)


def _spread(candidates: Candidates, vocab_size: int) -> jax.Array:
  """Returns the probabilities of the whole vocabulary, [R, V]."""
  num_rows = len(candidates.ids_RC)
  place = jnp.arange(num_rows)[:, None], candidates.ids_RC
  return jnp.zeros((num_rows, vocab_size)).at[place].set(jnp.exp(candidates.log_probs_RC))


def _stream(keys_R: jax.Array, stream: np.uint32) -> jax.Array:
  return jax.vmap(jax.random.fold_in, (0, None))(keys_R, stream)


def _take(array_RX: jax.Array, index_RY: jax.Array) -> jax.Array:
  return jnp.take_along_axis(array_RX, index_RY, axis=1)
