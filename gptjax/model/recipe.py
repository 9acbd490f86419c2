"""The published model that a config is nearest to, and where it leaves it. Imports no jax."""

import dataclasses
import math
from typing import Any

from gptjax.model.config import ModelConfig
from gptjax.model.presets import PRESETS

# How a model computes, not what.
_COMPUTING = (
  "attention_implementation",
  "compute_dtype",
  "remat",
  "scan_layers",
  "vocab_multiple",
)
# What only a new or a training model notices.
TRAINING_FIELDS = (
  "attention_dropout",
  "embedding_dropout",
  "init_std",
  "position_init_std",
  "residual_dropout",
  "residual_init_scale",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A published model beside a config.

  Attributes:
    name: of the preset.
    differences: {field: (of the config, as published)}.
  """

  name: str
  differences: dict[str, tuple[Any, Any]]


def nearest_recipe(config: ModelConfig) -> Recipe:
  """Returns the preset of the same family (of any, if there is none) whose sizes are nearest."""
  family = [name for name, preset in PRESETS.items() if preset.family == config.family]
  recipes = [Recipe(name, _differences(config, PRESETS[name])) for name in family or PRESETS]
  return min(
    recipes,
    key=lambda recipe: (_distance(config, PRESETS[recipe.name]), len(recipe.differences)),
  )


def _distance(config: ModelConfig, preset: ModelConfig) -> float:
  sizes = ("num_layers", "model_dim", "num_heads")
  return sum(abs(math.log(getattr(config, size) / getattr(preset, size))) for size in sizes)


def _differences(config: ModelConfig, preset: ModelConfig) -> dict[str, tuple[Any, Any]]:
  here, there = spell_out(config), spell_out(preset)
  return {name: (here[name], there[name]) for name in here if here[name] != there[name]}


def spell_out(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that matter, with what None stands for, and None for what has no effect."""
  fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  fields |= {"head_dim": config.head_width, "ffw_dim": config.ffw_width}
  if config.positions == "rotary":
    fields |= {"rotary_dim": config.rotated_dim, "position_init_std": None}
  else:
    fields |= dict.fromkeys(("rotary_dim", "rotary_style", "rotary_base"))
  if "local" not in config.attention_pattern:
    fields["window_size"] = None
  return {name: value for name, value in fields.items() if name not in _COMPUTING}
