"""One transformer block as a pure function: pre- or post-norm, sequential or parallel.

Activations stay flattened to [T, D] (T tokens, whatever their rows) for every matrix product;
only attention sees rows. XLA on CPU runs [B, L, D] products at less than half the speed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.model.attention import dropout
from gptjax.model.config import ModelConfig

# mix(query_TA, key_TA, value_TA, layer) -> (mixed_TA, what the caller wants back, e.g. a cache)
Mixer = Callable[..., tuple[jax.Array, Any]]

ACTIVATIONS = {
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Layer:
  """Which layer a block is.

  Attributes:
    kind: "global" or "local" attention.
    index: 0-based depth; an int, or a traced int32 under scan.
  """

  kind: str
  index: int | jax.Array


def layer_norm(params: dict, x_TD: jax.Array, epsilon: float) -> jax.Array:
  """Normalises over the last axis in float32; returns the dtype of x (Ba et al. 2016)."""
  x = x_TD.astype(jnp.float32)
  centered = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.square(centered).mean(axis=-1, keepdims=True)
  y_TD = centered * jax.lax.rsqrt(variance + epsilon) * params["scale"][None, :]
  if "bias" in params:
    y_TD += params["bias"][None, :]
  return y_TD.astype(x_TD.dtype)


def linear(params: dict, x_TD: jax.Array) -> jax.Array:
  """Multiplies by the kernel [in, out], in the dtype of x, and adds the bias if there is one."""
  y = x_TD @ params["kernel"].astype(x_TD.dtype)
  return y + params["bias"].astype(x_TD.dtype)[None, :] if "bias" in params else y


def attention_scale(config: ModelConfig, layer: Layer) -> float | jax.Array:
  """Returns what the scores of a layer are multiplied by."""
  K = config.head_width
  scale = {"sqrt_head_dim": 1 / math.sqrt(K), "one": 1.0, "head_dim": 1 / K}[config.attention_scale]
  return scale / (layer.index + 1) if config.scale_attention_by_layer else scale


def attention(params: dict, x_TD: jax.Array, mix: Mixer, layer: Layer) -> tuple[jax.Array, Any]:
  """Projects to queries, keys and values, mixes positions, and projects back."""
  query_TA, key_TA, value_TA = (linear(params[name], x_TD) for name in ("query", "key", "value"))
  mixed_TA, kept = mix(query_TA, key_TA, value_TA, layer)
  return linear(params["output"], mixed_TA), kept


def mlp(params: dict, x_TD: jax.Array, config: ModelConfig) -> jax.Array:
  """Expands to F, applies the activation, and projects back."""
  return linear(params["down"], ACTIVATIONS[config.activation](linear(params["up"], x_TD)))


def block(
  params: dict,
  x_TD: jax.Array,
  config: ModelConfig,
  mix: Mixer,
  layer: Layer,
  key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
  """Applies one block.

  Args:
    params: one layer's parameters, unstacked.
    x_TD: residual stream in the compute dtype.
    config: the architecture.
    mix: attention over positions, closed over masks or a cache.
    layer: which layer this is.
    key: dropout key; None is deterministic.

  Returns:
    (the new residual stream [T, D], what `mix` kept).
  """
  attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
  rate = config.residual_dropout

  def norm(name, x):
    return layer_norm(params[name], x, config.norm_epsilon)

  if config.norm_position == "post":
    mixed, kept = attention(params["attention"], x_TD, mix, layer)
    x_TD = norm("attention_norm", x_TD + dropout(mixed, rate, attention_key))
    expanded = mlp(params["mlp"], x_TD, config)
    return norm("mlp_norm", x_TD + dropout(expanded, rate, mlp_key)), kept

  normed = norm("attention_norm", x_TD)
  mixed, kept = attention(params["attention"], normed, mix, layer)
  mixed = dropout(mixed, rate, attention_key)
  if config.parallel_residual:
    mlp_input = normed if config.shared_norm else norm("mlp_norm", x_TD)
    return x_TD + mixed + dropout(mlp(params["mlp"], mlp_input, config), rate, mlp_key), kept
  x_TD = x_TD + mixed
  return x_TD + dropout(mlp(params["mlp"], norm("mlp_norm", x_TD), config), rate, mlp_key), kept
