"""Log-likelihoods and perplexity equal transformers', for random and for trained weights."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from families import HF_CASES, make_params
from scored_models import make_loaded, make_text

from gptjax.checkpoint.models import load_model
from gptjax.evaluate.perplexity import measure_perplexity
from gptjax.evaluate.protocol import Protocol
from gptjax.evaluate.scoring import Row, Scorer

pytestmark = pytest.mark.hf

TOLERANCE = 1e-4
NANO_SORT = Path(__file__).parents[2] / "shared/data/models/gpt_nano_sort"


@pytest.fixture(scope="module")
def hf():
  """The tests' bridge to transformers; skips where PyTorch is not installed."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  return pytest.importorskip("hf_models")


def their_logprobs(model, tokens):
  """Returns the log-likelihood of tokens[1:], from transformers' logits, a row at a time."""
  import torch

  with torch.no_grad():
    inputs = torch.tensor(np.asarray(tokens)[None, :-1].astype(np.int64))
    logits_LV = model(input_ids=inputs).logits[0]
  log_probs_LV = torch.log_softmax(logits_LV.double(), dim=-1).numpy()
  return log_probs_LV[np.arange(len(tokens) - 1), tokens[1:]]


def check_against(their_model, model, rows):
  for row, found in zip(rows, Scorer(model, batch_size=4).score(rows), strict=True):
    expected = their_logprobs(their_model, row.tokens)[-row.num_scored :]
    np.testing.assert_allclose(found.logprobs_S, expected, rtol=TOLERANCE, atol=TOLERANCE)


def draw_rows(config, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, config.context_length + 1, 6)
  return [Row(rng.integers(0, config.vocab_size, n), int(rng.integers(1, n))) for n in lengths]


@pytest.mark.parametrize("name", HF_CASES)
def test_random_models(hf, name):
  config = HF_CASES[name]
  model = SimpleNamespace(config=config, params=make_params(config, gain=2.0))
  check_against(hf.make_hf_model(model.params, config), model, draw_rows(config))


def test_other_weights_are_noticed(hf):
  """Companion: a model that differs in one embedding is far outside the tolerance."""
  config = HF_CASES["gpt2"]
  model = SimpleNamespace(config=config, params=make_params(config, gain=2.0))
  their_model = hf.make_hf_model(model.params, config)
  model.params["decoder"]["token_embedding"]["embedding"][:, 0] += 0.1
  with pytest.raises(AssertionError):
    check_against(their_model, model, draw_rows(config))


@pytest.mark.skipif(not NANO_SORT.is_dir(), reason="needs ../shared/data")
def test_a_trained_model(hf):
  """minGPT's sorter: what it was trained for is likely, in both."""
  model = load_model(NANO_SORT / "gpt-nano-sort-model.json")
  rng = np.random.default_rng(0)
  problems = [rng.integers(0, 3, 6) for _ in range(8)]
  rows = [Row(np.concatenate([problem, np.sort(problem)]), 6) for problem in problems]
  check_against(hf.make_hf_model(_as_numpy(model.params), model.config), model, rows)
  scores = Scorer(model).score(rows)
  assert np.mean([found.is_greedy for found in scores]) > 0.8


def _as_numpy(tree):
  return {k: _as_numpy(v) if isinstance(v, dict) else np.asarray(v) for k, v in tree.items()}


def recipe(model, ids, max_length, stride):
  """The loop of transformers' documentation, "Perplexity of fixed-length models"."""
  import torch

  tokens = torch.tensor([ids])
  nll_sum, n_tokens, prev_end = 0.0, 0, 0
  for begin in range(0, len(ids), stride):
    end = min(begin + max_length, len(ids))
    inputs = tokens[:, begin:end]
    targets = inputs.clone()
    targets[:, : -(end - prev_end)] = -100
    with torch.no_grad():
      loss = model(inputs, labels=targets).loss
    num_loss_tokens = int((targets != -100).sum()) - 1
    nll_sum += float(loss) * num_loss_tokens
    n_tokens += num_loss_tokens
    prev_end = end
    if end == len(ids):
      break
  return math.exp(nll_sum / n_tokens), n_tokens


@pytest.mark.parametrize(("context", "stride"), [(24, 24), (24, 23), (24, 12), (16, 5)])
def test_strided_perplexity_is_that_of_the_recipe(hf, tmp_path, context, stride):
  """Theirs weighs a window by a token less than it averages over; both weightings are reported."""
  model, text = make_loaded(), make_text(230)
  (tmp_path / "text.txt").write_text(text)
  protocol = Protocol(context=context, stride=stride)
  found = measure_perplexity([str(tmp_path / "text.txt")], model, Scorer(model), protocol, str)
  their_model = hf.make_hf_model(model.params, model.config)
  expected, n_tokens = recipe(their_model, model.tokenizer.encode(text), context, stride)
  assert found["transformers_perplexity"] == pytest.approx(expected, rel=TOLERANCE)
  assert found["token_perplexity"] == pytest.approx(expected, rel=2e-2)
  if stride == context:
    assert found["token_perplexity"] == pytest.approx(expected, rel=TOLERANCE)
    assert found["tokens"] == n_tokens
