"""What a run needs before its first update: devices, lengths, checks of what would fail later."""

import contextlib
import dataclasses
import functools
import os
import sys
import traceback
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gptjax import parallel as parallel_lib
from gptjax.allocator import keep_freed_memory
from gptjax.data.batch_schedule import BatchSchedule
from gptjax.data.batches import BatchSource, valid_batches
from gptjax.data.prepare import PreparedData, prepare_data
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import ConfigError, DataError, UserError
from gptjax.model.parameters import SHARDING_RULES
from gptjax.train.config import EvalConfig, PretrainConfig

# What may change between a run and its resumption: it changes no number that is learned (but that,
# with dropout, other devices draw other masks), except the guards against bad updates, which a run
# that was stopped by them must be able to change.
CHANGEABLE_KEYS = (
  "data.cache_dir",
  "data.build_processes",
  "eval",
  "model.attention_implementation",
  "model.remat",
  "model.scan_layers",
  "tags",
  *(
    f"train.{key}"
    for key in (
      "coordinator",
      "distributed_timeout_seconds",
      "host_devices",
      "keep_every_steps",
      "keep_latest",
      "log_every_steps",
      "loss_chunk_tokens",
      "max_bad_steps",
      "mesh_data",
      "mesh_fsdp",
      "mesh_tensor",
      "mode",
      "num_processes",
      "peak_flops_per_second",
      "process_id",
      "profile_num_steps",
      "profile_start_step",
      "save_every_steps",
      "skip_nonfinite",
      "spike_sigmas",
      "trackers",
    )
  ),
)

CHECKED_TOKENS = 65536  # evenly spread over a split, to tell its content

_make_parallel = functools.cache(parallel_lib.make_parallel)


def say(message: str) -> None:
  """Tells the user something, in one process of the run."""
  if jax.process_index() == 0:
    print(message, file=sys.stderr, flush=True)


def start_devices(config: PretrainConfig) -> None:
  """Starts jax with the devices and processes that the config asks for."""
  train = config.train
  parallel_lib.set_host_devices(train.host_devices)
  parallel_lib.initialize_processes(
    train.coordinator, train.num_processes, train.process_id, train.distributed_timeout_seconds
  )
  precision = None if train.matmul_precision == "default" else train.matmul_precision
  jax.config.update("jax_default_matmul_precision", precision)
  if jax.default_backend() == "cpu":
    keep_freed_memory()


def make_parallel(config: PretrainConfig) -> parallel_lib.Parallel:
  """Returns the driver that the config names, over all devices; the same for equal configs."""
  train = config.train
  return _make_parallel(
    train.mode,
    mesh_data=train.mesh_data,
    mesh_fsdp=train.mesh_fsdp,
    mesh_tensor=train.mesh_tensor,
    sharding_rules=SHARDING_RULES,
  )


@contextlib.contextmanager
def ending_together(parallel: parallel_lib.Parallel) -> Iterator[None]:
  """Ends all processes if one of them fails inside; jax would abort those that wait for it."""
  try:
    yield
  except Exception:
    parallel.agree(True)
    raise
  if parallel.agree(False):
    raise UserError("another process of the run cannot go on; its message says why")


@contextlib.contextmanager
def ending_at_once(parallel: parallel_lib.Parallel) -> Iterator[None]:
  """Ends this process of several if it fails inside.

  What fails in one process alone (a full disk, a dead machine) breaks the connections of the
  others, who then fail here too; Python's own way out would wait minutes for all of them.
  """
  try:
    yield
  except Exception as error:
    if parallel.process_count == 1:
      raise
    if isinstance(error, UserError):
      reason = " ".join(str(error).split())
    else:
      traceback.print_exc()
      reason = "the error above; if another process ended before, its message says why"
    print(f"gptjax: process {parallel.process_index}: {reason}", file=sys.stderr, flush=True)
    os._exit(2)


