"""Our config as a config.json with which transformers computes the same numbers."""

import dataclasses
import math
from typing import Any

from gptjax.checkpoint.foreign_config import CLASS_PREFIXES, lm_class_suffix
from gptjax.errors import CheckpointError
from gptjax.model.config import ModelConfig

_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}
# GPT-1's "gelu" is the tanh form, and it has no exact one.
_GPT1_ACTIVATIONS = {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}
# Which biases an architecture of transformers always has; where ours has none, zeros are written.
_BIASES = {
  "gpt2": ("norm_bias", "qkv_bias", "attention_output_bias", "mlp_bias"),
  "openai-gpt": ("norm_bias", "qkv_bias", "attention_output_bias", "mlp_bias"),
  "gptj": ("norm_bias", "mlp_bias", "head_bias"),
  "gpt_neo": ("norm_bias", "attention_output_bias", "mlp_bias"),
  "gpt_neox": ("norm_bias", "mlp_bias"),
}
_MODEL_TYPES = {
  "gpt2": "gpt2",
  "gpt3": "gpt2",
  "gpt1": "openai-gpt",
  "gptj": "gptj",
  "gptneo": "gpt_neo",
  "gptneox": "gpt_neox",
}
_LEARNED = {
  "norm_position": "pre",
  "final_norm": True,
  "positions": "learned",
  "parallel_residual": False,
  "head_bias": False,
  "mup_base_dim": None,
}
_ROTARY = {
  "norm_position": "pre",
  "final_norm": True,
  "positions": "rotary",
  "attention_scale": "sqrt_head_dim",
  "scale_attention_by_layer": False,
  "mup_base_dim": None,
}
_DEMANDS = {
  "gpt2": _LEARNED,
  "openai-gpt": _LEARNED
  | {
    "norm_position": "post",
    "final_norm": False,
    "attention_scale": "sqrt_head_dim",
    "scale_attention_by_layer": False,
  },
  "gptj": _ROTARY
  | {
    "rotary_style": "interleaved",
    "rotary_base": 10_000.0,
    "parallel_residual": True,
    "shared_norm": True,
    "qkv_bias": False,
    "attention_output_bias": False,
    "tie_embeddings": False,
  },
  "gpt_neo": _LEARNED
  | {"attention_scale": "one", "scale_attention_by_layer": False, "qkv_bias": False},
  "gpt_neox": _ROTARY | {"rotary_style": "halves", "shared_norm": False, "head_bias": False},
}


