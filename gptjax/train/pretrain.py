"""Pretraining by next-token prediction: puts a config's data, model, devices and loop together."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import config as config_lib
from gptjax import parallel as parallel_lib
from gptjax import report
from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data.batches import BatchSource, valid_batches
from gptjax.data.prefetch import prefetch
from gptjax.data.prepare import PreparedData, prepare_data
from gptjax.generate.sample import sample_long
from gptjax.model.parameters import count_parameters, init_parameters
from gptjax.train import hardware
from gptjax.train.config import PretrainConfig
from gptjax.train.display import ProgressDisplay
from gptjax.train.initial import check_init_from, load_initial
from gptjax.train.loop import Event, Line, Loop, bits_per_byte, stop_signals
from gptjax.train.metrics import MetricsWriter, make_trackers
from gptjax.train.optimizer import hyperparameters
from gptjax.train.profile import Profiler
from gptjax.train.run_report import training_report
from gptjax.train.schedule import resolve_durations
from gptjax.train.setup import (
  CHANGEABLE_KEYS,
  batch_schedule,
  check_events,
  describe_data,
  ending_at_once,
  ending_together,
  is_finished_and_whole,
  make_parallel,
  resolve_model,
  resolve_num_steps,
  sample_prompt_ids,
  say,
  start_devices,
)
from gptjax.train.step import (
  LanguageModelObjective,
  TrainState,
  describe_not_finite,
  find_not_finite,
  init_state,
  make_eval_step,
  make_train_step,
)


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
      schedule = batch_schedule(config)
      schedule.check_processes(parallel.process_count)
      source = BatchSource(prepared, config.model.context_length, config.seed, schedule)
      num_steps = resolve_num_steps(config, schedule, source.rows_per_epoch)
      check_events(config, prepared, parallel.process_count)
      if run.latest_step() is None:
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
    with ending_at_once(parallel):
      Pretraining(config, run, prepared, parallel, source, num_steps, started).run_all()


@dataclasses.dataclass
class Pretraining:
  """One run in this process: what its events share.

  Attributes:
    started: time of the process's start.
    seconds_before: that processes before this one took for the steps restored.
  """

  config: PretrainConfig
  run: RunDirectory
  prepared: PreparedData
  parallel: parallel_lib.Parallel
  source: BatchSource
  num_steps: int
  started: float
  seconds_before: float = 0.0

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
          save_every_steps=config.save_every_steps or self.num_steps,
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
        self.seconds_before = max((line["seconds"] for line in self.run.read_metrics()), default=0)
      say(f"resuming after step {restored.step}")
      return self.parallel.from_saved(restored.state), restored.step
    state = self.parallel.init_state(init, key)
    if self.config.init_from:
      with ending_together(self.parallel):
        params = load_initial(self.config, self.parallel)
      ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
      state = state.replace(params=params, ema=ema)
    return state, 0

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
    seconds = self.seconds_before + time.time() - self.started
    self._writer.write(step, **line, seconds=seconds)

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
