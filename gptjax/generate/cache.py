"""The key-value cache: static shapes, rows right-aligned at the end of the prompt.

Prompts of different lengths are padded on the left, so that every row writes the same slot at
every step; `first_slot_B` says where a row begins, and nothing before it is ever seen.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.batch import Batch
from gptjax.model import positions
from gptjax.model.attention import causal_attention, masked_attention
from gptjax.model.block import Layer, Mixer, attention_scale, block
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import embed, final_norm


@struct.dataclass
class Cache:
  """Keys and values of every layer, one pair of arrays [B, M, H, K] each.

  Attributes:
    keys, values: tuples over layers, in the compute dtype, keys already rotated.
    next_slot: int32, the slot that the next token writes.
    first_slot_B: int32, the slot of each row's first token.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  next_slot: jax.Array
  first_slot_B: jax.Array


def prefill(
  decoder_params: Any,
  layers: list[Any],
  tokens_BL: jax.Array,
  first_slot_B: jax.Array,
  num_slots: int,
  config: ModelConfig,
) -> tuple[jax.Array, Cache]:
  """Runs whole prompts at once.

  Args:
    decoder_params: the "decoder" subtree, for embeddings and the final norm.
    layers: one parameter tree a layer.
    tokens_BL: int32 prompts, padded on the left with any token.
    first_slot_B: int32 place of each row's first token in tokens_BL.
    num_slots: M >= L, room for the tokens to come.
    config: the architecture.

  Returns:
    (hidden states [B, D] of the last position, the filled cache).
  """
  num_rows, length = tokens_BL.shape
  slots_L = jnp.arange(length)
  is_token_BL = slots_L[None, :] >= first_slot_B[:, None]
  positions_BL = jnp.maximum(slots_L[None, :] - first_slot_B[:, None], 0)
  batch = Batch(tokens_BL, tokens_BL, is_token_BL, positions_BL, is_token_BL.astype(jnp.int32))
  shape = (num_rows, length, config.num_heads, config.head_width)

  def mix(query_TA, key_TA, value_TA, layer: Layer):
    query, key, value = (x.reshape(shape) for x in (query_TA, key_TA, value_TA))
    query, key = _rotate((query, key), positions_BL, config)
    window = config.window_size if layer.kind == "local" else None
    mixed = causal_attention(
      query,
      key,
      value,
      scale=attention_scale(config, layer),
      window=window,
      segment_ids_BL=batch.segment_ids_BL,
    )
    room = ((0, 0), (0, num_slots - length), (0, 0), (0, 0))
    return mixed.reshape(-1, config.attention_dim), (jnp.pad(key, room), jnp.pad(value, room))

  x_TD = embed(decoder_params, tokens_BL, positions_BL, config)
  x_TD, kept = _run(layers, x_TD, config, lambda i: mix)
  keys, values = zip(*kept)
  hidden_BD = x_TD.reshape(num_rows, length, -1)[:, -1]
  cache = Cache(keys, values, jnp.int32(length), first_slot_B)
  return final_norm(decoder_params, hidden_BD, config), cache


def decode_step(
  decoder_params: Any, layers: list[Any], token_B: jax.Array, cache: Cache, config: ModelConfig
) -> tuple[jax.Array, Cache]:
  """Appends one token to every row.

  Args:
    decoder_params, layers, config: as for `prefill`.
    token_B: int32, the new token of each row.
    cache: with a free slot.

  Returns:
    (hidden states [B, D] of the new position, the longer cache).
  """
  num_slots = cache.keys[0].shape[1]
  slots_M = jnp.arange(num_slots)
  positions_B1 = (cache.next_slot - cache.first_slot_B)[:, None]
  shape = (token_B.shape[0], 1, config.num_heads, config.head_width)
  is_seen_BM = (slots_M[None] <= cache.next_slot) & (slots_M[None] >= cache.first_slot_B[:, None])

  def mixer(index: int) -> Mixer:
    def mix(query_BA, key_BA, value_BA, layer: Layer):
      query, key, value = (x.reshape(shape) for x in (query_BA, key_BA, value_BA))
      query, key = _rotate((query, key), positions_B1, config)
      keys = jax.lax.dynamic_update_slice_in_dim(cache.keys[index], key, cache.next_slot, axis=1)
      values = jax.lax.dynamic_update_slice_in_dim(
        cache.values[index], value, cache.next_slot, axis=1
      )
      mask_BM = is_seen_BM
      if layer.kind == "local":
        mask_BM &= slots_M[None] > cache.next_slot - config.window_size
      scale = attention_scale(config, layer)
      mixed = masked_attention(query, keys, values, mask_BM[:, None, None, :], scale)
      return mixed.reshape(-1, config.attention_dim), (keys, values)

    return mix

  x_BD = embed(decoder_params, token_B[:, None], positions_B1, config)
  x_BD, kept = _run(layers, x_BD, config, mixer)
  keys, values = zip(*kept)
  cache = Cache(keys, values, cache.next_slot + 1, cache.first_slot_B)
  return final_norm(decoder_params, x_BD, config), cache


def _run(layers: list[Any], x_TD: jax.Array, config: ModelConfig, mixer):
  """Runs the blocks one after the other, collecting what each mixer kept."""
  kept = []
  for index, layer_params in enumerate(layers):
    kind = config.attention_pattern[index % len(config.attention_pattern)]
    x_TD, pair = block(layer_params, x_TD, config, mixer(index), Layer(kind, index))
    kept.append(pair)
  return x_TD, kept


def _rotate(arrays, positions_BL: jax.Array, config: ModelConfig):
  if config.positions != "rotary":
    return arrays
  angles = positions.rotary_angles(positions_BL, config)
  return tuple(positions.rotate(x, angles, config) for x in arrays)
