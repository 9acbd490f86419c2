"""Every family against the float64 reference; each kind of weight must matter to it."""

import functools

import jax
import numpy as np
import pytest
from families import (
  FAMILIES,
  ODD_SHAPES,
  make_batch,
  make_config,
  make_params,
  make_tokens,
  relative_error,
)

from gptjax.checkpoint.reference import reference_activations, reference_loss
from gptjax.model.decoder import all_hidden_states, hidden_states
from gptjax.model.heads import lm_logits
from gptjax.train.step import LanguageModelObjective
from gptjax.tree import named_leaves

# float32 carries 6e-8; a handful of layers of sums over at most a hundred terms stay within 2e-6.
TOLERANCE = 1e-5
PACKED_SEGMENTS = np.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11], np.int32)
PACKED_POSITIONS = np.array([[*range(4), *range(5), 0, 1], [*range(11)]], np.int32)


@functools.partial(jax.jit, static_argnames="config")
def compute_logits(params, batch, config):
  return lm_logits(params, hidden_states(params["decoder"], batch, config), config)


@functools.partial(jax.jit, static_argnames="config")
def compute_layers_and_loss(params, batch, config):
  _, sums = LanguageModelObjective(config)(params, batch, Hyper, None)
  return all_hidden_states(params["decoder"], batch, config), sums["loss"]


