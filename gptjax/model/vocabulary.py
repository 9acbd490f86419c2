"""Rows for new tokens: the one change of shape that a model can have."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.errors import ConfigError
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import init_specs, model_specs
from gptjax.tree import map_named, named_leaves

PyTree = Any


def grow_vocabulary(
  params: PyTree, config: ModelConfig, vocab_size: int, key: jax.Array
) -> tuple[PyTree, ModelConfig]:
  """Appends rows for new ids to the embedding and to a head of its own; a tied head has the same.

  Args:
    params: a whole tree, of which other parts (a task's head) are left as they are.
    config: its architecture.
    vocab_size: of the grown model. What was padding becomes rows; new padding is zero.
    key: draws the new rows as any parameter is: N(0, init_std), and zero for a bias.

  Returns:
    (parameters in the dtypes they had, config).

  Raises:
    ConfigError: the vocabulary would shrink.
  """
  if vocab_size <= config.vocab_size:
    raise ConfigError(
      f"the vocabulary has {config.vocab_size} ids and cannot grow to {vocab_size}; ids are kept"
    )
  grown = dataclasses.replace(config, vocab_size=vocab_size)
  of_new = dataclasses.replace(config, vocab_size=vocab_size - config.vocab_size, vocab_multiple=1)
  specs = named_leaves(model_specs(of_new))
  new_rows = init_specs({name: specs[name] for name in specs if is_vocabulary(name)}, key)

  def grow(name, leaf):
    if not is_vocabulary(name):
      return leaf
    rows = [leaf[: config.vocab_size], new_rows[name].astype(leaf.dtype)]
    padding = (grown.padded_vocab_size - vocab_size, *leaf.shape[1:])
    return jnp.concatenate([*rows, jnp.zeros(padding, leaf.dtype)])

  return map_named(grow, params), grown


def is_vocabulary(name: str) -> bool:
  """Says whether the first axis of a parameter is the padded vocabulary."""
  return name.startswith("lm_head/") or name == "decoder/token_embedding/embedding"
