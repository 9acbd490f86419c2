"""Tiny models of every family at odd shapes, with NumPy weights in which everything matters."""

import numpy as np

from gptjax.batch import Batch
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import model_specs
from gptjax.tree import map_named

SIZES = {
  "vocab_size": 61,
  "vocab_multiple": 8,
  "context_length": 24,
  "num_layers": 2,
  "model_dim": 24,
  "num_heads": 3,
}
ROTARY = {"positions": "rotary", "parallel_residual": True, "tie_embeddings": False}
RECIPES = {
  "gpt1": {"norm_position": "post", "final_norm": False},
  "gpt2": {},
  "gpt3": {"attention_pattern": ("global", "local"), "window_size": 4},
  "gptj": ROTARY
  | {
    "shared_norm": True,
    "rotary_dim": 4,
    "rotary_style": "interleaved",
    "qkv_bias": False,
    "attention_output_bias": False,
    "head_bias": True,
  },
  "gptneo": {
    "attention_pattern": ("global", "local"),
    "window_size": 5,
    "attention_scale": "one",
    "qkv_bias": False,
  },
  "gptneox": ROTARY | {"rotary_dim": 2, "rotary_style": "halves", "activation": "gelu"},
}


def make_config(family, **changes) -> ModelConfig:
  """Returns a family's recipe at a tiny size."""
  return ModelConfig(family=family, **SIZES | RECIPES[family] | changes)


FAMILIES = {family: make_config(family) for family in RECIPES}
# Every shape that a reshape, a default or a mask could get wrong.
ODD_SHAPES = {
  **FAMILIES,
  "gpt1-one-layer": make_config("gpt1", num_layers=1, num_heads=4, vocab_size=64),
  "gpt2-wide-heads": make_config("gpt2", head_dim=10, ffw_dim=17, vocab_multiple=1),
  "gpt2-scaled-by-layer": make_config("gpt2", num_layers=3, scale_attention_by_layer=True),
  "gpt2-relu": make_config("gpt2", activation="relu", mlp_bias=False),
  "gpt2-without-biases": make_config(
    "gpt2", norm_bias=False, qkv_bias=False, attention_output_bias=False, mlp_bias=False
  ),
  "gpt2-mup": make_config("gpt2", mup_base_dim=8, attention_scale="head_dim"),
  "gpt2-silu": make_config("gpt2", activation="silu", norm_epsilon=1e-3, tie_embeddings=False),
  "gpt3-wide-window": make_config("gpt3", window_size=99, num_layers=4),
  "gpt3-window-of-one": make_config("gpt3", window_size=1),
  "gpt3-three-kinds": make_config(
    "gpt3", num_layers=6, attention_pattern=("local", "local", "global"), window_size=3
  ),
  "gptj-narrow-heads": make_config("gptj", head_dim=6, rotary_dim=None, num_layers=1),
  "gptneo-wide-window": make_config("gptneo", window_size=12, vocab_size=7),
  "gptneox-one-head": make_config(
    "gptneox", num_heads=1, rotary_dim=None, rotary_base=100.0, vocab_multiple=32
  ),
}
# What transformers has too, in shapes where its code takes other paths.
HF_CASES = {
  **{family: FAMILIES[family] for family in ("gpt1", "gpt2", "gptj", "gptneo", "gptneox")},
  "gpt1-one-layer": make_config("gpt1", num_layers=1, num_heads=4, vocab_size=64),
  "gpt2-narrow-mlp": make_config("gpt2", ffw_dim=17, vocab_multiple=1, num_heads=1),
  "gpt2-scaled-by-layer": make_config("gpt2", num_layers=3, scale_attention_by_layer=True),
  "gpt2-relu": make_config("gpt2", activation="relu", norm_epsilon=1e-3),
  "gptj-all-rotated": make_config("gptj", rotary_dim=None, num_heads=2, ffw_dim=40),
  "gptneo-wide-window": make_config("gptneo", window_size=99, num_layers=4, vocab_size=7),
  "gptneo-window-of-one": make_config("gptneo", window_size=1),
  "gptneox-all-rotated": make_config("gptneox", rotary_dim=None, num_layers=1, num_heads=2),
  "gptneox-other-base": make_config("gptneox", rotary_dim=6, rotary_base=100.0, num_heads=2),
}


def make_params(config, seed=0, gain=1.0):
  """Draws float32 NumPy weights: unit-scale activations, and biases and norms that are not trivial.

  Initial values of training would hide mistakes: their biases are 0, their norms 1, and their
  attention nearly uniform. Padded rows of the vocabulary are filled too.
  """
  rng = np.random.default_rng(seed)

  def draw(name, spec):
    noise = rng.standard_normal(spec.shape).astype(np.float32)
    if name.endswith("scale"):
      return 1 + noise / 4
    if name.endswith("bias"):
      return noise / 4
    fan_in = spec.shape[-2] if "layers" in name else spec.shape[-1]
    return gain * noise / np.float32(np.sqrt(fan_in))

  return map_named(draw, model_specs(config))


def make_tokens(config, num_rows=2, length=11, seed=1):
  """Draws int32 tokens [B, L] from the true vocabulary."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, config.vocab_size, (num_rows, length)).astype(np.int32)


def make_batch(tokens_BL, positions_BL=None, segment_ids_BL=None):
  """Wraps tokens [B, L + 1]: the next one is the target, and weights are uneven."""
  inputs, targets = tokens_BL[:, :-1], tokens_BL[:, 1:]
  weights = 1.0 + np.arange(inputs.size, dtype=np.float32).reshape(inputs.shape) % 3
  return Batch(inputs, targets, weights, positions_BL, segment_ids_BL)


def relative_error(got, expected):
  """Returns the norm of the difference over the norm of `expected`, in float64."""
  got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
  assert got.shape == expected.shape
  assert np.isfinite(got).all()
  return np.linalg.norm(got - expected) / (np.linalg.norm(expected) or 1.0)
