"""Warped distributions are those of a plain sort in float64, and draws follow them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generate.candidates import Candidates, Sampling, draw, make_sampling, warp

V = 300


def _scores(rows=6, seed=0, scale=3.0):
  scores_RV = np.random.default_rng(seed).normal(0, scale, (rows, V)).astype(np.float32)
  scores_RV[:, ::7] = -np.inf
  return scores_RV


@jax.jit
def _choose(scores_RV, sampling, keys_R, index_R):
  return draw(warp(scores_RV, sampling), keys_R, index_R)


def _same(options, rows):
  return {name: [value] * rows for name, value in options.items()}


def probabilities(scores_RV, sampling) -> np.ndarray:
  """The warped distribution over the vocabulary, float32 [R, V]."""
  candidates = jax.jit(warp)(scores_RV, sampling)
  probs_RV = np.zeros(scores_RV.shape, np.float32)
  probs_RC = np.exp(np.asarray(candidates.log_probs_RC))
  np.put_along_axis(probs_RV, np.asarray(candidates.ids_RC), probs_RC, axis=1)
  return probs_RV


def reference(scores_V, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None):
  """The same by sorting, one row, in float64."""
  x = scores_V.astype(np.float64) / temperature

  def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()

  if top_k:
    x = np.where(x < np.sort(x)[::-1][min(top_k, V) - 1], -np.inf, x)
  if top_p is not None and top_p < 1:
    order = np.argsort(x, kind="stable")
    is_cut = np.cumsum(softmax(x)[order]) <= 1 - top_p
    is_cut[-1] = False
    x[order[is_cut]] = -np.inf
  if min_p:
    x = np.where(softmax(x) < min_p * softmax(x).max(), -np.inf, x)
  if typical_p is not None and typical_p < 1:
    p = softmax(x)
    with np.errstate(divide="ignore"):
      surprise = -np.log(p)
    entropy = np.sum(p[p > 0] * surprise[p > 0])
    distance = np.abs(surprise - entropy)
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(p[order]) < typical_p).sum()), V - 1)
    x = np.where(distance > distance[order[last]], -np.inf, x)
  return softmax(x)


OPTIONS = [
  {},
  {"temperature": 0.3},
  {"top_k": 1},
  {"top_k": 50},
  {"top_k": 5000},
  {"top_p": 0.9},
  {"top_p": 0.05},
  {"top_p": 0.0},
  {"min_p": 0.2},
  {"min_p": 1.0},
  {"typical_p": 0.4},
  {"typical_p": 0.95},
  {"temperature": 1.7, "top_k": 40, "top_p": 0.8},
  {"temperature": 0.7, "top_k": 33, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.7},
  {"temperature": 2.0, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_probabilities_are_those_of_a_sort(options):
  scores_RV = _scores()
  probs_RV = probabilities(
    scores_RV, make_sampling(V, **_same({"temperature": 1.0} | options, len(scores_RV)))
  )
  for scores_V, probs_V in zip(scores_RV, probs_RV):
    wanted_V = reference(scores_V, **options)
    np.testing.assert_array_equal(probs_V > 0, wanted_V > 0)
    # float32 against float64: a few roundings of numbers near 10, in an exponent.
    np.testing.assert_allclose(probs_V, wanted_V, rtol=1e-5)


def test_another_order_of_the_warpers_would_be_seen():
  """Companion of the above: it can fail."""
  scores_RV = _scores(1)
  options = {"top_k": 20, "top_p": 0.6}
  probs_RV = probabilities(scores_RV, make_sampling(V, **_same({"temperature": 1.5} | options, 1)))
  top_p_first_V = reference(scores_RV[0], temperature=1.5, top_p=0.6)
  assert ((probs_RV[0] > 0) != (top_p_first_V > 0)).any()
  colder_V = reference(scores_RV[0], temperature=1.499, **options)
  assert not np.allclose(probs_RV[0], colder_V, rtol=1e-5)


def test_rows_with_other_options_share_a_program():
  """Each row of a mixed batch has what it has alone, although its path is another one."""
  scores_RV = _scores(len(OPTIONS), seed=1)
  rows = [{"temperature": 1.0} | options for options in OPTIONS]
  names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
  mixed = make_sampling(V, **{name: [row.get(name) for row in rows] for name in names})
  assert mixed.width == 0
  probs_RV = probabilities(scores_RV, mixed)
  for scores_V, probs_V, options in zip(scores_RV, probs_RV, OPTIONS):
    wanted_V = reference(scores_V, **options)
    np.testing.assert_array_equal(probs_V > 0, wanted_V > 0)
    np.testing.assert_allclose(probs_V, wanted_V, rtol=1e-5)


def test_options_that_no_row_has_are_not_in_the_program():
  sampling = make_sampling(V, [1.0, 0.5], top_k=[0, None], top_p=[1.0, None], min_p=[0, None])
  assert sampling.replace(temperature_R=None) == Sampling(temperature_R=None)
  assert make_sampling(V, [1.0], typical_p=[1.0]).typical_mass_R is None


@pytest.mark.parametrize(
  "top_k, width", [([50, 50], 64), ([3, 200], 256), ([50, 0], 0), ([V, 5], 0), ([280, 2], V)]
)
def test_width_holds_the_largest_top_k(top_k, width):
  assert make_sampling(V, [1.0, 1.0], top_k=top_k).width == width


def test_no_sort_is_in_the_program():
  sampling = make_sampling(V, [1.0], [0], [0.9], [0.1], [0.9])
  text = (
    jax.jit(warp).lower(_scores(1), sampling.replace(top_k_R=np.array([40], np.int32))).as_text()
  )
  assert "sort" not in text
  assert "top_k" not in text


def test_extreme_scores_stay_finite_and_banned_tokens_stay_banned():
  scores_RV = np.full((3, V), -np.inf, np.float32)
  scores_RV[0, [5, 9]] = 3e38, -3e38
  scores_RV[1, 7] = -1e30
  scores_RV[2] = np.linspace(-1e4, 1e4, V)
  for top_k in (None, [40] * 3):
    sampling = make_sampling(V, [1.0] * 3, top_k, [0.9] * 3, [0.1] * 3, [0.9] * 3)
    probs_RV = probabilities(scores_RV, sampling)
    assert probs_RV.argmax(axis=1).tolist() == [5, 7, V - 1]
    np.testing.assert_array_equal(probs_RV.max(axis=1), 1.0)
    np.testing.assert_array_equal(probs_RV.sum(axis=1), 1.0)


def test_ties_are_cut_by_id():
  """Of equal scores, top-p cuts as many as are needed, lower ids first; top-k cuts none."""
  scores_RV = np.zeros((1, V), np.float32)
  kept_V = probabilities(scores_RV, make_sampling(V, [1.0], top_p=[0.25]))[0] > 0
  assert kept_V.nonzero()[0].tolist() == list(range(V - V // 4, V))
  scores_RV[0, :10] = 1.0
  assert (probabilities(scores_RV, make_sampling(V, [1.0], top_k=[4]))[0] > 0).sum() == 10
  assert (probabilities(scores_RV, make_sampling(V, [1.0], top_k=[11]))[0] > 0).sum() == 64
  mixed = make_sampling(V, [1.0, 1.0], top_k=[11, 0])
  assert (probabilities(np.tile(scores_RV, (2, 1)), mixed)[0] > 0).sum() == V


def test_temperature_zero_takes_the_likeliest_of_its_row_only():
  scores_RV = _scores(3)
  scores_RV[1, [20, 40]] = 50.0
  for top_k in (None, [60, 60, 60]):
    sampling = make_sampling(V, [0.0, 0.0, 1.0], top_k, top_p=[0.9, None, 0.5])
    probs_RV = probabilities(scores_RV, sampling)
    assert probs_RV[0].argmax() == scores_RV[0].argmax()
    assert probs_RV[1, 20] == 1.0
    assert (probs_RV[:2] > 0).sum() == 2
    assert (probs_RV[2] > 0).sum() > 2
    assert (
      _choose(scores_RV, sampling, jax.random.split(jax.random.key(0), 3), jnp.arange(3))[1] == 20
    )


def _draws(probs_V, num, seed=0) -> np.ndarray:
  candidates = Candidates(
    jnp.arange(len(probs_V))[None, :], jnp.log(jnp.asarray(probs_V, jnp.float32))[None, :]
  )
  keys_R = jax.random.key(seed)[None]

  def one(index):
    return draw(candidates, keys_R, index[None])[0]

  return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(num)))


def _chi_square(counts, probs, num) -> float:
  return float(np.sum((counts - num * probs) ** 2 / (num * probs)))


def test_draws_follow_the_probabilities():
  probs_V = reference(_scores(1, seed=3, scale=1.5)[0], top_k=21)
  num = 40_000
  counts_V = np.bincount(_draws(probs_V, num), minlength=V)
  kept_V = probs_V > 0
  assert kept_V.sum() == 21
  assert counts_V[~kept_V].sum() == 0
  # 20 degrees of freedom: above 56 once in 30,000 times, and the seed is fixed.
  assert _chi_square(counts_V[kept_V], probs_V[kept_V], num) < 56
  # Companion: a distribution that is 10 % off in temperature is told apart.
  other_V = probs_V**1.1 / np.sum(probs_V**1.1)
  assert _chi_square(counts_V[kept_V], other_V[kept_V], num) > 100


def test_draws_depend_on_key_and_index_alone():
  scores_RV = jnp.asarray(_scores(4, seed=5))
  keys_R = jax.random.split(jax.random.key(1), 4)
  index_R = jnp.array([0, 9, 9, 3])
  plain = make_sampling(V, [1.0] * 4, top_k=[30, 30, 30, 30], top_p=[0.9] * 4)
  mixed = make_sampling(V, [1.0] * 4, top_k=[30, 30, 30, 0], top_p=[0.9] * 4)
  assert (plain.width, mixed.width) == (64, 0)
  together = _choose(scores_RV, plain, keys_R, index_R)
  # By the other path too, for those rows whose options are the same.
  np.testing.assert_array_equal(_choose(scores_RV, mixed, keys_R, index_R)[:3], together[:3])
  for row in range(4):
    one = slice(row, row + 1)
    alone = make_sampling(V, [1.0], top_k=[30], top_p=[0.9])
    token_R = _choose(scores_RV[one], alone, keys_R[one], index_R[one])
    assert token_R[0] == together[row]
  # Companion: another index is another draw.
  later = [_choose(scores_RV, plain, keys_R, index_R + i).tolist() for i in range(1, 6)]
  assert any(tokens != together.tolist() for tokens in later)


def test_draws_need_no_room_for_noise_over_the_vocabulary():
  """One number a row: the random bits of a step are not [R, V]."""
  scores_RV = jnp.asarray(_scores(2))
  keys_R = jax.random.split(jax.random.key(1), 2)

  def step(scores_RV):
    candidates = warp(scores_RV, make_sampling(V, [0.7, 0.9]))
    return draw(candidates, keys_R, jnp.zeros(2, jnp.int32))

  text = str(jax.make_jaxpr(step)(scores_RV))
  assert f"ui32[2,{V}]" not in text and f"u32[2,{V}]" not in text
  assert "u32[2]" in text
