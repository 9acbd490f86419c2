"""The product of few rows with a large matrix, which decoding does and nothing else."""

import math
from typing import Any

import jax
import jax.numpy as jnp

_MOST_ROWS = 32
_BLOCK_OUTPUTS = 64


def multiply_transposed(x_TI: jax.Array, kernel_OI: jax.Array, dtype: Any = None) -> jax.Array:
  """Returns x @ kernel.T, [T, O].

  For up to 32 rows on CPU the outputs go by blocks of 64 and the rows are filled up to a power of
  two: XLA has fast code for a batch of small products with 4, 8 or 16 rows, and reads the matrix
  twice as fast as in one product (docs/log.md, 2026-11-23).

  Args:
    x_TI, kernel_OI: of one dtype.
    dtype: of the result and of its sums; None is that of x.
  """
  num_rows, (num_outputs, num_inputs) = len(x_TI), kernel_OI.shape
  block = math.gcd(num_outputs, _BLOCK_OUTPUTS)
  is_fast = 1 < num_rows <= _MOST_ROWS and block > 8 and jax.default_backend() == "cpu"
  if not is_fast:
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_TI, kernel_OI, dims, preferred_element_type=dtype)
  filled = 1 << (num_rows - 1).bit_length()
  filled_TI = jnp.pad(x_TI, ((0, filled - num_rows), (0, 0)))
  blocks_NCI = kernel_OI.reshape(-1, block, num_inputs)
  product_NTC = jnp.einsum("ti,nci->ntc", filled_TI, blocks_NCI, preferred_element_type=dtype)
  return jnp.swapaxes(product_NTC, 0, 1).reshape(filled, num_outputs)[:num_rows]
