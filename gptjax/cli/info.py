"""`gptjax info`: what a model is, and how it differs from the recipe it follows."""

import argparse
import json
import math
from typing import Any

import jax
import numpy as np

from gptjax.checkpoint.models import DTYPES, describe_model
from gptjax.cli.arguments import MODEL_HELP, add_json
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import count_parameters, model_specs
from gptjax.model.recipe import TRAINING_FIELDS, nearest_recipe
from gptjax.report import format_bytes, format_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("model", help=MODEL_HELP)
  add_json(parser)


def run(options: argparse.Namespace) -> None:
  facts = describe(describe_model(options.model))
  print(json.dumps(facts, ensure_ascii=False) if options.json else _to_text(facts))


def describe(config: ModelConfig) -> dict[str, Any]:
  """Returns the facts about a model.

  Returns:
    family; parameters (ties counted once, padding not at all); sizes; memory_bytes of the
    parameters by dtype, padding included; recipe (the nearest published model), and differences
    from it, {field: {"model", "recipe"}}.
  """
  recipe = nearest_recipe(config)
  elements = sum(math.prod(spec.shape) for spec in jax.tree.leaves(model_specs(config)))
  return {
    "family": config.family,
    "parameters": count_parameters(config),
    "vocab_size": config.vocab_size,
    "context_length": config.context_length,
    "num_layers": config.num_layers,
    "model_dim": config.model_dim,
    "num_heads": config.num_heads,
    "head_dim": config.head_width,
    "ffw_dim": config.ffw_width,
    "memory_bytes": {dtype: elements * np.dtype(dtype).itemsize for dtype in DTYPES},
    "recipe": recipe.name,
    "differences": {
      field: {"model": here, "recipe": there} for field, (here, there) in recipe.differences.items()
    },
  }


def _to_text(facts: dict[str, Any]) -> str:
  parameters = facts["parameters"]
  memory = (f"{format_bytes(size)} in {dtype}" for dtype, size in facts["memory_bytes"].items())
  rows = {
    "family": facts["family"],
    "parameters": f"{parameters:,} ({format_count(parameters)})",
    "vocabulary": f"{facts['vocab_size']:,}",
    "context": f"{facts['context_length']:,} tokens",
    "layers": f"{facts['num_layers']} of width {facts['model_dim']}, MLP of {facts['ffw_dim']}",
    "heads": f"{facts['num_heads']} of width {facts['head_dim']}",
    "memory": ", ".join(memory),
  }
  lines = [f"{name:<12}{value}" for name, value in rows.items()]
  if not facts["differences"]:
    return "\n".join([*lines, f"{'recipe':<12}{facts['recipe']}, as published"])
  lines.append(f"{'recipe':<12}nearest is {facts['recipe']}, which has")
  for field, values in facts["differences"].items():
    note = " (matters in training only)" if field in TRAINING_FIELDS else ""
    lines.append(f"{'':<12}{field} {values['recipe']}, and this {values['model']}{note}")
  return "\n".join(lines)
