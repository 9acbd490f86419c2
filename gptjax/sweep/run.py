"""`gptjax sweep`: starts workers, replaces those that die, shows how far they are, and reports."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.errors import UserError
from gptjax.sweep.config import Plan
from gptjax.sweep.display import SweepDisplay
from gptjax.sweep.report import write_results
from gptjax.sweep.study import Record, Study
from gptjax.sweep.worker import work_as_process
from gptjax.train.config import PretrainConfig
from gptjax.train.loop import stop_signals

_INPUT_KEYS = ("data.", "init_from", "tokenizer")  # of what a run reads
POLL_SECONDS = 0.5
REPORT_SECONDS = 60.0  # a report of many runs takes a second
MOST_DEATHS = 3  # of workers, one after another, with nothing taken in between


def sweep(plan: Plan, workdir: str, url: str = "", workers: int = 1) -> bool:
  """Runs the trials of a plan that are not finished, and reports on all.

  Args:
    plan: what to run.
    workdir: folder of the sweep.
    url: Optuna storage; "" is a journal in the folder.
    workers: processes of this machine that run trials.

  Returns:
    Whether all trials are finished; not if it was asked to stop.

  Raises:
    UserError: the data, the folder or the storage cannot be used, or every trial failed.
  """
  study = Study(plan, workdir, url)
  with SweepDisplay(plan, study.run_path, workers) as display:
    if any(not record.is_finished for record in _enqueued(study)):
      check_inputs(plan, study.workdir, display.say)
      with stop_signals(display.say) as is_stop_requested, _Crew(plan, workdir, url) as crew:
        crew.start(workers)
        _watch(study, plan, crew, display, is_stop_requested)
    records = study.records()
    display.update(records)
    summary = write_results(plan, study, records)
    display.say(summary)
  if records and all(record.state == "failed" for record in records):
    raise UserError(f"every trial failed; the first one: {records[0].reason}")
  return all(record.is_finished for record in records)


def _enqueued(study: Study) -> list[Record]:
  study.enqueue()
  return study.records()


def check_inputs(plan: Plan, workdir: Path, say: Callable[[str], None]) -> None:
  """Builds or reads the data of the trials once, and finds the models that they fine-tune.

  Where these are drawn, the trials find out.

  Raises:
    UserError: what is wrong with them.
  """
  are_drawn = plan.settings is None and any(key.startswith(_INPUT_KEYS) for key in plan.space)
  configs = {}
  for setting in () if are_drawn else plan.settings or ({},):
    config = plan.config(setting)
    inputs = [getattr(config, key, None) for key in ("data", "init_from", "tokenizer")]
    configs.setdefault(repr(inputs), config)
  for config in configs.values():
    if isinstance(config, PretrainConfig):
      from gptjax.data.prepare import prepare_data

      prepare_data(config.data, report=say)
    else:
      from gptjax.data.tasks import load_task
      from gptjax.train.transfer import find_origin

      find_origin(config, RunDirectory(workdir))
      load_task(config.data)


def _watch(study: Study, plan: Plan, crew: "_Crew", display: SweepDisplay, is_stop_requested):
  """Waits for the workers, and keeps display and report up to date."""
  reported_at = time.monotonic()
  num_reported = 0
  while True:
    records = study.records()
    display.update(records)
    num_finished = sum(record.is_finished for record in records)
    if is_stop_requested():
      crew.stop()
      return
    if num_finished == len(records) or not crew.tend(records):
      return
    if num_finished > num_reported and time.monotonic() - reported_at > REPORT_SECONDS:
      write_results(plan, study, records)
      reported_at, num_reported = time.monotonic(), num_finished
    time.sleep(POLL_SECONDS)


class _Crew:
  """The worker processes of this machine."""

  def __init__(self, plan: Plan, workdir: str, url: str):
    self._arguments = (plan, str(workdir), url)
    # A fork would inherit a started jax.
    self._context = multiprocessing.get_context("spawn")
    self._processes: list[multiprocessing.Process] = []
    self._deaths, self._starts = 0, 0

  def __enter__(self) -> "_Crew":
    return self

  def __exit__(self, *_) -> None:
    self.stop()

  def start(self, workers: int) -> None:
    """Adds workers."""
    for _ in range(workers):
      process = self._context.Process(target=work_as_process, args=self._arguments)
      process.start()
      self._processes.append(process)

  def tend(self, records: list[Record]) -> bool:
    """Replaces workers that died; returns whether any are left.

    Raises:
      UserError: they die before they take a trial.
    """
    starts = sum(len(record.starts) for record in records)
    if starts > self._starts:
      self._deaths, self._starts = 0, starts
    dead = [process for process in self._processes if process.exitcode]
    self._processes = [process for process in self._processes if process.exitcode is None]
    self._deaths += len(dead)
    if self._deaths > MOST_DEATHS:
      raise UserError(
        f"worker processes end with status {dead[-1].exitcode} before they take a trial; what they"
        " said is above"
      )
    self.start(len(dead))
    return bool(self._processes)

  def stop(self) -> None:
    """Asks the workers to save and leave, and waits."""
    for process in self._processes:
      process.terminate()
    for process in self._processes:
      process.join()
    self._processes = []
