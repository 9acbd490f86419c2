"""LoRA: nothing at first, then a product of low rank; what is frozen stays, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import make_config, make_params

from gptjax.batch import Batch
from gptjax.errors import ConfigError
from gptjax.model.lora import lora_specs, merge_lora
from gptjax.model.parameters import init_specs
from gptjax.train.config import OptimizerConfig
from gptjax.train.optimizer import hyperparameters
from gptjax.train.schedule import Durations
from gptjax.train.step import LanguageModelObjective, init_state, make_train_step
from gptjax.tree import join_named, named_leaves, split_named

CONFIG = make_config("gpt2")
PATTERN = "attention/(query|value)"


def test_the_chosen_kernels_get_two_factors():
  specs = named_leaves(lora_specs(CONFIG, PATTERN, rank=3))
  assert {name: spec.shape for name, spec in specs.items()} == {
    "layers/attention/query/a": (2, 24, 3),
    "layers/attention/query/b": (2, 3, 24),
    "layers/attention/value/a": (2, 24, 3),
    "layers/attention/value/b": (2, 3, 24),
  }


def test_a_pattern_without_a_kernel_is_refused_with_all_of_them():
  with pytest.raises(ConfigError, match="decoder/layers/mlp/down/kernel"):
    lora_specs(CONFIG, "attention/querry", rank=3)


def test_merging_adds_the_scaled_product_to_those_kernels_alone():
  params = make_params(CONFIG)
  lora = init_specs(lora_specs(CONFIG, PATTERN, rank=3), jax.random.key(0))
  at_first = merge_lora(params | {"lora": lora}, 2.0)
  assert "lora" not in at_first
  for name, leaf in named_leaves(params).items():
    np.testing.assert_array_equal(named_leaves(at_first)[name], leaf)
  factors = lora["layers"]["attention"]["query"]
  factors["b"] = factors["b"] + 0.5
  merged = merge_lora(params | {"lora": lora}, 2.0)
  query = params["decoder"]["layers"]["attention"]["query"]["kernel"]
  expected = query + 2.0 * np.asarray(factors["a"]) @ np.full((2, 3, 24), 0.5)
  got = merged["decoder"]["layers"]["attention"]["query"]["kernel"]
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  same = merged["decoder"]["layers"]["attention"]["key"]["kernel"]
  assert same is params["decoder"]["layers"]["attention"]["key"]["kernel"]
  assert merge_lora(params, 2.0) is params


def test_a_tree_is_parted_and_joined_by_paths():
  params = make_params(CONFIG)
  trained, frozen = split_named(params, "embedding$")
  assert len(named_leaves(frozen)) == 2
  assert not named_leaves(trained).keys() & named_leaves(frozen).keys()
  joined = join_named(trained, frozen)
  assert named_leaves(joined).keys() == named_leaves(params).keys()
  whole, nothing = split_named(params, "")
  assert named_leaves(whole).keys() == named_leaves(params).keys()
  assert not named_leaves(nothing)


def test_frozen_parameters_have_no_moments_and_do_not_move():
  optimizer = OptimizerConfig(frozen_pattern="embedding|norm", warmup_steps=0)
  hyper = hyperparameters(optimizer, Durations(10, 0, 10))
  state = init_state(make_params(CONFIG), optimizer, hyper, jax.random.key(0))
  moments = [name for name in named_leaves(state.opt_state) if "embedding" in name]
  assert not moments
  step = make_train_step(LanguageModelObjective(CONFIG), optimizer)
  rng = np.random.default_rng(0)
  tokens_ABL = jnp.asarray(rng.integers(0, 61, (1, 2, 9)), jnp.int32)
  inputs = tokens_ABL[..., :-1]
  batch = Batch(inputs, tokens_ABL[..., 1:], jnp.ones_like(inputs, jnp.float32))
  after, metrics = jax.jit(lambda state, batch: step(state, batch, axis_name=None))(state, batch)
  assert np.isfinite(metrics["train_loss"])
  for name, leaf in named_leaves(after.params).items():
    is_same = np.array_equal(leaf, named_leaves(state.params)[name])
    assert is_same == ("embedding" in name or "norm" in name), name
