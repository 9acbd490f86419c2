"""`init_from`: another model's parameters to start from, in place of fresh ones."""

from typing import Any

from gptjax.checkpoint.models import describe_model, load_model, load_model_tokenizer
from gptjax.checkpoint.resolve import resolve_model
from gptjax.data.prepare import PreparedData
from gptjax.errors import CheckpointError
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import model_specs
from gptjax.model.recipe import TRAINING_FIELDS, spell_out
from gptjax.parallel import Parallel
from gptjax.train.config import PretrainConfig
from gptjax.train.setup import say
from gptjax.tree import PyTree, named_leaves


def check_init_from(config: PretrainConfig, prepared: PreparedData) -> None:
  """Raises CheckpointError unless init_from is a model of this architecture and tokenizer."""
  if not config.init_from:
    return
  here, there = _spell_out(config.model), _spell_out(describe_model(config.init_from, say))
  different = [f"model.{key}={value!r}" for key, value in there.items() if here[key] != value]
  if different:
    raise CheckpointError(
      f'init_from "{config.init_from}" has another architecture; set {", ".join(different)}'
    )
  model = resolve_model(config.init_from, say)
  tokenizer = load_model_tokenizer(model, {})
  if tokenizer is None:
    say(f'init_from "{config.init_from}" has no tokenizer to compare data.tokenizer with')
  elif tokenizer.fingerprint != prepared.tokenizer.fingerprint:
    raise CheckpointError(
      f'init_from "{config.init_from}" was trained with another tokenizer; set'
      f' data.tokenizer="{model.path}" and data.end_token="{tokenizer.end_token or ""}"'
    )


def load_initial(config: PretrainConfig, parallel: Parallel) -> PyTree:
  """Loads the parameters of init_from, float32, placed; of a run that kept one, their average."""
  loaded = load_model(config.init_from, "float32", parallel, report=say).params
  params = {part: loaded[part] for part in model_specs(config.model)}
  left_out = "".join(f'; its "{part}" is left out' for part in loaded if part not in params)
  say(
    f"starting from {config.init_from}: all {len(named_leaves(params))} parameters match{left_out};"
    " the optimiser and the count of steps are fresh"
  )
  return params


def _spell_out(model: ModelConfig) -> dict[str, Any]:
  """Returns what both models must have in common: shapes and functions."""
  fields = spell_out(model) | {"vocab_multiple": model.vocab_multiple}
  # ("global", "global") is ("global",).
  pattern = model.attention_pattern
  periods = (p for p in range(1, len(pattern) + 1) if len(pattern) % p == 0)
  fields["attention_pattern"] = next(
    pattern[:p] for p in periods if pattern == pattern[:p] * (len(pattern) // p)
  )
  return {key: fields[key] for key in fields if key not in ("family", *TRAINING_FIELDS)}
