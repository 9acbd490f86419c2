"""Schedules against float64 formulas, and durations in steps."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gptjax.errors import ConfigError
from gptjax.train.config import OptimizerConfig
from gptjax.train.schedule import Durations, learning_rate_factor, resolve_durations

# float32 has 24 bits; a factor is a handful of operations, one of them a subtraction near 0.
TOLERANCE = 2e-6


def hyper(total=100, warmup=10, decay=90, end=0.1):
  return SimpleNamespace(
    total_steps=np.float32(total),
    warmup_steps=np.float32(warmup),
    decay_steps=np.float32(decay),
    end_fraction=np.float32(end),
  )


def factors(schedule, steps, **values):
  factor = jax.jit(lambda step: learning_rate_factor(schedule, hyper(**values), step))
  return np.array([factor(step) for step in steps])


def nanogpt_factor(step, warmup, decay_end, end):
  """nanoGPT's get_lr over its peak, in float64."""
  if step < warmup:
    return (step + 1) / (warmup + 1)
  if step > decay_end:
    return end
  ratio = (step - warmup) / (decay_end - warmup)
  return end + 0.5 * (1 + math.cos(math.pi * ratio)) * (1 - end)


def gpt1_factor(step, warmup, total):
  """warmup_linear of the released code, in float64."""
  x, w = step / total, warmup / total
  return (x / w if x <= w else 1) * (1 - x)


def test_cosine_is_nanogpts():
  steps = range(0, 121)
  expected = [nanogpt_factor(step, 10, 100, 0.1) for step in steps]
  np.testing.assert_allclose(factors("cosine", steps), expected, rtol=TOLERANCE)


def test_cosine_with_another_warmup_is_not_nanogpts():
  steps = range(0, 121)
  expected = [nanogpt_factor(step, 11, 100, 0.1) for step in steps]
  assert not np.allclose(factors("cosine", steps), expected, rtol=1e-3)


@pytest.mark.parametrize("total", [100, 234, 750])
def test_gpt1s_warm_up_of_a_fraction_is_not_rounded(total):
  """0.002 of a short run is less than an update, of which the first is still wasted on 0."""
  config = OptimizerConfig(schedule="gpt1", warmup_fraction=0.002)
  durations = resolve_durations(config, total, lambda step: step)
  steps = [0, 1, 2, total - 1]
  got = factors("gpt1", steps, total=total, warmup=durations.warmup_steps)
  expected = [gpt1_factor(step, 0.002 * total, total) for step in steps]
  np.testing.assert_allclose(got, expected, rtol=TOLERANCE)
  assert got[0] == 0 < got[1]


def test_gpt1_is_the_released_code():
  steps = range(0, 100)
  expected = [gpt1_factor(step, 8, 100) for step in steps]
  np.testing.assert_allclose(factors("gpt1", steps, warmup=8), expected, rtol=TOLERANCE)
  unlike = [gpt1_factor(step, 9, 100) for step in steps]
  assert not np.allclose(factors("gpt1", steps, warmup=8), unlike, rtol=1e-3)


@pytest.mark.parametrize(
  "schedule, points",
  [
    ("linear", {0: 1 / 11, 9: 10 / 11, 10: 1, 55: 0.55, 99: 0.11, 100: 0.1, 500: 0.1}),
    ("constant", {0: 1 / 11, 10: 1, 99: 1, 500: 1}),
    ("gpt1", {0: 0, 5: 0.5 * 0.95, 10: 0.9, 99: 0.01, 100: 0, 500: 0}),
  ],
)
def test_points(schedule, points):
  got = factors(schedule, points)
  np.testing.assert_allclose(got, list(points.values()), rtol=TOLERANCE)


def test_wsd_decays_at_the_end_of_the_run():
  points = {0: 1 / 11, 10: 1, 80: 1, 90: 0.55, 99: 0.145, 100: 0.1}
  got = factors("wsd", points, decay=20)
  np.testing.assert_allclose(got, list(points.values()), rtol=TOLERANCE)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "gpt1"])
def test_no_warmup_starts_at_the_peak(schedule):
  assert factors(schedule, [0], warmup=0, decay=20).item() == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "gpt1"])
def test_an_end_of_zero_wastes_no_update(schedule):
  last, after = factors(schedule, [99, 100], end=0.0)
  assert last > 0 and after < 1e-7


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "gpt1"])
def test_lengths_are_traced(schedule):
  traces = []

  @jax.jit
  def factor(warmup, decay, total, end, step):
    traces.append(schedule)
    values = SimpleNamespace(
      warmup_steps=warmup, decay_steps=decay, total_steps=total, end_fraction=end
    )
    return learning_rate_factor(schedule, values, step)

  got = [factor(*map(np.float32, (warmup, 50, 100, 0.1)), np.int32(5)) for warmup in (0, 10, 20)]
  assert len(traces) == 1
  assert len({float(value) for value in got}) == 3


def per_step(tokens):
  return lambda step: tokens * step


def ramp(step):
  """Batches of 100, 200, ... 1000 tokens, then 1000."""
  grown = min(step, 10)
  return 50 * grown * (grown + 1) + 1000 * (step - grown)


@pytest.mark.parametrize(
  "values, tokens_before, expected",
  [
    ({}, per_step(10), (0, 100)),
    ({"warmup_steps": 7}, per_step(10), (7, 93)),
    ({"warmup_fraction": 0.03}, per_step(10), (3, 97)),
    ({"warmup_tokens": 95}, per_step(10), (10, 90)),
    ({"warmup_tokens": 100}, per_step(10), (10, 90)),
    ({"warmup_tokens": 1500}, ramp, (5, 95)),
    ({"warmup_steps": 5, "decay_tokens": 4000 + 5000}, ramp, (5, 10)),
    ({"warmup_steps": 5, "decay_tokens": 10**6}, per_step(10), (5, 10**5)),
    ({"schedule": "wsd"}, per_step(10), (0, 20)),
    ({"schedule": "wsd", "decay_steps": 30}, per_step(10), (0, 30)),
    ({"schedule": "wsd", "decay_tokens": 300}, per_step(10), (0, 30)),
    ({"schedule": "wsd", "decay_tokens": 10**9}, per_step(10), (0, 100)),
    ({"warmup_steps": 200}, per_step(10), (200, 1)),
  ],
)
def test_durations(values, tokens_before, expected):
  durations = resolve_durations(OptimizerConfig(**values), 100, tokens_before)
  assert durations == Durations(100, *expected)


@pytest.mark.parametrize(
  "values",
  [
    {"warmup_steps": -1},
    {"warmup_fraction": -0.1},
    {"decay_steps": 0},
    {"decay_tokens": -5},
    {"schedule": "gpt1", "decay_steps": 10},
    {"schedule": "constant", "decay_tokens": 10},
  ],
)
def test_durations_that_make_no_sense_are_refused(values):
  with pytest.raises(ConfigError) as error:
    resolve_durations(OptimizerConfig(**values), 100, per_step(10))
  assert "\n" not in str(error.value) and "optimizer." in str(error.value)
