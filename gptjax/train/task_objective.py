"""What fine-tuning minimises: the task's loss, plus the language model's on the same sequences.

L = L_task + lambda * L_lm (Radford et al. 2018, section 3.2, equation 5), each term normalised as
in the released code: the task's over examples; the language model's over the real tokens of each
sequence first, then over sequences.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.batch import Batch
from gptjax.data.task_format import Task
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_head, task_logits
from gptjax.model.lora import merge_lora
from gptjax.parallel import Parallel, Program
from gptjax.train.loss import Sums, chunked_next_token_loss
from gptjax.train.programs import KEPT_PROGRAMS
from gptjax.train.step import TrainState

PyTree = Any


@dataclasses.dataclass(frozen=True)
class TaskObjective:
  """The objective of fine-tuning; see `gptjax.train.step.Objective`.

  "loss" is cross-entropy in nats an example, or the squared error of a score; "lm_loss" is in nats
  a token, each sequence counting once. Rows of padding count nothing.

  Attributes:
    config: the architecture.
    task: what is asked.
    has_lm: whether there is a term of the language model at all; its coefficient is traced.
    classifier_dropout, class_weights, lora_scale: as of FinetuneSettings.
    chunk_tokens: as TrainConfig.loss_chunk_tokens.
  """

  config: ModelConfig
  task: Task
  has_lm: bool = True
  classifier_dropout: float = 0.0
  class_weights: tuple[float, ...] = ()
  lora_scale: float = 1.0
  chunk_tokens: int = 0

  def weights(self, batch: Batch) -> dict[str, jax.Array]:
    num_targets_B = batch.weights_BL.sum(axis=1)
    return {
      "loss": self._example_weights(batch).sum(),
      "lm_loss": jnp.sum(num_targets_B > 0).astype(jnp.float32),
      "tokens": num_targets_B.sum(),
    }

  def __call__(
    self, params: PyTree, batch: Batch, hyper: Any, key: jax.Array | None
  ) -> tuple[dict[str, jax.Array], Sums]:
    params = merge_lora(params, self.lora_scale)
    decoder_key, head_key = (None, None) if key is None else jax.random.split(key)
    hidden_BLD = hidden_states(params["decoder"], batch, self.config, decoder_key)
    logits = self._logits(params, hidden_BLD, batch, head_key)
    weights_E = self._example_weights(batch)
    loss = jnp.sum(weights_E * example_losses(self.task, logits, batch.labels_B))
    terms, sums = {"loss": loss}, {"loss": (loss, weights_E.sum())}
    if self.has_lm:
      lm_loss, lm_sums = self._lm_loss(params, hidden_BLD, batch)
      terms["lm_loss"] = hyper.lm_coefficient * lm_loss
      sums["lm_loss"] = lm_sums["loss"]
    return terms, sums

  def outputs(self, params: PyTree, batch: Batch) -> jax.Array:
    """Returns the logits of the examples, as `task_logits` gives them, without dropout."""
    params = merge_lora(params, self.lora_scale)
    hidden_BLD = hidden_states(params["decoder"], batch, self.config)
    return self._logits(params, hidden_BLD, batch, None)

  def _logits(self, params, hidden_BLD, batch, key) -> jax.Array:
    return task_logits(
      params,
      hidden_BLD,
      batch,
      is_choice=self.task.is_choice,
      dropout_rate=self.classifier_dropout,
      key=key,
    )

  def _example_weights(self, batch: Batch) -> jax.Array:
    """Returns float32 [E]: 0 for an example of padding, otherwise that of its class."""
    labels_E = batch.labels_B
    is_real_E = (batch.segment_ids_BL > 0).reshape(labels_E.shape[0], -1).any(axis=1)
    if not self.class_weights:
      return is_real_E.astype(jnp.float32)
    return is_real_E * jnp.asarray(self.class_weights, jnp.float32)[labels_E]

  def _lm_loss(self, params, hidden_BLD, batch) -> tuple[jax.Array, Sums]:
    kernel_VD, bias_V = lm_head(params, self.config)
    num_targets_B1 = batch.weights_BL.sum(axis=1, keepdims=True)
    return chunked_next_token_loss(
      hidden_BLD.reshape(-1, self.config.model_dim),
      kernel_VD,
      bias_V,
      batch.targets_BL.reshape(-1),
      (batch.weights_BL / jnp.maximum(num_targets_B1, 1)).reshape(-1),
      vocab_size=self.config.vocab_size,
      chunk_tokens=self.chunk_tokens,
    )


def example_losses(task: Task, logits: jax.Array, labels_E: jax.Array) -> jax.Array:
  """Returns float32 [E]: cross-entropy over classes or answers, or the squared error of a score."""
  if task.target == "score":
    return jnp.square(logits[:, 0] - labels_E)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels_E)


@functools.lru_cache(KEPT_PROGRAMS)
def output_program(parallel: Parallel, objective: TaskObjective) -> Program:
  """Compiles `(state, batch) -> logits` of the examples of all devices, whole on each, in order.

  The batch is one micro-batch, [1, B, L].
  """

  def output_step(state: TrainState, batch: Batch, *, axis_name: str | None) -> jax.Array:
    logits = objective.outputs(state.eval_params, batch.map(lambda array: array[0]))
    return logits if axis_name is None else jax.lax.all_gather(logits, axis_name, tiled=True)

  return parallel.compile_eval(output_step)
