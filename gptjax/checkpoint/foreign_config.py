"""Other people's config.json, read into a ModelConfig.

Every field that changes the numbers is honoured or refused by name. Fields that do not are listed
in `config_fields`; what is neither has no effect in transformers either, and is reported.

Source of the fields, their defaults and their effect: the configuration and modelling code of
transformers 5 (and 4, whose names it still reads), nanoGPT and minGPT.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptjax.checkpoint.config_fields import Fields, read_json, spell
from gptjax.errors import CheckpointError, ConfigError, did_you_mean
from gptjax.model.config import ModelConfig

Report = Callable[[str], None]

# By what they compute. gelu_fast and gelu_accurate spell the tanh form with other parentheses.
_ACTIVATIONS = {
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_accurate": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_python_tanh": "gelu_tanh",
  "gelu": "gelu",
  "gelu_python": "gelu",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
}
# GPT-1's "gelu" is the tanh form.
_GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}

# Fields with one value that we compute, and why no other.
_REQUIRED = {
  "add_cross_attention": (False, "only decoders without cross-attention are supported"),
  "is_encoder_decoder": (False, "only decoders are supported"),
  "is_causal": (True, "only causal attention is supported"),
  "rotary": (True, "a GPT-J without rotary positions is not supported"),
  "quantization_config": (None, "quantised weights are not supported"),
  "per_layer_config": (None, "layers that differ in more than their window are not supported"),
  "pruned_heads": ({}, "pruned heads are not supported"),
}
CLASS_PREFIXES = {
  "gpt2": "GPT2",
  "openai-gpt": "OpenAIGPT",
  "gptj": "GPTJ",
  "gpt_neo": "GPTNeo",
  "gpt_neox": "GPTNeoX",
}
_CLASS_SUFFIXES = (
  "LMHeadModel",
  "ForCausalLM",
  "Model",
  "PreTrainedModel",
  "DoubleHeadsModel",
  "ForSequenceClassification",
  "ForTokenClassification",
  "ForQuestionAnswering",
)
# Of a generation_config.json: ids, where it is from, what is returned.
_NOT_DECODING = re.compile(
  r"_.*|.*_token_ids?|transformers_version|output_.*|.*return_.*|use_cache"
)
_GPT2_ALIASES = {
  "n_embd": "hidden_size",
  "n_positions": "max_position_embeddings",
  "n_head": "num_attention_heads",
  "n_layer": "num_hidden_layers",
}
# Other names that transformers takes for a field.
_ALIASES = {
  **dict.fromkeys(("gpt2", "openai-gpt", "gptj"), _GPT2_ALIASES),
  "gpt_neo": {"num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"},
  "gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
}


def read_foreign_config(path: str | os.PathLike, report: Report = print) -> ModelConfig:
  """Reads the config.json of a folder in the Hugging Face layout.

  Args:
    path: the folder.
    report: takes a line about each field that is passed over.

  Raises:
    CheckpointError: no such file, an unknown model_type, or a field that is not supported.
  """
  fields = read_json(Path(path) / "config.json")
  source = f'"{Path(path) / "config.json"}"'
  return make_model_config(_model_type(fields, source), fields, source, report)


def make_model_config(
  model_type: str, fields: Mapping[str, Any], source: str, report: Report = print
) -> ModelConfig:
  """Translates the fields of a foreign config.

  Args:
    model_type: transformers' name of the family, or "nanogpt" or "mingpt".
    fields: as stored; those that are absent have the family's defaults.
    source: names the config in messages.
    report: takes a line about each field that is passed over.

  Raises:
    CheckpointError: a field that is missing, of the wrong kind, or not supported.
  """
  if model_type not in _READERS:
    raise CheckpointError(
      f"{source}: model_type is {spell(model_type)}, which is not supported"
      + did_you_mean(model_type, CLASS_PREFIXES)
    )
  _check_code(model_type, fields, source)
  reader = Fields(fields, source, _ALIASES.get(model_type, {}))
  for name, (value, reason) in _REQUIRED.items():
    given = reader.take(name, value, object)
    if given != value and (given or value):
      reader.refuse(name, given, reason)
  try:
    config = ModelConfig(**_READERS[model_type](reader))
  except ConfigError as error:
    raise CheckpointError(f"{source} contradicts itself: {error}") from error
  unread = reader.unread()
  if unread:
    shown = ", ".join(ascii(name)[1:-1] for name in unread[:10])
    more = f" and {len(unread) - 10} more" if len(unread) > 10 else ""
    report(f"{source}: fields that have no effect on this model: {shown}{more}")
  return config


def read_token_ids(
  path: str | os.PathLike, vocab_size: int, report: Report = print
) -> dict[str, tuple[int, ...]]:
  """Reads the default special ids of a Hugging Face folder.

  Returns:
    {"bos", "eos", "pad": ids}; generation_config.json goes before config.json. Ids out of the
    vocabulary are left out and reported, as are decoding options, which are not taken from files.
  """
  generation = Path(path) / "generation_config.json"
  files = [read_json(generation)] if generation.is_file() else []
  for file in files:
    options = {
      k: v for k, v in file.items() if v not in (None, False) and not _NOT_DECODING.fullmatch(k)
    }
    if options:
      report(
        f'"{generation}" asks for {spell(options)}; decoding options are not taken from files, so'
        " give them to generate"
      )
  files.append(read_json(Path(path) / "config.json"))
  found = {}
  for name in ("bos", "eos", "pad"):
    key = f"{name}_token_id"
    given = next((file[key] for file in files if file.get(key) is not None), ())
    ids = tuple(given) if isinstance(given, list | tuple) else (given,)
    found[name] = tuple(i for i in ids if type(i) is int and 0 <= i < vocab_size)
    if found[name] != ids:
      report(f'"{path}": {key} is {spell(given)}, out of the vocabulary of {vocab_size}; ignored')
  return found


def _model_type(fields: Mapping[str, Any], source: str) -> str:
  """Returns model_type; the oldest configs have only the class of their model."""
  if isinstance(fields.get("model_type"), str):
    return fields["model_type"]
  classes = _class_names(fields)
  for model_type, prefix in sorted(CLASS_PREFIXES.items(), key=lambda item: -len(item[1])):
    if any(name.startswith(prefix) for name in classes):
      return model_type
  if "afn" in fields:
    return "openai-gpt"
  # As OpenAI's GPT-2 was published at first.
  if {"n_ctx", "n_embd", "n_head", "n_layer"} <= fields.keys() and "rotary_dim" not in fields:
    return "gpt2"
  raise CheckpointError(
    f"{source} has no model_type; write one of {', '.join(CLASS_PREFIXES)} into it"
  )


def _check_code(model_type: str, fields: Mapping[str, Any], source: str) -> None:
  """Refuses models that bring code, and classes that are not this family's."""
  code = fields.get("auto_map")
  if isinstance(code, dict) and any(name.startswith("AutoModel") for name in code):
    raise CheckpointError(
      f"{source}: auto_map is {spell(code)}; a model with code of its own is not supported"
    )
  if model_type in CLASS_PREFIXES:
    prefix = CLASS_PREFIXES[model_type]
    for name in _class_names(fields):
      if name not in [prefix + suffix for suffix in _CLASS_SUFFIXES]:
        raise CheckpointError(
          f"{source}: architectures has {spell(name)}, which is no known {model_type};"
          f" supported are {prefix}{lm_class_suffix(model_type)} and the like"
        )


