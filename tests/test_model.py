"""Properties of the decoder: causality, padding, scan and remat, sizes, first values."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import (
  FAMILIES,
  make_batch,
  make_config,
  make_params,
  make_tokens,
  relative_error,
)

from gptjax.errors import ConfigError
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import Decoder, hidden_states
from gptjax.model.heads import lm_logits
from gptjax.model.parameters import count_parameters, init_parameters, model_specs
from gptjax.train.step import LanguageModelObjective
from gptjax.tree import count_parameters as count_elements
from gptjax.tree import named_leaves

# The same float32 sums in another order.
SAME = 1e-6


@functools.partial(jax.jit, static_argnames="config")
def compute_hidden(params, batch, config, key=None):
  return hidden_states(params["decoder"], batch, config, key)


class Hyper:
  """What the objective reads of the hyperparameters."""

  z_loss = 0.0


@functools.partial(jax.jit, static_argnames="config")
def _loss_and_gradients(params, batch, config, key):
  def loss(params):
    total, sums = LanguageModelObjective(config)(params, batch, Hyper, key)
    return total["loss"] / sums["loss"][1]

  return jax.value_and_grad(loss)(params)


def compute_loss_and_gradients(params, batch, config, key=None):
  """Returns (loss in nats a token, its gradients)."""
  loss, gradients = _loss_and_gradients(params, batch, config, key)
  return float(loss), gradients


def assert_same(got, expected, tolerance):
  """Compares each array by the norm of its difference; a zero gradient must be zero."""
  got, expected = named_leaves(got), named_leaves(expected)
  assert got.keys() == expected.keys()
  # The gradient of a bias of keys is 0 but for rounding, so it is measured by the query's.
  for name, array in expected.items():
    scale = np.linalg.norm(expected.get(name.replace("key/bias", "query/bias")))
    difference = np.linalg.norm(np.asarray(got[name], np.float64) - array)
    assert difference <= tolerance * max(scale, np.linalg.norm(array)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_causality_at_every_position(family):
  """The Jacobian of hidden states by token embeddings is exactly lower triangular."""
  length = 9
  config = make_config(family, vocab_size=length, window_size=length)
  params = make_params(config)
  # Each place has its own token, so that the table's rows are the places.
  batch = make_batch(np.arange(length + 1, dtype=np.int32)[None])
  probe_DV = np.random.default_rng(2).standard_normal((config.model_dim, 3)).astype(np.float32)

  def probe(table_VD):
    decoder = params["decoder"] | {"token_embedding": {"embedding": table_VD}}
    return hidden_states(decoder, batch, config)[0] @ probe_DV

  table = params["decoder"]["token_embedding"]["embedding"]
  jacobian = np.asarray(jax.jit(jax.jacrev(probe))(jnp.asarray(table)))
  influence_LL = np.abs(jacobian[:, :, :length]).sum(axis=(1, 3))
  assert (influence_LL[np.triu_indices(length, 1)] == 0).all()
  assert (influence_LL[np.tril_indices(length)] > 1e-6).all()


def test_a_local_layer_reaches_its_window_and_no_further():
  length, window = 9, 3
  config = make_config(
    "gpt3", num_layers=1, attention_pattern=("local",), window_size=window, vocab_size=length
  )
  params = make_params(config)
  tokens = np.arange(length + 1, dtype=np.int32)[None]
  tokens[0, -1] = 0
  plain = compute_hidden(params, make_batch(tokens), config)
  for place in range(length):
    moved = jax.tree.map(np.copy, params)
    moved["decoder"]["token_embedding"]["embedding"][place] += np.arange(config.model_dim)
    changed = np.any(compute_hidden(moved, make_batch(tokens), config) != plain, axis=-1)[0]
    assert list(np.nonzero(changed)[0]) == list(range(place, min(place + window, length)))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_documents_alone(family):
  config, params = FAMILIES[family], make_params(FAMILIES[family])
  tokens = make_tokens(config, num_rows=1, length=13)
  bounds = [(0, 5), (5, 9), (9, 10)]
  segments, positions = np.zeros((2, 1, 12), np.int32)
  for number, (start, end) in enumerate(bounds):
    segments[0, start:end], positions[0, start:end] = number + 1, np.arange(end - start)
  packed = compute_hidden(params, make_batch(tokens, positions, segments), config)
  for start, end in bounds:
    # Alone in a row that goes on with other tokens, which causality hides: one shape for all.
    alone = compute_hidden(params, make_batch(np.roll(tokens, -start)), config)[:, : end - start]
    assert relative_error(packed[:, start:end], alone) < SAME
  other = tokens.copy()
  other[:, 10:] = (other[:, 10:] + 1) % config.vocab_size
  padded_otherwise = compute_hidden(params, make_batch(other, positions, segments), config)
  np.testing.assert_array_equal(padded_otherwise[:, :10], packed[:, :10])
  together = compute_hidden(params, make_batch(tokens), config)
  assert relative_error(together[:, 5:9], packed[:, 5:9]) > 1e-3


LAYOUTS = [
  {"scan_layers": True, "remat": "dots"},
  {"scan_layers": True, "remat": "full"},
  {"scan_layers": False, "remat": "none"},
  {"scan_layers": False, "remat": "full"},
]


@pytest.mark.parametrize("has_dropout", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scan_unrolled_and_remat_agree(has_dropout):
  """In loss and every gradient, and with dropout too: its draws depend on the layer alone."""
  rates = dict.fromkeys(DROPOUTS, 0.2 * has_dropout)
  layouts = [{"scan_layers": False, "remat": "dots"}] if has_dropout else LAYOUTS
  config = make_config("gpt3", num_layers=4, **rates)
  params, batch = make_params(config), make_batch(make_tokens(config))
  key = jax.random.key(3) if has_dropout else None
  loss, gradients = compute_loss_and_gradients(params, batch, config, key)
  assert math.isfinite(loss)
  for layout in layouts:
    other = dataclasses.replace(config, **layout)
    other_loss, other_gradients = compute_loss_and_gradients(params, batch, other, key)
    assert other_loss == pytest.approx(loss, rel=SAME), layout
    assert_same(other_gradients, gradients, 2 * SAME)


DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout")


@pytest.mark.parametrize("rate_name", DROPOUTS)
def test_each_dropout_acts_with_a_key_alone(rate_name):
  config = make_config("gpt2", **{rate_name: 0.1})
  params, batch = make_params(config), make_batch(make_tokens(config))
  plain = compute_hidden(params, batch, FAMILIES["gpt2"])
  np.testing.assert_array_equal(compute_hidden(params, batch, config), plain)
  first, again, other = (
    compute_hidden(params, batch, config, jax.random.key(seed)) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert relative_error(first, plain) > 1e-2
  assert relative_error(other, first) > 1e-2
  still = compute_hidden(params, batch, FAMILIES["gpt2"], jax.random.key(0))
  np.testing.assert_array_equal(still, plain)


@pytest.mark.slow
def test_bfloat16_is_near_float32():
  config, params = FAMILIES["gptj"], make_params(FAMILIES["gptj"])
  batch = make_batch(make_tokens(config))
  half = dataclasses.replace(config, compute_dtype="bfloat16")
  hidden = compute_hidden(params, batch, half)
  assert hidden.dtype == jnp.bfloat16
  # bfloat16 rounds by up to 0.4 %; two layers round some twenty times.
  exact = compute_hidden(params, batch, config)
  assert 1e-4 < relative_error(hidden.astype(np.float32), exact) < 3e-2
  loss, gradients = compute_loss_and_gradients(params, batch, half)
  exact_loss, exact_gradients = compute_loss_and_gradients(params, batch, config)
  assert loss == pytest.approx(exact_loss, rel=1e-2)
  assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float32")}
  assert_same(gradients, exact_gradients, 0.1)


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "gptj"])
def test_padded_vocabulary_is_never_predicted_and_learns_nothing(family):
  config = make_config(family, vocab_size=61, vocab_multiple=32)
  params, batch = make_params(config), make_batch(make_tokens(config))
  assert config.padded_vocab_size == 64
  loss, gradients = compute_loss_and_gradients(params, batch, config)
  logits = lm_logits(params, compute_hidden(params, batch, config), config)
  assert logits.shape[-1] == 61
  assert logits.dtype == jnp.float32
  for name, leaf in named_leaves(gradients).items():
    if leaf.shape[0] == 64:
      assert (leaf[61:] == 0).all(), name
      assert (np.abs(leaf[:61]) > 0).any(), name
  unpadded = make_config(family, vocab_size=61, vocab_multiple=1)
  cut = jax.tree.map(lambda leaf: leaf[:61] if leaf.shape[0] == 64 else leaf, params)
  assert compute_loss_and_gradients(cut, batch, unpadded)[0] == pytest.approx(loss, rel=SAME)


def test_the_linen_module_is_the_pure_function():
  for family in ("gpt1", "gptneox"):
    config, params = FAMILIES[family], make_params(FAMILIES[family])
    batch = make_batch(make_tokens(config))
    module = Decoder(config)
    pure = compute_hidden(params, batch, config)
    hidden = jax.jit(module.apply)({"params": params["decoder"]}, batch)
    assert hidden.shape == (2, 10, config.model_dim)
    np.testing.assert_array_equal(hidden, pure)
    made = jax.eval_shape(module.init, jax.random.key(0), batch)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(np.shape, params["decoder"])


def test_the_linen_module_initialises_and_drops():
  config = make_config("gpt2", residual_dropout=0.5)
  batch = make_batch(make_tokens(config))
  variables = jax.jit(Decoder(config).init)(jax.random.key(0), batch)
  scale = variables["params"]["layers"]["attention_norm"]["scale"]
  np.testing.assert_array_equal(scale, np.ones((2, config.model_dim)))
  kernel = variables["params"]["layers"]["mlp"]["up"]["kernel"]
  assert np.std(kernel) == pytest.approx(config.init_std, rel=0.05)

  @jax.jit
  def apply(key):
    return Decoder(config).apply(variables, batch, False, rngs={"dropout": key})

  first, again, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert relative_error(first, other) > 0.1


def gpt2_size(num_layers, model_dim, num_heads, **changes):
  sizes = {"vocab_size": 50257, "context_length": 1024} | changes
  return ModelConfig(num_layers=num_layers, model_dim=model_dim, num_heads=num_heads, **sizes)


gpt3_size = functools.partial(gpt2_size, context_length=2048)
GPT1_117M = gpt2_size(
  12, 768, 12, vocab_size=40478, context_length=512, norm_position="post", final_norm=False
)
GPTJ = {"shared_norm": True, "qkv_bias": False, "attention_output_bias": False, "head_bias": True}
ROTARY = {"positions": "rotary", "parallel_residual": True, "tie_embeddings": False}
GPTJ_6B = gpt3_size(28, 4096, 16, vocab_size=50400, rotary_dim=64, **ROTARY | GPTJ)
# FEATURES.md section 4.3; those of GPT-Neo and Pythia are what their cards on the hub say.
PUBLISHED = [
  ("gpt1", GPT1_117M, 116_534_784),
  ("gpt2", gpt2_size(12, 768, 12), 124_439_808),
  ("gpt2-medium", gpt2_size(24, 1024, 16), 354_823_168),
  ("gpt2-large", gpt2_size(36, 1280, 20), 774_030_080),
  ("gpt2-xl", gpt2_size(48, 1600, 25), 1_557_611_200),
  ("gpt3-small", gpt3_size(12, 768, 12), 125_226_240),
  ("gpt3-medium", gpt3_size(24, 1024, 16), 355_871_744),
  ("gpt3-large", gpt3_size(24, 1536, 16), 760_300_032),
  ("gpt3-xl", gpt3_size(24, 2048, 16), 1_315_723_264),
  ("gpt3-2.7b", gpt3_size(32, 2560, 32), 2_651_553_280),
  ("gpt3-6.7b", gpt3_size(32, 4096, 32), 6_658_404_352),
  ("gpt3-13b", gpt3_size(40, 5120, 40), 12_853_386_240),
  ("gpt3-175b", gpt3_size(96, 12288, 96), 174_604_259_328),
  ("gptj-6b", GPTJ_6B, 6_050_882_784),
  ("gptneo-1.3b", gpt3_size(24, 2048, 16, qkv_bias=False), 1_315_575_808),
  ("pythia-410m", gpt3_size(24, 1024, 16, vocab_size=50304, **ROTARY), 405_334_016),
]


@pytest.mark.parametrize(("name", "config", "count"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_parameter_counts_are_the_published_ones(name, config, count):
  assert count_parameters(config) == count
  padded = dataclasses.replace(config, vocab_multiple=128)
  assert count_parameters(padded) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_is_that_of_the_arrays(family):
  config = make_config(family, vocab_multiple=1)
  assert count_parameters(config) == count_elements(make_params(config))


def test_initial_values_are_gpt2s():
  config = make_config(
    "gpt2", model_dim=64, num_heads=4, num_layers=8, vocab_size=512, position_init_std=0.01
  )
  params = named_leaves(jax.jit(init_parameters, static_argnums=0)(config, jax.random.key(0)))
  for name, leaf in params.items():
    assert leaf.dtype == np.float32
    leaf = np.asarray(leaf)
    if name.endswith("scale"):
      assert (leaf == 1).all(), name
    elif name.endswith("bias"):
      assert (leaf == 0).all(), name
    else:
      std = 0.02
      if "output" in name or "down" in name:
        std /= math.sqrt(2 * 8)
      if "position" in name:
        std = 0.01
      # Five standard errors of a sample deviation, and of a mean.
      assert abs(leaf.std() / std - 1) < 5 / math.sqrt(2 * leaf.size), name
      assert abs(leaf.mean()) < 5 * std / math.sqrt(leaf.size), name
  kernels = [leaf for name, leaf in params.items() if name.endswith(("key/kernel", "query/kernel"))]
  assert abs(np.corrcoef(np.ravel(kernels[0]), np.ravel(kernels[1]))[0, 1]) < 0.03
  plain = dataclasses.replace(config, residual_init_scale=False)
  assert model_specs(plain)["decoder"]["layers"]["mlp"]["down"]["kernel"].std == 0.02


def test_a_parameters_values_do_not_depend_on_its_neighbours():
  tied, untied = (make_config("gpt2", tie_embeddings=tie) for tie in (True, False))
  init = jax.jit(init_parameters, static_argnums=0)
  first, second = (named_leaves(init(config, jax.random.key(0))) for config in (tied, untied))
  assert second.keys() - first.keys() == {"lm_head/kernel"}
  for name, leaf in first.items():
    np.testing.assert_array_equal(leaf, second[name])


@pytest.mark.parametrize(
  ("changes", "complaint"),
  [
    ({"num_heads": 5}, "model.model_dim 24 is not a multiple of model.num_heads 5"),
    ({"num_layers": 3, "attention_pattern": ("global", "local")}, "not a multiple of the 2 kinds"),
    ({"attention_pattern": ("banded",)}, "model.attention_pattern"),
    ({"positions": "rotary", "rotary_dim": 3}, "model.rotary_dim is 3; it must be even"),
    ({"positions": "rotary", "rotary_dim": 10}, "at most the head's width 8"),
    ({"shared_norm": True}, "needs model.parallel_residual"),
    ({"parallel_residual": True, "norm_position": "post"}, 'model.norm_position="pre"'),
    ({"head_bias": True}, "needs model.tie_embeddings=False"),
    ({"residual_dropout": 1.0}, r"model.residual_dropout is 1.0; it must be in \[0, 1\)"),
    ({"num_layers": 0}, "model.num_layers is 0; it must be at least 1"),
    ({"activation": "gelu_tan"}, 'did you mean "gelu_tanh"'),
    ({"compute_dtype": "float16"}, "model.compute_dtype"),
  ],
)
def test_impossible_models_are_refused(changes, complaint):
  with pytest.raises(ConfigError, match=complaint):
    make_config("gpt2", **changes)
