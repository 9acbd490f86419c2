"""The key-value cache: static shapes, token i of a row at slot i.

Rows stand at the left, whatever their lengths: a query sees the slots up to its own and nothing
else, so that neither padding, nor companions, nor the number of slots can change what it sees.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.model import positions
from gptjax.model.attention import MASKED, causal_attention
from gptjax.model.block import Layer, attention_scale, block
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import embed, final_norm

PyTree = Any


@struct.dataclass
class Cache:
  """Keys and values of every layer, heads first: decoding reads them as they lie.

  Attributes:
    keys, values: tuples over layers of [R, H, M, K], in the compute dtype, keys already rotated.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]


def prefill(
  weights: PyTree, tokens_RL: jax.Array, num_slots: int, config: ModelConfig
) -> tuple[jax.Array, Cache]:
  """Runs whole prompts at once.

  Args:
    weights: from `prepare`.
    tokens_RL: int32 prompts, padded on the right with any token.
    num_slots: M >= L, room for the tokens to come.
    config: the architecture.

  Returns:
    (hidden states [R, L, D] after the final norm, the cache). What padding left in the cache is
    written over before it is seen.
  """
  num_rows, length = tokens_RL.shape
  positions_RL = jnp.broadcast_to(jnp.arange(length)[None], tokens_RL.shape)
  shape = (num_rows, length, config.num_heads, config.head_width)
  angles = _angles(positions_RL, config)
  room = ((0, 0), (0, 0), (0, num_slots - length), (0, 0))

  def mix(query_TA, key_TA, value_TA, layer: Layer):
    query, key, value = (x.reshape(shape) for x in (query_TA, key_TA, value_TA))
    query, key = _rotate((query, key), angles, config)
    mixed = causal_attention(
      query, key, value, scale=attention_scale(config, layer), window=_window(layer, config)
    )
    kept = tuple(jnp.pad(jnp.swapaxes(x, 1, 2), room) for x in (key, value))
    return mixed.reshape(-1, config.attention_dim), kept

  return run_blocks(weights, tokens_RL, positions_RL, lambda index: mix, config)


def extend(
  weights: PyTree, tokens_RQ: jax.Array, position_R: jax.Array, cache: Cache, config: ModelConfig
) -> tuple[jax.Array, Cache]:
  """Runs Q more tokens of every row.

  Args:
    weights: from `prepare`.
    tokens_RQ: int32.
    position_R: int32, where in its row the first of them stands; what the cache holds from there
      on is written over, and what stands after slot M is lost.
    cache: with the row's earlier tokens.
    config: the architecture.

  Returns:
    (hidden states [R, Q, D] after the final norm, the cache).
  """
  num_rows, num_new = tokens_RQ.shape
  positions_RQ = position_R[:, None] + jnp.arange(num_new)[None]
  shape = (num_rows, num_new, config.num_heads, config.head_width)
  angles = _angles(positions_RQ, config)
  slots_M = jnp.arange(cache.keys[0].shape[2])
  distance_RQM = positions_RQ[:, :, None] - slots_M[None, None]
  place = (
    jnp.arange(num_rows)[:, None, None],
    jnp.arange(config.num_heads)[None, :, None],
    positions_RQ[:, None],
  )

  def mixer(index: int):
    def mix(query_TA, key_TA, value_TA, layer: Layer):
      query, key, value = (x.reshape(shape) for x in (query_TA, key_TA, value_TA))
      query, key = _rotate((query, key), angles, config)
      query_RHQK, key_RHQK, value_RHQK = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
      keys_RHMK = cache.keys[index].at[place].set(key_RHQK, mode="drop")
      values_RHMK = cache.values[index].at[place].set(value_RHQK, mode="drop")
      is_seen_RQM = distance_RQM >= 0
      if layer.kind == "local":
        is_seen_RQM &= distance_RQM < config.window_size
      mixed_RHQK = _attend(
        query_RHQK * attention_scale(config, layer), keys_RHMK, values_RHMK, is_seen_RQM
      )
      mixed_TA = jnp.swapaxes(mixed_RHQK, 1, 2).reshape(-1, config.attention_dim)
      return mixed_TA, (keys_RHMK, values_RHMK)

    return mix

  return run_blocks(weights, tokens_RQ, positions_RQ, mixer, config)


def _attend(query_RHQK, keys_RHMK, values_RHMK, is_seen_RQM) -> jax.Array:
  scores_RHQM = jnp.einsum(
    "rhqk,rhmk->rhqm", query_RHQK, keys_RHMK, preferred_element_type=jnp.float32
  )
  weights_RHQM = jax.nn.softmax(jnp.where(is_seen_RQM[:, None], scores_RHQM, MASKED), axis=-1)
  return jnp.einsum("rhqm,rhmk->rhqk", weights_RHQM.astype(values_RHMK.dtype), values_RHMK)


def run_blocks(
  weights: PyTree, tokens_RL, positions_RL, mixer, config: ModelConfig
) -> tuple[jax.Array, Cache]:
  """Runs embeddings, blocks and final norm.

  Args:
    tokens_RL, positions_RL: int32, what is read and where in its text it stands.
    mixer: index of a layer -> its attention, a `Mixer` that keeps (keys, values).

  Returns:
    (hidden states [R, L, D], what the mixers kept).
  """
  x_TD = embed(weights["decoder"], tokens_RL, positions_RL, config)
  kept = []
  for index, layer_params in enumerate(weights["layers"]):
    kind = config.attention_pattern[index % len(config.attention_pattern)]
    x_TD, pair = block(layer_params, x_TD, config, mixer(index), Layer(kind, index))
    kept.append(pair)
  keys, values = zip(*kept)
  hidden_TD = final_norm(weights["decoder"], x_TD, config)
  return hidden_TD.reshape(*tokens_RL.shape, config.model_dim), Cache(keys, values)


def _window(layer: Layer, config: ModelConfig) -> int | None:
  return config.window_size if layer.kind == "local" else None


def _angles(positions_RL: jax.Array, config: ModelConfig) -> jax.Array | None:
  return positions.rotary_angles(positions_RL, config) if config.positions == "rotary" else None


def _rotate(arrays, angles, config: ModelConfig):
  return arrays if angles is None else tuple(positions.rotate(x, angles, config) for x in arrays)
