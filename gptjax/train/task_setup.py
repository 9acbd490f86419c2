"""What fine-tuning needs before its first update: tokens of examples, and a resolved config."""

import dataclasses
import zlib
from typing import Any

import numpy as np

from gptjax.data.task_batches import choose_buckets
from gptjax.data.task_format import Task
from gptjax.data.task_inputs import EncodedTask, encode_examples, find_task_tokens
from gptjax.data.tasks import TaskData, load_task
from gptjax.errors import ConfigError
from gptjax.model.lora import lora_specs
from gptjax.model.parameters import model_specs, task_head_specs
from gptjax.train.finetune_config import FinetuneConfig, ResolvedFinetuneConfig
from gptjax.train.setup import say
from gptjax.train.transfer import Origin

# Under LoRA the model itself stays as it is, but for the head.
LORA_FROZEN_PATTERN = r"^(decoder|lm_head)/"


@dataclasses.dataclass(frozen=True)
class TaskExamples:
  """The examples of a run as sequences.

  Attributes:
    data: as they were read.
    train, valid: encoded.
    buckets: padded lengths, of both.
  """

  data: TaskData
  train: EncodedTask
  valid: EncodedTask
  buckets: tuple[int, ...]

  @property
  def task(self) -> Task:
    return self.data.task

  @classmethod
  def load(cls, config: FinetuneConfig, origin: Origin) -> "TaskExamples":
    """Reads and encodes them, and says what was left out or cut."""
    data = load_task(config.data)
    max_length = config.data.max_length or origin.model.context_length
    tokens = find_task_tokens(origin.tokenizer, config.data)
    train, valid = (
      encode_examples(examples, data.task, origin.tokenizer, tokens, max_length)
      for examples in (data.train, data.valid)
    )
    lengths_N = np.concatenate([train.lengths_N, valid.lengths_N])
    buckets = choose_buckets(lengths_N, config.data.num_buckets, max_length)
    for note in data.notes:
      say(note)
    say(
      f"task: {data.task.family}, {train.num_examples:,} examples to train on and"
      f" {valid.num_examples:,} to validate, padded to {', '.join(map(str, buckets))} tokens"
    )
    for name, encoded in (("training", train), ("validation", valid)):
      if encoded.num_cut:
        say(
          f"{encoded.num_cut:,} of {encoded.num_examples:,} {name} examples were cut to"
          f" {max_length} tokens a sequence"
        )
    return cls(data, train, valid, buckets)

  def describe(self) -> dict[str, Any]:
    """Describes the examples well enough to tell them from others, wherever they are."""
    return {"train": _describe(self.train), "valid": _describe(self.valid)}


def _describe(encoded: EncodedTask) -> dict[str, int]:
  checksum = zlib.crc32(encoded.labels_N.tobytes())
  for sequences in encoded.sequences:
    for sequence in sequences:
      for piece in sequence:
        checksum = zlib.crc32(piece.astype("<i4").tobytes(), checksum)
  return {"num_examples": encoded.num_examples, "crc32": checksum}


def resolve_config(
  config: FinetuneConfig, origin: Origin, examples: TaskExamples
) -> ResolvedFinetuneConfig:
  """Fills in the architecture, the labels, the class weights, the length, and what is frozen.

  Raises:
    ConfigError: class weights that do not fit the labels, no length.
  """
  settings, optimizer, train = config.finetune, config.optimizer, config.train
  settings = dataclasses.replace(
    settings, class_weights=_class_weights(config, examples), balance_classes=False
  )
  if settings.lora_pattern and not optimizer.frozen_pattern:
    optimizer = dataclasses.replace(optimizer, frozen_pattern=LORA_FROZEN_PATTERN)
  num_steps = _num_steps(config, examples)
  train = dataclasses.replace(train, num_steps=num_steps, num_epochs=None)
  fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  fields |= {"model": origin.model, "data": examples.data.config, "finetune": settings}
  return ResolvedFinetuneConfig(**fields | {"optimizer": optimizer, "train": train})


def _class_weights(config: FinetuneConfig, examples: TaskExamples) -> tuple[float, ...]:
  settings, labels = config.finetune, examples.task.labels
  if not (settings.class_weights or settings.balance_classes):
    return ()
  if not labels:
    key = "class_weights" if settings.class_weights else "balance_classes"
    raise ConfigError(f"finetune.{key} has no effect on scores and choices, which have no classes")
  if settings.balance_classes:
    counts_C = np.bincount(examples.train.labels_N, minlength=len(labels))
    return tuple((counts_C.sum() / (len(labels) * np.maximum(counts_C, 1))).tolist())
  if len(settings.class_weights) != len(labels):
    raise ConfigError(
      f"finetune.class_weights has {len(settings.class_weights)} entries, and the labels are"
      f" {', '.join(labels)}; give one for each"
    )
  return settings.class_weights


def _num_steps(config: FinetuneConfig, examples: TaskExamples) -> int:
  train = config.train
  if train.num_steps is not None:
    return train.num_steps
  if train.num_epochs is None:
    raise ConfigError("the run has no length; set train.num_epochs or train.num_steps")
  per_epoch = -(-examples.train.num_examples // train.batch_rows)
  return max(round(train.num_epochs * per_epoch), 1)


def param_specs(config: ResolvedFinetuneConfig) -> dict[str, Any]:
  """Describes the whole tree: the language model, the head, and LoRA's factors."""
  settings, task = config.finetune, config.data.task
  specs = model_specs(config.model)
  specs["task_head"] = task_head_specs(config.model, task.num_outputs)
  if settings.lora_pattern:
    specs["lora"] = lora_specs(config.model, settings.lora_pattern, settings.lora_rank)
  return specs
