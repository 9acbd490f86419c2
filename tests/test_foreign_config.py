"""Every field of a foreign config.json that changes the numbers is honoured or refused by name."""

import dataclasses
import json

import pytest
from families import ODD_SHAPES, make_config

from gptjax.checkpoint.export_config import write_foreign_config
from gptjax.checkpoint.foreign_config import (
  make_model_config,
  read_foreign_config,
  read_token_ids,
)
from gptjax.errors import CheckpointError
from gptjax.model.config import ModelConfig
from gptjax.model.presets import PRESETS
from gptjax.model.recipe import nearest_recipe

NEO = {"num_layers": 4, "attention_types": [[["global", "local"], 2]]}


def silent(line):
  raise AssertionError(f"an unexpected note: {line}")


def read(model_type, report=silent, /, **fields):
  return make_model_config(model_type, fields, "the config", report)


@pytest.mark.parametrize(
  ("model_type", "preset"),
  [("gpt2", "gpt2"), ("openai-gpt", "gpt1"), ("gptj", "gptj-6b"), ("gpt_neox", "gpt-neox-20b")],
)
def test_defaults_are_the_published_models(model_type, preset):
  """An empty config.json is transformers' default, which is the published one of the family."""
  found, expected = read(model_type), PRESETS[preset]
  for name in (
    *("vocab_size", "context_length", "num_layers", "model_dim", "num_heads", "ffw_width"),
    *("norm_position", "final_norm", "positions", "rotated_dim", "rotary_style", "rotary_base"),
    *("parallel_residual", "shared_norm", "qkv_bias", "tie_embeddings", "head_bias"),
    *("attention_pattern", "attention_scale", "attention_output_bias", "norm_epsilon"),
  ):
    assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize(
  ("model_type", "fields", "honoured"),
  [
    ("gpt2", {"n_inner": 100}, {"ffw_dim": 100}),
    ("gpt2", {"n_inner": None}, {"ffw_width": 3072}),
    ("gpt2", {"layer_norm_epsilon": 1e-3}, {"norm_epsilon": 1e-3}),
    ("gpt2", {"scale_attn_weights": False}, {"attention_scale": "one"}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {"scale_attention_by_layer": True}),
    ("gpt2", {"reorder_and_upcast_attn": True}, {"attention_scale": "sqrt_head_dim"}),
    ("gpt2", {"tie_word_embeddings": False}, {"tie_embeddings": False}),
    ("gpt2", {"hidden_size": 24, "num_attention_heads": 2}, {"model_dim": 24, "num_heads": 2}),
    ("gpt2", {"num_hidden_layers": 3, "max_position_embeddings": 7}, {"context_length": 7}),
    ("gpt2", {"n_ctx": 7}, {"context_length": 7}),
    ("gpt2", {"n_ctx": 7, "n_positions": 9}, {"context_length": 9}),
    ("gpt2", {"resid_pdrop": 0.2, "embd_pdrop": 0, "attn_pdrop": 0.3}, {"residual_dropout": 0.2}),
    ("gpt2", {"initializer_range": 0.01}, {"init_std": 0.01, "position_init_std": 0.01}),
    ("gpt2", {"vocab_size": 61}, {"vocab_size": 61}),
    ("openai-gpt", {"afn": "gelu"}, {"activation": "gelu_tanh"}),
    ("openai-gpt", {"afn": "swish"}, {"activation": "silu"}),
    ("gptj", {"rotary_dim": 8}, {"rotary_dim": 8, "rotary_style": "interleaved"}),
    ("gptj", {"scale_attn_weights": False}, {"attention_scale": "sqrt_head_dim"}),
    ("gpt_neo", NEO | {"window_size": 3}, {"window_size": 3}),
    ("gpt_neo", NEO, {"attention_pattern": ("global", "local")}),
    ("gpt_neo", NEO | {"attention_types": [[["global"], 4]]}, {"attention_pattern": ("global",)}),
    (
      "gpt_neo",
      NEO | {"attention_types": [[["global"], 1], [["local"], 3]]},
      {"attention_pattern": ("global", "local", "local", "local")},
    ),
    (
      "gpt_neo",
      {"num_layers": 2, "attention_layers": ["local", "local"]},
      {"attention_pattern": ("local",)},
    ),
    ("gpt_neo", NEO | {"intermediate_size": 40}, {"ffw_dim": 40}),
    ("gpt_neox", {"use_parallel_residual": False}, {"parallel_residual": False}),
    (
      "gpt_neox",
      {"attention_bias": False},
      {"qkv_bias": False, "attention_output_bias": False, "mlp_bias": True},
    ),
    ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 100}, {"rotary_dim": 96}),
    ("gpt_neox", {"rotary_emb_base": 100}, {"rotary_base": 100.0}),
    ("gpt_neox", {"rope_theta": 100, "partial_rotary_factor": 0.5}, {"rotary_dim": 48}),
    (
      "gpt_neox",
      {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
      {"rotary_base": 50.0, "rotary_dim": 24},
    ),
    ("gpt_neox", {"rope_scaling": None}, {"rotary_base": 10000.0}),
    ("gpt_neox", {"hidden_act": "gelu_fast"}, {"activation": "gelu_tanh"}),
    ("gpt_neox", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
    ("gpt_neox", {"hidden_dropout": 0.25}, {"residual_dropout": 0.25, "embedding_dropout": 0.25}),
    (
      "nanogpt",
      {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 4, "bias": False, "dropout": 0.1},
      {"norm_bias": False, "qkv_bias": False, "mlp_bias": False, "activation": "gelu"},
    ),
    (
      "mingpt",
      {"model_type": "gpt-nano", "n_layer": 3, "n_head": 3, "n_embd": 48, "vocab_size": 3}
      | {"block_size": 11},
      {"tie_embeddings": False, "activation": "gelu_tanh", "context_length": 11},
    ),
  ],
)
def test_honoured(model_type, fields, honoured):
  config = read(model_type, **fields)
  for name, value in honoured.items():
    assert getattr(config, name) == value, name


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "gpt_neo", "gpt_neox"])
@pytest.mark.parametrize(
  ("theirs", "ours"),
  [
    *[(name, "gelu_tanh") for name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")],
    *[("gelu", "gelu"), ("gelu_python", "gelu"), ("relu", "relu")],
    *[("silu", "silu"), ("swish", "silu")],
  ],
)
def test_activations(model_type, theirs, ours):
  field = "hidden_act" if model_type == "gpt_neox" else "activation_function"
  assert read(model_type, **{field: theirs}).activation == ours


@pytest.mark.parametrize(
  ("model_type", "fields", "message"),
  [
    ("gpt2", {"activation_function": "quick_gelu"}, 'activation_function is "quick_gelu"; supp'),
    ("openai-gpt", {"afn": "gelu_new"}, 'afn is "gelu_new"; supported are gelu, relu'),
    ("gpt_neox", {"hidden_act": "mish"}, 'hidden_act is "mish"; supported'),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is true; only decoders"),
    ("gpt2", {"is_encoder_decoder": True}, "is_encoder_decoder is true"),
    ("gpt2", {"is_causal": False}, "is_causal is false; only causal"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config is .*quantised"),
    ("gpt2", {"pruned_heads": {"1": [0]}}, "pruned_heads is .*not supported"),
    ("gptj", {"rotary": False}, "rotary is false"),
    ("gptj", {"rotary_dim": None}, "rotary_dim is null; it must be a whole number, at least 1"),
    ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    ("gptj", {"rotary_dim": 7}, "contradicts itself: model.rotary_dim is 7"),
    ("gpt2", {"n_embd": 25, "n_head": 2}, "contradicts itself: model.model_dim 25"),
    ("gpt2", {"n_embd": 24, "hidden_size": 25}, "n_embd is 24 and hidden_size is 25"),
    ("gpt2", {"n_layer": "12"}, 'n_layer is "12"; it must be a whole number'),
    ("gpt2", {"n_layer": 1.5}, "n_layer is 1.5; it must be a whole number"),
    ("gpt2", {"n_layer": float("nan")}, "n_layer is NaN; it must be a whole number"),
    ("gpt2", {"n_layer": 10**400}, r"n_layer is 1000.*\.\.\.; it must be"),
    ("gpt2", {"architectures": 3}, 'architectures has "3"'),
    ("gpt_neo", NEO | {"attention_types": [[["global"], 10**12]]}, "must be for 4 layers"),
    ("gpt_neox", {"rope_parameters": {"rope_theta": "x"}}, 'rope_theta is "x"; it must be a num'),
    ("gpt2", {"n_layer": 0}, "n_layer is 0; it must be a whole number, at least 1"),
    ("gpt2", {"n_layer": True}, "n_layer is true; it must be a whole number"),
    ("gpt2", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
    ("gpt2", {"attn_pdrop": 1.5}, "contradicts itself: model.attention_dropout is 1.5"),
    ("gpt2", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map .*code of its own"),
    ("gpt2", {"architectures": ["GPT2LMHeadCustomModel"]}, "GPT2LMHeadCustomModel"),
    ("gpt2", {"architectures": ["GPTJForCausalLM"]}, "which is no known gpt2"),
    ("gpt_neo", {"num_layers": 4}, "attention_types is .* must be for 4 layers"),
    (
      "gpt_neo",
      NEO | {"attention_layers": ["global"] * 4},
      "attention_layers is .*attention_types",
    ),
    ("gpt_neo", NEO | {"attention_types": [[["global", "sparse"], 2]]}, 'supported are "global"'),
    ("gpt_neo", NEO | {"attention_types": [3]}, "attention_types is .* must be like"),
    (
      "gpt_neox",
      {"rope_scaling": {"type": "linear", "factor": 2.0}},
      "rope_parameters is .*linear",
    ),
    ("gpt_neox", {"rope_parameters": {"rope_type": "yarn"}}, 'only rope_type "default"'),
    ("gpt_neox", {"rotary_pct": 0.5, "partial_rotary_factor": 0.25}, "rotary_pct is 0.5 and"),
    (
      "gpt_neox",
      {"rotary_emb_base": 5, "rope_parameters": {"rope_theta": 6}},
      "rotary_emb_base is 5.0; rope_parameters says 6",
    ),
    ("gpt_neox", {"rotary_pct": 0.0}, "rotary_pct is 0.0; it must be"),
    ("gpt_neox", {"rope_parameters": 3}, "rope_parameters is 3; it must be an object"),
    ("gpt_neo", NEO | {"attention_types": "x"}, "it must be a list"),
    ("gpt_neox", {"rotary_pct": 0.01}, "rotary_pct is 0.01; it rotates no pair"),
    ("gpt_neox", {"head_dim": 7}, "head_dim is 7; it can only be 96"),
    ("mingpt", {"n_layer": 3}, "the config has no vocab_size; it must be there"),
    (
      "llama",
      {},
      'model_type is "llama", which is not supported; it must be one of: gpt2',
    ),
    ("gpt-neox", {}, 'model_type is "gpt-neox", .*did you mean "gpt_neox"'),
  ],
)
def test_refused(model_type, fields, message):
  with pytest.raises(CheckpointError, match=message) as caught:
    read(model_type, **fields)
  assert "\n" not in str(caught.value)


def test_what_has_no_effect_is_said_once():
  notes = []
  harmless = {"bos_token_id": 3, "summary_type": "x", "torch_dtype": "float16", "use_cache": True}
  read("gpt2", notes.append, **harmless, n_ctx=4, task_specific_params={}, _name_or_path="x")
  assert notes == []
  read("gpt2", notes.append, author="somebody", created_date="today", n_inenr=3)
  assert notes == [
    "the config: fields that have no effect on this model: author, created_date, n_inenr"
  ]


GENERATION = {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}
SUMMARY = {
  "summary_activation": None,
  "summary_first_dropout": 0.1,
  "summary_proj_to_labels": True,
  "summary_type": "cls_index",
  "summary_use_proj": True,
}
GPT2_SIZES = {"n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}
# What the hub's repositories say, with all that has no effect.
HUB = {
  "gpt2": GENERATION
  | SUMMARY
  | GPT2_SIZES
  | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257}
  | {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02}
  | {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
  | {"bos_token_id": 50256, "eos_token_id": 50256},
  "gpt2-medium": SUMMARY
  | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 32000}
  | {"n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_positions": 1024}
  | {"n_inner": 4096, "activation_function": "gelu_new", "gradient_checkpointing": False}
  | {"scale_attn_weights": True, "use_cache": True, "tokenizer_class": "T5Tokenizer"}
  | {"reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False}
  | {"torch_dtype": "float32", "transformers_version": "4.11.3", "pad_token_id": None},
  "gpt1": GENERATION
  | SUMMARY
  | {"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"], "afn": "gelu"}
  | {"n_ctx": 512, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 512, "n_special": 0}
  | {"predict_special_tokens": True, "vocab_size": 40478, "attn_pdrop": 0.1, "embd_pdrop": 0.1},
  "gptj-6b": GENERATION
  | SUMMARY
  | {"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "vocab_size": 50400}
  | {"n_embd": 4096, "n_head": 16, "n_layer": 28, "n_positions": 2048, "n_inner": None}
  | {"rotary": True, "rotary_dim": 64, "scale_attn_weights": True, "use_cache": True}
  | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "gradient_checkpointing": False}
  | {"tie_word_embeddings": False, "tokenizer_class": "GPT2Tokenizer", "torch_dtype": "float16"},
  "gpt-neo-125m": GENERATION
  | SUMMARY
  | {"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "vocab_size": 50257}
  | {"hidden_size": 768, "num_heads": 12, "num_layers": 12, "max_position_embeddings": 2048}
  | {"attention_types": [[["global", "local"], 6]], "attention_layers": ["global", "local"] * 6}
  | {"attention_dropout": 0, "embed_dropout": 0, "resid_dropout": 0, "intermediate_size": None}
  | {"window_size": 256, "gradient_checkpointing": False, "use_cache": True},
  "pythia-70m": {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
  | {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 6, "vocab_size": 50304}
  | {"intermediate_size": 2048, "max_position_embeddings": 2048, "rotary_pct": 0.25}
  | {"rotary_emb_base": 10000, "use_parallel_residual": True, "hidden_act": "gelu"}
  | {"layer_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float16"}
  | {"bos_token_id": 0, "eos_token_id": 0, "use_cache": True, "rope_scaling": None},
}


@pytest.mark.parametrize("name", HUB)
def test_configs_of_the_hub_are_the_published_models_without_a_note(name):
  notes = []
  fields = HUB[name]
  recipe = nearest_recipe(make_model_config(fields["model_type"], fields, name, notes.append))
  assert notes == []
  assert recipe.name == name
  changed = {field for field in recipe.differences if "dropout" not in field}
  assert changed == ({"vocab_size"} if name == "gpt2-medium" else set())


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_written_configs_read_back(name):
  """What transformers computes with our config.json is what we compute, or it is refused."""
  config = ODD_SHAPES[name]
  families = {"gptneo": "gpt_neo", "gptneox": "gpt_neox"}
  config = dataclasses.replace(config, family=families.get(config.family, config.family))
  is_banded = config.family == "gpt3" and config.window_size < config.context_length
  if is_banded or name in ("gpt2-wide-heads", "gptj-narrow-heads", "gpt2-mup"):
    with pytest.raises(CheckpointError, match=r"transformers cannot compute this model: model\."):
      write_foreign_config(config)
    return
  fields = json.loads(json.dumps(write_foreign_config(config)))
  found = make_model_config(fields["model_type"], fields, "x", silent)
  for field in dataclasses.fields(ModelConfig):
    if field.name.endswith("_bias") or field.name in (
      *("family", "residual_init_scale", "vocab_multiple", "head_dim", "ffw_dim"),
      *("rotary_dim", "window_size", "attention_pattern"),
    ):
      continue
    assert getattr(found, field.name) == getattr(config, field.name), field.name
  assert (found.ffw_width, found.attention_dim) == (config.ffw_width, config.attention_dim)
  if config.positions == "rotary":
    assert found.rotated_dim == config.rotated_dim


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_written_unless_banded(name):
  config = PRESETS[name]
  if config.family == "gpt3":
    with pytest.raises(CheckpointError, match=r"model.attention_pattern is .*; keep it as"):
      write_foreign_config(config)
    return
  fields = write_foreign_config(config)
  found = make_model_config(fields["model_type"], fields, "x", silent)
  assert (found.rotated_dim, found.ffw_width) == (config.rotated_dim, config.ffw_width)
  assert found.attention_pattern == config.attention_pattern


@pytest.mark.parametrize("rotary_dim", range(2, 98, 2))
def test_every_rotary_dim_survives_their_rounding(rotary_dim):
  config = make_config("gptneox", model_dim=97 * 2 - 2, num_heads=2, rotary_dim=rotary_dim)
  fields = write_foreign_config(config)
  assert int(config.head_width * fields["rotary_pct"]) == rotary_dim


def test_another_architecture_serves_where_the_family_does_not():
  """A user's own mixture goes to whichever of transformers' models computes it."""
  mixture = make_config("gptneox", parallel_residual=False)
  assert (
    write_foreign_config(dataclasses.replace(mixture, family="gpt2"))["model_type"] == "gpt_neox"
  )
  with pytest.raises(CheckpointError, match=r"norm_position is 'post', and 'pre' in its gpt2"):
    write_foreign_config(make_config("gpt2", norm_position="post"))


def test_files(tmp_path):
  path = tmp_path / "config.json"
  with pytest.raises(CheckpointError, match=r"has no config.json"):
    read_foreign_config(tmp_path)
  path.write_text("{")
  with pytest.raises(CheckpointError, match=r"config.json\" cannot be read"):
    read_foreign_config(tmp_path)
  path.write_text("[]")
  with pytest.raises(CheckpointError, match="is not a JSON object"):
    read_foreign_config(tmp_path)
  path.write_text("{}")
  with pytest.raises(CheckpointError, match="has no model_type"):
    read_foreign_config(tmp_path)
  path.write_text(json.dumps({"architectures": ["GPTNeoXForCausalLM"]}))
  assert read_foreign_config(tmp_path).family == "gpt_neox"
  path.write_text(json.dumps({"afn": "gelu", "n_layer": 3}))
  assert read_foreign_config(tmp_path).family == "gpt1"
  oldest = {"n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "finetuning_task": None}
  path.write_text(json.dumps(oldest), encoding="utf-8-sig")
  assert read_foreign_config(tmp_path).family == "gpt2"
  path.write_text('{"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_embd": 12}')
  with pytest.raises(CheckpointError, match='"n_embd" is there twice, 24 and 12'):
    read_foreign_config(tmp_path)
  path.write_text("[" * 100_000)
  with pytest.raises(CheckpointError, match="cannot be read"):
    read_foreign_config(tmp_path)


def test_special_ids(tmp_path):
  notes = []
  fields = {"model_type": "gpt2", "bos_token_id": 50256, "eos_token_id": 3, "pad_token_id": None}
  (tmp_path / "config.json").write_text(json.dumps(fields))
  generation = {"eos_token_id": [4, 5, 99], "do_sample": True, "top_k": None, "use_cache": True}
  (tmp_path / "generation_config.json").write_text(json.dumps(generation))
  ids = read_token_ids(tmp_path, 61, notes.append)
  assert ids == {"bos": (), "eos": (4, 5), "pad": ()}
  assert len(notes) == 3
  assert 'asks for {"do_sample": true}; decoding options are not taken from files' in notes[0]
  assert "bos_token_id is 50256, out of the vocabulary of 61" in notes[1]
