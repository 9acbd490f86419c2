"""Learning-rate schedules as pure functions of traced scalars, and durations in steps.

Update number s is the one that s completed updates precede, so a run of S steps makes the updates
0 .. S-1, and `learning_rate_factor` is what multiplies the peak rate in update s.

The warm-up of w steps is nanoGPT's, min(1, (s + 1) / (w + 1)): no update is wasted on a rate of 0,
the peak is reached in update w, and w = 0 starts at the peak. (GPT-1's code and optax use s / w,
whose first update does nothing.) The decay ends the same way: the end would be reached in update
warmup_steps + decay_steps, the first that a run of that length no longer makes; its last update is
one step above, so that an end of 0 wastes no update either.
"""

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.errors import ConfigError
from gptjax.train.config import OptimizerConfig

# Share of a "wsd" run that decays when the config does not say.
WSD_DECAY_FRACTION = 0.2
# Longer than any run; the range in which token counts are turned into steps.
MAX_STEPS = 2**40


@dataclasses.dataclass(frozen=True)
class Durations:
  """Lengths of a run and of the parts of its schedule, in updates.

  A fraction of the run is a whole number of updates, but for "gpt1", whose code rounds nothing.
  """

  total_steps: int
  warmup_steps: float
  decay_steps: int


def learning_rate_factor(schedule: str, hyper: Any, step: jax.Array) -> jax.Array:
  """Computes what multiplies the peak learning rate in one update.

  Args:
    schedule: "cosine", "linear", "constant", "wsd" or "gpt1".
    hyper: has float32 scalars warmup_steps, decay_steps, total_steps and end_fraction; all may be
      traced. decay_steps is at least 1.
    step: scalar, completed updates; exact up to 2**24.

  Returns:
    float32 scalar in [0, 1].

  Source: cosine as nanoGPT; "wsd" after Hu et al. 2024 (MiniCPM) with a linear decay; "gpt1" is
  warmup_linear of Radford et al. 2018's released code, (x / w if x <= w else 1) * (1 - x) with
  x = step / total_steps.
  """
  step = jnp.asarray(step, jnp.float32)
  if schedule == "gpt1":
    warm = step < hyper.warmup_steps
    ramp = jnp.where(warm, step / jnp.maximum(hyper.warmup_steps, 1), 1.0)
    return ramp * jnp.maximum(hyper.total_steps - step, 0) / hyper.total_steps
  ramp = jnp.minimum((step + 1) / (hyper.warmup_steps + 1), 1)
  if schedule == "constant":
    return ramp
  start = hyper.total_steps - hyper.decay_steps if schedule == "wsd" else hyper.warmup_steps
  progress = jnp.clip((step - start) / hyper.decay_steps, 0, 1)
  left = (1 + jnp.cos(jnp.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
  return ramp * (hyper.end_fraction + (1 - hyper.end_fraction) * left)


def resolve_durations(
  config: OptimizerConfig, total_steps: int, tokens_before: Callable[[int], int]
) -> Durations:
  """Converts a config's steps, tokens and fractions to steps.

  A count of tokens becomes the fewest steps that see as many. The decay of "cosine" and "linear"
  follows the warm-up, the decay of "wsd" ends with the run. A warm-up longer than the run is
  allowed (a short trial of a long recipe); its rate then stays below the peak.

  Args:
    config: at most one spelling of each duration is set.
    total_steps: updates of the run, at least 1.
    tokens_before: tokens that the updates before update k have seen, increasing in k and defined
      beyond the run.

  Raises:
    ConfigError: a duration is negative, or one is set that the schedule does not use.
  """
  warmup_steps = _warmup_steps(config, total_steps, tokens_before)
  if config.decay_steps is None and config.decay_tokens is None:
    wsd_steps = round(WSD_DECAY_FRACTION * total_steps)
    decay_steps = wsd_steps if config.schedule == "wsd" else total_steps - warmup_steps
    return Durations(total_steps, warmup_steps, max(round(decay_steps), 1))
  if config.schedule in ("constant", "gpt1"):
    raise ConfigError(
      f'optimizer.schedule "{config.schedule}" has no decay to set; remove optimizer.decay_steps'
      " or optimizer.decay_tokens, or choose another schedule"
    )
  for key in ("decay_steps", "decay_tokens"):
    value = getattr(config, key)
    if value is not None and value < 1:
      raise ConfigError(f"optimizer.{key} is {value}; it must be at least 1")
  decay_steps = config.decay_steps
  if decay_steps is None and config.schedule == "wsd":
    start_tokens = tokens_before(total_steps) - config.decay_tokens
    decay_steps = max(total_steps - _steps_of(start_tokens, tokens_before), 1)
  elif decay_steps is None:
    end_tokens = tokens_before(warmup_steps) + config.decay_tokens
    decay_steps = _steps_of(end_tokens, tokens_before) - warmup_steps
  return Durations(total_steps, warmup_steps, decay_steps)


def _warmup_steps(
  config: OptimizerConfig, total_steps: int, tokens_before: Callable[[int], int]
) -> float:
  """Converts the one spelling of the warm-up that is set; none is no warm-up."""
  for key in ("warmup_steps", "warmup_tokens", "warmup_fraction"):
    value = getattr(config, key)
    if value is not None and value < 0:
      raise ConfigError(f"optimizer.{key} is {value}; it must not be negative")
  if config.warmup_steps is not None:
    return config.warmup_steps
  if config.warmup_tokens is not None:
    return _steps_of(config.warmup_tokens, tokens_before)
  steps = (config.warmup_fraction or 0.0) * total_steps
  return steps if config.schedule == "gpt1" else round(steps)


def _steps_of(tokens: int, tokens_before: Callable[[int], int]) -> int:
  """Returns the fewest steps that see at least `tokens` tokens."""
  return bisect.bisect_left(range(MAX_STEPS), tokens, key=tokens_before)