def write_foreign_config(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields of a config.json with which transformers computes the same numbers.

  The architecture is that of the config's family, or the first of transformers' that computes
  what the config says. Special token ids are null.

  Raises:
    CheckpointError: transformers cannot compute it; the field in its way is named.
  """
  model_type = find_model_type(config)
  activations = _GPT1_ACTIVATIONS if model_type == "openai-gpt" else _ACTIVATIONS
  common = {
    "model_type": model_type,
    "architectures": [CLASS_PREFIXES[model_type] + lm_class_suffix(model_type)],
    "vocab_size": config.vocab_size,
    "tie_word_embeddings": config.tie_embeddings,
    "initializer_range": config.init_std,
    "bos_token_id": None,
    "eos_token_id": None,
  }
  return common | _WRITERS[model_type](config, activations[config.activation])


def find_model_type(config: ModelConfig) -> str:
  """Names the architecture of transformers that computes what a config says.

  Raises:
    CheckpointError: there is none; the field in the way of its own family is named.
  """
  own = _MODEL_TYPES.get(config.family.replace("_", ""), "gpt2")
  for model_type in (own, *_MODEL_TYPES.values()):
    if _first_misfit(config, model_type) is None:
      return model_type
  raise CheckpointError(
    f"transformers cannot compute this model: {_first_misfit(config, own)} in its {own};"
    " keep it as a gptjax run"
  )


def with_written_biases(config: ModelConfig) -> ModelConfig:
  """Returns a config with the biases that transformers' architecture has in any case."""
  biases = dict.fromkeys(_BIASES[find_model_type(config)], True)
  return dataclasses.replace(config, **biases)


def _first_misfit(config: ModelConfig, model_type: str) -> str | None:
  """Says the first field that an architecture of transformers does not have as we do."""
  demands = dict(_DEMANDS[model_type])
  if model_type == "openai-gpt":
    demands["ffw_width"] = 4 * config.model_dim
  if model_type == "gpt_neox":
    demands["attention_output_bias"] = config.qkv_bias
  if model_type != "gpt_neo" and config.window_size < config.context_length:
    demands["attention_pattern"] = ("global",) * len(config.attention_pattern)
  if config.attention_scale == "head_dim":
    demands["attention_scale"] = "sqrt_head_dim"
  demands["attention_dim"] = config.model_dim
  for name, demanded in demands.items():
    if getattr(config, name) != demanded:
      return f"model.{name} is {getattr(config, name)!r}, and {demanded!r}"
  if model_type == "openai-gpt" and config.activation not in _GPT1_ACTIVATIONS:
    return f"model.activation is {config.activation!r}, and 'gelu_tanh', 'relu' or 'silu'"
  return None


def _gpt2_fields(config: ModelConfig) -> dict[str, Any]:
  """Returns what GPT-1, GPT-2 and GPT-J name alike."""
  return {
    "n_positions": config.context_length,
    "n_embd": config.model_dim,
    "n_layer": config.num_layers,
    "n_head": config.num_heads,
    "layer_norm_epsilon": config.norm_epsilon,
    "embd_pdrop": config.embedding_dropout,
    "attn_pdrop": config.attention_dropout,
    "resid_pdrop": config.residual_dropout,
  }


def _write_gpt2(config: ModelConfig, activation: str) -> dict[str, Any]:
  return _gpt2_fields(config) | {
    "n_inner": config.ffw_dim,
    "activation_function": activation,
    "scale_attn_weights": config.attention_scale == "sqrt_head_dim",
    "scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer,
  }


def _write_gpt1(config: ModelConfig, activation: str) -> dict[str, Any]:
  return _gpt2_fields(config) | {"afn": activation}


def _write_gptj(config: ModelConfig, activation: str) -> dict[str, Any]:
  return _gpt2_fields(config) | {
    "n_inner": config.ffw_dim,
    "activation_function": activation,
    "rotary_dim": config.rotated_dim,
  }


def _write_gpt_neo(config: ModelConfig, activation: str) -> dict[str, Any]:
  pattern = list(config.attention_pattern)
  repeats = config.num_layers // len(pattern)
  return {
    "max_position_embeddings": config.context_length,
    "hidden_size": config.model_dim,
    "num_layers": config.num_layers,
    "num_heads": config.num_heads,
    "intermediate_size": config.ffw_dim,
    "attention_types": [[pattern, repeats]],
    "attention_layers": pattern * repeats,
    "window_size": config.window_size,
    "activation_function": activation,
    "layer_norm_epsilon": config.norm_epsilon,
    "embed_dropout": config.embedding_dropout,
    "attention_dropout": config.attention_dropout,
    "resid_dropout": config.residual_dropout,
  }


def _write_gpt_neox(config: ModelConfig, activation: str) -> dict[str, Any]:
  factor = config.rotated_dim / config.head_width
  # They round their product down.
  if int(config.head_width * factor) < config.rotated_dim:
    factor = math.nextafter(factor, 2.0)
  return {
    "max_position_embeddings": config.context_length,
    "hidden_size": config.model_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "intermediate_size": config.ffw_width,
    "hidden_act": activation,
    "layer_norm_eps": config.norm_epsilon,
    "use_parallel_residual": config.parallel_residual,
    "attention_bias": config.qkv_bias,
    "attention_dropout": config.attention_dropout,
    "hidden_dropout": config.residual_dropout,
    # By the names of transformers 4 too, which llama.cpp and vLLM read.
    "rotary_pct": factor,
    "rotary_emb_base": config.rotary_base,
    "rope_parameters": {
      "rope_type": "default",
      "rope_theta": config.rotary_base,
      "partial_rotary_factor": factor,
    },
  }


_WRITERS = {
  "gpt2": _write_gpt2,
  "openai-gpt": _write_gpt1,
  "gptj": _write_gptj,
  "gpt_neo": _write_gpt_neo,
  "gpt_neox": _write_gpt_neox,
}
