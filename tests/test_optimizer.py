"""Update rules against float64 formulas, and what may vary without a new program."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.train.config import OptimizerConfig
from gptjax.train.optimizer import (
  ema_update,
  hyperparameters,
  learning_rate,
  make_optimizer,
  newton_schulz,
)
from gptjax.train.schedule import Durations
from gptjax.tree import map_named, named_leaves

NUM_STEPS = 6
DURATIONS = Durations(total_steps=10, warmup_steps=2, decay_steps=8)
DECAYED = ("kernel", "embedding")
# Adam divides by a root and by 1 - beta**t, which in float32 is known to 1e-5 for beta2 = 0.99;
# the root halves it, and the parameters move by a hundredth of themselves.
TOLERANCE = 2e-6
# Newton-Schulz triples an error in a small singular value five times over.
MUON_TOLERANCE = 5e-6


def random_like(shapes, seed):
  """Draws a tree of normal arrays."""
  leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    structure, [rng.normal(size=shape).astype(np.float32) for shape in leaves]
  )


SHAPES = {
  "decoder": {
    "token_embedding": {"embedding": (12, 8)},
    "layers": {
      "attention": {"query": {"kernel": (3, 8, 8), "bias": (3, 8)}},
      "attention_norm": {"scale": (3, 8), "bias": (3, 8)},
      "mlp": {"up": {"kernel": (3, 8, 32)}, "down": {"kernel": (3, 32, 8)}},
    },
  },
  "lm_head": {"kernel": (8, 12)},
}
PARAMS = random_like(SHAPES, 0)
GRADIENTS = [random_like(SHAPES, seed) for seed in range(1, NUM_STEPS + 1)]


def make_hyper(config, z_loss=0.0):
  return hyperparameters(config, DURATIONS, z_loss=z_loss)


def scan_updates(make, params, gradients):
  """Returns params and state after an update with each of the stacked gradients."""

  def update(carry, inputs):
    params, state = carry
    step, gradient = inputs
    updates, state = make(step).update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  steps = jnp.arange(len(jax.tree.leaves(gradients)[0]))
  return jax.lax.scan(update, (params, make(0).init(params)), (steps, gradients))[0]


@partial(jax.jit, static_argnums=0)
def run_static(config, hyper, params, gradients):
  return scan_updates(lambda step: make_optimizer(config, hyper, step=step), params, gradients)


def run(config, params=PARAMS, gradients=GRADIENTS):
  """Runs a config; configs that differ in traced values share a program."""
  static = OptimizerConfig(
    name=config.name, schedule=config.schedule, decay_pattern=config.decay_pattern
  )
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *gradients)
  return run_static(static, make_hyper(config), params, stacked)


def rate_factor(step):
  """Linear decay to 0.1 with DURATIONS, in float64."""
  progress = np.clip((step - 2) / 8, 0, 1)
  return min(1, (step + 1) / 3) * (0.1 + 0.9 * (1 - progress))


def clip(gradient, clip_norm):
  norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient.values()))
  scale = min(1, clip_norm / norm) if clip_norm else 1
  return {name: scale * np.asarray(g, np.float64) for name, g in gradient.items()}


def adamw_reference(config, is_decayed):
  """Loshchilov & Hutter 2019, algorithm 2 (AdamW), in float64."""
  params = {name: np.asarray(p, np.float64) for name, p in named_leaves(PARAMS).items()}
  first = dict.fromkeys(params, 0.0)
  second = dict.fromkeys(params, 0.0)
  for step, gradient in enumerate(GRADIENTS):
    rate = config.learning_rate * rate_factor(step)
    for name, g in clip(named_leaves(gradient), config.clip_norm).items():
      first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
      second[name] = config.beta2 * second[name] + (1 - config.beta2) * g**2
      first_hat = first[name] / (1 - config.beta1 ** (step + 1))
      second_hat = second[name] / (1 - config.beta2 ** (step + 1))
      update = first_hat / (np.sqrt(second_hat) + config.epsilon)
      if is_decayed(name):
        update = update + config.weight_decay * params[name]
      params[name] = params[name] - rate * update
  return params


def gpt1_reference(config):
  """Transcribes opt.py of Radford et al. 2018's released code, in float64."""
  params = {name: np.asarray(p, np.float64) for name, p in named_leaves(PARAMS).items()}
  first, second = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
  for step, gradient in enumerate(GRADIENTS):
    x, w, t = step / 10, 2 / 10, step + 1
    rate = config.learning_rate * (x / w if x <= w else 1) * (1 - x)
    rate *= np.sqrt(1 - config.beta2**t) / (1 - config.beta1**t)
    for name, g in clip(named_leaves(gradient), config.clip_norm).items():
      first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
      second[name] = config.beta2 * second[name] + (1 - config.beta2) * g**2
      update = first[name] / (np.sqrt(second[name]) + config.epsilon)
      # Of unstacked tensors those of rank 2.
      if name.endswith(DECAYED):
        update = update + config.weight_decay * params[name]
      params[name] = params[name] - rate * update
  return params


