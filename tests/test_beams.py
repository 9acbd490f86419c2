"""Beam search finds what exhaustive search finds; a prompt does not know its companions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generate.beams import LENGTH, OUT, RUNNING, BeamPlan, Game, make_ranking, search

VOCAB_SIZE = 4
END = 3
NUM_SLOTS = 20
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


@functools.partial(jax.jit, static_argnames=("plan", "process", "end_ids"))
def run(table, tokens_BS, length_B, max_new_B, ranking, keys_B, plan, process, end_ids):
  """Searches with a model whose memory is the texts themselves."""
  (num_prompts, num_slots), num_beams = tokens_BS.shape, plan.num_beams

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
  game = Game(process, end_at(end_ids), ranking, max_new_B, keys_B)
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
  early_stopping=False,
  do_sample=False,
  process=forbid_nothing,
  seed=0,
  num_slots=NUM_SLOTS,
):
  """Returns Texts as numpy arrays."""
  tokens = np.zeros((len(prompts), num_slots), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  max_new_B = np.broadcast_to(np.int32(max_new), len(prompts))
  plan = BeamPlan(num_beams, len(end_ids), do_sample)
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(prompts)))
  texts = run(
    table,
    tokens,
    np.array([len(prompt) for prompt in prompts], np.int32),
    max_new_B,
    make_ranking(penalty, early_stopping),
    keys_B,
    plan,
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


PROMPTS = [[1, 2], [0, 2], [2, 2, 1, 0, 1], [1]]


@pytest.mark.parametrize(
  "modes",
  [
    {"early_stopping": False},
    {"early_stopping": True},
    {"early_stopping": "never", "penalty": 1.5},
    {"penalty": -1.0},
    {"do_sample": True},
  ],
)
def test_a_prompt_does_not_know_its_companions(modes):
  """Neither their number, nor lengths and limits, nor how much room there is."""
  table, limits = make_model(5), [5, 9, 3, 1]
  together = find(table, PROMPTS, num_beams=3, max_new=limits, **modes)
  # Draws go by a prompt's place.
  for row in range(1 if "do_sample" in modes else 2):
    alone = find(table, [PROMPTS[row]], num_beams=3, max_new=limits[row], num_slots=12, **modes)
    assert as_lists(alone) == as_lists(together, row)
    for name in ("finish_BW", "length_BW"):
      np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[row])


def test_limits_and_end_tokens_say_why_a_text_ended():
  texts = find(make_model(1), PROMPTS, num_beams=4, max_new=[1, 2, 6, 7], end_ids=(3, 0))
  for row, (prompt, limit) in enumerate(zip(PROMPTS, [1, 2, 6, 7])):
    for beam, (ids, _) in enumerate(as_lists(texts, row)):
      new = ids[len(prompt) :]
      assert ids[: len(prompt)] == prompt
      assert 1 <= len(new) <= limit
      assert not set(new[:-1]) & {0, 3}
      ended = new[-1] in (0, 3)
      assert texts.finish_BW[row, beam] == (1 if ended else LENGTH)
      assert ended or len(new) == limit


def test_scores_are_the_penalised_sums_of_the_recorded_log_probabilities():
  texts = find(make_model(2), PROMPTS, num_beams=3, max_new=6, penalty=0.8)
  sums = texts.log_probs_BWS.sum(axis=-1)
  num_new = texts.length_BW - np.array([len(prompt) for prompt in PROMPTS])[:, None]
  np.testing.assert_allclose(texts.score_BW, sums / num_new**0.8, rtol=SAME)
  assert (np.diff(texts.score_BW, axis=1) <= 0).all()
  is_new = np.arange(texts.log_probs_BWS.shape[2]) < texts.length_BW[:, :, None]
  is_new &= (
    np.arange(texts.log_probs_BWS.shape[2])
    >= np.array([len(prompt) for prompt in PROMPTS])[:, None, None]
  )
  assert (texts.log_probs_BWS[~is_new] == 0).all()
  assert (texts.log_probs_BWS[is_new] < 0).all()


def test_one_beam_is_greedy():
  table = make_model(3)
  texts = find(table, [[1, 2]], num_beams=1, max_new=9, end_ids=())
  ids = [1, 2]
  for _ in range(9):
    ids.append(int(table[len(ids), ids[-2], ids[-1]].argmax()))
  assert as_lists(texts)[0][0] == ids


def forbid_the_likeliest(log_probs_RV, tokens_RS, length_R):
  """And shows what a rule sees: an even token may not follow itself."""
  last_R = jnp.take_along_axis(tokens_RS, length_R[:, None] - 1, axis=1)
  is_repeated_RV = (jnp.arange(log_probs_RV.shape[1])[None] == last_R) & (last_R % 2 == 0)
  return jnp.where(is_repeated_RV, -jnp.inf, log_probs_RV), None


def test_rules_see_the_texts_of_their_rows():
  table = make_model(4)
  table = table + 3 * jnp.eye(VOCAB_SIZE)[None, None]
  free, ruled = (
    find(table, PROMPTS, num_beams=3, max_new=8, process=process)
    for process in (forbid_nothing, forbid_the_likeliest)
  )

  def count_repeats(texts):
    return sum(
      a == b and a % 2 == 0
      for row, prompt in enumerate(PROMPTS)
      for ids, _ in as_lists(texts, row)
      for a, b in zip(ids[len(prompt) - 1 :], ids[len(prompt) :])
    )

  assert count_repeats(ruled) == 0
  assert count_repeats(free) > 0


def keep_two_reversed(log_probs_RV, tokens_RS, length_R):
  """The two likeliest of the first three tokens, the likeliest last; halved."""
  del tokens_RS, length_R
  scores_RX, ids_RX = jax.lax.top_k(log_probs_RV[:, :3], 2)
  return scores_RX[:, ::-1] / 2, ids_RX[:, ::-1]


def test_choices_may_be_a_few_ids_in_any_order():
  table = make_model(6)
  texts = find(table, [[1, 2]], num_beams=2, max_new=4, penalty=0.0, process=keep_two_reversed)
  totals = {(1, 2): 0.0}
  for _ in range(4):
    longer = {}
    for ids, total in totals.items():
      log_probs = np.asarray(jax.nn.log_softmax(table[len(ids), ids[-2], ids[-1]]))
      for token in np.argsort(log_probs[:3])[-2:]:
        longer[*ids, int(token)] = total + log_probs[token] / 2
    totals = dict(sorted(longer.items(), key=lambda pair: -pair[1])[:2])
  for (ids, score), (expected_ids, expected) in zip(as_lists(texts), totals.items()):
    assert tuple(ids) == expected_ids
    assert score == pytest.approx(expected, rel=SAME)


@pytest.mark.parametrize(
  ("end_logit", "later", "early_stopping", "is_short"),
  [
    # The running score better than the worst finished: only True stops.
    (1.5, 2.0, True, True),
    (1.5, 2.0, False, False),
    # They score worse now but will be better: only "never" goes on.
    (1.0, 9.0, False, True),
    (1.0, 9.0, "never", False),
  ],
)
def test_when_a_search_stops(end_logit, later, early_stopping, is_short):
  table = jnp.zeros((23, 4, 4, 4)).at[..., END].set(end_logit)
  table = table.at[3 if later > 2 else 0 :, ..., 2].set(later)
  texts = find(table, [[1]], num_beams=2, max_new=12, early_stopping=early_stopping)
  longest = max(len(ids) - 1 for ids, _ in as_lists(texts))
  assert longest == 2 if is_short else longest == 12


def test_two_texts_drawn_without_replacement_follow_their_distribution():
  """Of four first tokens drawn, the two likeliest go on; their frequencies are those of draws."""
  num_draws, table = 4000, make_model(7, vocab_size=6)
  texts = find(table, [[1, 2]] * num_draws, num_beams=2, max_new=1, end_ids=(), do_sample=True)
  probabilities = np.asarray(jax.nn.softmax(table[2, 1, 2]), np.float64)
  expected = dict.fromkeys(map(frozenset, itertools.combinations(range(6), 2)), 0.0)
  for tokens in itertools.permutations(range(6), 4):
    drawn = probabilities[list(tokens)]
    left = 1 - np.concatenate([[0], drawn[:-1].cumsum()])
    best = frozenset(sorted(tokens, key=probabilities.__getitem__)[-2:])
    expected[best] += np.prod(drawn / left)
  drawn = [frozenset(row) for row in texts.tokens_BWS[:, :, 2].tolist()]
  for pair, probability in expected.items():
    # Five standard deviations of a binomial count.
    spread = 5 * np.sqrt(num_draws * probability * (1 - probability))
    assert abs(drawn.count(pair) - num_draws * probability) <= spread
