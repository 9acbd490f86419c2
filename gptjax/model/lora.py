"""LoRA: low-rank updates of chosen kernels, beside them in the tree as `params["lora"]`.

A kernel [N, in, out] at `decoder/layers/PATH/kernel` has the factors `lora/layers/PATH/a`
[N, in, R] and `.../b` [N, R, out], and acts as `kernel + scale * a @ b`. Source: Hu et al. 2021,
"LoRA", section 4.1: a starts random and b at zero, so that training starts from the model itself.
"""

import re
from typing import Any

import jax.numpy as jnp

from gptjax.errors import ConfigError
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import ParameterSpec, decoder_specs
from gptjax.tree import map_named, named_leaves

PyTree = Any

_LAYERS = "decoder/layers/"


def lora_specs(config: ModelConfig, pattern: str, rank: int) -> PyTree:
  """Describes the factors of every kernel of the layers whose path matches.

  Args:
    config: the architecture.
    pattern: regular expression over paths: "attention/(query|value)".
    rank: R.

  Raises:
    ConfigError: no kernel matches.
  """
  specs = {f"decoder/{name}": spec for name, spec in named_leaves(decoder_specs(config)).items()}
  kernels = [name for name in specs if name.startswith(_LAYERS) and name.endswith("/kernel")]
  chosen = [name for name in kernels if re.search(pattern, name)]
  if not chosen:
    raise ConfigError(
      f'the LoRA pattern "{pattern}" matches no kernel of the layers; they are {", ".join(kernels)}'
    )
  tree = {}
  for name in chosen:
    num_layers, dim_in, dim_out = specs[name].shape
    group = tree
    for part in name.split("/")[1:-1]:
      group = group.setdefault(part, {})
    group["a"] = ParameterSpec((num_layers, dim_in, rank), std=dim_in**-0.5)
    group["b"] = ParameterSpec((num_layers, rank, dim_out))
  return tree


def merge_lora(params: PyTree, scale: float) -> PyTree:
  """Returns the tree without "lora", its updates added to the kernels; without any, the tree."""
  if "lora" not in params:
    return params
  factors = named_leaves(params["lora"])

  def merge(name, leaf):
    path = name.removeprefix("decoder/").removesuffix("kernel")
    if f"{path}a" not in factors:
      return leaf
    update = jnp.einsum("nir,nro->nio", factors[f"{path}a"], factors[f"{path}b"])
    return leaf + (scale * update).astype(leaf.dtype)

  return map_named(merge, {name: tree for name, tree in params.items() if name != "lora"})
