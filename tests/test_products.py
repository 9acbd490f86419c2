"""Few rows by blocks give what one product gives."""

import jax
import numpy as np
import pytest

from gptjax.model.products import multiply_transposed

# float32 sums of 24 products in another order.
SAME = 2e-6


@pytest.mark.parametrize("num_outputs", [16, 61, 64, 192, 200])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 31, 32, 33])
def test_blocks_do_not_matter(num_rows, num_outputs):
  draw = np.random.default_rng(num_rows)
  x, kernel = (draw.standard_normal((n, 24), np.float32) for n in (num_rows, num_outputs))
  product = jax.jit(multiply_transposed)(x, kernel)
  expected = x.astype(np.float64) @ kernel.T
  assert product.shape == expected.shape
  assert np.abs(product - expected).max() < SAME * np.abs(expected).max()
  assert np.abs(product[::-1] - expected).max() > SAME * np.abs(expected).max() or num_rows == 1


def test_bfloat16_sums_in_float32():
  x, kernel = np.ones((4, 512)), np.ones((64, 512))
  product = multiply_transposed(*(jax.numpy.bfloat16(a) for a in (x, kernel)), jax.numpy.float32)
  assert product.dtype == np.float32
  assert (product == 512).all()
