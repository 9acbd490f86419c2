"""Our weights in transformers' models, by a small key table of the tests' own."""

import dataclasses

import jax
import numpy as np
import torch
import transformers

from gptjax.tree import named_leaves


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where transformers keeps a family's tensors.

  Attributes:
    top: {our path in the tree: their module} outside of the layers.
    prefix: of the layers, before the number.
    layer: {our path in a layer: their module}; "attention/qkv" is the three in one.
    is_transposed: their kernels are [out, in].
  """

  top: dict[str, str]
  prefix: str
  layer: dict[str, str]
  is_transposed: bool = True


_EMBEDDINGS = {
  "decoder/token_embedding": "transformer.wte",
  "decoder/position_embedding": "transformer.wpe",
  "decoder/final_norm": "transformer.ln_f",
  "lm_head": "lm_head",
}
_GPT2_LAYER = {
  "attention_norm": "ln_1",
  "mlp_norm": "ln_2",
  "attention/qkv": "attn.c_attn",
  "attention/output": "attn.c_proj",
  "mlp/up": "mlp.c_fc",
  "mlp/down": "mlp.c_proj",
}
_HEADS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
LAYOUTS = {
  "gpt1": Layout(
    {
      "decoder/token_embedding": "transformer.tokens_embed",
      "decoder/position_embedding": "transformer.positions_embed",
    },
    "transformer.h",
    _GPT2_LAYER,
    is_transposed=False,
  ),
  "gpt2": Layout(_EMBEDDINGS, "transformer.h", _GPT2_LAYER, is_transposed=False),
  "gptj": Layout(
    _EMBEDDINGS,
    "transformer.h",
    {"attention_norm": "ln_1", "mlp/up": "mlp.fc_in", "mlp/down": "mlp.fc_out"}
    | {f"attention/{ours}": f"attn.{theirs}" for ours, theirs in _HEADS.items()},
  ),
  "gptneo": Layout(
    _EMBEDDINGS,
    "transformer.h",
    {name: _GPT2_LAYER[name] for name in ("attention_norm", "mlp_norm", "mlp/up", "mlp/down")}
    | {f"attention/{ours}": f"attn.attention.{theirs}" for ours, theirs in _HEADS.items()},
  ),
  "gptneox": Layout(
    {
      "decoder/token_embedding": "gpt_neox.embed_in",
      "decoder/final_norm": "gpt_neox.final_layer_norm",
      "lm_head": "lm_head",
    },
    "gpt_neox.layers",
    {
      "attention_norm": "input_layernorm",
      "mlp_norm": "post_attention_layernorm",
      "attention/qkv": "attention.query_key_value",
      "attention/output": "attention.dense",
      "mlp/up": "mlp.dense_h_to_4h",
      "mlp/down": "mlp.dense_4h_to_h",
    },
  ),
}


def to_hf(params, config) -> dict[str, np.ndarray]:
  """Renames parameters, or gradients, to transformers' tensors; linear in the values."""
  layout = LAYOUTS[config.family]
  tensors = {}

  def put(module, leaf_name, array):
    suffix = "bias" if leaf_name == "bias" else "weight"
    tensors[f"{module}.{suffix}"] = array

  layers = params["decoder"]["layers"]
  for name, leaf in named_leaves(params).items():
    module, _, leaf_name = name.rpartition("/")
    if "/layers/" not in name:
      # Embeddings, head and its bias lose the padding of the vocabulary.
      array = leaf[: config.vocab_size] if "token" in name or "head" in name else leaf
      put(layout.top[module], leaf_name, np.asarray(array))
  for index in range(config.num_layers):
    layer = jax.tree.map(lambda leaf: np.asarray(leaf)[index], layers)  # noqa: B023
    if "attention/qkv" in layout.layer:
      layer["attention"]["qkv"] = _fuse(layer["attention"], config)
    for name, array in named_leaves(layer).items():
      module, _, leaf_name = name.rpartition("/")
      if module in layout.layer:
        is_turned = leaf_name == "kernel" and layout.is_transposed
        put(
          f"{layout.prefix}.{index}.{layout.layer[module]}",
          leaf_name,
          array.T if is_turned else array,
        )
  return tensors