def resolve_model(config: PretrainConfig, prepared: PreparedData) -> PretrainConfig:
  """Fills in the vocabulary size; one that is given must hold the tokenizer's."""
  entries = prepared.tokenizer.vocab_size
  vocab_size = config.model.vocab_size or entries
  if vocab_size < entries:
    raise ConfigError(
      f"model.vocab_size is {vocab_size}, but the tokenizer has {entries} entries;"
      " leave it unset or raise it"
    )
  return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def batch_schedule(config: PretrainConfig) -> BatchSchedule:
  """Returns how many rows each batch has, which does not depend on the number of processes."""
  return BatchSchedule(
    batch_rows=config.train.batch_rows,
    context_length=config.model.context_length,
    ramp_start_rows=config.train.ramp_start_rows,
    ramp_tokens=config.train.ramp_tokens,
    multiple=config.train.accumulation,
  )


def resolve_num_steps(config: PretrainConfig, schedule: BatchSchedule, rows_per_epoch: int) -> int:
  """Converts the length of the run to updates."""
  train = config.train
  if train.num_steps is not None:
    num_steps = train.num_steps
  elif train.num_tokens is not None:
    num_steps = schedule.batches_for(-(-train.num_tokens // config.model.context_length))
  elif train.num_epochs is not None:
    num_steps = schedule.batches_for(round(train.num_epochs * rows_per_epoch))
  else:
    raise ConfigError("the run has no length; set train.num_steps, num_tokens or num_epochs")
  if num_steps < 1:
    raise ConfigError("the run has no steps; raise train.num_steps, num_tokens or num_epochs")
  return num_steps


def describe_data(prepared: PreparedData) -> dict[str, Any]:
  """Describes token files well enough to tell them from others, wherever they are."""

  def describe(tokens):
    positions = np.linspace(0, tokens.num_tokens, CHECKED_TOKENS, endpoint=False, dtype=np.int64)
    some = tokens.gather(positions) if tokens.num_tokens else positions
    return {
      "num_tokens": tokens.num_tokens,
      "num_documents": tokens.num_documents,
      "text_bytes": tokens.text_bytes,
      f"crc32_of_{CHECKED_TOKENS}_tokens": zlib.crc32(some.astype("<i4").tobytes()),
    }

  return {
    name: {"train": describe(train), "valid": describe(valid)}
    for name, (train, valid) in prepared.corpora.items()
  }


def check_events(config: PretrainConfig, prepared: PreparedData, process_count: int) -> None:
  """Raises UserError for a validation or samples that would fail hours later."""
  if config.eval.has_samples:
    sample_prompt_ids(config.eval, prepared.tokenizer)
  if prepared.valid_tokens:
    batches = valid_batches(
      prepared, config.model.context_length, config.eval.batch_rows, process_count=process_count
    )
    if next(batches, None) is None:
      raise DataError(
        f"the validation split has {prepared.valid_tokens} tokens and no target to score;"
        " hold out more of the corpus, or nothing"
      )


def sample_prompt_ids(config: EvalConfig, tokenizer: Tokenizer) -> list[list[int]]:
  """Encodes the prompts; an empty one is the end token, or a line break where there is none.

  Raises:
    UserError: the tokenizer has no ids for a prompt.
  """
  return [_prompt_ids(tokenizer, prompt) for prompt in config.sample_prompts if config.has_samples]


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
  if not prompt and tokenizer.end_id is not None:
    return [tokenizer.end_id]
  try:
    ids = tokenizer.encode(prompt or "\n")
  except DataError as error:
    if prompt:
      raise DataError(f"eval.sample_prompts: {error}") from error
    ids = []
  if not ids:
    wanted = "no tokens for it" if prompt else "neither an end token nor a line break to start with"
    raise ConfigError(
      f'eval.sample_prompts has "{prompt}", but the tokenizer has {wanted}; give another prompt'
    )
  return ids


def show_row(config: PretrainConfig, step: int, row: int) -> list[Any]:
  """Finds what row `row` of the batch of update `step` (0-based) was made from; see Span."""
  prepared = prepare_data(config.data, report=lambda line: None)
  source = BatchSource(prepared, config.model.context_length, config.seed, batch_schedule(config))
  return source.locate(step, row)
