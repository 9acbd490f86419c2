"""The train state and the one step: pure, written once, run by pmap or on a mesh.

Sums are divided once, after all micro-batches and devices were added, so that the update does not
depend on how the rows were dealt out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.flatten_util import ravel_pytree

from gptjax.batch import Batch
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_head
from gptjax.train.config import OptimizerConfig
from gptjax.train.loss import Sums, chunked_next_token_loss
from gptjax.train.optimizer import Hyperparameters, ema_update, learning_rate, make_optimizer
from gptjax.tree import join_named, map_named, named_leaves, split_named

PyTree = Any

# Spikes are judged against running means over about this many good steps, once as many were seen.
SPIKE_MEMORY_STEPS = 50

# Parameters in the order in which the forward pass reads them; others come last.
_FORWARD_PARTS = ("token_embedding", "position_embedding", "layers", "final_norm", "lm_head")
_FORWARD_PARTS_OF_LAYER = (
  "attention_norm",
  "attention/query",
  "attention/key",
  "attention/value",
  "attention/output",
  "mlp_norm",
  "mlp/up",
  "mlp/down",
)
_STACKED = "decoder/layers/"


class Objective(Protocol):
  """What a run minimises: named sums over rows, and what to divide them by.

  Equal objectives compute the same: runs of one process share what was compiled for one.
  """

  def weights(self, batch: Batch) -> dict[str, jax.Array]:
    """Returns the weight of each term in a batch, and its count of "tokens".

    It depends on the batch alone.
    """

  def __call__(
    self, params: PyTree, batch: Batch, hyper: Hyperparameters, key: jax.Array | None
  ) -> tuple[dict[str, jax.Array], Sums]:
    """Returns ({term: sum to differentiate}, {name: (sum, weight)} to report, "loss" among them).

    Each term is divided by its weight over the whole global batch, and the terms are added.
    """


@dataclasses.dataclass(frozen=True)
class LanguageModelObjective:
  """Next-token cross-entropy, plus the z-loss.

  Attributes:
    config: the architecture.
    chunk_tokens: as TrainConfig.loss_chunk_tokens.
  """

  config: ModelConfig
  chunk_tokens: int = 0

  def weights(self, batch: Batch) -> dict[str, jax.Array]:
    num_targets = jnp.sum(batch.weights_BL)
    return {"loss": num_targets, "tokens": num_targets}

  def __call__(self, params, batch, hyper, key):
    hidden_BLD = hidden_states(params["decoder"], batch, self.config, key)
    kernel_VD, bias_V = lm_head(params, self.config)
    total, sums = chunked_next_token_loss(
      hidden_BLD.reshape(-1, self.config.model_dim),
      kernel_VD,
      bias_V,
      batch.targets_BL.reshape(-1),
      batch.weights_BL.reshape(-1),
      vocab_size=self.config.vocab_size,
      z_loss=hyper.z_loss,
      chunk_tokens=self.chunk_tokens,
    )
    return {"loss": total}, sums


@struct.dataclass
class Health:
  """Counts of skipped steps, and running moments of loss and gradient norm (index 0 and 1).

  The moments, and the count of good steps that they are of, are kept where spikes are looked for.
  """

  skipped: jax.Array
  skipped_in_row: jax.Array
  good_steps: jax.Array
  mean_2: jax.Array
  variance_2: jax.Array


@struct.dataclass
class TrainState:
  """Everything a run carries from step to step; a checkpoint is this and nothing else.

  Attributes:
    step: int32, completed updates, skipped ones included.
    params: {"decoder", "lm_head", ...}, float32.
    opt_state: of the optimiser.
    hyper: traced hyperparameters; changing them compiles nothing.
    key: typed PRNG key of the run; step k uses fold_in(key, k).
    ema: average of the parameters, or None.
    health: what the guard against bad steps remembers.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  hyper: Hyperparameters
  key: jax.Array
  ema: PyTree | None
  health: Health

  @property
  def eval_params(self) -> PyTree:
    """The parameters that evaluation and export use: the average where there is one."""
    return self.params if self.ema is None else self.ema


def init_state(
  params: PyTree, config: OptimizerConfig, hyper: Hyperparameters, key: jax.Array
) -> TrainState:
  """Makes the state before the first step."""
  step, two = jnp.int32(0), jnp.zeros(2, jnp.float32)
  trained, _ = split_named(params, config.frozen_pattern)
  return TrainState(
    step=step,
    params=params,
    opt_state=make_optimizer(config, hyper, step=step).init(trained),
    hyper=hyper,
    key=key,
    ema=jax.tree.map(jnp.copy, params) if config.ema_decay else None,
    health=Health(step, step, step, two, two),
  )


