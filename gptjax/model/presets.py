"""Every published size of the family, by name.

Sources: GPT-1: Radford et al. 2018, section 4.1. GPT-2: Radford et al. 2019, table 2, and the
released code. GPT-3: Brown et al. 2020, table 2.1, with two rows as table D.1's parameter counts
show they were: XL has 16 heads (2.1 prints 24) and 13B has width 5120 (2.1 prints 5140). GPT-J,
GPT-Neo, GPT-NeoX and Pythia: the config.json of the released checkpoints. Imports no jax.
"""

import dataclasses

from gptjax.errors import ConfigError, did_you_mean
from gptjax.model.config import ModelConfig

_DROPOUT = {"embedding_dropout": 0.1, "attention_dropout": 0.1, "residual_dropout": 0.1}

_GPT1 = ModelConfig(
  family="gpt1",
  vocab_size=40_478,
  context_length=512,
  norm_position="post",
  final_norm=False,
  residual_init_scale=False,
  **_DROPOUT,
)
_GPT2 = ModelConfig(family="gpt2", vocab_size=50_257, context_length=1024)
_GPT3 = ModelConfig(
  family="gpt3", vocab_size=50_257, context_length=2048, attention_pattern=("global", "local")
)
_GPTJ = ModelConfig(
  family="gptj",
  vocab_size=50_400,
  context_length=2048,
  num_layers=28,
  model_dim=4096,
  num_heads=16,
  positions="rotary",
  rotary_dim=64,
  rotary_style="interleaved",
  parallel_residual=True,
  shared_norm=True,
  qkv_bias=False,
  attention_output_bias=False,
  tie_embeddings=False,
  head_bias=True,
)
_GPT_NEO = ModelConfig(
  family="gpt_neo",
  vocab_size=50_257,
  context_length=2048,
  attention_pattern=("global", "local"),
  window_size=256,
  attention_scale="one",
  qkv_bias=False,
)
_GPT_NEOX = ModelConfig(
  family="gpt_neox",
  vocab_size=50_304,
  context_length=2048,
  activation="gelu",
  positions="rotary",
  rotary_style="halves",
  parallel_residual=True,
  tie_embeddings=False,
)


def _sized(base: ModelConfig, num_layers: int, model_dim: int, num_heads: int, **more):
  sizes = {"num_layers": num_layers, "model_dim": model_dim, "num_heads": num_heads}
  return dataclasses.replace(base, **sizes, **more)


def _neox(num_layers: int, model_dim: int, num_heads: int, **more):
  quarter = model_dim // num_heads // 4
  return _sized(_GPT_NEOX, num_layers, model_dim, num_heads, rotary_dim=quarter, **more)


PRESETS: dict[str, ModelConfig] = {
  "gpt1": _GPT1,
  "gpt2": _GPT2,
  "gpt2-medium": _sized(_GPT2, 24, 1024, 16),
  "gpt2-large": _sized(_GPT2, 36, 1280, 20),
  "gpt2-xl": _sized(_GPT2, 48, 1600, 25),
  "gpt3-small": _sized(_GPT3, 12, 768, 12),
  "gpt3-medium": _sized(_GPT3, 24, 1024, 16),
  "gpt3-large": _sized(_GPT3, 24, 1536, 16),
  "gpt3-xl": _sized(_GPT3, 24, 2048, 16),
  "gpt3-2.7b": _sized(_GPT3, 32, 2560, 32),
  "gpt3-6.7b": _sized(_GPT3, 32, 4096, 32),
  "gpt3-13b": _sized(_GPT3, 40, 5120, 40),
  "gpt3-175b": _sized(_GPT3, 96, 12288, 96),
  "gptj-6b": _GPTJ,
  "gpt-neo-125m": _sized(_GPT_NEO, 12, 768, 12),
  "gpt-neo-1.3b": _sized(_GPT_NEO, 24, 2048, 16),
  "gpt-neo-2.7b": _sized(_GPT_NEO, 32, 2560, 20),
  "gpt-neox-20b": _neox(44, 6144, 64, vocab_size=50_432, activation="gelu_tanh"),
  "pythia-70m": _neox(6, 512, 8),
  "pythia-160m": _neox(12, 768, 12),
  "pythia-410m": _neox(24, 1024, 16),
  "pythia-1b": _neox(16, 2048, 8),
  "pythia-1.4b": _neox(24, 2048, 16),
  "pythia-2.8b": _neox(32, 2560, 32),
  "pythia-6.9b": _neox(32, 4096, 32, vocab_size=50_432),
  "pythia-12b": _neox(36, 5120, 40, vocab_size=50_688),
}


def mup(config: ModelConfig, base_dim: int) -> ModelConfig:
  """Returns a config in muP: whatever its width, it trains best at the rates of model_dim base_dim.

  At that width it differs from the standard one in the scale of attention alone.
  """
  return dataclasses.replace(config, mup_base_dim=base_dim, attention_scale="head_dim")


def preset(name: str) -> ModelConfig:
  """Returns a published size. Raises ConfigError, with the nearest name, if there is none."""
  if name not in PRESETS:
    raise ConfigError(f'unknown preset "{name}"{did_you_mean(name, PRESETS)}')
  return PRESETS[name]
