"""The loop alone, with counters for a model: which lines, events and saves a stop leaves."""

import dataclasses

import numpy as np
import pytest

from gptjax.train import loop
from gptjax.train.loop import DivergedError, Event, Loop


def metrics(loss, in_row):
  return {
    "train_loss": np.float32(loss),
    "grad_norm": np.float32(1),
    "tokens": np.float32(8),
    "is_skipped": np.bool_(in_row > 0),
    "skipped": np.int32(in_row),
    "skipped_in_row": np.int32(in_row),
  }


class Recorder:
  """Runs a loop whose state is the number of updates done."""

  def __init__(
    self, num_steps=10, stop_at=None, bad_from=None, enough_at=None, save_every_steps=100
  ):
    self.lines, self.saves, self.sampled, self.diagnosed = [], [], [], []

    def train_step(state, batch):
      step = state + 1
      return step, metrics(step, max(0, step - bad_from + 1) if bad_from else 0)

    self.loop = Loop(
      train_step=train_step,
      num_steps=num_steps,
      events=[
        Event(5, lambda step, state: {"valid_loss": 1.0}, "evaluating", measures=True),
        Event(5, lambda step, state: self.sampled.append(step), "sampling"),
      ],
      save=lambda step, state, line: self.saves.append(step),
      save_every_steps=save_every_steps,
      write=lambda step, line: self.lines.append((step, "valid_loss" in line)),
      show=lambda step, line: None,
      status=lambda name: None,
      log_every_steps=3,
      flops_per_token=1.0,
      peak_flops_per_second=None,
      max_bad_steps=3,
      diagnose=lambda state, batch: self.diagnosed.append(batch) or "nothing found",
      should_stop=lambda step: step == stop_at,
      is_enough=lambda step, line: line["valid_loss"] == 1 and step == enough_at,
    )

  def run(self):
    _, step = self.loop.run(0, iter(range(1, 100)), 0)
    return step


def test_each_line_is_written_once():
  run = Recorder()
  assert run.run() == 10
  assert run.lines == [(3, False), (5, True), (6, False), (9, False), (10, True)]
  assert run.sampled == [5, 10] and run.saves == [10]


def test_a_stop_at_an_evaluation_keeps_the_line_without_evaluating():
  run = Recorder(stop_at=5)
  assert run.run() == 5
  assert run.lines == [(3, False), (5, False)]
  assert run.saves == [5] and not run.sampled


def test_a_stop_at_the_last_update_ends_the_run_as_always():
  run = Recorder(stop_at=10)
  assert run.run() == 10
  assert run.lines[-1] == (10, True)
  assert run.sampled == [5, 10] and run.saves == [10]


def test_what_is_enough_is_asked_of_evaluations_and_saves():
  run = Recorder(enough_at=5)
  assert run.run() == 5
  assert run.lines == [(3, False), (5, True)]
  assert run.saves == [5] and run.sampled == [5]
  assert Recorder(enough_at=6).run() == 10


@pytest.mark.parametrize("bad_from", [1, 4])
def test_what_went_bad_is_looked_for_in_the_batch_of_the_failing_update(bad_from):
  run = Recorder(bad_from=bad_from)
  with pytest.raises(DivergedError, match=f"up to step {bad_from + 2} .*start again in a new"):
    run.run()
  assert run.diagnosed == [bad_from + 2]


def test_bad_updates_are_not_saved_over_the_good_ones():
  run = Recorder(bad_from=5, save_every_steps=2)
  with pytest.raises(DivergedError, match=r"checkpoint, of step 4, is from before.* init_from"):
    run.run()
  assert run.saves == [2, 4]
  # The last update is saved as always.
  run = Recorder(bad_from=5, save_every_steps=2, num_steps=6)
  assert run.run() == 6
  assert run.saves == [2, 4, 6]


def test_the_rate_leaves_out_updates_that_compile(monkeypatch):
  """An update takes a second, and one of another shape a hundred to be compiled first."""
  now, rates, seen = [0.0], [], set()
  monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
  run = Recorder(num_steps=12)

  def train_step(state, batch):
    now[0] += 1.0 if batch.shape in seen else 100.0
    seen.add(batch.shape)
    return state + 1, metrics(1.0, 0)

  recording = dataclasses.replace(
    run.loop,
    train_step=train_step,
    events=(),
    show=lambda step, line: rates.append(line.get("tokens_per_second")),
  )
  recording.run(0, (np.zeros(3 if step < 6 else 4) for step in range(12)), 0)
  # Numbers are looked at one update late, so that the first ones are low.
  assert rates[0] is None and min(rates[1:]) >= 4.0
