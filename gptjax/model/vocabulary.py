"""Rows for new tokens: the one change of shape that a model can have."""

import dataclasses
import functools
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
    return _append(leaf, new_rows[name], config.vocab_size, grown.padded_vocab_size)

  return map_named(grow, params), grown


def is_vocabulary(name: str) -> bool:
  """Says whether the first axis of a parameter is the padded vocabulary."""
  return name.startswith("lm_head/") or name == "decoder/token_embedding/embedding"


# In one piece: the parts of a large table would each be a copy of it.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _append(leaf: jax.Array, rows: jax.Array, num_kept: int, num_rows: int) -> jax.Array:
  """Returns the first `num_kept` rows, then the new ones, then zeros."""
  padding = jnp.zeros((num_rows - num_kept - len(rows), *leaf.shape[1:]), leaf.dtype)
  return jnp.concatenate([leaf[:num_kept], rows.astype(leaf.dtype), padding])
