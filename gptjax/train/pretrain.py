"""Pretraining by next-token prediction: puts a config's data, model, devices and loop together."""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import config as config_lib
from gptjax import parallel as parallel_lib
from gptjax import report
from gptjax.checkpoint.run_directory import RunDirectory, is_run_directory
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data.batches import BatchSchedule, BatchSource, prefetch, valid_batches
from gptjax.data.prepare import PreparedData, prepare_data
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.errors import CheckpointError, ConfigError, DataError, UserError
from gptjax.generate.sample import sample_long
from gptjax.model.parameters import SHARDING_RULES, count_parameters, init_parameters
from gptjax.train import hardware
from gptjax.train.config import EvalConfig, PretrainConfig
from gptjax.train.display import ProgressDisplay
from gptjax.train.loop import Event, Line, Loop, bits_per_byte, stop_signals
from gptjax.train.metrics import MetricsWriter, make_trackers
from gptjax.train.optimizer import hyperparameters
from gptjax.train.profile import Profiler
from gptjax.train.run_report import training_report
from gptjax.train.schedule import resolve_durations
from gptjax.train.step import (
  LanguageModelObjective,
  TrainState,
  describe_not_finite,
  find_not_finite,
  init_state,
  make_eval_step,
  make_train_step,
)

# What may change between a run and its resumption: it changes no number that is learned, except
# the guards against bad updates, which a run that was stopped by them must be able to change.
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

# What may differ between a run and the one it starts from: no shape and no function.
FREE_MODEL_KEYS = (
  "family",
  "embedding_dropout",
  "attention_dropout",
  "residual_dropout",
  "init_std",
  "position_init_std",
  "residual_init_scale",
  "compute_dtype",
  "attention_implementation",
  "scan_layers",
  "remat",
)

CHECKED_TOKENS = 65536  # evenly spread over a split, to tell its content


def pretrain(config: PretrainConfig, workdir: str) -> None:
  """Trains a language model into a run directory, or goes on with the run that is there.

  Raises:
    UserError: whatever in config, data or the directory keeps it from running.
  """
  started = time.time()
  start_devices(config)
  parallel = make_parallel(config)
  run = RunDirectory(workdir)
  is_first = parallel.process_index == 0
  with contextlib.ExitStack() as stack:
    with ending_together(parallel):
      if is_first:
        stack.enter_context(run.lock())
      prepared = prepare_data(config.data, report=say)
      config = resolve_model(config, prepared)
      schedule = batch_schedule(config, parallel)
      source = BatchSource(prepared, config.model.context_length, config.seed, schedule)
      num_steps = resolve_num_steps(config, schedule, source.rows_per_epoch)
      check_events(config, prepared, parallel.process_count)
      check_init_from(config, prepared)
      identity = (
        config_lib.to_json(config), prepared.tokenizer, CHANGEABLE_KEYS, describe_data(prepared)
      )  # fmt: skip
      if is_first:
        run.create_or_check(*identity)
    with ending_together(parallel):
      if not is_first:  # with other data or another config, the processes would not fit together
        run.check(*identity)
      is_finished = is_finished_and_whole(run, num_steps)
    if is_finished:
      say(f"{workdir} has all of its {num_steps} steps; nothing to do")
      return
    Pretraining(config, run, prepared, parallel, source, num_steps, started).run_all()


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


def is_finished_and_whole(run: RunDirectory, num_steps: int) -> bool:
  """Says whether all updates are done and the last checkpoint can be read."""
  with CheckpointStore(run.checkpoints_path) as store:
    return run.is_finished(num_steps) and store.is_whole(run.latest_step())


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