def make_train_step(
  objective: Objective,
  config: OptimizerConfig,
  *,
  skip_nonfinite: bool = True,
  spike_sigmas: float = 0.0,
) -> Callable:
  """Returns `train_step(state, batch, *, axis_name) -> (state, metrics)`.

  Inside the step batch arrays are [A, B, L]: A micro-batches, of this device under pmap. Metrics
  are scalars: train_loss and every other reported mean, grad_norm, learning_rate, tokens,
  is_skipped, skipped, skipped_in_row.

  Args:
    objective: what is minimised.
    config: static choices of the optimiser.
    skip_nonfinite: leave the state alone when loss or gradient norm is not finite.
    spike_sigmas: also when one of them lies this many deviations above its running mean; 0: off.
  """

  def train_step(state: TrainState, batch: Batch, *, axis_name: str | None):
    gradients, sums, weights = accumulate_gradients(
      state, batch, objective, axis_name, config.frozen_pattern
    )
    trained, frozen = split_named(state.params, config.frozen_pattern)
    means = {name: value / weight for name, (value, weight) in sums.items()}
    grad_norm = optax.tree.norm(gradients)
    optimizer = make_optimizer(config, state.hyper, step=state.step, axis_name=axis_name)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    params = join_named(optax.apply_updates(trained, updates), frozen)
    ema = state.ema
    if ema is not None:
      ema = ema_update(ema, params, state.hyper.ema_decay, state.step)
    watched_2 = jnp.stack([means["loss"], grad_norm])
    is_bad = _is_bad(state.health, watched_2, skip_nonfinite, spike_sigmas)
    params, opt_state, ema = jax.tree.map(
      lambda old, new: jnp.where(is_bad, old, new),
      (state.params, state.opt_state, state.ema),
      (params, opt_state, ema),
    )
    health = _count_bad(state.health, is_bad)
    if spike_sigmas:
      health = _update_moments(health, watched_2, is_bad)
    metrics = {f"train_{name}": mean for name, mean in means.items()} | {
      "grad_norm": grad_norm,
      "learning_rate": learning_rate(config, state.hyper, state.step),
      "tokens": weights["tokens"],
      "is_skipped": is_bad,
      "skipped": health.skipped,
      "skipped_in_row": health.skipped_in_row,
    }
    state = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state, ema=ema, health=health
    )
    return state, metrics

  return train_step


def make_eval_step(objective: Objective) -> Callable:
  """Returns `eval_step(state, batch, *, axis_name) -> {name: (sum, weight)}` over all devices."""

  def eval_step(state: TrainState, batch: Batch, *, axis_name: str | None) -> Sums:
    def compute(micro_batch):
      return objective(state.eval_params, micro_batch, state.hyper, None)[1]

    return _sum_devices(_sum_micro_batches(compute, batch), axis_name)

  return eval_step


def accumulate_gradients(
  state: TrainState,
  batch: Batch,
  objective: Objective,
  axis_name: str | None,
  frozen_pattern: str = "",
) -> tuple[PyTree, Sums, dict[str, jax.Array]]:
  """Computes the exact gradient of a global batch, over micro-batches and devices.

  Returns:
    (the gradient, with None in the place of frozen parameters; the sums of the objective; its
    weights).
  """
  key = jax.random.fold_in(state.key, state.step)
  if axis_name:
    key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
  weights = jax.vmap(objective.weights)(batch)
  weights = _sum_devices(jax.tree.map(lambda w_A: w_A.sum(), weights), axis_name)

  trained, frozen = split_named(state.params, frozen_pattern)

  def loss(trained, micro_batch, micro_key):
    params = join_named(trained, frozen)
    terms, sums = objective(params, micro_batch, state.hyper, micro_key)
    return sum(term / weights[name] for name, term in terms.items()), sums

  def compute(micro):
    micro_batch, index = micro
    micro_key = jax.random.fold_in(key, index)
    return jax.grad(loss, has_aux=True)(trained, micro_batch, micro_key)

  indices_A = jnp.arange(batch.tokens_BL.shape[0])
  gradients, sums = _sum_devices(_sum_micro_batches(compute, (batch, indices_A)), axis_name)
  return gradients, sums, weights


