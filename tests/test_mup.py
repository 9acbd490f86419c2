"""muP: table 8 of Tensor Programs V entry by entry, and what it is for, the coordinate check."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import make_batch, make_config, make_params, make_tokens, relative_error

from gptjax.checkpoint.reference import reference_activations
from gptjax.errors import ConfigError
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import all_hidden_states
from gptjax.model.heads import lm_logits
from gptjax.model.mup import standard_form
from gptjax.model.parameters import init_parameters, model_specs
from gptjax.model.presets import mup, preset
from gptjax.train.config import OptimizerConfig, PretrainConfig
from gptjax.train.optimizer import HIDDEN_PATTERN, hyperparameters, make_optimizer
from gptjax.train.schedule import Durations
from gptjax.train.step import LanguageModelObjective, init_state, make_train_step
from gptjax.tree import named_leaves

BASE = 16
WIDTHS = (16, 64, 256)


def make_model(width, is_mup):
  config = ModelConfig(
    vocab_size=32, vocab_multiple=1, context_length=8, num_layers=2, model_dim=width, num_heads=2
  )
  return mup(config, BASE) if is_mup else config


def make_hyper(optimizer, model):
  multiplier = model.width_multiplier if model.mup_base_dim else None
  return hyperparameters(optimizer, Durations(100, 0, 100), width_multiplier=multiplier)


def test_initial_values_are_those_of_table_8():
  wide = named_leaves(model_specs(make_model(64, True)))
  standard = named_leaves(model_specs(make_model(64, False)))
  for name, spec in wide.items():
    # Variance 1 / fan_in for hidden matrices: four times as wide, half the deviation.
    factor = 0.5 if "layers" in name and name.endswith("kernel") else 1
    assert spec.std == pytest.approx(factor * standard[name].std), name


def first_updates(optimizer, model):
  """Returns {name: update} of constant gradients of 1, from parameters of 1."""

  @jax.jit
  def update():
    params = jax.tree.map(lambda spec: jnp.ones(spec.shape), model_specs(model))
    rule = make_optimizer(optimizer, make_hyper(optimizer, model), step=jnp.int32(0))
    updates, _ = rule.update(params, rule.init(params), params)
    return jax.tree.map(lambda leaf: leaf.ravel()[0], updates)

  return {name: float(leaf) for name, leaf in named_leaves(update()).items()}


def test_adams_rate_falls_with_the_width_for_hidden_matrices_only():
  optimizer = OptimizerConfig(schedule="constant", learning_rate=1.0, weight_decay=0.5, clip_norm=0)
  for name, update in first_updates(optimizer, make_model(64, True)).items():
    is_hidden = "layers" in name and name.endswith("kernel")
    # The decay keeps its rate, as in the mup package's MuAdamW.
    decay = 0.5 if name.endswith(("kernel", "embedding")) else 0
    assert update == pytest.approx(-(0.25 if is_hidden else 1) - decay, rel=1e-5), name


@pytest.mark.slow
def test_muons_updates_need_no_rule():
  model = make_model(64, True)
  optimizer = OptimizerConfig(name="muon", schedule="constant")
  standard = dataclasses.replace(model, mup_base_dim=None)
  assert first_updates(optimizer, model) == first_updates(optimizer, standard)


def test_at_its_base_width_it_is_the_standard_parametrisation():
  model = dataclasses.replace(make_model(BASE, False), mup_base_dim=BASE)
  standard = make_model(BASE, False)
  key = jax.random.key(0)
  for a, b in zip(jax.tree.leaves(init_parameters(model, key)),
                  jax.tree.leaves(init_parameters(standard, key))):  # fmt: skip
    np.testing.assert_array_equal(a, b)
  optimizer = OptimizerConfig()
  assert first_updates(optimizer, model) == first_updates(optimizer, standard)


def test_gpt1s_adam_has_no_rule():
  with pytest.raises(ConfigError, match="gpt1_adam"):
    PretrainConfig(model=make_model(64, True), optimizer=OptimizerConfig(name="gpt1_adam"))


def test_a_preset_takes_it_as_an_option():
  config = mup(preset("gpt2-medium"), base_dim=256)
  assert (config.width_multiplier, config.attention_scale) == (4.0, "head_dim")


@pytest.mark.parametrize("family", ["gpt2", "gptneox"])
def test_the_standard_form_is_the_same_function(family):
  config = make_config(family, mup_base_dim=8, attention_scale="head_dim")
  params = make_params(config)
  standard, rescaled = standard_form(config, params)
  assert (standard.mup_base_dim, standard.attention_scale) == (None, "sqrt_head_dim")
  tokens = make_tokens(config, length=5)
  expected = reference_activations(params, config, tokens)["logits"]
  assert (
    relative_error(reference_activations(rescaled, standard, tokens)["logits"], expected) < 1e-6
  )
  # The companion: without the scales it is another function.
  assert relative_error(reference_activations(params, standard, tokens)["logits"], expected) > 0.1


def changes_after_steps(width, is_mup, name, num_steps=3):
  """Returns the root mean square change of the last block's stream and of the logits."""
  model = make_model(width, is_mup)
  optimizer = OptimizerConfig(
    name=name, schedule="constant", learning_rate=0.01, muon_learning_rate=0.01, clip_norm=0
  )
  state = init_state(
    init_parameters(model, jax.random.key(1)), optimizer, make_hyper(optimizer, model),
    jax.random.key(2),
  )  # fmt: skip
  batch = make_batch(make_tokens(model, num_rows=16, length=9))
  step = jax.jit(
    lambda state: make_train_step(LanguageModelObjective(model), optimizer)(
      state, jax.tree.map(lambda rows: rows[None], batch), axis_name=None
    )[0]
  )

  def look(params):
    states = all_hidden_states(params["decoder"], batch, model)
    return states[-2], lm_logits(params, states[-1], model)

  before = look(state.params)
  for _ in range(num_steps):
    state = step(state)
  after = look(state.params)
  return [float(jnp.sqrt(jnp.mean(jnp.square(b - a)))) for a, b in zip(before, after)]


def slopes(is_mup, name):
  """Returns how the changes grow: exponents of the width."""
  changes = np.array([changes_after_steps(width, is_mup, name) for width in WIDTHS])
  return [np.polyfit(np.log(WIDTHS), np.log(column), 1)[0] for column in changes.T]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_after_some_steps_activations_have_changed_alike_at_every_width(name):
  """The coordinate check (Yang et al. 2022, appendix D.1)."""
  assert max(map(abs, slopes(True, name))) < 0.15


@pytest.mark.slow
def test_in_the_standard_parametrisation_they_grow_with_the_width():
  assert min(slopes(False, "adamw")) > 0.4


def test_the_hidden_matrices_are_those_with_two_growing_sides():
  narrow, wide = (named_leaves(model_specs(make_model(width, True))) for width in (16, 32))
  for name, spec in narrow.items():
    growing = sum(a != b for a, b in zip(spec.shape, wide[name].shape))
    assert (growing == 2) == bool(re.search(HIDDEN_PATTERN, name)), name
  assert math.isclose(make_model(32, True).width_multiplier, 2)
