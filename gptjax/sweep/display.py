"""What a person sees of a sweep: a line for each running trial, and how many are left.

Everything goes to standard error. Reads the metrics of running trials from their run directories,
so that it shows those of other machines that share the folder too.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.report import format_seconds
from gptjax.sweep.config import Plan
from gptjax.sweep.space import spell, spell_setting
from gptjax.sweep.study import Record

PLAIN_SECONDS = 30.0
TAIL_BYTES = 8192  # holds the last lines of metrics.jsonl


class SweepDisplay:
  """Shows a sweep; a context manager.

  Args:
    plan: the sweep.
    run_path: `run_path(index)`, the run directory of a trial.
    workers: that run trials side by side, for the time left.
    stream: where to write; None is standard error.
    clock: seconds, monotonic.
  """

  def __init__(
    self,
    plan: Plan,
    run_path: Callable[[int], Path],
    workers: int,
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._plan, self._run_path, self._workers, self._clock = plan, run_path, workers, clock
    self._console = Console(stderr=stream is None, file=stream, highlight=False, soft_wrap=True)
    self._live: Live | None = None
    self._shown_at: float | None = None
    self._finished: set[int] | None = None

  def __enter__(self) -> "SweepDisplay":
    if self._console.is_terminal:
      self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
      self._live.start()
    return self

  def __exit__(self, *_: Any) -> None:
    if self._live:
      self._live.stop()

  def say(self, message: str) -> None:
    """Prints a message above the lines."""
    self._console.print(Text(message))

  def update(self, records: Sequence[Record]) -> None:
    """Takes the newest state of all trials; says which have ended since the last time."""
    finished = {record.index for record in records if record.is_finished}
    for record in records:
      if self._finished is not None and record.index in finished - self._finished:
        self.say(_ending(record, self._plan.sweep.objective))
    self._finished = finished
    if self._live:
      self._live.update(Group(*map(Text, self.lines(records))), refresh=True)
    elif self._shown_at is None or self._clock() - self._shown_at >= PLAIN_SECONDS:
      self._shown_at = self._clock()
      for line in self.lines(records):
        self.say(line)

  def lines(self, records: Sequence[Record]) -> list[str]:
    """Returns a line for each running trial, and the summary."""
    running = {
      record.index: last_metrics(self._run_path(record.index))
      for record in records
      if record.state == "running"
    }
    by_index = {record.index: record for record in records}
    lines = [self._running_line(by_index[index], line) for index, line in running.items()]
    counts = {state: sum(record.state == state for record in records) for state in _COUNTED}
    parts = [f"{sum(record.is_finished for record in records)} of {len(records)} trials finished"]
    parts += [f"{count} {state}" for state, count in counts.items() if count]
    elapsed = [line.get("seconds", 0.0) for line in running.values()]
    left = seconds_left(records, elapsed, self._workers)
    return [*lines, ", ".join(parts) + f"; {format_seconds(left)} left"]

  def _running_line(self, record: Record, line: dict[str, Any]) -> str:
    total = self._plan.config(record.setting).train.num_steps
    parts = [
      f"trial {record.index}",
      f"step {line.get('step', 0)}" + (f"/{total}" if total else ""),
    ]
    parts += [f"{key} {line[key]:.4g}" for key in ("train_loss", "valid_loss") if key in line]
    if record.seed is not None:
      parts.append(f"seed {record.seed}")
    return "  ".join([*parts, spell_setting(record.setting), f"({record.worker})"])


_COUNTED = ("pruned", "failed", "running", "waiting")


def last_metrics(path: Path) -> dict[str, Any]:
  """Returns the newest value of every metric in the last lines of a run's metrics."""
  newest: dict[str, Any] = {}
  try:
    with open(RunDirectory(path).metrics_path, "rb") as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
      lines = file.read().decode(errors="replace").splitlines()
  except FileNotFoundError:
    return newest
  for line in lines:
    try:
      values = json.loads(line)
    except ValueError:  # torn at either end
      continue
    newest |= {key: value for key, value in values.items() if isinstance(value, int | float)}
  return newest


def seconds_left(records: Sequence[Record], elapsed: Sequence[float], workers: int) -> float | None:
  """Estimates the time to the end from the trials that ended; None before the first has.

  Args:
    records: all trials.
    elapsed: seconds that each running one has taken.
    workers: that run side by side.
  """
  remaining = sum(not record.is_finished for record in records)
  if not remaining:
    return 0.0
  taken = [r.seconds for r in records if r.state in ("complete", "pruned") and r.seconds]
  if not taken:
    return None
  mean = statistics.mean(taken)
  work = sum(max(mean - seconds, 0.0) for seconds in elapsed) + mean * (remaining - len(elapsed))
  return work / min(workers, remaining)


def _ending(record: Record, objective: str) -> str:
  setting = spell_setting(record.setting)
  seed = "" if record.seed is None else f", seed {record.seed}"
  what = f"trial {record.index} {record.state}"
  if record.state == "failed":
    return f"{what} ({setting}{seed}): {record.reason}"
  value = "" if record.value is None else f": {objective} {spell(record.value)}"
  return f"{what}{value} ({setting}{seed})"