def newton_schulz_reference(matrix, num_steps=5):
  x = np.asarray(matrix, np.float64)
  x = x / np.linalg.norm(x)
  for _ in range(num_steps):
    gram = x @ x.T
    x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
  return x


def muon_reference(config, name):
  """Muon of one stack, matrix by matrix, in float64."""
  stack = np.asarray(named_leaves(PARAMS)[name], np.float64)
  momentum = np.zeros_like(stack)
  for step, gradient in enumerate(GRADIENTS):
    g = clip(named_leaves(gradient), config.clip_norm)[name]
    momentum = config.muon_momentum * momentum + g
    nesterov = config.muon_momentum * momentum + g
    scale = np.sqrt(max(1, stack.shape[2] / stack.shape[1]))
    update = scale * np.stack([newton_schulz_reference(matrix) for matrix in nesterov])
    rate = config.muon_learning_rate * rate_factor(step)
    stack = stack - rate * (update + config.weight_decay * stack)
  return stack


def worst_error(got, expected):
  """Largest relative norm of a difference over named leaves."""
  return max(
    np.linalg.norm(np.asarray(got[name], np.float64) - expected[name])
    / np.linalg.norm(expected[name])
    for name in expected
  )


ADAMW = OptimizerConfig(
  learning_rate=0.01, schedule="linear", weight_decay=0.3, beta2=0.99, clip_norm=5.0
)
MUON = dataclasses.replace(ADAMW, name="muon", muon_learning_rate=0.03, muon_momentum=0.9)


@pytest.mark.parametrize("clip_norm", [0.0, 5.0])
def test_adamw_is_the_papers(clip_norm):
  config = dataclasses.replace(ADAMW, clip_norm=clip_norm)
  got = named_leaves(run(config)[0])
  expected = adamw_reference(config, lambda name: name.endswith(DECAYED))
  assert worst_error(got, expected) < TOLERANCE


GPT1 = OptimizerConfig(
  name="gpt1_adam",
  schedule="gpt1",
  learning_rate=0.01,
  weight_decay=0.3,
  beta2=0.99,
  epsilon=0.1,
  clip_norm=5.0,
)


def test_gpt1_adam_is_the_released_code():
  got = named_leaves(run(GPT1)[0])
  assert worst_error(got, gpt1_reference(GPT1)) < TOLERANCE
  # What differs from AdamW is the place of epsilon, and what the decay is multiplied by.
  for changes in ({"epsilon": 1e-8}, {"epsilon": 1e-8, "weight_decay": 0.0}):
    ours = dataclasses.replace(GPT1, **changes)
    theirs = named_leaves(run(dataclasses.replace(ours, name="adamw"))[0])
    is_same = worst_error(theirs, gpt1_reference(ours)) < TOLERANCE
    assert is_same == (not ours.weight_decay)
  without_decay = dataclasses.replace(GPT1, weight_decay=0.0)
  theirs = named_leaves(run(dataclasses.replace(without_decay, name="adamw"))[0])
  assert worst_error(theirs, gpt1_reference(without_decay)) > 100 * TOLERANCE


@pytest.mark.parametrize(
  "change",
  [
    {"learning_rate": 0.0101},
    {"weight_decay": 0.31},
    {"beta1": 0.91},
    {"beta2": 0.98},
    {"epsilon": 1e-2},
    {"decay_pattern": "."},
    {"end_fraction": 0.2},
  ],
)
def test_a_perturbed_config_is_noticed(change):
  got = named_leaves(run(dataclasses.replace(ADAMW, **change))[0])
  expected = adamw_reference(ADAMW, lambda name: name.endswith(DECAYED))
  assert worst_error(got, expected) > 10 * TOLERANCE