def _class_names(fields: Mapping[str, Any]) -> list[str]:
  names = fields.get("architectures")
  names = names if isinstance(names, list) else [names] if names else []
  return [str(name).removeprefix("Flax").removeprefix("TF") for name in names]


def lm_class_suffix(model_type: str) -> str:
  """Returns how transformers ends the name of a family's language model."""
  return "LMHeadModel" if model_type in ("gpt2", "openai-gpt") else "ForCausalLM"


def _read_gpt2_sizes(fields: Fields, defaults: tuple[int, ...]) -> dict[str, Any]:
  """Reads what GPT-1, GPT-2 and GPT-J name alike."""
  vocab_size, context_length, model_dim, num_layers, num_heads = defaults
  std = fields.take("initializer_range", 0.02, float, least=0)
  return {
    "vocab_size": fields.size("vocab_size", vocab_size),
    "context_length": _read_context(fields, context_length),
    "model_dim": fields.size("n_embd", model_dim),
    "num_layers": fields.size("n_layer", num_layers),
    "num_heads": fields.size("n_head", num_heads),
    "norm_epsilon": fields.take("layer_norm_epsilon", 1e-5, float, least=0),
    "init_std": std,
    "position_init_std": std,
  }


def _read_context(fields: Fields, default: int) -> int:
  """Reads n_positions; n_ctx, which beside it has no effect, is all that OpenAI's files have."""
  is_named = fields.has("n_positions") or fields.has("max_position_embeddings")
  return fields.size("n_positions", default) if is_named else fields.size("n_ctx", default)


def _read_gpt2_dropout(fields: Fields, default: float) -> dict[str, Any]:
  return {
    "embedding_dropout": fields.take("embd_pdrop", default, float),
    "attention_dropout": fields.take("attn_pdrop", default, float),
    "residual_dropout": fields.take("resid_pdrop", default, float),
  }


