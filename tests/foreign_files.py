"""Checkpoints as other libraries write them, spelled out tensor by tensor, without PyTorch.

Written apart from gptjax/checkpoint/key_tables.py, so that a mistake there cannot hide here.
"""

import json

import numpy as np
from flax import serialization
from safetensors.numpy import save_file


def tensors_of(config, params):
  """Returns the tensors that transformers saves for a config of one of its families."""
  decoder = params["decoder"]
  rows = slice(0, config.vocab_size)
  embedding = decoder["token_embedding"]["embedding"][rows]
  layers = [take(decoder["layers"], i) for i in range(config.num_layers)]
  write = {
    "gpt1": gpt1_tensors,
    "gpt2": gpt2_tensors,
    "gptj": gptj_tensors,
    "gptneo": gptneo_tensors,
    "gptneox": gptneox_tensors,
  }[config.family]
  tensors = write(config, decoder, layers, embedding)
  if not config.tie_embeddings:
    name = "embed_out" if config.family == "gptneox" else "lm_head"
    tensors |= {f"{name}.{leaf}": a[rows] for leaf, a in rename(params["lm_head"]).items()}
  return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def take(tree, index):
  return {k: take(v, index) if isinstance(v, dict) else v[index] for k, v in tree.items()}


def rename(module, transposed=False):
  """Returns a norm or a linear layer as PyTorch names it."""
  weight = module["scale"] if "scale" in module else module["kernel"]
  named = {"weight": weight.T if transposed else weight}
  return named | ({"bias": module["bias"]} if "bias" in module else {})


def put(tensors, prefix, module, transposed=False):
  tensors |= {f"{prefix}.{leaf}": a for leaf, a in rename(module, transposed).items()}


def side_by_side(attention):
  """Joins query, key and value as Conv1D has them: kernel [D, 3A], bias [3A]."""
  parts = [attention[name] for name in ("query", "key", "value")]
  return {
    leaf: np.concatenate([part[leaf] for part in parts], axis=-1) for leaf in attention["query"]
  }


def gpt1_tensors(config, decoder, layers, embedding):
  tensors = {
    "transformer.tokens_embed.weight": embedding,
    "transformer.positions_embed.weight": decoder["position_embedding"]["embedding"],
  }
  for i, layer in enumerate(layers):
    gpt2_layer(tensors, f"transformer.h.{i}", layer)
  return tensors


def gpt2_tensors(config, decoder, layers, embedding, transposed=False):
  tensors = {
    "transformer.wte.weight": embedding,
    "transformer.wpe.weight": decoder["position_embedding"]["embedding"],
  }
  for i, layer in enumerate(layers):
    gpt2_layer(tensors, f"transformer.h.{i}", layer, transposed)
  put(tensors, "transformer.ln_f", decoder["final_norm"])
  return tensors


def gpt2_layer(tensors, prefix, layer, transposed=False):
  put(tensors, f"{prefix}.ln_1", layer["attention_norm"])
  put(tensors, f"{prefix}.attn.c_attn", side_by_side(layer["attention"]), transposed)
  put(tensors, f"{prefix}.attn.c_proj", layer["attention"]["output"], transposed)
  put(tensors, f"{prefix}.ln_2", layer["mlp_norm"])
  put(tensors, f"{prefix}.mlp.c_fc", layer["mlp"]["up"], transposed)
  put(tensors, f"{prefix}.mlp.c_proj", layer["mlp"]["down"], transposed)


def gptj_tensors(config, decoder, layers, embedding):
  tensors = {"transformer.wte.weight": embedding}
  for i, layer in enumerate(layers):
    prefix = f"transformer.h.{i}"
    put(tensors, f"{prefix}.ln_1", layer["attention_norm"])
    put(tensors, f"{prefix}.attn.q_proj", layer["attention"]["query"], True)
    put(tensors, f"{prefix}.attn.k_proj", layer["attention"]["key"], True)
    put(tensors, f"{prefix}.attn.v_proj", layer["attention"]["value"], True)
    put(tensors, f"{prefix}.attn.out_proj", layer["attention"]["output"], True)
    put(tensors, f"{prefix}.mlp.fc_in", layer["mlp"]["up"], True)
    put(tensors, f"{prefix}.mlp.fc_out", layer["mlp"]["down"], True)
  put(tensors, "transformer.ln_f", decoder["final_norm"])
  return tensors


def gptneo_tensors(config, decoder, layers, embedding):
  tensors = {
    "transformer.wte.weight": embedding,
    "transformer.wpe.weight": decoder["position_embedding"]["embedding"],
  }
  for i, layer in enumerate(layers):
    prefix = f"transformer.h.{i}"
    put(tensors, f"{prefix}.ln_1", layer["attention_norm"])
    put(tensors, f"{prefix}.attn.attention.q_proj", layer["attention"]["query"], True)
    put(tensors, f"{prefix}.attn.attention.k_proj", layer["attention"]["key"], True)
    put(tensors, f"{prefix}.attn.attention.v_proj", layer["attention"]["value"], True)
    put(tensors, f"{prefix}.attn.attention.out_proj", layer["attention"]["output"], True)
    put(tensors, f"{prefix}.ln_2", layer["mlp_norm"])
    put(tensors, f"{prefix}.mlp.c_fc", layer["mlp"]["up"], True)
    put(tensors, f"{prefix}.mlp.c_proj", layer["mlp"]["down"], True)
  put(tensors, "transformer.ln_f", decoder["final_norm"])
  return tensors