def check_init_from(config: PretrainConfig, prepared: PreparedData) -> None:
  """Raises CheckpointError unless init_from is a run of this architecture and tokenizer."""
  if not config.init_from:
    return
  if not is_run_directory(config.init_from):
    raise CheckpointError(f'init_from "{config.init_from}" is not a run directory')
  other = RunDirectory(config.init_from)
  there = other.read_config()["model"]
  here = json.loads(config_lib.to_json(config))["model"]
  for key, value in here.items():
    if key not in FREE_MODEL_KEYS and key in there and there[key] != value:
      raise CheckpointError(
        f'init_from "{config.init_from}" has model.{key} {there[key]}, this config {value};'
        " use its architecture"
      )
  there = load_tokenizer(str(other.path)).fingerprint
  if there != prepared.tokenizer.fingerprint:
    raise CheckpointError(
      f'init_from "{config.init_from}" was trained with another tokenizer;'
      f' set data.tokenizer="{other.tokenizer_path}"'
    )


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
  if train.matmul_precision == "highest":
    jax.config.update("jax_default_matmul_precision", "highest")


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


def make_parallel(config: PretrainConfig) -> parallel_lib.Parallel:
  """Makes the driver that the config names, over all devices."""
  train = config.train
  return parallel_lib.make_parallel(
    train.mode,
    mesh_data=train.mesh_data,
    mesh_fsdp=train.mesh_fsdp,
    mesh_tensor=train.mesh_tensor,
    sharding_rules=SHARDING_RULES,
  )


def batch_schedule(
  config: PretrainConfig, parallel: parallel_lib.Parallel | None = None
) -> BatchSchedule:
  """Returns how many rows each batch has, which does not depend on the number of processes.

  Args:
    config: of the run.
    parallel: if given, its processes must be able to share every batch evenly.
  """
  train = config.train
  schedule = BatchSchedule(
    batch_rows=train.batch_rows,
    context_length=config.model.context_length,
    ramp_start_rows=train.ramp_start_rows,
    ramp_tokens=train.ramp_tokens,
    multiple=train.accumulation,
  )
  process_count = parallel.process_count if parallel else 1
  ramp = itertools.takewhile(
    lambda k: schedule.tokens_before(k) < train.ramp_tokens, itertools.count()
  )
  for rows in (train.batch_rows, *map(schedule.rows, ramp)):
    if rows % process_count:
      raise ConfigError(
        f"a batch of {rows} rows does not divide among {process_count} processes; make"
        " train.batch_rows a multiple of them, and with a ramp train.accumulation too"
      )
  return schedule


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


