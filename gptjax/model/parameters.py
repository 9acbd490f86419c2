"""The parameter tree: every name, shape and initialiser, written once.

`{"decoder": ..., "lm_head": ... (not where tied), "task_head": ... (only fine-tuned)}`; kernels
are [in, out], vocabulary matrices [V, D], and the layers are stacked on a leading axis. Values are
GPT-2's: N(0, init_std), residual projections scaled by 1/sqrt(2 * num_layers), zero biases
(Radford et al. 2019, section 2.3).
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import tree
from gptjax.model.config import ModelConfig

# Path rules for the mesh: one axis name (or None) a dimension; the first match wins. Megatron's
# layout: columns of the first product and rows of the second over "tensor", the rest over "fsdp".
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"token_embedding/embedding$", ("tensor", "fsdp")),
  (r"lm_head/kernel$", ("tensor", "fsdp")),
  (r"position_embedding/embedding$", (None, "fsdp")),
  (r"layers/attention/(query|key|value)/kernel$", (None, "fsdp", "tensor")),
  (r"layers/attention/(query|key|value)/bias$", (None, "tensor")),
  (r"layers/attention/output/kernel$", (None, "tensor", "fsdp")),
  (r"layers/mlp/up/kernel$", (None, "fsdp", "tensor")),
  (r"layers/mlp/up/bias$", (None, "tensor")),
  (r"layers/mlp/down/kernel$", (None, "tensor", "fsdp")),
  (r"", ()),
)


# Arrays below this size are drawn whole by every device.
FLAT_DRAW_ELEMENTS = 1 << 24


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
  """One array: its shape, and the normal distribution N(mean, std) it starts from."""

  shape: tuple[int, ...]
  std: float = 0.0
  mean: float = 0.0

  def init(self, key: jax.Array) -> jax.Array:
    """Draws float32 values."""
    if not self.std:
      return jnp.full(self.shape, self.mean, jnp.float32)
    # The same numbers either way. A flat draw compiles in a third of the time; the other can be
    # drawn in parts by the devices of a mesh.
    is_flat = math.prod(self.shape) < FLAT_DRAW_ELEMENTS
    shape = (math.prod(self.shape),) if is_flat else self.shape
    drawn = jax.random.normal(key, shape, jnp.float32).reshape(self.shape)
    return self.mean + self.std * drawn


def decoder_specs(config: ModelConfig) -> dict[str, Any]:
  """Describes the decoder's parameters as nested dicts of ParameterSpec."""
  D, A, F, N = config.model_dim, config.attention_dim, config.ffw_width, config.num_layers
  hidden_std = config.init_std / math.sqrt(config.width_multiplier)
  residual_std = hidden_std / (math.sqrt(2 * N) if config.residual_init_scale else 1)

  def linear(dim_in, dim_out, bias, std=hidden_std):
    specs = {"kernel": ParameterSpec((N, dim_in, dim_out), std)}
    return specs | ({"bias": ParameterSpec((N, dim_out))} if bias else {})

  def norm(*stack):
    specs = {"scale": ParameterSpec((*stack, D), mean=1.0)}
    return specs | ({"bias": ParameterSpec((*stack, D))} if config.norm_bias else {})

  layers = {
    "attention_norm": norm(N),
    "attention": {name: linear(D, A, config.qkv_bias) for name in ("query", "key", "value")}
    | {"output": linear(A, D, config.attention_output_bias, residual_std)},
    "mlp": {
      "up": linear(D, F, config.mlp_bias),
      "down": linear(F, D, config.mlp_bias, residual_std),
    },
  }
  if not config.shared_norm:
    layers["mlp_norm"] = norm(N)
  specs = {
    "token_embedding": {"embedding": ParameterSpec((config.padded_vocab_size, D), config.init_std)},
    "layers": layers,
  }
  if config.positions == "learned":
    shape = (config.context_length, D)
    specs["position_embedding"] = {"embedding": ParameterSpec(shape, config.position_init_std)}
  if config.final_norm:
    specs["final_norm"] = norm()
  return specs


def lm_head_specs(config: ModelConfig) -> dict[str, Any]:
  """Describes the untied language-model head; empty where it is tied."""
  if config.tie_embeddings:
    return {}
  V = config.padded_vocab_size
  specs = {"kernel": ParameterSpec((V, config.model_dim), config.init_std)}
  return specs | ({"bias": ParameterSpec((V,))} if config.head_bias else {})


def task_head_specs(config: ModelConfig, num_outputs: int) -> dict[str, Any]:
  """Describes the linear layer of a task, C = num_outputs (Radford et al. 2018, section 3.2)."""
  kernel = ParameterSpec((config.model_dim, num_outputs), config.init_std)
  return {"kernel": kernel, "bias": ParameterSpec((num_outputs,))}


def model_specs(config: ModelConfig) -> dict[str, Any]:
  """Describes the whole tree of a language model."""
  head = lm_head_specs(config)
  return {"decoder": decoder_specs(config)} | ({"lm_head": head} if head else {})


def init_specs(specs: Any, key: jax.Array) -> Any:
  """Draws every array; each key depends on the parameter's path alone, not on its neighbours."""
  names = list(tree.named_leaves(specs))
  hashes = jnp.array([zlib.crc32(name.encode()) for name in names], jnp.uint32)
  # At once: XLA would compile every fold_in on its own.
  keys = dict(zip(names, jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)))
  return tree.map_named(lambda name, spec: spec.init(keys[name]), specs)


def init_parameters(config: ModelConfig, key: jax.Array) -> Any:
  """Draws the parameters of a language model: float32, nested dicts."""
  return init_specs(model_specs(config), key)


def count_parameters(config: ModelConfig) -> int:
  """Counts parameters as papers do: ties once, vocabulary padding not at all."""
  unpadded = dataclasses.replace(config, vocab_multiple=1)
  return sum(math.prod(spec.shape) for spec in jax.tree.leaves(model_specs(unpadded)))
