"""Predictions of a fine-tuned model: examples in, logits or scores out, on all local devices.

An example's prediction depends on its own tokens alone: padding lies at the right, where causal
attention does not look, and what a batch adds are rows of padding.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from gptjax.batch import Batch
from gptjax.data.examples import Example
from gptjax.data.task_batches import PADDING, padded_lengths, scoring_batches
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.task_inputs import encode_examples, find_task_tokens
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import CheckpointError, DataError
from gptjax.generate import programs
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import MISSING, task_logits
from gptjax.parallel import make_parallel

# Most examples of a batch on one device.
BATCH_EXAMPLES = 32


class Tuned(Protocol):
  """What predicts: `gptjax.checkpoint.models.Loaded`, or a `gptjax.Model`."""

  config: ModelConfig
  params: Any
  tokenizer: Tokenizer | None
  task: TaskDataConfig | None


class Classifier:
  """Predicts with one model; a program is compiled once for each padded length.

  Args:
    model: with a "task_head" among its parameters, which are computed with as they are.
    name: of the model, for messages.
    report: takes a line about texts that are cut.

  Attributes:
    config: of the model's task.
    task: what it tells of an example.

  Raises:
    CheckpointError: the model has no task, or no tokenizer.
  """

  def __init__(
    self,
    model: Tuned,
    name: str = "the model",
    report: Callable[[str], None] = lambda line: None,
  ):
    if model.task is None or "task_head" not in model.params:
      raise CheckpointError(
        f'"{name}" was not fine-tuned on a task; run gptjax finetune with it as'
        " --config.init_from, and give that run"
      )
    if model.tokenizer is None:
      raise CheckpointError(f'"{name}" has no tokenizer, and a task is told of text')
    self.config = model.task
    self.task = model.task.task
    self._model = model.config
    self._report = report
    self._tokenizer = model.tokenizer
    self._tokens = find_task_tokens(model.tokenizer, model.task)
    self._max_length = model.task.max_length or model.config.context_length
    self._parallel = make_parallel("pmap", devices=jax.local_devices())
    self._params = self._parallel.adopt(model.params)
    self._program = self._parallel.compile_map(self._compute)

  def outputs(self, examples: Sequence[Example]) -> np.ndarray:
    """Returns float32 [N, C]: logits of classes or answers, in which an answer that an example
    lacks has MISSING; or scores, [N, 1].

    Raises:
      DataError: no examples, or a text that the tokenizer refuses.
    """
    if not examples:
      raise DataError("there are no examples; give at least one")
    encoded = encode_examples(examples, self.task, self._tokenizer, self._tokens, self._max_length)
    if encoded.num_cut:
      self._report(f"{encoded.num_cut:,} of {len(examples):,} examples were cut to fit")
    # A power of two, so that few examples are no full batch and yet compile in few sizes.
    on_device = min(BATCH_EXAMPLES, 1 << (len(examples) - 1).bit_length())
    batch_examples = on_device * self._parallel.num_devices
    width = encoded.num_sequences if self.task.is_choice else self.task.num_outputs
    outputs_NC = np.full((len(examples), width), MISSING, np.float32)
    lengths = padded_lengths(self._max_length)
    for indices_E, batch in scoring_batches(encoded, batch_examples, lengths):
      outputs_EC = self._run(batch, len(indices_E))
      outputs_NC[indices_E[indices_E != PADDING]] = outputs_EC[indices_E != PADDING]
    return outputs_NC

  def _run(self, batch: Batch, num_examples: int) -> np.ndarray:
    # True float32 on every device; products of bfloat16 are exact in any case.
    with jax.default_matmul_precision("highest"):
      outputs = self._program(self._params, self._parallel.shard_batch(batch, accumulation=1))
    return self._parallel.collect_rows(outputs, num_examples)

  def _compute(self, params: Any, batch: Batch, *, axis_name: str | None) -> jax.Array:
    del axis_name
    batch = batch.map(lambda array_1B: array_1B[0])
    num_rows, length = batch.tokens_BL.shape
    programs.report("predictions", rows=num_rows, slots=length)
    hidden_BLD = hidden_states(params["decoder"], batch, self._model)
    return task_logits(params, hidden_BLD, batch, is_choice=self.task.is_choice)[None]