def _read_gpt2(fields: Fields) -> dict[str, Any]:
  # Honoured by being so: scores and softmax are float32 whatever the compute dtype.
  fields.take("reorder_and_upcast_attn", False, bool)
  return (
    {"family": "gpt2"}
    | _read_gpt2_sizes(fields, (50257, 1024, 768, 12, 12))
    | _read_gpt2_dropout(fields, 0.1)
    | {
      "ffw_dim": fields.take("n_inner", None, int, least=1),
      "activation": fields.choose("activation_function", "gelu_new", _ACTIVATIONS),
      "attention_scale": _attention_scale(fields.take("scale_attn_weights", True, bool)),
      "scale_attention_by_layer": fields.take("scale_attn_by_inverse_layer_idx", False, bool),
      "tie_embeddings": fields.take("tie_word_embeddings", True, bool),
    }
  )


def _attention_scale(is_scaled: bool) -> str:
  return "sqrt_head_dim" if is_scaled else "one"


def _read_gpt1(fields: Fields) -> dict[str, Any]:
  return (
    {"family": "gpt1", "norm_position": "post", "final_norm": False, "residual_init_scale": False}
    | _read_gpt2_sizes(fields, (40478, 512, 768, 12, 12))
    | _read_gpt2_dropout(fields, 0.1)
    | {
      "activation": fields.choose("afn", "gelu", _GPT1_ACTIVATIONS),
      "tie_embeddings": fields.take("tie_word_embeddings", True, bool),
    }
  )


def _read_gptj(fields: Fields) -> dict[str, Any]:
  # In their config.json, and without effect in their code.
  fields.take("scale_attn_weights", True, bool)
  if fields.take("tie_word_embeddings", False, bool):
    fields.refuse("tie_word_embeddings", True, "a GPT-J's head, which has a bias, is never tied")
  return (
    {"family": "gptj", "positions": "rotary", "rotary_style": "interleaved"}
    | {"parallel_residual": True, "shared_norm": True, "tie_embeddings": False, "head_bias": True}
    | {"qkv_bias": False, "attention_output_bias": False}
    | _read_gpt2_sizes(fields, (50400, 2048, 4096, 28, 16))
    | _read_gpt2_dropout(fields, 0.0)
    | {
      "rotary_dim": fields.size("rotary_dim", 64),
      "ffw_dim": fields.take("n_inner", None, int, least=1),
      "activation": fields.choose("activation_function", "gelu_new", _ACTIVATIONS),
    }
  )


def _read_gpt_neo(fields: Fields) -> dict[str, Any]:
  std = fields.take("initializer_range", 0.02, float, least=0)
  num_layers = fields.size("num_layers", 24)
  return {
    "family": "gpt_neo",
    "attention_scale": "one",
    "qkv_bias": False,
    "vocab_size": fields.size("vocab_size", 50257),
    "context_length": fields.size("max_position_embeddings", 2048),
    "model_dim": fields.size("hidden_size", 2048),
    "num_layers": num_layers,
    "num_heads": fields.size("num_heads", 16),
    "ffw_dim": fields.take("intermediate_size", None, int, least=1),
    "attention_pattern": _period(_read_attention_layers(fields, num_layers)),
    "window_size": fields.size("window_size", 256),
    "activation": fields.choose("activation_function", "gelu_new", _ACTIVATIONS),
    "norm_epsilon": fields.take("layer_norm_epsilon", 1e-5, float, least=0),
    "embedding_dropout": fields.take("embed_dropout", 0.0, float),
    "attention_dropout": fields.take("attention_dropout", 0.0, float),
    "residual_dropout": fields.take("resid_dropout", 0.0, float),
    "tie_embeddings": fields.take("tie_word_embeddings", True, bool),
    "init_std": std,
    "position_init_std": std,
  }


def _read_attention_layers(fields: Fields, num_layers: int) -> list[str]:
  """Returns the kind of each layer: attention_layers, or attention_types written out."""
  types = fields.take("attention_types", [[["global", "local"], 12]], list)
  layers = fields.take("attention_layers", None, list)
  try:
    is_long = sum(len(kinds) * repeats for kinds, repeats in types) > num_layers
    written_out = [] if is_long else [k for kinds, repeats in types for k in kinds * repeats]
  except (TypeError, ValueError):
    fields.refuse("attention_types", types, 'it must be like [[["global", "local"], 12]]')
  name, given = "attention_types", types
  if layers is None:
    layers = written_out
  elif fields.has("attention_types") and layers != written_out:
    fields.refuse("attention_layers", layers, f"attention_types is {spell(types)}")
  else:
    name, given = "attention_layers", layers
  if len(layers) != num_layers:
    fields.refuse(name, given, f"it must be for {num_layers} layers")
  if not {"global", "local"}.issuperset(map(str, layers)):
    fields.refuse(name, given, 'supported are "global" and "local"')
  return layers