def perturb(params, name):
  """Returns a copy with one entry of the last layer (or of token 0, position 0) of a leaf moved."""

  def move(path, leaf):
    leaf = np.array(leaf)
    if path == name:
      part = leaf[-1:] if "layers" in path else leaf[:1]
      part.flat[0] += 0.1
    return leaf

  paths = list(named_leaves(params))
  leaves, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(structure, map(move, paths, leaves))


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_logits_equal_the_reference(name):
  config, params = ODD_SHAPES[name], make_params(ODD_SHAPES[name])
  batch = make_batch(make_tokens(config, length=12))
  expected = reference_activations(params, config, batch.tokens_BL)["logits"]
  assert expected.shape == (2, 11, config.vocab_size)
  assert relative_error(compute_logits(params, batch, config), expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_the_reference(family):
  config, params = FAMILIES[family], make_params(FAMILIES[family])
  tokens = make_tokens(config, length=12)
  batch = make_batch(tokens, PACKED_POSITIONS, PACKED_SEGMENTS)
  expected = reference_activations(
    params, config, batch.tokens_BL, PACKED_POSITIONS, PACKED_SEGMENTS
  )["logits"]
  assert relative_error(compute_logits(params, batch, config), expected) < TOLERANCE
  plain = compute_logits(params, make_batch(tokens), config)
  assert relative_error(plain, expected) > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_the_loss_equal_the_reference(family):
  config, params = FAMILIES[family], make_params(FAMILIES[family])
  batch = make_batch(make_tokens(config, length=12))
  expected = reference_activations(params, config, batch.tokens_BL)
  states, (loss_sum, weight_sum) = compute_layers_and_loss(params, batch, config)
  names = ["embedding", *(f"layers/{i}/output" for i in range(config.num_layers))]
  if config.final_norm:
    names[-1] = "final_norm"
  assert len(states) == len(names)
  for state, name in zip(states, names):
    assert relative_error(state, expected[name]) < TOLERANCE, name
  expected_loss = reference_loss(expected["logits"], batch.targets_BL, batch.weights_BL)
  assert loss_sum / weight_sum == pytest.approx(expected_loss, rel=TOLERANCE)
  assert weight_sum == batch.weights_BL.sum()


class Hyper:
  """What the objective reads of the hyperparameters."""

  z_loss = 0.0


def without_effect(config, name):
  """The bias of the keys adds one number to all scores of a query, unless it is rotated."""
  return name.endswith("key/bias") and config.positions == "learned"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_of_weight_matters(family):
  config, params = FAMILIES[family], make_params(FAMILIES[family])
  batch = make_batch(make_tokens(config, length=12))
  batch.tokens_BL[0, 0] = 0
  logits = compute_logits(params, batch, config)
  for name in named_leaves(params):
    wrong = reference_activations(perturb(params, name), config, batch.tokens_BL)["logits"]
    error = relative_error(logits, wrong)
    if without_effect(config, name):
      assert error < TOLERANCE, name
    else:
      assert error > 10 * TOLERANCE, name


@pytest.mark.parametrize("family", FAMILIES)
def test_each_choice_of_the_recipe_matters(family):
  """The comparison tells a family from its neighbours, not only right weights from wrong ones."""
  config, params = FAMILIES[family], make_params(FAMILIES[family])
  batch = make_batch(make_tokens(config, length=12))
  logits = compute_logits(params, batch, config)
  changes = [{"activation": "gelu" if config.activation == "gelu_tanh" else "gelu_tanh"}]
  changes += [{"norm_epsilon": 1e-3}, {"scale_attention_by_layer": True}]
  if config.positions == "rotary":
    other = {"interleaved": "halves", "halves": "interleaved"}[config.rotary_style]
    # With one pair, both styles are the same.
    changes += [{"rotary_style": other, "rotary_dim": 4}, {"rotary_base": 500.0, "rotary_dim": 4}]
    changes += [{"rotary_dim": config.rotary_dim + 2}]
  if "local" in config.attention_pattern:
    changes += [{"window_size": config.window_size + 1}, {"attention_pattern": ("local", "global")}]
  for change in changes:
    wrong = reference_activations(params, make_config(family, **change), batch.tokens_BL)["logits"]
    assert relative_error(logits, wrong) > 10 * TOLERANCE, change


def test_the_reference_names_every_activation_in_order():
  config = make_config("gptneox", num_layers=1)
  found = reference_activations(make_params(config), config, make_tokens(config))
  inner = ["attention_norm", "query", "key", "value", "rotated_query", "rotated_key", "mixed"]
  inner += ["attention", "mlp_norm", "mlp_up", "mlp", "output"]
  assert list(found) == ["embedding", *(f"layers/0/{n}" for n in inner), "final_norm", "logits"]
  assert all(array.dtype == np.float64 for array in found.values())
  config = make_config("gpt1", num_layers=1)
  found = reference_activations(make_params(config), config, make_tokens(config))
  inner = ["query", "key", "value", "mixed", "attention", "residual", "attention_norm", "mlp_up"]
  inner += ["mlp", "mlp_norm", "output"]
  assert list(found) == ["embedding", *(f"layers/0/{n}" for n in inner), "logits"]
  np.testing.assert_array_equal(found["layers/0/output"], found["layers/0/mlp_norm"])


def test_the_reference_matches_numbers_worked_out_by_hand():
  """One layer that adds nothing: logits are the normed embedding times the embedding."""
  config = make_config("gpt2", num_layers=1, vocab_size=3, model_dim=2, num_heads=1)
  params = jax.tree.map(np.zeros_like, make_params(config))
  decoder = params["decoder"]
  decoder["token_embedding"]["embedding"][:3] = [[3, 1], [0, 4], [1, 1]]
  decoder["final_norm"]["scale"][:] = [1, 2]
  logits = reference_activations(params, config, np.array([[0, 1]]))["logits"]
  # [3, 1] normed is [1, -1], [0, 4] is [-1, 1], up to the epsilon 1e-5; times the scale [1, 2].
  np.testing.assert_allclose(logits, [[[1, -8, -1], [-1, 8, 1]]], rtol=1e-5)
  expected_loss = np.log(np.exp([0, -9, -2]).sum()) + 9
  loss = reference_loss(logits[:, :1], np.array([[1]]))
  assert loss == pytest.approx(expected_loss, rel=1e-5)


def test_the_reference_loss_weighs_tokens():
  logits = np.log(np.array([[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]]))
  targets, weights = np.array([[0, 1, 1]]), np.array([[1.0, 0.0, 3.0]])
  expected = -(np.log(0.5) + 3 * np.log(0.8)) / 4
  assert reference_loss(logits + 700, targets, weights) == pytest.approx(expected, rel=1e-12)
