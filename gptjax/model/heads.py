"""Heads on the decoder's hidden states: the language model's logits."""

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.model.config import ModelConfig
from gptjax.model.products import multiply_transposed


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
