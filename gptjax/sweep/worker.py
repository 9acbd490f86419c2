"""A process that runs trials, one after another, each in a run directory of its own."""

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.errors import UserError
from gptjax.sweep.config import Plan, SweepConfig
from gptjax.sweep.study import Study, Trial
from gptjax.train.config import PretrainConfig
from gptjax.train.loop import Line
from gptjax.train.programs import count_step_compilations

LOG_NAME = "log.txt"
STOPPED = 128 + signal.SIGTERM  # as a shell says it


def work_as_process(plan: Plan, workdir: str, url: str) -> None:
  """Runs trials as all that this process does; between trainings, a request to stop ends it."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
  threading.Thread(target=_end_with_parent, daemon=True).start()
  try:
    work(plan, workdir, url)
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway


def work(plan: Plan, workdir: str, url: str) -> None:
  """Runs trials until there is none to take; asked to stop, it ends with status STOPPED."""
  study = Study(plan, workdir, url)
  compiled_before = count_step_compilations()
  while True:
    with study.take() as trial:
      if trial is None:
        return
      try:
        has_ended = run_trial(plan, trial)
      finally:
        study.set_compilations(count_step_compilations() - compiled_before)
    if not has_ended:
      sys.exit(STOPPED)


def run_trial(plan: Plan, trial: Trial) -> bool:
  """Runs a trial to its end, or as far as it goes; whatever goes wrong is its end.

  Returns:
    Whether it ended. Otherwise the process was asked to stop, and the trial is to be gone on with.
  """
  is_hopeless = False

  def is_enough(step: int, line: Line) -> bool:
    nonlocal is_hopeless
    is_hopeless = trial.report(step, _objective(plan.sweep, line))
    return is_hopeless

  try:
    trial.start()
    with _log_to(trial.path / LOG_NAME):
      is_complete = _train(plan, trial, is_enough)
    if is_complete:
      trial.complete(objective_value(plan.sweep, trial.path))
    elif is_hopeless:
      trial.prune()
    return is_complete or is_hopeless
  except Exception as error:
    trial.fail(_reason(error))
    return True


def objective_value(sweep: SweepConfig, path: Path) -> float:
  """Returns the objective of a finished run.

  Raises:
    UserError: its metrics do not have it.
  """
  lines = RunDirectory(path).read_metrics()
  values = [_objective(sweep, line) for line in lines if sweep.objective in line]
  if not values:
    raise UserError(
      f'the run has no {sweep.objective}; hold out some data, or choose another "objective"'
    )
  if sweep.objective_of == "last":
    return values[-1]
  return min(values) if sweep.direction == "minimize" else max(values)


def _objective(sweep: SweepConfig, line: Line) -> float:
  if sweep.objective not in line:
    found = ", ".join(key for key in line if key.startswith(("valid", "train")))
    raise UserError(f'evaluations have no {sweep.objective}, the "objective", but {found}')
  value = float(line[sweep.objective])
  if not math.isfinite(value):
    raise UserError(f"{sweep.objective} is {value}: the run diverged")
  return value


def _train(plan: Plan, trial: Trial, is_enough) -> bool:
  """Runs what the config is of; True is complete."""
  config = plan.config(trial.setting, trial.seed)
  if plan.config_class is PretrainConfig:
    from gptjax.train.pretrain import pretrain as train
  else:
    from gptjax.train.finetune import finetune as train
  return train(config, str(trial.path), is_enough)


def _reason(error: Exception) -> str:
  """Says in one line why a trial failed; the traceback is in its log."""
  message = " ".join(str(error).split())
  if isinstance(error, UserError):
    return message
  name = type(error).__name__
  if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|out of memory", message, re.I):
    return f"out of memory: {message or name}"[:500]
  return f"{name}: {message}"[:500]


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
  """Sends standard error, of libraries too, to the end of a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  sys.stderr.flush()
  kept = os.dup(2)
  try:
    with open(path, "a", buffering=1) as file, contextlib.redirect_stderr(file):
      os.dup2(file.fileno(), 2)
      try:
        yield
      except Exception:
        traceback.print_exc()
        raise
  finally:
    os.dup2(kept, 2)
    os.close(kept)


def _end_with_parent() -> None:
  """Asks this process to stop, as a user would, when the one that started it has died."""
  if parent := multiprocessing.parent_process():
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
