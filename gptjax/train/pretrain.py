"""Pretraining by next-token prediction: puts a config's data, model, devices and loop together."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from gptjax.batch import Batch
from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data.batches import BatchSource, valid_batches
from gptjax.data.prepare import PreparedData, prepare_data
from gptjax.model.parameters import model_specs
from gptjax.parallel import Parallel
from gptjax.train.config import PretrainConfig
from gptjax.train.initial import check_init_from, load_initial
from gptjax.train.loop import Event, bits_per_byte
from gptjax.train.optimizer import Hyperparameters, hyperparameters
from gptjax.train.programs import eval_program
from gptjax.train.run import IsEnough, TrainingRun, launch, never
from gptjax.train.run_report import training_report
from gptjax.train.schedule import resolve_durations
from gptjax.train.setup import (
  batch_schedule,
  check_events,
  describe_data,
  resolve_model,
  resolve_num_steps,
  say,
)
from gptjax.train.step import LanguageModelObjective, TrainState


def pretrain(config: PretrainConfig, workdir: str, is_enough: IsEnough = never) -> bool:
  """Trains a language model into a run directory, or goes on with the run that is there.

  Args:
    config: the run.
    workdir: the run directory.
    is_enough: as of TrainingRun.

  Returns:
    Whether the run is complete, and not stopped before its end.

  Raises:
    UserError: whatever in config, data or the directory keeps it from running.
  """

  def prepare(parallel: Parallel, run: RunDirectory, started: float) -> Pretraining:
    prepared = prepare_data(config.data, report=say)
    resolved = resolve_model(config, prepared)
    schedule = batch_schedule(resolved)
    schedule.check_processes(parallel.process_count)
    source = BatchSource(prepared, resolved.model.context_length, resolved.seed, schedule)
    num_steps = resolve_num_steps(resolved, schedule, source.rows_per_epoch)
    check_events(resolved, prepared, parallel.process_count)
    if run.latest_step() is None:
      check_init_from(resolved, prepared)
    return Pretraining(
      config=resolved,
      run=run,
      tokenizer=prepared.tokenizer,
      parallel=parallel,
      num_steps=num_steps,
      started=started,
      is_enough=is_enough,
      prepared=prepared,
      source=source,
    )

  return launch(config, workdir, prepare)


@dataclasses.dataclass(kw_only=True)
class Pretraining(TrainingRun):
  """A run of next-token prediction.

  Attributes:
    prepared: its token files.
    source: its batches.
  """

  prepared: PreparedData
  source: BatchSource

  def describe_data(self) -> dict[str, Any]:
    return describe_data(self.prepared)

  def is_finished(self) -> bool:
    with CheckpointStore(self.run.checkpoints_path) as store:
      return self.run.is_finished(self.num_steps) and store.is_whole(self.run.latest_step())

  def objective(self) -> LanguageModelObjective:
    objective = LanguageModelObjective(self.config.model, self.config.train.loss_chunk_tokens)
    self._eval_step = eval_program(self.parallel, objective)
    return objective

  def hyperparameters(self) -> Hyperparameters:
    config = self.config
    durations = resolve_durations(
      config.optimizer, self.num_steps, self.source.schedule.tokens_before
    )
    return hyperparameters(
      config.optimizer,
      durations,
      z_loss=config.train.z_loss,
      width_multiplier=config.model.width_multiplier if config.model.mup_base_dim else None,
    )

  def specs(self) -> Any:
    return model_specs(self.config.model)

  def load_initial(self, params: Any) -> Any:
    del params
    return load_initial(self.config, self.parallel)

  def batches(self, start_step: int) -> Iterator[Batch]:
    parallel = self.parallel
    return self.source.batches(start_step, parallel.process_index, parallel.process_count)

  def events(self) -> list[Event]:
    every_steps = self.config.eval.every_steps
    events = []
    if self.prepared.valid_tokens:
      events.append(Event(every_steps, self._evaluate, "evaluating", measures=True))
    return events + self.sample_events()

  def report_page(self, metrics: list[dict[str, Any]], **common: Any) -> str:
    return training_report(self.run.path.name, metrics, **common)

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
