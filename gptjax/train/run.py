"""A run from its start to its report: what pretraining and fine-tuning share around the loop."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import config as config_lib
from gptjax import parallel as parallel_lib
from gptjax import report
from gptjax.batch import Batch
from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data.prefetch import prefetch
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import ConfigError
from gptjax.generate.sample import sample_long
from gptjax.model.parameters import count_parameters
from gptjax.train import hardware
from gptjax.train.config import RunConfig
from gptjax.train.display import ProgressDisplay
from gptjax.train.loop import Event, Line, Loop, stop_signals
from gptjax.train.metrics import MetricsWriter, make_trackers
from gptjax.train.optimizer import Hyperparameters
from gptjax.train.profile import Profiler
from gptjax.train.programs import make_init, not_finite_program, train_program
from gptjax.train.setup import (
  CHANGEABLE_KEYS,
  ending_at_once,
  ending_together,
  make_parallel,
  sample_prompt_ids,
  say,
  start_devices,
)
from gptjax.train.step import Objective, TrainState, describe_not_finite
from gptjax.tree import named_leaves

PyTree = Any
# The estimate is near (hardware.memory_estimate); a run of so many times the memory is not begun.
HOPELESS_MEMORY = 10
# Told (step, line of metrics) after each evaluation; True saves and ends the run.
IsEnough = Callable[[int, Line], bool]


def never(step: int, line: Line) -> bool:
  """Lets a run go on to its end."""
  return False


def launch(
  config: RunConfig,
  workdir: str,
  prepare: Callable[[parallel_lib.Parallel, RunDirectory, float], "TrainingRun"],
) -> bool:
  """Trains in a run directory, or goes on with the run that is there, in all processes together.

  Args:
    config: of the run; which devices it starts.
    workdir: the run directory, locked while this process is at work in it.
    prepare: called with the driver, the directory and the time of the start; finds the data and
      raises UserError for whatever would fail later.

  Returns:
    Whether the run is complete, and not stopped before its end.
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
      training = prepare(parallel, run, started)
      training.check()
      identity = (
        config_lib.to_json(training.config),
        training.tokenizer,
        CHANGEABLE_KEYS,
        training.describe_data(),
      )
      if is_first:
        run.create_or_check(*identity)
    with ending_together(parallel):
      if not is_first:  # with other data or another config, the processes would not fit together
        run.check(*identity)
      is_finished = training.is_finished()
    if is_finished:
      say(f"{workdir} is complete; nothing to do")
      return True
    with ending_at_once(parallel):
      return training.run_all()


