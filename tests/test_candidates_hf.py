"""Warped probabilities are those of transformers' warpers, composed as `generate` composes them."""

import itertools

import jax
import numpy as np
import pytest
from test_candidates import probabilities

from gptjax.generate.candidates import make_sampling, shortlist

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

pytestmark = pytest.mark.hf

V = 1000
NAMES = ("temperature", "top_k", "top_p", "min_p", "typical_p")
VALUES = {
  "temperature": (1.0, 0.35, 1.8),
  "top_k": (None, 1, 50, 5000),
  "top_p": (None, 0.0, 0.3, 0.95),
  "min_p": (None, 0.0, 0.05, 1.0),
  "typical_p": (None, 0.2, 0.9),
}
COMBINATIONS = [dict(zip(NAMES, values)) for values in itertools.product(*VALUES.values())]


def _scores(rows, seed=0):
  random = np.random.default_rng(seed)
  scores_RV = random.normal(0, 1, (rows, V)) * random.uniform(0.1, 12, (rows, 1))
  scores_RV[random.random((rows, V)) < 0.1] = -np.inf
  return scores_RV.astype(np.float32)


def _theirs(scores_RV, options, num_beams=1, raw=False) -> np.ndarray:
  """By the processors that transformers' own `generate` makes of the options."""
  given = {name: value for name, value in options.items() if value is not None}
  given = {"do_sample": True, "num_beams": num_beams, "top_k": 0} | given
  config = transformers.GenerationConfig(**given)
  # One end token, of which `generate` makes this.
  config._eos_token_tensor = torch.tensor([3])
  for name in NAMES:
    if options[name] is None and name != "top_k":
      setattr(config, name, None)
  model = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1)
  )
  ids = torch.zeros((len(scores_RV), 1), dtype=torch.long)
  processors = model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
  with torch.no_grad():
    # In float64, so that only our own rounding counts.
    warped_RV = processors(ids, torch.tensor(scores_RV, dtype=torch.float64))
  return (warped_RV if raw else warped_RV.softmax(-1)).numpy()


def _ours(scores_RV, rows) -> np.ndarray:
  return probabilities(
    scores_RV, make_sampling(V, **{name: [row[name] for row in rows] for name in NAMES})
  )


def check_close(probs_RV, wanted_RV):
  # Below the second there is no float32 of full precision.
  np.testing.assert_allclose(probs_RV, wanted_RV, rtol=1e-5, atol=1e-36)


@pytest.mark.parametrize("top_k", VALUES["top_k"])
def test_every_combination(top_k):
  for seed, options in enumerate(row for row in COMBINATIONS if row["top_k"] == top_k):
    scores_RV = _scores(3, seed)
    check_close(_ours(scores_RV, [options] * 3), _theirs(scores_RV, options))


def test_all_combinations_in_one_batch():
  scores_RV = _scores(len(COMBINATIONS), seed=77)
  probs_RV = _ours(scores_RV, COMBINATIONS)
  for row, options in enumerate(COMBINATIONS):
    one = slice(row, row + 1)
    check_close(probs_RV[one], _theirs(scores_RV[one], options))


def test_ties():
  scores_RV = np.random.default_rng(1).integers(-3, 3, (20, V)).astype(np.float32)
  for top_p, typical_p in ((0.4, None), (0.83, None), (None, 0.3), (0.7, 0.5)):
    options = dict.fromkeys(NAMES) | {"temperature": 1.0, "top_p": top_p, "typical_p": typical_p}
    probs_RV, wanted_RV = _ours(scores_RV, [options] * 20), _theirs(scores_RV, options)
    # PyTorch promises no order of equal scores, so which of them stay is its own affair.
    check_close(np.sort(probs_RV), np.sort(wanted_RV))


def test_scores_of_extreme_size():
  scores_RV = np.full((3, V), -np.inf, np.float32)
  scores_RV[0, [5, 9]] = 3e38, -3e38
  scores_RV[1, 7] = -1e30
  scores_RV[2] = np.linspace(-1e4, 1e4, V)
  for options in COMBINATIONS[::17]:
    if options["temperature"] >= 1:
      check_close(_ours(scores_RV, [options] * 3), _theirs(scores_RV, options))


def test_beams_keep_the_size_of_scores_and_two_tokens():
  scores_RV = _scores(3, seed=9)
  scores_RV -= np.log(np.exp(scores_RV.astype(np.float64)).sum(-1, keepdims=True)).astype(
    np.float32
  )
  for options in COMBINATIONS[::5]:
    sampling = make_sampling(V, **{name: [options[name]] * 3 for name in NAMES})
    short_RC, ids_RC = jax.jit(shortlist, static_argnums=2)(scores_RV, sampling, 2)
    assert (ids_RC is None) == (sampling.width == 0)
    ours_RV = np.full(scores_RV.shape, -np.inf, np.float32)
    ids_RC = np.arange(V)[None].repeat(3, 0) if ids_RC is None else np.asarray(ids_RC)
    np.put_along_axis(ours_RV, ids_RC, np.asarray(short_RC), axis=1)
    wanted_RV = _theirs(scores_RV, options, num_beams=2, raw=True)
    np.testing.assert_allclose(ours_RV, wanted_RV, rtol=1e-6)
    assert ((ours_RV > -np.inf).sum(axis=1) >= 2).all()


def test_other_options_are_told_apart():
  """Companion: the comparison fails where an option is slightly another one."""
  scores_RV = _scores(3, seed=5)
  options = dict(zip(NAMES, (0.8, 50, 0.9, 0.01, 0.9)))
  wanted_RV = _theirs(scores_RV, options)
  check_close(_ours(scores_RV, [options] * 3), wanted_RV)
  for name, value in zip(NAMES, (0.8001, 1, 0.2, 0.9, 0.1)):
    with pytest.raises(AssertionError):
      check_close(_ours(scores_RV, [options | {name: value}] * 3), wanted_RV)