def test_decay_goes_by_path():
  zeros = jax.tree.map(np.zeros_like, PARAMS)
  for config in (ADAMW, MUON):
    params, _ = run(config, gradients=[zeros])
    moved = jax.tree.map(lambda after, before: np.any(after != before), params, PARAMS)
    for name, has_moved in named_leaves(moved).items():
      assert has_moved == name.endswith(DECAYED), name


def test_clip_leaves_small_gradients_alone():
  """Adam is nearly blind to the scale of all gradients, so one norm stands out from the rest."""
  small = [jax.tree.map(lambda g: g * 1e-3, gradient) for gradient in GRADIENTS[:1]] + GRADIENTS[1:]
  clipped, _ = run(ADAMW, gradients=small)
  unclipped, _ = run(dataclasses.replace(ADAMW, clip_norm=0.0), gradients=small)
  beyond, _ = run(dataclasses.replace(ADAMW, clip_norm=1e6), gradients=small)
  np.testing.assert_array_equal(beyond["lm_head"]["kernel"], unclipped["lm_head"]["kernel"])
  assert np.any(clipped["lm_head"]["kernel"] != unclipped["lm_head"]["kernel"])


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
  params = named_leaves(run(MUON)[0])
  adamw = adamw_reference(MUON, lambda name: name.endswith(DECAYED))
  hidden = [name for name in params if "layers" in name and name.endswith("kernel")]
  assert len(hidden) == 3
  expected = {name: muon_reference(MUON, name) for name in hidden}
  assert worst_error(params, expected) < MUON_TOLERANCE
  rest = {name: value for name, value in adamw.items() if name not in hidden}
  assert worst_error(params, rest) < TOLERANCE
  unlike = dataclasses.replace(MUON, muon_momentum=0.91)
  assert worst_error(params, {hidden[0]: muon_reference(unlike, hidden[0])}) > 1e-4


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
def test_newton_schulz_orthogonalises(shape):
  stack = jax.random.normal(jax.random.key(0), (2, *shape))
  got = newton_schulz(stack, 5)
  values = np.linalg.svd(got, compute_uv=False)
  assert values.min() > 0.6 and values.max() < 1.3
  u, _, vh = np.linalg.svd(np.asarray(stack, np.float64), full_matrices=False)
  aligned = np.einsum("nri,nrc,nic->ni", u, got, vh)
  np.testing.assert_allclose(np.sort(aligned), np.sort(values), rtol=1e-4)
  untouched = np.linalg.svd(stack / np.linalg.norm(stack, axis=(1, 2), keepdims=True))[1]
  assert untouched.min() < 0.1