def gptneox_tensors(config, decoder, layers, embedding):
  tensors = {"gpt_neox.embed_in.weight": embedding}
  for i, layer in enumerate(layers):
    prefix, attention = f"gpt_neox.layers.{i}", layer["attention"]
    put(tensors, f"{prefix}.input_layernorm", layer["attention_norm"])
    put(tensors, f"{prefix}.attention.query_key_value", head_by_head(config, attention), True)
    put(tensors, f"{prefix}.attention.dense", attention["output"], True)
    put(tensors, f"{prefix}.post_attention_layernorm", layer["mlp_norm"])
    put(tensors, f"{prefix}.mlp.dense_h_to_4h", layer["mlp"]["up"], True)
    put(tensors, f"{prefix}.mlp.dense_4h_to_h", layer["mlp"]["down"], True)
  put(tensors, "gpt_neox.final_layer_norm", decoder["final_norm"])
  return tensors


def head_by_head(config, attention):
  """Joins query, key and value of the first head, then of the second, and so on."""
  K = config.head_width
  return {
    leaf: np.concatenate(
      [
        attention[name][leaf][..., head * K : (head + 1) * K]
        for head in range(config.num_heads)
        for name in ("query", "key", "value")
      ],
      axis=-1,
    )
    for leaf in attention["query"]
  }


def config_of(config):
  """Returns the config.json that transformers writes for one of our tiny configs."""
  gpt2 = {
    "n_embd": config.model_dim,
    "n_layer": config.num_layers,
    "n_head": config.num_heads,
    "n_positions": config.context_length,
  }
  hidden = {
    "hidden_size": config.model_dim,
    "max_position_embeddings": config.context_length,
    "intermediate_size": config.ffw_width,
  }
  own = {
    "gpt1": {"model_type": "openai-gpt", "afn": "gelu"} | gpt2,
    "gpt2": {"model_type": "gpt2", "activation_function": "gelu_new"} | gpt2,
    "gptj": {"model_type": "gptj", "rotary_dim": config.rotated_dim} | gpt2,
    "gptneo": hidden
    | {
      "model_type": "gpt_neo",
      "num_layers": config.num_layers,
      "num_heads": config.num_heads,
      "attention_types": [[list(config.attention_pattern), config.num_layers // 2]],
      "window_size": config.window_size,
    },
    "gptneox": hidden
    | {
      "model_type": "gpt_neox",
      "num_hidden_layers": config.num_layers,
      "num_attention_heads": config.num_heads,
      "rotary_pct": config.rotated_dim / config.head_width,
      "rotary_emb_base": 10000,
    },
  }[config.family]
  return own | {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings}


def write_folder(folder, fields, tensors):
  """Writes config.json and model.safetensors."""
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(fields))
  save_file(tensors, folder / "model.safetensors", {"format": "pt"})
  return folder


def write_flax(folder, fields, tensors):
  """Writes flax_model.msgpack: matrices transposed, leaves renamed, modules nested."""
  tree = {}
  for name, tensor in tensors.items():
    *modules, leaf = name.split(".")
    node = tree
    for module in modules:
      node = node.setdefault(module, {})
    is_norm = tensor.ndim == 1 and leaf == "weight"
    is_embedding = modules[-1] in ("wte", "wpe")
    names = {"weight": "scale" if is_norm else "embedding" if is_embedding else "kernel"}
    node[names.get(leaf, leaf)] = tensor.T if names.get(leaf) == "kernel" else tensor
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(fields))
  (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
  return folder


def write_openai(folder, config, params):
  """Writes GPT-1 as OpenAI did: shapes, and all numbers in a row cut into shards."""
  decoder = params["decoder"]
  arrays = [
    decoder["position_embedding"]["embedding"],
    decoder["token_embedding"]["embedding"][: config.vocab_size],
  ]
  for i in range(config.num_layers):
    layer = take(decoder["layers"], i)
    linears = [side_by_side(layer["attention"]), layer["attention"]["output"]]
    arrays += [a for linear in linears for a in (linear["kernel"][None], linear["bias"])]
    arrays += [layer["attention_norm"]["scale"], layer["attention_norm"]["bias"]]
    for linear in (layer["mlp"]["up"], layer["mlp"]["down"]):
      arrays += [linear["kernel"][None], linear["bias"]]
    arrays += [layer["mlp_norm"]["scale"], layer["mlp_norm"]["bias"]]
  folder.mkdir(exist_ok=True)
  (folder / "params_shapes.json").write_text(json.dumps([list(a.shape) for a in arrays]))
  flat = np.concatenate([a.ravel() for a in arrays])
  for i, shard in enumerate(np.array_split(flat, 10)):
    np.save(folder / f"params_{i}.npy", shard)
  return folder
