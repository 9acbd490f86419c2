"""The one loop: pretraining and fine-tuning both call it, neither forks it.

It knows how to count, to look at numbers one step late (so that accelerators never wait for the
host), to stop, and when to call what it was given: evaluation, samples, saving.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.errors import UserError
from gptjax.train.step import TrainState

Line = dict[str, Any]


class DivergedError(UserError):
  """Too many steps in a row were not finite, or spiked."""


@dataclasses.dataclass(frozen=True)
class Event:
  """Something to run after every so many updates, and after the last.

  Attributes:
    every_steps: 0 is after the last only.
    run: `run(step, state) -> values to add to the line of metrics`, or None.
    name: what the display says meanwhile.
    measures: it runs before the line is written; the others (samples) do not delay it.
  """

  every_steps: int
  run: Callable[[int, TrainState], Mapping[str, Any] | None]
  name: str
  measures: bool = False

  def is_due(self, step: int, num_steps: int) -> bool:
    return step == num_steps or (self.every_steps > 0 and step % self.every_steps == 0)


@dataclasses.dataclass(frozen=True)
class Loop:
  """A run of exactly num_steps updates.

  Attributes:
    train_step: `train_step(state, batch) -> (state, metrics)`.
    num_steps: updates of the whole run.
    events: in the order they run.
    save: `save(step, state, line)`, called every save_every_steps unless that update was bad,
      after the last update, and when the run is interrupted.
    save_every_steps: updates between saves.
    write: takes (step, values) for metrics.jsonl and the trackers.
    show: takes (step, values) after every update.
    status: takes the name of what runs between updates.
    log_every_steps: updates between lines of metrics.
    flops_per_token, peak_flops_per_second: of the model, and of all devices (None: no MFU).
    max_bad_steps: skipped updates in a row that end the run.
    diagnose: `diagnose(state, batch) -> str` names what went bad.
    should_stop: asked after every update, with its number; True saves and ends the run.
    is_enough: asked after every step that was measured, with its number and line; True too saves
      and ends the run.
    profile: `profile(step)` is told each update before it starts.
  """

  train_step: Callable
  num_steps: int
  events: Sequence[Event]
  save: Callable[[int, TrainState, Line], None]
  save_every_steps: int
  write: Callable[[int, Line], None]
  show: Callable[[int, Line], None]
  status: Callable[[str], None]
  log_every_steps: int
  flops_per_token: float
  peak_flops_per_second: float | None
  max_bad_steps: int
  diagnose: Callable[[TrainState, Any], str]
  should_stop: Callable[[int], bool]
  is_enough: Callable[[int, Line], bool] = lambda step, line: False
  profile: Callable[[int], None] = lambda step: None

  def run(
    self, state: TrainState, batches: Iterable[Any], start_step: int
  ) -> tuple[TrainState, int]:
    """Runs updates start_step + 1 .. num_steps.

    Args:
      state: after start_step updates; donated.
      batches: of the remaining updates, on the devices, in order.
      start_step: completed updates.

    Returns:
      (final state, completed updates); fewer than num_steps if the run was stopped.

    Raises:
      DivergedError: max_bad_steps updates in a row were skipped. Saved checkpoints stay.
    """
    clock = _Clock()
    pending = None
    step = saved_step = start_step
    batches = iter(batches)
    compiled = set()
    while step < self.num_steps:
      self.profile(step)
      batch = next(batches)
      shapes = tuple(map(np.shape, jax.tree.leaves(batch)))
      is_compiling = shapes not in compiled
      if is_compiling:
        compiled.add(shapes)
        clock.stop()
      state, metrics = self.train_step(state, batch)
      step += 1
      if pending is not None:
        self._look(*pending, clock, state, saved_step)
      pending = (step, metrics, batch)
      is_stopped = self.should_stop(step) and step < self.num_steps
      due = [event for event in self.events if event.is_due(step, self.num_steps)]
      is_save_due = step % self.save_every_steps == 0 or step == self.num_steps
      if due or is_save_due or is_stopped or is_compiling:
        line, bad_in_row = self._look(*pending, clock, state, saved_step, is_logged=bool(due))
        pending = None
        if due:
          self._run_events([] if is_stopped else due, step, state, line)
        if any(event.measures for event in due) and not is_stopped:
          is_stopped = self.is_enough(step, line)
        # Bad updates must not push the checkpoints from before them out.
        is_save_due &= not bad_in_row or step == self.num_steps
        if is_save_due or is_stopped:
          self.status("saving")
          self.save(step, state, line)
          saved_step = step
        clock.restart()
      if is_stopped:
        break
    return state, step

  def _look(
    self, step, metrics, batch, clock, state, saved_step, is_logged=False
  ) -> tuple[Line, int]:
    """Reads the numbers of an update that may still run, shows them, writes them when due.

    The state may be that after one more update: of a bad update it is the same.

    Returns:
      (the line of metrics, how many updates in a row were bad).
    """
    metrics = jax.device_get(metrics)
    tokens_per_second = clock.tick(float(metrics.pop("tokens")))
    line = {name: value.item() for name, value in metrics.items()}
    line = {"train_loss": line.pop("train_loss"), **line}
    if not line["skipped"]:
      del line["skipped"]
    is_skipped, in_row = line.pop("is_skipped"), line.pop("skipped_in_row")
    if tokens_per_second:
      line["tokens_per_second"] = tokens_per_second
      if self.peak_flops_per_second:
        line["mfu"] = tokens_per_second * self.flops_per_token / self.peak_flops_per_second
    self.show(step, line)
    if in_row >= self.max_bad_steps:
      self.write(step, line)
      remedy = "start again in a new --workdir, with a lower optimizer.learning_rate"
      if saved_step:
        remedy = (
          f"the last checkpoint, of step {saved_step}, is from before them. Raise"
          f" train.max_bad_steps to go on from it, or {remedy} and init_from"
        )
      raise DivergedError(
        f"{in_row} updates in a row were skipped, up to step {step} (train_loss"
        f" {line['train_loss']}, grad_norm {line['grad_norm']}): {self.diagnose(state, batch)};"
        f" {remedy}"
      )
    if not is_logged and (step % self.log_every_steps == 0 or is_skipped):
      self.write(step, line)
    return line, in_row

  def _run_events(self, due: Sequence[Event], step: int, state: TrainState, line: Line) -> None:
    for event in due:
      if event.measures:
        self.status(event.name)
        line.update(event.run(step, state))
    self.write(step, line)
    self.show(step, line)
    for event in due:
      if not event.measures:
        self.status(event.name)
        event.run(step, state)


class _Clock:
  """Tokens per second over the updates since the last restart; events are not counted."""

  def __init__(self):
    self._tokens, self._started, self._rate = 0.0, None, None

  def stop(self) -> None:
    """Counts nothing until the next restart: an update that compiles says nothing of the rate."""
    self._started = None

  def restart(self) -> None:
    self._tokens, self._started = 0.0, time.perf_counter()

  def tick(self, tokens: float) -> float | None:
    """Counts an update; returns the rate, the one before while stopped, None if none was seen."""
    if self._started is None:
      return self._rate
    self._tokens += tokens
    self._rate = self._tokens / (time.perf_counter() - self._started)
    return self._rate


@contextlib.contextmanager
def stop_signals(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
  """Turns SIGTERM and Ctrl-C into a polite request; a second Ctrl-C ends at once.

  Yields:
    A function that says whether a stop was asked for.
  """
  requested = []

  def handle(number, frame):
    if requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    requested.append(number)
    say(f"{signal.Signals(number).name}: saving after this update, then leaving")

  previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield lambda: bool(requested)
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
  """Converts a loss to bits per byte of the text that was scored."""
  return nats_per_token / math.log(2) / bytes_per_token