def find_not_finite(
  state: TrainState, batch: Batch, objective: Objective, axis_name: str | None
) -> dict[str, PyTree]:
  """Returns whether parameters and gradients are finite: a bool a leaf, [N] for stacked layers."""

  def is_finite(name, leaf):
    axes = tuple(range(1 if _STACKED in name else 0, leaf.ndim))
    return jnp.all(jnp.isfinite(leaf), axis=axes)

  gradients, _, _ = accumulate_gradients(state, batch, objective, axis_name)
  return {
    "gradients": map_named(is_finite, gradients),
    "parameters": map_named(is_finite, state.params),
  }


def describe_not_finite(is_finite: Mapping[str, PyTree]) -> str:
  """Names the first parameter, else gradient, that is not finite, in the order of the forward pass.

  Args:
    is_finite: from `find_not_finite`, on the host.
  """
  for kind in ("parameters", "gradients"):
    bad = [
      (_forward_place(name, layer), name, layer)
      for name, leaf in named_leaves(is_finite[kind]).items()
      for layer, finite in enumerate(np.atleast_1d(leaf))
      if not finite
    ]
    if bad:
      _, name, layer = min(bad)
      where = f"{name} of layer {layer}" if _STACKED in name else name
      which = "parameter" if kind == "parameters" else "gradient"
      return f"{len(bad)} {which}s are not finite, the first on the way forward is {where}"
  return "every parameter and every gradient is finite"


def _forward_place(name: str, layer: int) -> tuple[int, int, int]:
  def place(parts):
    return next((i for i, part in enumerate(parts) if f"/{part}/" in f"/{name}"), len(parts))

  return place(_FORWARD_PARTS), layer, place(_FORWARD_PARTS_OF_LAYER)


def _sum_micro_batches(compute: Callable, micro: PyTree) -> PyTree:
  """Adds `compute` over the leading axis; a single micro-batch needs no scan."""
  first = jax.tree.map(lambda x: x[0], micro)
  if jax.tree.leaves(micro)[0].shape[0] == 1:
    return compute(first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(compute, first))
  return jax.lax.scan(
    lambda total, m: (jax.tree.map(jnp.add, total, compute(m)), None), zeros, micro
  )[0]


def _sum_devices(tree: PyTree, axis_name: str | None) -> PyTree:
  """Sums over the devices of pmap; on a mesh the sums are global already."""
  if axis_name is None or jax.lax.axis_size(axis_name) == 1:
    return tree
  if jax.default_backend() != "cpu":
    return jax.lax.psum(tree, axis_name)  # XLA combines them, and begins before the last is there
  # On a CPU each all-reduce waits for the slower device; the copy costs less.
  flat, unravel = ravel_pytree(tree)
  return unravel(jax.lax.psum(flat, axis_name))


def _is_bad(health: Health, watched_2, skip_nonfinite: bool, spike_sigmas: float) -> jax.Array:
  is_bad = jnp.bool_(False)
  if skip_nonfinite:
    is_bad |= ~jnp.all(jnp.isfinite(watched_2))
  if spike_sigmas:
    is_spike = jnp.any(watched_2 > health.mean_2 + spike_sigmas * jnp.sqrt(health.variance_2))
    is_bad |= is_spike & (health.good_steps >= SPIKE_MEMORY_STEPS)
  return is_bad


def _count_bad(health: Health, is_bad: jax.Array) -> Health:
  return health.replace(
    skipped=health.skipped + is_bad,
    skipped_in_row=jnp.where(is_bad, health.skipped_in_row + 1, 0),
  )


def _update_moments(health: Health, watched_2: jax.Array, is_bad: jax.Array) -> Health:
  good_steps = health.good_steps + ~is_bad
  # A plain mean at first, then exponential.
  rate = 1 / jnp.minimum(good_steps, SPIKE_MEMORY_STEPS).astype(jnp.float32)

  # Around the mean: the mean of squares less the squared mean is all rounding, where a loss of 3
  # varies by a thousandth.
  difference_2 = watched_2 - health.mean_2
  mean_2 = health.mean_2 + rate * difference_2
  variance_2 = (1 - rate) * (health.variance_2 + rate * jnp.square(difference_2))

  return health.replace(
    good_steps=good_steps,
    mean_2=jnp.where(is_bad, health.mean_2, mean_2),
    variance_2=jnp.where(is_bad, health.variance_2, variance_2),
  )