def _period(kinds: list[str]) -> tuple[str, ...]:
  """Returns the shortest pattern that, repeated, is the whole."""
  count = len(kinds)
  divisors = (n for n in range(1, count + 1) if count % n == 0)
  return tuple(next(kinds[:n] for n in divisors if kinds[:n] * (count // n) == kinds))


def _read_gpt_neox(fields: Fields) -> dict[str, Any]:
  model_dim = fields.size("hidden_size", 6144)
  num_heads = fields.size("num_attention_heads", 64)
  has_bias = fields.take("attention_bias", True, bool)
  hidden_dropout = fields.take("hidden_dropout", 0.0, float)
  head_dim = model_dim // num_heads
  if fields.take("head_dim", None, int) not in (None, head_dim):
    fields.refuse("head_dim", fields.take("head_dim", None, int), f"it can only be {head_dim}")
  return {
    "family": "gpt_neox",
    "positions": "rotary",
    "rotary_style": "halves",
    "vocab_size": fields.size("vocab_size", 50432),
    "context_length": fields.size("max_position_embeddings", 2048),
    "model_dim": model_dim,
    "num_layers": fields.size("num_hidden_layers", 44),
    "num_heads": num_heads,
    "ffw_dim": fields.size("intermediate_size", 24576),
    "activation": fields.choose("hidden_act", "gelu", _ACTIVATIONS),
    "norm_epsilon": fields.take("layer_norm_eps", 1e-5, float, least=0),
    "parallel_residual": fields.take("use_parallel_residual", True, bool),
    "qkv_bias": has_bias,
    "attention_output_bias": has_bias,
    "embedding_dropout": hidden_dropout,
    "attention_dropout": fields.take("attention_dropout", 0.0, float),
    "residual_dropout": hidden_dropout,
    "tie_embeddings": fields.take("tie_word_embeddings", False, bool),
    "init_std": fields.take("initializer_range", 0.02, float, least=0),
  } | _read_rotary(fields, head_dim)


def _read_rotary(fields: Fields, head_dim: int) -> dict[str, Any]:
  """Reads transformers 5's rope_parameters and the names that 4 had for the same."""
  rope = fields.take("rope_scaling", None, dict) or fields.take("rope_parameters", None, dict) or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  strange = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
  if kind != "default" or strange:
    fields.refuse("rope_parameters", rope, 'only rope_type "default" is supported')
  base = _read_rotary_field(fields, rope, "rotary_emb_base", "rope_theta", 10_000.0)
  factor = _read_rotary_field(fields, rope, "rotary_pct", "partial_rotary_factor", 0.25)
  rotary_dim = int(head_dim * factor)
  if rotary_dim < 2:
    fields.refuse("rotary_pct", factor, "it rotates no pair of entries")
  return {"rotary_dim": rotary_dim, "rotary_base": base}


def _read_rotary_field(fields: Fields, rope: dict, old: str, new: str, default: float) -> float:
  outer = fields.take(old, None, float, least=1e-6)
  inner = fields.within(rope).take(new, None, float, least=1e-6)
  if None not in (outer, inner) and outer != inner:
    fields.refuse(old, outer, f"rope_parameters says {spell(inner)}")
  given = [value for value in (inner, outer) if value is not None]
  return given[0] if given else default


def _read_nanogpt(fields: Fields) -> dict[str, Any]:
  has_bias = fields.take("bias", True, bool)
  dropout = fields.take("dropout", 0.0, float)
  return {
    "family": "gpt2",
    # nn.GELU(), the exact form, although the weights it starts from had the other.
    "activation": "gelu",
    "vocab_size": fields.size("vocab_size", 50304),
    "context_length": fields.size("block_size"),
    "model_dim": fields.size("n_embd"),
    "num_layers": fields.size("n_layer"),
    "num_heads": fields.size("n_head"),
    **dict.fromkeys(("norm_bias", "qkv_bias", "attention_output_bias", "mlp_bias"), has_bias),
    **dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"), dropout),
  }


def _read_mingpt(fields: Fields) -> dict[str, Any]:
  fields.take("B", None, int)  # rows of the recorded batch
  return {
    "family": "gpt2",
    "vocab_size": fields.size("vocab_size"),
    "context_length": fields.size("block_size"),
    "model_dim": fields.size("n_embd"),
    "num_layers": fields.size("n_layer"),
    "num_heads": fields.size("n_head"),
    "tie_embeddings": False,
  } | _read_gpt2_dropout(fields, 0.1)


_READERS = {
  "gpt2": _read_gpt2,
  "openai-gpt": _read_gpt1,
  "gptj": _read_gptj,
  "gpt_neo": _read_gpt_neo,
  "gpt_neox": _read_gpt_neox,
  "nanogpt": _read_nanogpt,
  "mingpt": _read_mingpt,
}
