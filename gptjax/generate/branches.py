"""The memory of a beam search: a prompt and its beams are branches of one tree, in one cache row.

A beam search usually copies the keys and values of every beam at every step, and those of the
prompt with them. Here nothing is copied: a mask says which slots lie on a beam's path, and all
beams of a prompt attend in one product, which reads the prompt once.

Letters as in beams.py: B prompts, W beams of a prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.generate.cache import run_blocks
from gptjax.model import positions
from gptjax.model.attention import MASKED
from gptjax.model.block import attention_scale
from gptjax.model.config import ModelConfig


@struct.dataclass
class Tree:
  """What the model remembers of each prompt and its beams: branches of one tree, in one cache row.

  The slots of the prompt come first, then W for each step, one a beam. Keys and values are never
  moved: each beam sees the slots on its own path, and what was given up is on no path.

  Attributes:
    keys, values: tuples over layers of [B, H, M, K].
    place_BM: int32, where in a text the token of a slot stands.
    seen_BWM: bool, the path to each beam's last token.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  place_BM: jax.Array
  seen_BWM: jax.Array


def plant(
  keys: Sequence[jax.Array],
  values: Sequence[jax.Array],
  prompt_length_B: jax.Array,
  num_prompt_slots: int,
  num_beams: int,
) -> Tree:
  """Makes the tree of prompts that the model has read.

  Args:
    keys, values: of each layer, [B, H, M, K]; token i of a prompt is at slot i, and after the first
      num_prompt_slots there is room for W tokens a step, the last step excepted.
    prompt_length_B: int32; what is between it and num_prompt_slots is padding.
    num_beams: W.
  """
  slots_1M = jnp.arange(keys[0].shape[2])[None]
  step_1M = (slots_1M - num_prompt_slots) // num_beams
  place_BM = jnp.where(slots_1M < num_prompt_slots, slots_1M, prompt_length_B[:, None] + step_1M)
  seen_BM = slots_1M < prompt_length_B[:, None]
  seen_BWM = jnp.repeat(seen_BM[:, None], num_beams, axis=1)
  return Tree(tuple(keys), tuple(values), place_BM, seen_BWM)


def make_extend(
  weights: Any,
  logits: Callable,
  prompt_length_B: jax.Array,
  num_prompt_slots: int,
  config: ModelConfig,
) -> Callable:
  """Returns `extend` of `search`, for a model whose memory is a planted Tree.

  Args:
    weights: "decoder" (embeddings, final norm) and "layers", one tree a layer.
    logits: hidden_XD -> float32 [X, V].
    prompt_length_B, num_prompt_slots: as for `plant`.
    config: the architecture.
  """

  def extend(token_BW, parent_BW, num_new, tree: Tree):
    num_beams = token_BW.shape[1]
    slot = num_prompt_slots + (num_new - 1) * num_beams
    own_WM = jnp.arange(tree.place_BM.shape[1])[None] == slot + jnp.arange(num_beams)[:, None]
    seen_BWM = tree.seen_BWM[jnp.arange(len(parent_BW))[:, None], parent_BW]
    tree = tree.replace(seen_BWM=seen_BWM | own_WM[None])
    place_B = prompt_length_B + num_new - 1
    hidden_BWD, tree = _grow(weights, tree, token_BW, place_B, slot, config)
    logits_RV = logits(hidden_BWD.reshape(-1, config.model_dim))
    return logits_RV.reshape(*token_BW.shape, -1), tree

  return extend


def _grow(
  weights: Any, tree: Tree, token_BW: jax.Array, place_B: jax.Array, slot, config: ModelConfig
) -> tuple[jax.Array, Tree]:
  """Runs one token of each beam, whose path is already seen; writes W slots from `slot` on.

  Returns:
    (hidden states [B, W, D] after the final norm, the tree).
  """
  num_prompts, num_beams = token_BW.shape
  place_BW = jnp.repeat(place_B[:, None], num_beams, axis=1)
  shape = (num_prompts, num_beams, config.num_heads, config.head_width)
  angles = positions.rotary_angles(place_BW, config) if config.positions == "rotary" else None

  def mixer(index):
    def mix(query_TA, key_TA, value_TA, layer):
      query, key, value = (x.reshape(shape) for x in (query_TA, key_TA, value_TA))
      if angles is not None:
        query, key = (positions.rotate(x, angles, config) for x in (query, key))
      keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(new, 1, 2), slot, axis=2)
        for old, new in ((tree.keys[index], key), (tree.values[index], value))
      )
      mask_BWM = tree.seen_BWM
      if layer.kind == "local":
        mask_BWM &= tree.place_BM[:, None] > (place_B - config.window_size)[:, None, None]
      query_BHWK = jnp.swapaxes(query, 1, 2) * attention_scale(config, layer)
      scores = jnp.einsum("bhwk,bhmk->bhwm", query_BHWK, keys, preferred_element_type=jnp.float32)
      weights_BHWM = jax.nn.softmax(jnp.where(mask_BWM[:, None], scores, MASKED), axis=-1)
      mixed = jnp.einsum("bhwm,bhmk->bwhk", weights_BHWM.astype(values.dtype), values)
      return mixed.reshape(-1, config.attention_dim), (keys, values)

    return mix

  hidden_BWD, cache = run_blocks(weights, token_BW, place_BW, mixer, config)
  return hidden_BWD, tree.replace(keys=cache.keys, values=cache.values)
