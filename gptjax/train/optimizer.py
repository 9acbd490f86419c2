"""AdamW, Muon and GPT-1's Adam from optax parts, with every value that may vary traced.

`hyperparameters` makes the float32 scalars that the train state carries; `make_optimizer` is
called inside the step, with those scalars and the step, so that changing any of them compiles
nothing. What the config alone decides (the rule, the schedule's shape, which paths decay, the
Newton-Schulz iterations) is static.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jax.flatten_util import ravel_pytree

from gptjax.train.config import OptimizerConfig
from gptjax.train.schedule import Durations, learning_rate_factor
from gptjax.tree import PyTree, map_named

# Hidden matrices, stacked [N, in, out]: Muon's, and those whose rate muP lowers with the width.
# Embeddings, heads, norms and biases stay with AdamW, at rates that no width changes.
HIDDEN_PATTERN = r"^decoder/layers/.*kernel$"
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@struct.dataclass
class Hyperparameters:
  """Traced float32 scalars of the optimiser, the schedule and the loss.

  Attributes are those of OptimizerConfig (and TrainConfig.z_loss), durations in steps; of
  fine-tuning lm_coefficient, None elsewhere; and ModelConfig.width_multiplier, None without muP.
  """

  learning_rate: jax.Array
  end_fraction: jax.Array
  total_steps: jax.Array
  warmup_steps: jax.Array
  decay_steps: jax.Array
  weight_decay: jax.Array
  beta1: jax.Array
  beta2: jax.Array
  epsilon: jax.Array
  clip_norm: jax.Array
  muon_learning_rate: jax.Array
  muon_momentum: jax.Array
  ema_decay: jax.Array
  z_loss: jax.Array
  lm_coefficient: jax.Array | None = None
  width_multiplier: jax.Array | None = None


def hyperparameters(
  config: OptimizerConfig,
  durations: Durations,
  *,
  z_loss: float = 0.0,
  lm_coefficient: float | None = None,
  width_multiplier: float | None = None,
) -> Hyperparameters:
  """Makes the traced scalars of a run from its config and `schedule.resolve_durations`."""
  return Hyperparameters(
    learning_rate=jnp.float32(config.learning_rate),
    end_fraction=jnp.float32(config.end_fraction),
    total_steps=jnp.float32(durations.total_steps),
    warmup_steps=jnp.float32(durations.warmup_steps),
    decay_steps=jnp.float32(durations.decay_steps),
    weight_decay=jnp.float32(config.weight_decay),
    beta1=jnp.float32(config.beta1),
    beta2=jnp.float32(config.beta2),
    epsilon=jnp.float32(config.epsilon),
    clip_norm=jnp.float32(config.clip_norm),
    muon_learning_rate=jnp.float32(config.muon_learning_rate),
    muon_momentum=jnp.float32(config.muon_momentum),
    ema_decay=jnp.float32(config.ema_decay),
    z_loss=jnp.float32(z_loss),
    lm_coefficient=None if lm_coefficient is None else jnp.float32(lm_coefficient),
    width_multiplier=None if width_multiplier is None else jnp.float32(width_multiplier),
  )


def learning_rate(config: OptimizerConfig, hyper: Hyperparameters, step: jax.Array) -> jax.Array:
  """Returns the rate of update number `step` (of AdamW's parameters), for metrics."""
  return hyper.learning_rate * learning_rate_factor(config.schedule, hyper, step)


def make_optimizer(
  config: OptimizerConfig,
  hyper: Hyperparameters,
  *,
  step: jax.Array,
  axis_name: str | None = None,
) -> optax.GradientTransformation:
  """Builds the update rule inside a trace.

  Gradients are clipped together, by the norm over all parameters. Weight decay is decoupled and
  goes by path, since stacked norm scales have two dimensions like a matrix.

  Args:
    config: static choices.
    hyper: traced values; they leave the structure of the state alone.
    step: int32 scalar, completed updates. It drives the schedule, so that a skipped update does
      not delay the decay; Adam's own count of updates drives only its bias correction.
    axis_name: axis of devices that hold the same parameters and gradients; they share Muon's
      work. None where each device does all of it, or the compiler divides it (a mesh).

  Returns:
    A transformation whose `update` needs params, for the decay. `init` may use any step.
  """
  factor = learning_rate_factor(config.schedule, hyper, step)
  decay = optax.add_decayed_weights(
    hyper.weight_decay,
    mask=lambda params: map_named(
      lambda name, _: bool(re.search(config.decay_pattern, name)), params
    ),
  )
  clip = optax.clip_by_global_norm(jnp.where(hyper.clip_norm > 0, hyper.clip_norm, jnp.inf))
  if config.name == "gpt1_adam":
    adam = scale_by_gpt1_adam(hyper.beta1, hyper.beta2, hyper.epsilon, decay)
    return optax.chain(clip, adam, optax.scale_by_learning_rate(hyper.learning_rate * factor))
  adam = optax.scale_by_adam(hyper.beta1, hyper.beta2, hyper.epsilon)
  # Muon's updates are of one size at any width as they are (Bernstein and Newhouse 2024).
  if hyper.width_multiplier is not None and config.name == "adamw":
    adam = optax.chain(adam, _divide_hidden(hyper.width_multiplier))
  adamw = optax.chain(
    adam,
    decay,
    optax.scale_by_learning_rate(hyper.learning_rate * factor),
  )
  if config.name == "adamw":
    return optax.chain(clip, adamw)
  muon = optax.chain(
    scale_by_muon(hyper.muon_momentum, config.muon_steps, axis_name),
    decay,
    optax.scale_by_learning_rate(hyper.muon_learning_rate * factor),
  )
  return optax.chain(clip, optax.partition({"adamw": adamw, "muon": muon}, _rule_of_paths))


def _rule_of_paths(params: PyTree) -> PyTree:
  """Labels each parameter with the rule that updates it."""
  return map_named(lambda name, _: "muon" if re.search(HIDDEN_PATTERN, name) else "adamw", params)


def _divide_hidden(width_multiplier: jax.Array) -> optax.GradientTransformation:
  """Divides the updates of hidden matrices, and not their decay, as the mup package's MuAdamW."""

  def divide(name, update):
    return update / width_multiplier if re.search(HIDDEN_PATTERN, name) else update

  return optax.stateless(lambda updates, params: map_named(divide, updates))


def scale_by_gpt1_adam(
  beta1: jax.Array, beta2: jax.Array, epsilon: jax.Array, decay: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Scales gradients as the Adam of GPT-1's released code does (Radford et al. 2018, opt.py).

  Update t is c_t * (m / (sqrt(v) + epsilon) + decay * p), c_t = sqrt(1 - beta2^t) / (1 - beta1^t).
  Unlike in AdamW, epsilon is outside of the bias correction, and the decay is times c_t.

  Args:
    beta1, beta2, epsilon: traced.
    decay: adds the decayed parameters; it has no state.
  """

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return optax.ScaleByAdamState(jnp.int32(0), zeros, zeros)

  def update(updates, state, params):
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(updates, state.mu, beta1, 1)
    nu = optax.tree.update_moment(updates, state.nu, beta2, 2)
    steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mu, nu)
    steps, _ = decay.update(steps, decay.init(params), params)
    correction = jnp.sqrt(1 - beta2**count) / (1 - beta1**count)
    return optax.tree.scale(correction, steps), optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def scale_by_muon(
  momentum: jax.Array, num_steps: int, axis_name: str | None = None
) -> optax.GradientTransformation:
  """Orthogonalises the Nesterov momentum of stacked matrices [N, in, out] (Jordan et al. 2024).

  The result is scaled by sqrt(max(1, out / in)), as in Jordan's code and optax's default, so that
  its effect on the root mean square of the output does not depend on the shape.

  optax.contrib.muon differs in Adam's bias correction of the momentum, which changes the balance
  of gradient and momentum in the first updates only, and in knowing nothing of other devices.
  """

  def orthogonalize(stack):
    rows, columns = stack.shape[-2:]
    return newton_schulz(stack, num_steps) * max(1.0, columns / rows) ** 0.5

  def update(updates, _):
    if axis_name is None:
      return jax.tree.map(orthogonalize, updates)
    return _map_shared(orthogonalize, updates, axis_name)

  return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(update))


def _map_shared(function: Callable, stacks: PyTree, axis_name: str) -> PyTree:
  """Maps `function` over replicated stacks [N, ...]; each device computes its share of the layers.

  One all-gather returns all of them, since each collective waits for the slowest device.
  """
  num_devices = lax.axis_size(axis_name)

  def compute_share(stack):
    num_layers = -(-stack.shape[0] // num_devices)
    padding = num_layers * num_devices - stack.shape[0]
    padded = jnp.pad(stack, [(0, padding)] + [(0, 0)] * (stack.ndim - 1))
    start = lax.axis_index(axis_name) * num_layers
    return function(lax.dynamic_slice_in_dim(padded, start, num_layers))

  flat, unravel = ravel_pytree(jax.tree.map(compute_share, stacks))
  shares = jax.vmap(unravel)(lax.all_gather(flat, axis_name))
  return jax.tree.map(
    lambda share, stack: share.reshape(-1, *stack.shape[1:])[: stack.shape[0]], shares, stacks
  )


def newton_schulz(matrices: jax.Array, num_steps: int) -> jax.Array:
  """Moves the singular values of matrices [..., rows, columns] near 1, keeping their vectors.

  The quintic iteration X <- (a I + b A + c A^2) X, A = X X^T, whose coefficients are chosen for
  speed: five steps leave singular values within about [0.7, 1.2], not at 1.
  """
  if matrices.shape[-2] > matrices.shape[-1]:  # A must be the smaller of the two Gram matrices.
    return newton_schulz(matrices.mT, num_steps).mT
  a, b, c = NEWTON_SCHULZ_COEFFICIENTS
  norm = jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True)
  x = matrices / (norm + 1e-7)
  for _ in range(num_steps):
    gram = x @ x.mT
    x = a * x + (b * gram + c * (gram @ gram)) @ x
  return x


def ema_update(ema: PyTree, params: PyTree, decay: jax.Array, step: jax.Array) -> PyTree:
  """Moves an average of the parameters towards them.

  The decay in effect is min(decay, (1 + step) / (10 + step)) (TensorFlow's
  ExponentialMovingAverage), so that the initial values fade early; a bias correction would need
  an average started at 0, which evaluation could not use at step 0.

  Args:
    ema, params: trees of one structure; start with ema = params.
    decay: float32 scalar in [0, 1).
    step: int32 scalar, updates completed before the one that made `params`.
  """
  step = jnp.asarray(step, jnp.float32)
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda average, value: average + (1 - decay) * (value - average), ema, params)
