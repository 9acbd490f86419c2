"""Log-likelihoods against the float64 reference, whatever the batch, bucket, chunk or devices."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from families import FAMILIES, make_params

from gptjax.checkpoint.reference import reference_activations
from gptjax.errors import ConfigError, DataError
from gptjax.evaluate import scoring
from gptjax.evaluate.scoring import Row, Scorer, continuation_row
from gptjax.generate import programs
from gptjax.model.parameters import SHARDING_RULES
from gptjax.parallel import make_parallel

CONFIG = FAMILIES["gpt2"]
# Ours is float32, the reference float64.
TOLERANCE = 1e-5
LENGTHS = (2, 5, 25, 7, 20, 25, 25, 13, 18)


def make_model(config=CONFIG):
  return SimpleNamespace(config=config, params=make_params(config, gain=2.0))


def make_rows(lengths=LENGTHS, seed=3):
  rng = np.random.default_rng(seed)
  return [
    Row(rng.integers(0, CONFIG.vocab_size, length), int(rng.integers(1, length)))
    for length in lengths
  ]


def reference_log_probs(model, row):
  """Returns float64 [scored, V], a row at a time and without padding."""
  inputs = np.asarray(row.tokens)[None, :-1]
  logits_LV = reference_activations(model.params, model.config, inputs)["logits"][0]
  logits_SV = logits_LV[-row.num_scored :]
  logits_SV = logits_SV - logits_SV.max(axis=-1, keepdims=True)
  return logits_SV - np.log(np.exp(logits_SV).sum(axis=-1, keepdims=True))


def reference_score(model, row):
  """Returns (log-probability of each scored token, whether it is the likeliest)."""
  log_probs_SV = reference_log_probs(model, row)
  targets_S = np.asarray(row.tokens)[-row.num_scored :]
  logprobs_S = log_probs_SV[np.arange(len(targets_S)), targets_S]
  return logprobs_S, log_probs_SV.argmax(axis=-1) == targets_S


def check_scores(model, rows, scores):
  for row, found in zip(rows, scores, strict=True):
    logprobs_S, is_greedy_S = reference_score(model, row)
    np.testing.assert_allclose(found.logprobs_S, logprobs_S, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_array_equal(found.is_greedy_S, is_greedy_S)


@pytest.fixture(scope="module")
def model():
  return make_model()


@pytest.fixture(scope="module")
def scorer(model):
  """On all eight devices, four whole rows in a batch."""
  return Scorer(model, batch_size=4)


@pytest.fixture(scope="module")
def rows():
  return make_rows()


@pytest.fixture(scope="module")
def scores(scorer, rows):
  return scorer.score(rows)


def test_every_scored_token_has_the_log_likelihood_of_the_reference(model, rows, scores):
  check_scores(model, rows, scores)
  assert [len(found.logprobs_S) for found in scores] == [row.num_scored for row in rows]
  assert scores[0].alternatives_SX.shape == (rows[0].num_scored, 0)


def test_a_score_shifted_by_one_token_is_noticed(model, rows, scores):
  """Companion: what a model thinks of the next token instead is far outside the tolerance."""
  shifted = [Row([*row.tokens[1:], 0], row.num_scored) for row in rows[1:]]
  with pytest.raises(AssertionError):
    check_scores(model, shifted, scores[1:])


def test_one_device_and_one_row_at_a_time_change_nothing(model, rows, scores):
  one = make_parallel("pmap", devices=jax.devices()[:1])
  alone = Scorer(
    SimpleNamespace(config=model.config, params=one.adopt(model.params)), 1, parallel=one
  )
  for found, expected in zip(alone.score(rows[2:5]), scores[2:5], strict=True):
    np.testing.assert_allclose(found.logprobs_S, expected.logprobs_S, rtol=TOLERANCE)


def test_a_row_does_not_depend_on_its_companions(scorer, rows, scores):
  found = scorer.score([rows[4], rows[2]])
  np.testing.assert_allclose(found[0].logprobs_S, scores[4].logprobs_S, rtol=TOLERANCE)
  np.testing.assert_allclose(found[1].logprobs_S, scores[2].logprobs_S, rtol=TOLERANCE)


def test_chunks_of_the_head_change_nothing_and_give_the_alternatives(monkeypatch, model, rows):
  monkeypatch.setattr(scoring, "CHUNK_TOKENS", 5)
  scores = Scorer(model, batch_size=8).score(rows[5:7], num_alternatives=4)
  check_scores(model, rows[5:7], scores)
  for row, found in zip(rows[5:7], scores):
    log_probs_SV = reference_log_probs(model, row)
    best_SX = np.argsort(-log_probs_SV, axis=-1)[:, :4]
    np.testing.assert_array_equal(found.alternatives_SX, best_SX)
    expected_SX = np.take_along_axis(log_probs_SV, best_SX, axis=-1)
    np.testing.assert_allclose(found.alternative_logprobs_SX, expected_SX, rtol=1e-4, atol=1e-5)


def test_a_bucket_is_compiled_once(model):
  scorer, compiled, done = Scorer(model, batch_size=1), [], []
  stop = programs.on_compile(compiled.append)
  scorer.score(make_rows((18, 20, 19, 25, 22, 24)), advance=done.append)
  scorer.score(make_rows((18, 23), seed=4))
  stop()
  # One row of a batch is one for each device, so traced with one.
  assert compiled == ["compiling the scores for 1 rows, 24 slots"]
  assert sum(done) == 6


def test_the_sum_of_a_row(scores):
  found = scores[5]
  assert found.logprob == pytest.approx(float(np.sum(found.logprobs_S, dtype=np.float64)))
  assert found.is_greedy == all(found.is_greedy_S)


def test_a_greedy_continuation_is_seen(model, scorer):
  """What the reference finds likeliest, token by token, is greedy; another last token is not."""
  tokens = [5, 9, 2]
  for _ in range(3):
    log_probs_SV = reference_log_probs(model, Row([*tokens, 0], 1))
    tokens.append(int(log_probs_SV.argmax()))
  other = [*tokens[:-1], (tokens[-1] + 1) % CONFIG.vocab_size]
  assert [scores.is_greedy for scores in scorer.score([Row(tokens, 3), Row(other, 3)])] == [
    True,
    False,
  ]


def test_a_long_context_loses_its_beginning():
  row = continuation_row(range(20), [20, 21, 22], context_length=8)
  assert (list(row.tokens), row.num_scored) == (list(range(14, 23)), 3)
  row = continuation_row([1], [2], context_length=8)
  assert (list(row.tokens), row.num_scored) == ([1, 2], 1)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    (Row([1], 1), "a row has 1 tokens; it must have 2 to 25"),
    (Row([1] * 26, 1), "a row has 26 tokens"),
    (Row([1, 2, 3], 3), "3 of 3 tokens are to be scored"),
    (Row([1, 2, 3], 0), "0 of 3 tokens"),
    (Row([1, 61], 1), "token id 61 is not in the vocabulary of the model, whose ids are 0 to 60"),
    (Row([-1, 6], 1), "token id -1"),
  ],
)
def test_rows_that_cannot_be_scored(scorer, row, message):
  with pytest.raises(DataError, match=message):
    scorer.score([row])


def test_what_else_is_refused(model, scorer):
  with pytest.raises(ConfigError, match="batch_size is 0"):
    Scorer(model, 0)
  with pytest.raises(ConfigError, match="alternatives is 62"):
    scorer.score([Row([1, 2], 1)], num_alternatives=62)
  with pytest.raises(DataError, match="the context is empty"):
    continuation_row([], [1], 8)
  with pytest.raises(DataError, match="the continuation is empty"):
    continuation_row([1], [], 8)
  with pytest.raises(DataError, match="has 9 tokens"):
    continuation_row([1], range(9), 8)
  assert scorer.score([]) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
  model, rows = make_model(FAMILIES[family]), make_rows()
  check_scores(model, rows, Scorer(model, batch_size=3).score(rows))


@pytest.mark.slow
def test_parameters_split_over_a_mesh(model, rows):
  mesh = make_parallel("mesh", mesh_fsdp=2, mesh_tensor=2, sharding_rules=SHARDING_RULES)
  split = SimpleNamespace(config=model.config, params=mesh.adopt(model.params))
  check_scores(model, rows, Scorer(split, parallel=mesh).score(rows))
