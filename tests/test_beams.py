"""Beam search finds what exhaustive search finds; a prompt does not know its companions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generate.beams import OUT, RUNNING, BeamPlan, Game, search

VOCAB_SIZE = 4
END = 3
SAME = 1e-5  # float32 sums of a few log-probabilities


def make_model(seed=0, vocab_size=VOCAB_SIZE, gain=1.5):
  """Draws a language model: logits of the next token from the two last and the length."""
  table = np.random.default_rng(seed).standard_normal((23, vocab_size, vocab_size, vocab_size))
  return jnp.asarray(gain * table, jnp.float32)


def next_logits(table, tokens_RS, length_R):
  rows = jnp.arange(len(tokens_RS))
  before = jnp.maximum(length_R - 2, 0)
  return table[length_R, tokens_RS[rows, before], tokens_RS[rows, length_R - 1]]


def forbid_nothing(log_probs_RV, tokens_RS, length_R):
  del tokens_RS, length_R
  return log_probs_RV, None


def end_at(end_ids):
  def end(stop_state, token_R):
    return stop_state, jnp.isin(token_R, jnp.array(end_ids, jnp.int32)).astype(jnp.int32)

  return end


@functools.partial(jax.jit, static_argnames=("plan", "num_slots", "process", "end_ids"))
def run(table, tokens_BL, length_B, max_new_B, penalty, keys_B, plan, num_slots, process, end_ids):
  """Searches with a model whose memory is the texts themselves."""
  tokens_BS = jnp.pad(tokens_BL, ((0, 0), (0, num_slots - tokens_BL.shape[1])))
  num_prompts, num_beams = len(tokens_BS), plan.num_beams

  def extend(token_BW, parent_BW, num_new, tokens_BWS):
    tokens_BWS = jnp.take_along_axis(tokens_BWS, parent_BW[:, :, None], axis=1)
    place_B = length_B + num_new - 1
    is_place_BS = jnp.arange(num_slots)[None] == place_B[:, None]
    tokens_BWS = jnp.where(is_place_BS[:, None], token_BW[:, :, None], tokens_BWS)
    logits = next_logits(
      table, tokens_BWS.reshape(-1, num_slots), jnp.repeat(place_B + 1, num_beams)
    )
    return logits.reshape(num_prompts, num_beams, -1), tokens_BWS

  memory = jnp.repeat(tokens_BS[:, None], num_beams, axis=1)
  game = Game(process, end_at(end_ids), penalty, max_new_B, keys_B)
  first = next_logits(table, tokens_BS, length_B)
  return search(tokens_BS, length_B, None, first, extend, memory, game, plan)


def find(
  table,
  prompts,
  *,
  num_beams,
  max_new=5,
  penalty=1.0,
  end_ids=(END,),
  process=forbid_nothing,
  seed=0,
  num_slots=None,
  **modes,
):
  """Returns Texts as numpy arrays."""
  longest = max(map(len, prompts))
  tokens = np.zeros((len(prompts), longest), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  max_new_B = np.broadcast_to(np.int32(max_new), len(prompts))
  plan = BeamPlan(num_beams, len(end_ids), **modes)
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(prompts)))
  texts = run(
    table,
    tokens,
    np.array([len(prompt) for prompt in prompts], np.int32),
    max_new_B,
    np.float32(penalty),
    keys_B,
    plan,
    num_slots or longest + int(max_new_B.max()),
    process,
    tuple(end_ids),
  )
  return jax.tree.map(np.asarray, texts)


def as_lists(texts, prompt=0):
  """Returns [(ids, score)] of a prompt's finished texts."""
  return [
    (texts.tokens_BWS[prompt, beam, : texts.length_BW[prompt, beam]].tolist(), float(score))
    for beam, score in enumerate(texts.score_BW[prompt])
  ]


def search_exhaustively(table, prompt, max_new, penalty):
  """Returns [(ids, score)] of every possible text, best first."""
  found = []
  log_probs = np.asarray(jax.nn.log_softmax(table, axis=-1), np.float64)

  def visit(ids, total):
    num_new = len(ids) - len(prompt)
    if num_new and (ids[-1] == END or num_new == max_new):
      found.append((ids, total / num_new**penalty))
      return
    for token in range(table.shape[-1]):
      before = ids[-2] if len(ids) > 1 else ids[0]
      visit([*ids, token], total + log_probs[len(ids), before, ids[-1], token])

  visit(list(prompt), 0.0)
  return sorted(found, key=lambda pair: -pair[1])


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.7, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_wide_beams_find_the_best_of_all(seed, penalty):
  table = make_model(seed)
  # As wide as there are texts: nothing is pruned, and "never" stops late only where it may.
  texts = find(table, [[1, 2]], num_beams=64, max_new=3, penalty=penalty, early_stopping="never")
  expected = search_exhaustively(table, [1, 2], 3, penalty)
  assert len(expected) == 1 + 3 + 36
  for (ids, score), (expected_ids, expected_score) in zip(as_lists(texts), expected):
    assert score == pytest.approx(expected_score, rel=SAME)
    assert ids == expected_ids
  assert (texts.finish_BW[0, :40] != RUNNING).all()
  assert (texts.score_BW[0, 40:] < OUT / 10).all()