def test_first_muon_update_is_optax_contribs():
  """Later ones differ: contrib corrects the bias of the momentum as Adam does."""
  config = dataclasses.replace(MUON, weight_decay=0.0, clip_norm=0.0)
  params, _ = run(config, gradients=GRADIENTS[:1])
  contrib = optax.contrib.muon(config.muon_learning_rate * rate_factor(0))
  contrib_update = jax.jit(lambda p, g: contrib.update(g, contrib.init(p), p)[0])
  for name in ("up", "down"):
    before, after, gradient = (
      tree["decoder"]["layers"]["mlp"][name]["kernel"][1] for tree in (PARAMS, params, GRADIENTS[0])
    )
    expected = contrib_update(before, gradient)
    # The move is read off as a difference of parameters a hundred times larger.
    assert np.linalg.norm(after - before - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("base", [ADAMW, MUON])
def test_hyperparameters_are_traced(base):
  settings = [
    base,
    dataclasses.replace(base, learning_rate=0.002, beta1=0.8, clip_norm=0.0, muon_momentum=0.5),
    dataclasses.replace(base, weight_decay=0.0, beta2=0.9, epsilon=1e-3, muon_learning_rate=0.1),
  ]
  gradients = jax.tree.map(lambda *leaves: np.stack(leaves), *GRADIENTS)
  traces = []

  @jax.jit
  def traced(hyper):
    traces.append(base.name)
    return scan_updates(lambda step: make_optimizer(base, hyper, step=step), PARAMS, gradients)

  for config in settings:
    got = named_leaves(traced(make_hyper(config))[0])
    expected = named_leaves(constant_optax(config, gradients))
    if base.name == "muon":
      hidden = "decoder/layers/mlp/up/kernel"
      assert worst_error(got, {hidden: muon_reference(config, hidden)}) < MUON_TOLERANCE
      expected = {name: value for name, value in expected.items() if "/layers/" not in name}
    assert worst_error(got, expected) < TOLERANCE
  assert len(traces) == 1


def constant_optax(config, gradients):
  """AdamW from optax's own aliases, all values constants of the program."""
  schedule = [config.learning_rate * rate_factor(step) for step in range(NUM_STEPS)]
  transform = optax.chain(
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    optax.adamw(
      lambda step: jnp.array(schedule, jnp.float32)[step],
      config.beta1,
      config.beta2,
      config.epsilon,
      weight_decay=config.weight_decay,
      mask=map_named(lambda name, _: name.endswith(DECAYED), PARAMS),
    ),
  )
  return jax.jit(lambda: scan_updates(lambda step: transform, PARAMS, gradients)[0])()


def test_state_is_float32_and_named_by_parameter():
  for config in (ADAMW, MUON):
    leaves = named_leaves(run(config)[1])
    for name, leaf in leaves.items():
      assert leaf.dtype == (np.int32 if name.endswith("count") else np.float32), name
    moments = 1 if config.name == "muon" else 2
    assert sum(name.endswith("mlp/up/kernel") for name in leaves) == moments
    assert sum(name.endswith("token_embedding/embedding") for name in leaves) == 2


@pytest.mark.parametrize("num_devices", [2, 8])
def test_devices_share_muons_work(num_devices):
  """Three layers over two and over eight devices: neither divides them."""
  hyper = make_hyper(MUON)

  def update(axis_name):
    optimizer = make_optimizer(MUON, hyper, step=jnp.int32(1), axis_name=axis_name)
    return optimizer.update(GRADIENTS[0], optimizer.init(PARAMS), PARAMS)[0]

  shared = jax.pmap(lambda _: update("data"), axis_name="data", out_axes=None)
  got = shared(np.zeros(num_devices))
  expected = jax.jit(lambda: update(None))()
  assert worst_error(named_leaves(got), named_leaves(expected)) < TOLERANCE


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_sharded_parameters_take_the_same_update(config):
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

  def place(tree):
    def spec(name, leaf):
      if name.endswith("mlp/up/kernel"):
        return P(None, "fsdp", "tensor")
      return P("tensor", "fsdp") if name.endswith("embedding") else P()

    return map_named(
      lambda name, leaf: jax.device_put(leaf, NamedSharding(mesh, spec(name, leaf))), tree
    )

  got, state = run(config, params=place(PARAMS))
  expected, expected_state = run(config)
  assert worst_error(named_leaves(got), named_leaves(expected)) < TOLERANCE
  assert jax.tree.structure(state) == jax.tree.structure(expected_state)


def test_learning_rate_is_the_peak_times_the_factor():
  rates = [float(learning_rate(ADAMW, make_hyper(ADAMW), step)) for step in range(10)]
  np.testing.assert_allclose(rates, [0.01 * rate_factor(step) for step in range(10)], rtol=1e-6)


def test_ema_forgets_its_start_and_then_averages():
  ema, expected = {"w": jnp.full(3, 100.0)}, np.full(3, 100.0)
  for step in range(200):
    ema = ema_update(ema, {"w": jnp.full(3, float(step % 7))}, jnp.float32(0.9), step)
    decay = min(0.9, (1 + step) / (10 + step))
    expected = decay * expected + (1 - decay) * (step % 7)
  np.testing.assert_allclose(ema["w"], expected, rtol=1e-5)
  off = ema_update(ema, {"w": jnp.ones(3)}, jnp.float32(0.0), 5)
  np.testing.assert_array_equal(off["w"], np.ones(3))


def test_ema_of_constant_parameters_stays_exact():
  params = {"w": jnp.array([0.1, 3.7, -2.3])}
  np.testing.assert_array_equal(ema_update(params, params, jnp.float32(0.999), 7)["w"], params["w"])