def _fuse(attention, config):
  """Joins the three projections: one after the other, or head by head in GPT-NeoX."""

  def join(*arrays):
    if config.family != "gptneox":
      return np.concatenate(arrays, axis=-1)
    heads = [a.reshape(*a.shape[:-1], config.num_heads, 1, config.head_width) for a in arrays]
    return np.concatenate(heads, axis=-2).reshape(*arrays[0].shape[:-1], -1)

  return jax.tree.map(join, *(attention[name] for name in ("query", "key", "value")))


def make_hf_model(params, config, dtype=torch.float64):
  """Returns a transformers model of a config, with our weights in it, without dropout."""
  model_class, hf_config = _hf_config(config)
  # Models may have no special ids, and ours are smaller than the default ones.
  for name in ("bos_token_id", "eos_token_id"):
    hf_config[name] = None
  options = model_class.config_class(**hf_config, attn_implementation="eager")
  model = model_class(options).to(dtype).eval()
  tensors = to_hf(params, config)
  parameters = dict(model.named_parameters())
  assert parameters.keys() == tensors.keys()
  with torch.no_grad():
    for name, parameter in parameters.items():
      assert parameter.shape == tensors[name].shape, name
      parameter.copy_(torch.from_numpy(np.array(tensors[name])))
  return model


def _hf_config(config):
  """Returns (class, keywords of its config)."""
  common = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings}
  gpt2_style = common | {
    "n_positions": config.context_length,
    "n_embd": config.model_dim,
    "n_layer": config.num_layers,
    "n_head": config.num_heads,
    "layer_norm_epsilon": config.norm_epsilon,
    **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0),
  }
  hidden_style = common | {
    "max_position_embeddings": config.context_length,
    "hidden_size": config.model_dim,
    "num_heads": config.num_heads,
    "intermediate_size": config.ffw_width,
  }
  match config.family:
    case "gpt1":
      return transformers.OpenAIGPTLMHeadModel, gpt2_style
    case "gpt2":
      scaling = {"scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer}
      activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
      more = {"n_inner": config.ffw_width, "activation_function": activation}
      return transformers.GPT2LMHeadModel, gpt2_style | scaling | more
    case "gptj":
      more = {"n_inner": config.ffw_width, "rotary_dim": config.rotated_dim}
      return transformers.GPTJForCausalLM, gpt2_style | more
    case "gptneo":
      repeats = config.num_layers // len(config.attention_pattern)
      return transformers.GPTNeoForCausalLM, hidden_style | {
        "num_layers": config.num_layers,
        "attention_types": [[list(config.attention_pattern), repeats]],
        "window_size": config.window_size,
        "layer_norm_epsilon": config.norm_epsilon,
      }
    case "gptneox":
      hidden_style["num_attention_heads"] = hidden_style.pop("num_heads")
      return transformers.GPTNeoXForCausalLM, hidden_style | {
        "num_hidden_layers": config.num_layers,
        "layer_norm_eps": config.norm_epsilon,
        "rope_parameters": {
          "rope_type": "default",
          "rope_theta": config.rotary_base,
          "partial_rotary_factor": config.rotated_dim / config.head_width,
        },
      }


def hf_results(model, tokens_BL):
  """Returns (logits [B, L - 1, V], loss by their own shifting, {name: gradient})."""
  tokens = torch.from_numpy(tokens_BL.astype(np.int64))
  out = model(input_ids=tokens, labels=tokens)
  out.loss.backward()
  gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
  return out.logits[:, :-1].detach().numpy(), float(out.loss.detach()), gradients
