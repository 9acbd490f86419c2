"""Rotary position embeddings, interleaved (GPT-J) and in halves (GPT-NeoX).

Source: Su et al. 2021, "RoFormer", section 3.4.2; the two layouts are those of the released code.
"""

import jax
import jax.numpy as jnp

from gptjax.model.config import ModelConfig


def rotary_angles(positions_BL: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns the rotation angle of each pair: float32 radians [B, L, rotated_dim / 2]."""
  exponents = jnp.arange(0, config.rotated_dim, 2, dtype=jnp.float32) / config.rotated_dim
  frequencies = config.rotary_base**-exponents
  return positions_BL.astype(jnp.float32)[..., None] * frequencies[None, None, :]


def rotate(x_BLHK: jax.Array, angles: jax.Array, config: ModelConfig) -> jax.Array:
  """Rotates the first rotated_dim entries of each head by the angles of their position."""
  R = config.rotated_dim
  rotated, passed = x_BLHK[..., :R].astype(jnp.float32), x_BLHK[..., R:]
  sin, cos = jnp.sin(angles)[:, :, None, :], jnp.cos(angles)[:, :, None, :]
  if config.rotary_style == "interleaved":
    first, second = rotated[..., 0::2], rotated[..., 1::2]
  else:
    first, second = rotated[..., : R // 2], rotated[..., R // 2 :]
  pair = first * cos - second * sin, second * cos + first * sin
  if config.rotary_style == "interleaved":
    rotated = jnp.stack(pair, axis=-1).reshape(rotated.shape)
  else:
    rotated = jnp.concatenate(pair, axis=-1)
  return jnp.concatenate([rotated.astype(x_BLHK.dtype), passed], axis=-1)
