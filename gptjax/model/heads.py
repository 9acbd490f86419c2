"""Heads on the decoder's hidden states: the language model's logits, and a task's."""

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.batch import Batch
from gptjax.model.attention import dropout
from gptjax.model.config import ModelConfig
from gptjax.model.products import multiply_transposed

# The logit of an answer that an example does not have; its probability is exactly 0.
MISSING = -1e9


def lm_head(params: Any, config: ModelConfig) -> tuple[jax.Array, jax.Array | None]:
  """Returns the language-model head: (kernel_VD, bias_V or None), V padded, tied or not."""
  if config.tie_embeddings:
    return params["decoder"]["token_embedding"]["embedding"], None
  return params["lm_head"]["kernel"], params["lm_head"].get("bias")


def lm_logits(params: Any, hidden_BLD: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns float32 logits [..., V] over the true vocabulary; padding is cut off.

  Args:
    params: the whole tree.
    hidden_BLD: [..., D] in the compute dtype.
    config: the architecture.
  """
  kernel_VD, bias_V = lm_head(params, config)
  hidden_TD = hidden_BLD.reshape(-1, config.model_dim)
  logits_TV = multiply_transposed(hidden_TD, kernel_VD.astype(hidden_TD.dtype), jnp.float32)
  if bias_V is not None:
    logits_TV += bias_V.astype(jnp.float32)[None, :]
  return logits_TV[:, : config.vocab_size].reshape(*hidden_BLD.shape[:-1], config.vocab_size)


def task_logits(
  params: Any,
  hidden_BLD: jax.Array,
  batch: Batch,
  *,
  is_choice: bool,
  dropout_rate: float = 0.0,
  key: jax.Array | None = None,
) -> jax.Array:
  """Applies the task's linear layer to the states of the extract tokens.

  An example is S neighbouring rows, and a row's extract token is its last with a segment id.

  Args:
    params: the whole tree, with "task_head".
    hidden_BLD: of all rows, B = E * S.
    batch: segment_ids_BL, and labels_B with one entry for each of the E examples.
    is_choice: whether rows are answers to choose from, with one logit each. Otherwise the states
      of an example's rows are summed: of its one text, or of a pair in both orders.
    dropout_rate, key: classifier dropout; the answers of one example share a mask.

  Returns:
    float32 [E, C]; of choices [E, S], with MISSING where a row has no tokens.

  Source: Radford et al. 2018, section 3.3 and figure 1; the shared mask is the released code's.
  """
  num_examples = batch.labels_B.shape[0]
  is_real_BL = batch.segment_ids_BL > 0
  last_B = jnp.maximum(is_real_BL.sum(axis=1) - 1, 0)
  states_BD = hidden_BLD[jnp.arange(batch.num_rows), last_B].astype(jnp.float32)
  states = states_BD.reshape(num_examples, -1, states_BD.shape[-1])  # [E, S, D]
  if not is_choice:
    states = states.sum(axis=1, keepdims=True)
  if key is not None and dropout_rate:
    mask = dropout(jnp.ones_like(states[:, :1]), dropout_rate, key)
    states = states * mask
  head = params["task_head"]
  flat_TD = states.reshape(-1, states.shape[-1])
  logits_TC = flat_TD @ head["kernel"] + head["bias"][None, :]
  logits = logits_TC.reshape(num_examples, -1)
  if not is_choice:
    return logits
  return jnp.where(is_real_BL.any(axis=1).reshape(num_examples, -1), logits, MISSING)