@dataclasses.dataclass(kw_only=True)
class TrainingRun:
  """One run in this process: what its events share. Subclasses say what is trained on what.

  Attributes:
    config: with groups model (resolved), optimizer, train and eval.
    tokenizer: of the model.
    num_steps: updates of the whole run.
    started: time of the process's start.
    seconds_before: that processes before this one took for the steps restored.
    is_enough: ends the run from outside.
    best_metric: what `saved_metrics` says of checkpoints; the one where it is lowest is kept.
  """

  config: RunConfig
  run: RunDirectory
  tokenizer: Tokenizer
  parallel: parallel_lib.Parallel
  num_steps: int
  started: float
  seconds_before: float = 0.0
  is_enough: IsEnough = never
  best_metric: str = "valid_loss"

  def check(self) -> None:
    """Raises ConfigError for what can have no effect on these parameters in these updates."""
    names = list(named_leaves(self.specs()))
    for key in ("decay_pattern", "frozen_pattern"):
      pattern = getattr(self.config.optimizer, key)
      num_matching = sum(bool(pattern and re.search(pattern, name)) for name in names)
      is_all_frozen = key == "frozen_pattern" and num_matching == len(names)
      if is_all_frozen or (pattern and not num_matching):
        raise ConfigError(
          f'optimizer.{key} "{pattern}" matches {"every" if num_matching else "no"} parameter;'
          f" their paths are {', '.join(names)}"
        )
    train = self.config.train
    if train.profile_num_steps and train.profile_start_step >= self.num_steps:
      raise ConfigError(
        f"train.profile_start_step is {train.profile_start_step}, and the run has"
        f" {self.num_steps} updates; lower it to see a profile"
      )

  def describe_data(self) -> dict[str, Any]:
    """Returns what tells the data of this run from others, wherever they lie."""
    raise NotImplementedError

  def is_finished(self) -> bool:
    """Says whether nothing is left to do and the last checkpoint can be read."""
    raise NotImplementedError

  def objective(self) -> Objective:
    """Returns what is minimised."""
    raise NotImplementedError

  def hyperparameters(self) -> Hyperparameters:
    """Returns the traced scalars of the run."""
    raise NotImplementedError

  def specs(self) -> PyTree:
    """Describes the parameters, in ParameterSpecs."""
    raise NotImplementedError

  def load_initial(self, params: PyTree) -> PyTree:
    """Returns what training starts from in place of the drawn `params`: those of init_from."""
    raise NotImplementedError

  def batches(self, start_step: int) -> Iterator[Batch]:
    """Yields the rows that this process feeds, from update start_step on."""
    raise NotImplementedError

  def events(self) -> list[Event]:
    """Returns what is measured and written now and then."""
    raise NotImplementedError

  def model_params(self, state: TrainState) -> PyTree:
    """Returns the parameters of the model as it is used after training."""
    return state.eval_params

  def saved_metrics(self, line: Line) -> dict[str, float]:
    """Returns what is kept with a checkpoint, of the line of its step."""
    return {self.best_metric: line[self.best_metric]} if self.best_metric in line else {}

  def has_converged(self) -> bool:
    """Says after an evaluation whether further updates would bring nothing."""
    return False

  def row_size(self) -> tuple[int, int]:
    """Returns (rows of a batch, tokens of the longest row)."""
    return self.config.train.batch_rows, self.config.model.context_length

  def report_page(self, metrics: list[dict[str, Any]], **common: Any) -> str:
    """Builds the report; `common` is what `training_report` takes."""
    raise NotImplementedError

  def run_all(self) -> bool:
    """Restores or initialises, trains, leaves a report; returns whether the run is complete."""
    config, train = self.config, self.config.train
    self._prompts = sample_prompt_ids(config.eval, self.tokenizer)
    self._describe()
    objective = self.objective()
    self._find_not_finite = not_finite_program(self.parallel, objective)
    train_step = train_program(
      self.parallel,
      objective,
      config.optimizer,
      skip_nonfinite=train.skip_nonfinite,
      spike_sigmas=train.spike_sigmas,
    )
    self._peak = hardware.peak_flops_per_second(
      jax.devices(), config.model.compute_dtype, train.peak_flops_per_second
    )
    with CheckpointStore(
      self.run.checkpoints_path, train.keep_latest, train.keep_every_steps, self.best_metric
    ) as self.store:
      state, start_step = self._first_state()
      with (
        ProgressDisplay(
          self.num_steps, start_step, is_enabled=self.parallel.process_index == 0
        ) as display,
        stop_signals(display.say) as is_stop_requested,
        self._profiler() as profiler,
        self._metrics_writer(start_step) as self._writer,
        contextlib.closing(prefetch(self._placed_batches(start_step), 2)) as batches,
      ):
        loop = Loop(
          train_step=train_step,
          num_steps=self.num_steps,
          events=self.events(),
          save=self._save,
          save_every_steps=config.save_every_steps or self.num_steps,
          write=self._write,
          show=lambda step, line: display.update(step, **line),
          status=display.status,
          log_every_steps=train.log_every_steps,
          flops_per_token=hardware.flops_per_token(config.model, self.row_size()[1]),
          peak_flops_per_second=self._peak.flops_per_second,
          max_bad_steps=train.max_bad_steps,
          diagnose=self._diagnose,
          should_stop=lambda step: self._agree(step, is_stop_requested()),
          is_enough=lambda step, line: self.has_converged() or self.is_enough(step, line),
          profile=profiler.before_step,
        )
        step = start_step
        if not self.has_converged():  # nor had it when it was interrupted
          state, step = loop.run(state, batches, start_step)
        self.store.wait()  # while signals are still polite requests
      if bad := int(state.health.skipped_in_row):
        say(f"warning: the last {bad} updates were skipped; the model is the one from before them")
      is_complete = step == self.num_steps or self.has_converged()
      if is_complete:
        self.finish(state, step)
    self.write_report()
    done = "done" if is_complete else "stopped; the same command goes on from here"
    say(f"step {step} of {self.num_steps}, {done}: {self.run.path}")
    return is_complete

  def finish(self, state: TrainState, step: int) -> None:
    """Runs once after the last update, with everything saved or being saved."""

  def _agree(self, step: int, is_wanted: bool) -> bool:
    """Says whether a process was asked to stop; several ask each other now and then."""
    if self.parallel.process_count > 1 and step % self.config.train.log_every_steps:
      return False
    return self.parallel.agree(is_wanted)

  def _profiler(self) -> Profiler:
    train = self.config.train
    return Profiler(f"{self.run.path}/profile", train.profile_start_step, train.profile_num_steps)

  def _describe(self) -> None:
    config, model = self.config, self.config.model
    num_rows, row_tokens = self.row_size()
    estimate = hardware.memory_estimate(
      self.specs(),
      model,
      config.optimizer,
      dataclasses.replace(config.train, batch_rows=num_rows),
      num_devices=self.parallel.num_devices,
      row_tokens=row_tokens,
    )
    say(
      f"model: {report.format_count(count_parameters(model))} parameters, {model.num_layers} layers"
      f" x {model.model_dim}, context {model.context_length}"
    )
    say(
      f"run: {self.num_steps:,} steps of {num_rows} rows, seed {config.seed}, on"
      f" {self.parallel.num_devices} {jax.devices()[0].device_kind} devices ({config.train.mode});"
      f" about {report.format_bytes(estimate.total)} of memory each"
    )
    room = hardware.available_bytes(jax.local_devices()[0])
    if room and estimate.total > room:
      words = (
        f"that is more than the {report.format_bytes(room)} there are; lower train.batch_rows,"
        " raise train.accumulation, or set model.remat, train.loss_chunk_tokens"
      )
      if estimate.total > HOPELESS_MEMORY * room:
        raise ConfigError(f"a device needs {report.format_bytes(estimate.total)}: {words}")
      say(f"warning: {words}")

  def abstract_state(self) -> PyTree:
    """Describes the state of the run, for restoring it."""
    return self.parallel.abstract_state(*self._init())

  def _init(self) -> tuple[Any, ...]:
    """Returns a function that makes the first state, and its arguments."""
    key = jax.random.key(self.config.seed)
    return make_init(self.specs(), self.config.optimizer), self.hyperparameters(), key

  def _first_state(self) -> tuple[TrainState, int]:
    """Goes on from the newest whole checkpoint, or starts from init_from or from scratch."""
    restored = self.store.restore_latest(self.abstract_state())
    if restored is not None:
      for line in restored.skipped:
        say(line)
      if self.parallel.process_index == 0:
        self.run.drop_after(restored.step)
        self.seconds_before = max((line["seconds"] for line in self.run.read_metrics()), default=0)
      say(f"resuming after step {restored.step}")
      return self.parallel.from_saved(restored.state), restored.step
    state = self.parallel.init_state(*self._init())
    if self.config.init_from:
      with ending_together(self.parallel):
        params = self.load_initial(state.params)
      ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
      state = state.replace(params=params, ema=ema)
    return state, 0

  def _placed_batches(self, start_step: int) -> Iterator[Any]:
    for batch in self.batches(start_step):
      yield self.parallel.shard_batch(batch, self.config.train.accumulation)

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
    self._writer.write(step, **line, seconds=self.seconds())

  def seconds(self) -> float:
    """Returns the time that the run has taken so far, in all of its processes."""
    return self.seconds_before + time.time() - self.started

  def sample_events(self) -> list[Event]:
    """Returns the event that continues prompts, if the config asks for it."""
    if not self.config.eval.has_samples:
      return []
    return [Event(self.config.eval.every_steps, self._sample, "sampling")]

  def _sample(self, step: int, state: TrainState) -> None:
    config = self.config.eval
    new_tokens = sample_long(
      self.parallel.for_decoding(self.model_params(state)),
      self.config.model,
      self._prompts,
      max_new_tokens=config.sample_tokens,
      temperature=config.sample_temperature,
      key=jax.random.fold_in(jax.random.key(self.config.seed), step),
      num_ids=self.tokenizer.vocab_size,
    )
    if self.parallel.process_index == 0:
      for prompt, row in zip(config.sample_prompts, new_tokens):
        self.run.append_samples(step, prompt + self.tokenizer.decode(row.tolist()))

  def _save(self, step: int, state: TrainState, line: Line) -> None:
    self.store.save(step, self.parallel.for_saving(state), self.saved_metrics(line), force=True)
    self.write_report()

  def _diagnose(self, state: TrainState, batch: Any) -> str:
    return describe_not_finite(self.parallel.to_host(self._find_not_finite(state, batch)))

  def write_report(self) -> None:
    """Rebuilds report.html from what the run directory holds."""
    if self.parallel.process_index:
      return
    prompts = self.config.eval.sample_prompts
    samples = []
    for step, text in self.run.read_samples():
      prompt = max((p for p in prompts if text.startswith(p)), key=len, default="")
      samples.append((step, prompt, text[len(prompt) :]))
    self.run.flush()
    metrics = self.run.read_metrics()
    page = self.report_page(
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
