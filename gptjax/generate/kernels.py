"""Weights in the layout that decodes fastest: one tree a layer, matrices transposed, or in int8.

`Transposed` and `Int8` stand where a kernel does in `gptjax.model.block`, which multiplies by
`x @ kernel.astype(x.dtype)` and knows of neither.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.errors import check_choice
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import unstack_layers
from gptjax.model.products import multiply_transposed
from gptjax.tree import map_named

PyTree = Any

WEIGHTS = ("float32", "int8")
_LARGEST_INT8 = 127


@struct.dataclass
class Transposed:
  """A kernel stored [out, in], for `multiply_transposed`.

  Attributes:
    kernel_OI: the matrix, of any float dtype.
  """

  kernel_OI: jax.Array

  def astype(self, dtype: Any) -> "Transposed":
    return Transposed(self.kernel_OI.astype(dtype))

  def __rmatmul__(self, x_TI: jax.Array) -> jax.Array:
    return multiply_transposed(x_TI, self.kernel_OI)


@struct.dataclass
class Int8:
  """A kernel of whole numbers and one scale for each output; products are of the dtype of x.

  Attributes:
    kernel_OI: int8, in [-127, 127].
    scale_O: float32.
  """

  kernel_OI: jax.Array
  scale_O: jax.Array

  def astype(self, dtype: Any) -> "Int8":
    del dtype
    return self

  def __rmatmul__(self, x_TI: jax.Array) -> jax.Array:
    product_TO = multiply_transposed(x_TI, self.kernel_OI.astype(x_TI.dtype))
    return (product_TO * self.scale_O[None, :]).astype(x_TI.dtype)


def prepare(params: PyTree, config: ModelConfig, weights: str = "float32") -> PyTree:
  """Makes the weights that decoding reads, once; they take as much memory again as the layers.

  Args:
    params: the whole tree.
    config: the architecture.
    weights: "float32" (any float dtype, as the parameters are) or "int8" (matrices of the layers in
      a quarter of the bytes; embeddings, head and norms stay).

  Returns:
    {"decoder": tables and final norm, "layers": [one tree a layer], "lm_head" where untied}; also
    what `gptjax.model.heads.lm_logits` takes.
  """
  check_choice("weights", weights, WEIGHTS)
  decoder = {name: part for name, part in params["decoder"].items() if name != "layers"}
  head = {"lm_head": params["lm_head"]} if "lm_head" in params else {}
  layers = _prepare_layers(params["decoder"]["layers"], config, weights)
  return {"decoder": decoder, "layers": layers, **head}


@functools.partial(jax.jit, static_argnames=("config", "weights"))
def _prepare_layers(layers: PyTree, config: ModelConfig, weights: str) -> list[PyTree]:
  convert = _quantize if weights == "int8" else Transposed

  def prepare_leaf(name, leaf):
    return convert(leaf.T) if name.endswith("kernel") else leaf

  return [map_named(prepare_leaf, layer) for layer in unstack_layers(layers, config)]


@jax.jit
def round_to_int8(params: PyTree) -> PyTree:
  """Returns the tree with the numbers that `prepare(..., "int8")` keeps, in the tree's own dtypes.

  So anything that reads parameters tells what int8 costs, such as a perplexity.
  """

  def round_leaf(name, leaf):
    if not (name.startswith("decoder/layers/") and name.endswith("kernel")):
      return leaf
    whole, scale = _to_whole(leaf, axis=-2)
    return (whole * scale).astype(leaf.dtype)

  return map_named(round_leaf, params)


def _quantize(kernel_OI: jax.Array) -> Int8:
  whole_OI, scale_O1 = _to_whole(kernel_OI, axis=1)
  return Int8(whole_OI.astype(jnp.int8), scale_O1[:, 0])


def _to_whole(kernel: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  """Rounds to the nearest of 255 whole multiples of a scale, one for each output.

  Args:
    axis: of the inputs.

  Returns:
    float32 (multiples, scales), of which the second has length 1 there.
  """
  kernel = kernel.astype(jnp.float32)
  largest = jnp.max(jnp.abs(kernel), axis=axis, keepdims=True)
  scale = jnp.where(largest > 0, largest, 1.0) / _LARGEST_INT8
  return jnp.round(kernel / scale), scale
