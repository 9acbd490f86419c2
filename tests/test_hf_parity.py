"""Logits, loss and every gradient equal transformers', with the same weights in both."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from families import HF_CASES, make_batch, make_params, make_tokens, relative_error

from gptjax.model.config import ModelConfig
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_logits
from gptjax.train.step import LanguageModelObjective

pytestmark = pytest.mark.hf

# Theirs is float64 except where a model casts to float32 by itself; ours is float32.
LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def hf():
  """The tests' bridge to transformers; skips where PyTorch is not installed."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  return pytest.importorskip("hf_models")


class Hyper:
  """What the objective reads of the hyperparameters."""

  z_loss = 0.0


@functools.partial(jax.jit, static_argnames="config")
def compute(params, batch, config):
  """Returns (logits, loss, gradients)."""

  def loss(params):
    terms, sums = LanguageModelObjective(config)(params, batch, Hyper, None)
    return terms["loss"] / sums["loss"][1]

  logits = lm_logits(params, hidden_states(params["decoder"], batch, config), config)
  return logits, *jax.value_and_grad(loss)(params)


def make_even_batch(tokens_BL):
  return make_batch(tokens_BL).replace(weights_BL=np.ones_like(tokens_BL[:, 1:], np.float32))


@pytest.mark.parametrize("name", HF_CASES)
def test_logits_loss_and_every_gradient(hf, name):
  config, params = HF_CASES[name], make_params(HF_CASES[name])
  tokens = make_tokens(config, length=14)
  logits, loss, gradients = compute(params, make_even_batch(tokens), config)
  expected_logits, expected_loss, expected_gradients = hf.hf_results(
    hf.make_hf_model(params, config), tokens
  )
  assert relative_error(logits, expected_logits) < LOGITS_TOLERANCE
  assert float(loss) == pytest.approx(expected_loss, rel=LOGITS_TOLERANCE)
  gradients = hf.to_hf(gradients, config)
  assert gradients.keys() == expected_gradients.keys()
  for key, expected in expected_gradients.items():
    assert relative_error(gradients[key], expected) < GRADIENT_TOLERANCE, key


@pytest.mark.parametrize("family", ["gpt1", "gpt2", "gptj", "gptneo", "gptneox"])
def test_a_perturbed_tensor_is_noticed(hf, family):
  """In the logits, for each tensor of theirs moved in one entry."""
  config, params = HF_CASES[family], make_params(HF_CASES[family])
  tokens = make_tokens(config, length=14)
  tokens[0, 0] = 0
  logits, _, _ = compute(params, make_even_batch(tokens), config)
  torch = pytest.importorskip("torch")
  model = hf.make_hf_model(params, config)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.view(-1)[0] += 0.1
      wrong = model(input_ids=torch.from_numpy(tokens[:, :-1].astype(np.int64))).logits
      parameter.view(-1)[0] -= 0.1
      assert relative_error(logits, wrong) > 10 * LOGITS_TOLERANCE, name


@pytest.mark.slow
def test_gpt2_124m_at_full_size(hf):
  config = ModelConfig(vocab_size=50257)
  params = make_params(config, gain=0.5)
  tokens = make_tokens(config, num_rows=1, length=65)
  torch = pytest.importorskip("torch")
  model = hf.make_hf_model(params, config, dtype=torch.float32)
  with torch.no_grad():
    expected = model(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
  batch = make_batch(np.pad(tokens, ((0, 0), (0, 1))))

  @functools.partial(jax.jit, static_argnames="config")
  def forward(params, batch, config):
    return lm_logits(params, hidden_states(params["decoder"], batch, config), config)

  # Both sides are float32, with sums over 3072 terms in 12 layers.
  assert relative_error(forward(params, batch, config), expected) < 1e-4
  wrong = dataclasses.replace(config, norm_epsilon=1e-2)
  assert relative_error(forward(params, batch, wrong), expected) > 1e-3
