"""Compiled programs, shared by the runs of one process that differ in traced values only.

A sweep trains one small model after another; compiling would take longer than training. Programs
are kept by what is static: the devices, the objective, the optimiser without its traced values.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from gptjax.model.parameters import init_specs
from gptjax.parallel import Parallel, Program
from gptjax.train.config import OptimizerConfig
from gptjax.train.optimizer import Hyperparameters
from gptjax.train.step import (
  Objective,
  find_not_finite,
  init_state,
  make_eval_step,
  make_train_step,
)

PyTree = Any

KEPT_PROGRAMS = 32  # of each kind; a sweep over architectures must not fill the memory

_DURATIONS = ("warmup_steps", "warmup_tokens", "warmup_fraction", "decay_steps", "decay_tokens")
_TRACED = {field.name for field in dataclasses.fields(Hyperparameters)}.union(_DURATIONS)
_step_traces = 0

_shared = functools.lru_cache(KEPT_PROGRAMS)


def count_step_compilations() -> int:
  """Returns how often this process has compiled a training step."""
  return _step_traces


def static_optimizer(config: OptimizerConfig) -> OptimizerConfig:
  """Returns the config with every traced value at its default.

  An average of the parameters is static in that there is one; its decay becomes 0.5.
  """
  defaults = OptimizerConfig()
  traced = {
    field.name: getattr(defaults, field.name)
    for field in dataclasses.fields(config)
    if field.name in _TRACED
  }
  has_average = config.ema_decay > 0
  return dataclasses.replace(config, **traced | {"ema_decay": 0.5 * has_average})


def train_program(
  parallel: Parallel,
  objective: Objective,
  optimizer: OptimizerConfig,
  *,
  skip_nonfinite: bool,
  spike_sigmas: float,
) -> Program:
  """Returns the training step of `make_train_step`, the one from before where there is one.

  Args:
    objective: hashable by value.
  """
  return _train_program(
    parallel, objective, static_optimizer(optimizer), skip_nonfinite, spike_sigmas
  )


@_shared
def _train_program(parallel, objective, optimizer, skip_nonfinite, spike_sigmas) -> Program:
  step = make_train_step(
    objective, optimizer, skip_nonfinite=skip_nonfinite, spike_sigmas=spike_sigmas
  )

  def counted_step(state, batch, *, axis_name):
    global _step_traces
    _step_traces += 1
    return step(state, batch, axis_name=axis_name)

  return parallel.compile_step(counted_step)


def make_init(specs: PyTree, optimizer: OptimizerConfig) -> Callable:
  """Returns `init(hyper, key) -> TrainState`, the same function for equal specs.

  Args:
    specs: of the parameters.
    optimizer: what it traces does not matter.
  """
  leaves, structure = jax.tree.flatten(specs)
  return _make_init(tuple(leaves), structure, static_optimizer(optimizer))


@_shared
def _make_init(specs, structure, optimizer) -> Callable:
  def init(hyper, key):
    init_key, run_key = jax.random.split(key)
    params = init_specs(jax.tree.unflatten(structure, specs), init_key)
    return init_state(params, optimizer, hyper, run_key)

  return init


@_shared
def eval_program(parallel: Parallel, objective: Objective) -> Program:
  """Returns the evaluation of `make_eval_step`."""
  return parallel.compile_eval(make_eval_step(objective))


@_shared
def not_finite_program(parallel: Parallel, objective: Objective) -> Program:
  """Returns the program of `find_not_finite`."""
  return parallel.compile_eval(functools.partial(find_not_finite, objective=objective))
