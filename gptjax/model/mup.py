"""muP and the standard parametrisation of one function.

What muP changes of the forward pass is two scales, and the parameters next to them can hold both.
"""

import dataclasses
import math
from typing import Any

from gptjax.model.config import ModelConfig
from gptjax.tree import map_named

PyTree = Any


def standard_form(config: ModelConfig, params: PyTree) -> tuple[ModelConfig, PyTree]:
  """Returns the same function in the standard parametrisation, for programs that know no other.

  The queries take the scale of attention, and the last norm that of the states that heads read.
  Only the function is the same: trained further, it would learn at other rates.

  Args:
    config: one without a last norm keeps that scale.
    params: arrays of NumPy or jax.
  """
  scales = {}
  if config.attention_scale == "head_dim":
    config = dataclasses.replace(config, attention_scale="sqrt_head_dim")
    scales["decoder/layers/attention/query/"] = 1 / math.sqrt(config.head_width)
  if config.mup_base_dim and config.final_norm:
    scales["decoder/final_norm/"] = 1 / config.width_multiplier
    config = dataclasses.replace(config, mup_base_dim=None)
  if not scales:
    return config, params

  def rescale(name, leaf):
    scale = next((scale for path, scale in scales.items() if name.startswith(path)), 1)
    return leaf if scale == 1 else (leaf * scale).astype(leaf.dtype)

  return config, map_named(rescale, params)