@dataclasses.dataclass
class Pretraining:
  """One run in this process: what its events share."""

  config: PretrainConfig
  run: RunDirectory
  prepared: PreparedData
  parallel: parallel_lib.Parallel
  source: BatchSource
  num_steps: int
  started: float

  def run_all(self) -> None:
    """Restores or initialises, trains, and leaves a report."""
    config, train = self.config, self.config.train
    self._prompts = sample_prompt_ids(config.eval, self.prepared.tokenizer)
    self._describe()
    objective = LanguageModelObjective(config.model, train.loss_chunk_tokens)
    self._eval_step = self.parallel.compile_eval(make_eval_step(objective))
    self._find_not_finite = self.parallel.compile_eval(
      functools.partial(find_not_finite, objective=objective)
    )
    train_step = self.parallel.compile_step(
      make_train_step(
        objective,
        config.optimizer,
        skip_nonfinite=train.skip_nonfinite,
        spike_sigmas=train.spike_sigmas,
      )
    )
    self._peak = hardware.peak_flops_per_second(
      jax.devices(), config.model.compute_dtype, train.peak_flops_per_second
    )
    with CheckpointStore(
      self.run.checkpoints_path, train.keep_latest, train.keep_every_steps
    ) as self._store:
      state, start_step = self._first_state()
      with (
        ProgressDisplay(
          self.num_steps, start_step, is_enabled=self.parallel.process_index == 0
        ) as display,
        stop_signals(display.say) as is_stop_requested,
        self._profiler() as profiler,
        self._metrics_writer(start_step) as self._writer,
        contextlib.closing(prefetch(self._batches(start_step), 2)) as batches,
      ):
        loop = Loop(
          train_step=train_step,
          num_steps=self.num_steps,
          events=self._events(),
          save=self._save,
          save_every_steps=train.save_every_steps or config.eval.every_steps or self.num_steps,
          write=self._write,
          show=lambda step, line: display.update(step, **line),
          status=display.status,
          log_every_steps=train.log_every_steps,
          flops_per_token=hardware.flops_per_token(config.model),
          peak_flops_per_second=self._peak.flops_per_second,
          max_bad_steps=train.max_bad_steps,
          diagnose=self._diagnose,
          should_stop=lambda step: self._agree(step, is_stop_requested()),
          profile=profiler.before_step,
        )
        state, step = loop.run(state, batches, start_step)
    self._write_report()
    done = "done" if step == self.num_steps else "stopped; the same command goes on from here"
    say(f"step {step} of {self.num_steps}, {done}: {self.run.path}")

  def _agree(self, step: int, is_wanted: bool) -> bool:
    """Says whether a process was asked to stop; several ask each other now and then."""
    if self.parallel.process_count > 1 and step % self.config.train.log_every_steps:
      return False
    return self.parallel.agree(is_wanted)

  def _profiler(self) -> Profiler:
    train = self.config.train
    return Profiler(f"{self.run.path}/profile", train.profile_start_step, train.profile_num_steps)

  def _describe(self) -> None:
    config = self.config
    model = config.model
    estimate = hardware.memory_estimate(
      model,
      config.optimizer,
      config.train,
      num_devices=self.parallel.num_devices,
    )
    say(
      f"model: {report.format_count(count_parameters(model))} parameters, {model.num_layers} layers"
      f" x {model.model_dim}, context {model.context_length}"
    )
    say(
      f"run: {self.num_steps:,} steps of {config.train.batch_rows} rows, seed {config.seed}, on"
      f" {self.parallel.num_devices} {jax.devices()[0].device_kind} devices ({config.train.mode});"
      f" about {report.format_bytes(estimate.total)} of memory each"
    )
    room = hardware.available_bytes(jax.local_devices()[0])
    if room and estimate.total > room:
      say(
        f"warning: that is more than the {report.format_bytes(room)} there are; lower"
        " train.batch_rows, raise train.accumulation, or set model.remat, train.loss_chunk_tokens"
      )

  def _first_state(self) -> tuple[TrainState, int]:
    """Goes on from the newest whole checkpoint, or starts from init_from or from scratch."""
    durations = resolve_durations(
      self.config.optimizer, self.num_steps, self.source.schedule.tokens_before
    )
    optimizer, model = self.config.optimizer, self.config.model
    hyper = hyperparameters(optimizer, durations, z_loss=self.config.train.z_loss)

    def init(key):
      init_key, run_key = jax.random.split(key)
      return init_state(init_parameters(model, init_key), optimizer, hyper, run_key)

    key = jax.random.key(self.config.seed)
    restored = self._store.restore_latest(self.parallel.abstract_state(init, key))
    if restored is not None:
      for line in restored.skipped:
        say(line)
      if self.parallel.process_index == 0:
        self.run.drop_after(restored.step)
      say(f"resuming after step {restored.step}")
      return self.parallel.from_saved(restored.state), restored.step
    state = self.parallel.init_state(init, key)
    if self.config.init_from:
      state = self._start_from(state)
    return state, 0

  def _start_from(self, state: TrainState) -> TrainState:
    """Replaces the parameters by those of another run, by their average where it kept one."""
    other = RunDirectory(self.config.init_from)
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
      self.parallel.for_saving(state.params),
    )
    with CheckpointStore(other.checkpoints_path) as store:
      item = "ema" if other.read_config()["optimizer"]["ema_decay"] else "params"
      restored = store.restore_params(abstract, item=item)
    for line in restored.skipped:
      say(line)
    params = self.parallel.from_saved(restored.state)
    average = "the average of " if item == "ema" else ""
    say(f"starting from {average}step {restored.step} of {self.config.init_from}")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema)

  def _batches(self, start_step: int) -> Iterator[Any]:
    parallel = self.parallel
    for batch in self.source.batches(start_step, parallel.process_index, parallel.process_count):
      yield parallel.shard_batch(batch, self.config.train.accumulation)

  def _metrics_writer(self, start_step: int) -> MetricsWriter:
    is_first = self.parallel.process_index == 0
    with ending_together(self.parallel):
      trackers = make_trackers(
        self.config.train.trackers if is_first else (),
        str(self.run.path),
        config_lib.to_json(self.config),
        resume_step=start_step,
      )
    return MetricsWriter(self.run.append_metrics if is_first else lambda line: None, trackers)

  def _write(self, step: int, line: Line) -> None:
    if not self.config.train.z_loss:
      line = {name: value for name, value in line.items() if name != "train_z_loss"}
    self._writer.write(step, **line, seconds=time.time() - self.started)

  def _events(self) -> list[Event]:
    every_steps = self.config.eval.every_steps
    events = []
    if self.prepared.valid_tokens:
      events.append(Event(every_steps, self._evaluate, "evaluating", measures=True))
    if self.config.eval.has_samples:
      events.append(Event(every_steps, self._sample, "sampling"))
    return events

  def _evaluate(self, step: int, state: TrainState) -> Mapping[str, float]:
    del step
    config, parallel = self.config, self.parallel
    batches = valid_batches(
      self.prepared,
      config.model.context_length,
      config.eval.batch_rows,
      config.eval.max_rows,
      parallel.process_index,
      parallel.process_count,
    )
    loss_sum = weight_sum = 0.0
    for batch in batches:
      sums = parallel.to_host(self._eval_step(state, parallel.shard_batch(batch, 1)))
      loss_sum += float(sums["loss"][0])
      weight_sum += float(sums["loss"][1])
    valid_loss = loss_sum / weight_sum
    bits = bits_per_byte(valid_loss, self.prepared.bytes_per_token)
    return {"valid_loss": valid_loss, "valid_bits_per_byte": bits}

  def _sample(self, step: int, state: TrainState) -> None:
    config, tokenizer = self.config.eval, self.prepared.tokenizer
    new_tokens = sample_long(
      self.parallel.for_decoding(state.eval_params),
      self.config.model,
      self._prompts,
      max_new_tokens=config.sample_tokens,
      temperature=config.sample_temperature,
      key=jax.random.fold_in(jax.random.key(self.config.seed), step),
      num_ids=tokenizer.vocab_size,
    )
    if self.parallel.process_index == 0:
      for prompt, row in zip(config.sample_prompts, new_tokens):
        self.run.append_samples(step, prompt + tokenizer.decode(row.tolist()))

  def _save(self, step: int, state: TrainState, line: Line) -> None:
    metrics = {name: line[name] for name in ("valid_loss",) if name in line}
    self._store.save(step, self.parallel.for_saving(state), metrics, force=True)
    self._write_report()

  def _diagnose(self, state: TrainState, batch: Any) -> str:
    return describe_not_finite(self.parallel.to_host(self._find_not_finite(state, batch)))

  def _write_report(self) -> None:
    if self.parallel.process_index:
      return
    prompts = self.config.eval.sample_prompts
    samples = []
    for step, text in self.run.read_samples():
      prompt = max((p for p in prompts if text.startswith(p)), key=len, default="")
      samples.append((step, prompt, text[len(prompt) :]))
    self.run.flush()
    metrics = self.run.read_metrics()
    page = training_report(
      self.run.path.name,
      metrics,
      samples=samples,
      facts={"Parameters": report.format_count(count_parameters(self.config.model))},
      config_json=config_lib.to_json(self.config),
      environment=report.environment(jax.devices()),
      notes=self._notes(metrics),
    )
    self.run.write_report(page)

  def _notes(self, metrics: list[dict[str, Any]]) -> list[str]:
    notes = []
    if self._peak.flops_per_second:
      peak = report.format_count(self._peak.flops_per_second)
      notes.append(f"MFU is counted against {peak} FLOP/s: {self._peak.source}.")
    skipped = max((line["skipped"] for line in metrics if "skipped" in line), default=0)
    if skipped:
      notes.append(f"{skipped} bad updates were skipped.")
    return notes


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
