"""What fine-tuning starts from: a model's architecture and tokenizer, and what it has learned."""

import dataclasses

import jax
import jax.numpy as jnp

from gptjax.checkpoint.models import (
  describe_model,
  load_model,
  load_model_tokenizer,
  read_run_config,
)
from gptjax.checkpoint.resolve import resolve_model
from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.data.gpt1_tokenizer import MODES
from gptjax.data.task_inputs import new_tokens
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import CheckpointError, ConfigError
from gptjax.model.config import ModelConfig
from gptjax.model.vocabulary import is_vocabulary
from gptjax.parallel import Parallel
from gptjax.train.finetune_config import FinetuneConfig
from gptjax.train.setup import say
from gptjax.tree import PyTree, map_named, named_leaves

_LAYERS = "decoder/layers/"
# Above the last layer: of no use without all of them.
_TOP = ("decoder/final_norm/", "lm_head/")


@dataclasses.dataclass(frozen=True)
class Origin:
  """The model that a run fine-tunes.

  Attributes:
    model: its architecture, with rows for the new tokens and the run's own choices.
    tokenizer: with the new tokens.
  """

  model: ModelConfig
  tokenizer: Tokenizer


def find_origin(config: FinetuneConfig, run: RunDirectory) -> Origin:
  """Finds architecture and tokenizer: of the run where it has begun, or else of init_from.

  Raises:
    UserError: no such model, none with a tokenizer, or one that is not its own.
  """
  if run.latest_step() is not None:
    model, name = read_run_config(run), str(run.path)
    tokenizer = load_model_tokenizer(resolve_model(name, say), _special(config))
  elif not config.init_from:
    raise ConfigError(
      'init_from is ""; name the pretrained model: a run directory, a Hugging Face folder, ...'
    )
  else:
    model, name = describe_model(config.init_from, say), config.init_from
    tokenizer = _load_tokenizer(config)
  if tokenizer is None:
    raise CheckpointError(
      f'"{name}" has no tokenizer of a known kind beside it; name one by --config.tokenizer=PATH'
    )
  added = set(tokenizer.added_tokens)
  ids = tokenizer.backend.get_vocab(with_added_tokens=True)
  num_ids = 1 + max(index for token, index in ids.items() if token not in added)
  if num_ids > model.vocab_size:
    raise CheckpointError(
      f'"{name}" has {model.vocab_size} rows in its embedding, and its tokenizer {num_ids} ids;'
      " it is the tokenizer of another model"
    )
  vocab_size = max(model.vocab_size, tokenizer.vocab_size)
  model = config.model.apply(dataclasses.replace(model, vocab_size=vocab_size))
  if config.data.max_length is not None and config.data.max_length > model.context_length:
    raise ConfigError(
      f"data.max_length is {config.data.max_length}, and the context of the model"
      f" {model.context_length}; lower it, or leave it unset"
    )
  _check_layers(config, model)
  return Origin(model, tokenizer)


def _special(config: FinetuneConfig) -> dict[str, list[str]]:
  return {"additional_special_tokens": new_tokens(config.data)}


def _load_tokenizer(config: FinetuneConfig) -> Tokenizer | None:
  """Loads init_from's own tokenizer, or the one that is named where it has none."""
  model = resolve_model(config.init_from, say)
  named = config.tokenizer or None
  if named and named not in MODES:
    own, given = load_model_tokenizer(model, {}), load_model_tokenizer(model, {}, named)
    if own is not None and own.fingerprint != given.fingerprint:
      raise CheckpointError(
        f'tokenizer "{named}" is not the one that init_from "{config.init_from}" was trained with,'
        " which is beside it; leave tokenizer unset"
      )
  return load_model_tokenizer(model, _special(config), named)


def _check_layers(config: FinetuneConfig, model: ModelConfig) -> None:
  layers = config.finetune.transfer_layers
  if layers is not None and layers > model.num_layers:
    raise ConfigError(
      f"finetune.transfer_layers is {layers}, and the model has {model.num_layers} layers"
    )


def load_transferred(
  config: FinetuneConfig, fresh: PyTree, model: ModelConfig, parallel: Parallel
) -> PyTree:
  """Puts what init_from has learned, as far as finetune.transfer_layers says, into `fresh`.

  Args:
    config: with init_from.
    fresh: the drawn parameters of the whole tree, placed.
    model: of the run.
    parallel: where they live.
  """
  num_rows = describe_model(config.init_from, lambda line: None).vocab_size
  loaded = load_model(
    config.init_from,
    "float32",
    parallel,
    _special(config),
    report=say,
    tokenizer=config.tokenizer or None,
  ).params
  num_layers = config.finetune.transfer_layers
  num_layers = model.num_layers if num_layers is None else num_layers
  is_whole = num_layers == model.num_layers
  there = named_leaves({name: loaded[name] for name in ("decoder", "lm_head") if name in loaded})

  def choose(name, leaf):
    if name not in there or (name.startswith(_TOP) and not is_whole):
      return leaf
    if name.startswith(_LAYERS):
      return _first(num_layers, there[name], leaf)
    return _first(num_rows, there[name], leaf) if is_vocabulary(name) else there[name]

  layers = "" if is_whole else f" up to layer {num_layers} of {model.num_layers}"
  drawn = [name for name in fresh if name not in ("decoder", "lm_head")]
  say(
    f"starting from {config.init_from}{layers}; drawn afresh: {', '.join(drawn)}"
    + f", {model.vocab_size - num_rows} rows of new tokens" * (model.vocab_size > num_rows)
    + ("" if is_whole else ", and what is above that layer")
  )
  return map_named(choose, fresh)


def _first(count: int, loaded: jax.Array, fresh: jax.Array) -> jax.Array:
  """Returns the first `count` entries of `loaded`, and the others of `fresh`."""
  if count >= loaded.shape[0]:
    return loaded
  is_kept = jnp.arange(loaded.shape[0]) < count
  return jnp.where(is_kept.reshape(-1, *[1] * (loaded.ndim - 1)), loaded, fresh)
