"""The step: exact accumulation, device counts, guard against bad steps, traced hyperparameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batch import Batch
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import SHARDING_RULES, init_parameters
from gptjax.parallel import make_parallel
from gptjax.train.config import OptimizerConfig
from gptjax.train.optimizer import hyperparameters
from gptjax.train.schedule import resolve_durations
from gptjax.train.step import (
  LanguageModelObjective,
  describe_not_finite,
  find_not_finite,
  init_state,
  make_eval_step,
  make_train_step,
)

TINY = ModelConfig(
  vocab_size=61, context_length=16, num_layers=2, model_dim=16, num_heads=2, vocab_multiple=8
)
NUM_STEPS = 5


def make_batches(num_rows=16, num_steps=NUM_STEPS):
  """Rows whose loss weights are uneven, so that a mean of means is not the mean."""
  rng = np.random.default_rng(0)
  batches = []
  for _ in range(num_steps):
    tokens_BL = rng.integers(0, 61, (num_rows, 17)).astype(np.int32)
    weights_BL = (rng.random((num_rows, 16)) < rng.random((num_rows, 1))).astype(np.float32)
    batches.append(Batch(tokens_BL[:, :-1], tokens_BL[:, 1:], weights_BL))
  return batches


WARM = OptimizerConfig(warmup_steps=2)


@functools.cache
def make_run(devices, mode, mesh, model, optimizer, guard):
  """Compiles once what several tests run: (parallel, init, step)."""
  data, fsdp, tensor = mesh
  parallel = make_parallel(
    mode,
    mesh_data=data,
    mesh_fsdp=fsdp,
    mesh_tensor=tensor,
    sharding_rules=SHARDING_RULES,
    devices=jax.devices()[:devices],
  )
  hyper = hyperparameters(
    optimizer, resolve_durations(optimizer, NUM_STEPS, lambda k: 256 * k), z_loss=1e-4
  )
  key = jax.random.key(0)
  step = make_train_step(LanguageModelObjective(model), optimizer, **dict(guard))

  def init():
    return parallel.init_state(
      lambda key: init_state(init_parameters(model, key), optimizer, hyper, key), key
    )

  return parallel, init, parallel.compile_step(step)


def train(
  *,
  devices=1,
  mode="pmap",
  mesh=(-1, 1, 1),
  accumulation=1,
  model=TINY,
  optimizer=WARM,
  batches=None,
  **guard,
):
  """Runs the real step and returns (losses, final state, metrics of every step)."""
  parallel, init, step = make_run(
    devices, mode, mesh, model, optimizer, tuple(sorted(guard.items()))
  )
  state = init()
  metrics = []
  for batch in batches or make_batches():
    state, values = step(state, parallel.shard_batch(batch, accumulation))
    metrics.append(parallel.to_host(values))
  losses = np.array([values["train_loss"] for values in metrics], np.float64)
  return losses, parallel.to_host(state), metrics


@pytest.fixture(scope="module")
def reference_losses():
  return train()[0]


def assert_same_losses(losses, reference):
  # The sums are the same; only their order differs, in float32.
  np.testing.assert_allclose(losses, reference, rtol=1e-6)


slow = pytest.mark.slow


@pytest.mark.parametrize("accumulation", [pytest.param(2, marks=slow), 8])
def test_accumulation_equals_the_big_batch(accumulation, reference_losses):
  assert_same_losses(train(accumulation=accumulation)[0], reference_losses)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=slow), pytest.param(4, marks=slow), 8])
def test_pmap_does_not_depend_on_the_number_of_devices(devices, reference_losses):
  assert_same_losses(train(devices=devices)[0], reference_losses)


@pytest.mark.parametrize(
  "mesh", [(2, 2, 2), *(pytest.param(m, marks=slow) for m in [(8, 1, 1), (1, 8, 1), (4, 1, 2)])]
)
def test_every_mesh_agrees(mesh, reference_losses):
  assert_same_losses(train(devices=8, mode="mesh", mesh=mesh)[0], reference_losses)


@slow
def test_devices_and_accumulation_together(reference_losses):
  assert_same_losses(train(devices=4, accumulation=2)[0], reference_losses)


def test_a_mean_of_means_would_be_noticed(reference_losses):
  batches = make_batches()
  halves = [
    np.mean([train(batches=[b.map(lambda x, part=part: x[part])])[0][0] for part in parts])
    for b, parts in [(batches[0], (slice(0, 8), slice(8, 16)))]
  ]
  with pytest.raises(AssertionError):
    assert_same_losses(np.array(halves), reference_losses[:1])


@slow
@pytest.mark.parametrize("name", [pytest.param("adamw", marks=slow), "muon"])
def test_it_learns_a_batch_by_heart(name):
  optimizer = OptimizerConfig(name=name, learning_rate=1e-2, schedule="constant")
  losses, _, _ = train(optimizer=optimizer, batches=make_batches(num_steps=1) * 60)
  assert losses[-1] < 0.5 * losses[0]


def poison(batches, index):
  """Makes one batch's loss infinite through its weights."""
  bad = batches[index]
  batches[index] = bad.replace(weights_BL=bad.weights_BL * np.float32(np.nan))
  return batches


def test_a_nonfinite_step_is_skipped_and_counted():
  _, state, metrics = train(batches=poison(make_batches(), 4), skip_nonfinite=True)
  _, before, _ = train(batches=make_batches()[:4], skip_nonfinite=True)
  assert [bool(m["is_skipped"]) for m in metrics] == [False] * 4 + [True]
  assert metrics[-1]["skipped"] == metrics[-1]["skipped_in_row"] == 1
  assert state.step == NUM_STEPS
  for got, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(before.params)):
    np.testing.assert_array_equal(got, wanted)


def test_without_the_guard_the_parameters_are_lost():
  _, state, _ = train(batches=poison(make_batches(), 4), skip_nonfinite=False)
  assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(state.params))


def test_the_first_bad_parameter_on_the_way_forward_is_named():
  """Layer by layer, which is neither the tree's nor the alphabet's order."""
  model = dataclasses.replace(TINY, num_layers=4)
  params = init_parameters(model, jax.random.key(0))
  durations = resolve_durations(OptimizerConfig(), 10, lambda step: step)
  hyper = hyperparameters(OptimizerConfig(), durations, z_loss=0.0)
  state = init_state(params, OptimizerConfig(), hyper, jax.random.key(0))
  batch = jax.tree.map(lambda x: jnp.asarray(x)[None], make_batches()[0])
  find = jax.jit(
    functools.partial(find_not_finite, objective=LanguageModelObjective(model), axis_name=None)
  )

  def describe(state):
    return describe_not_finite(jax.device_get(find(state, batch)))

  assert describe(state) == "every parameter and every gradient is finite"
  decoder = params["decoder"]
  decoder["final_norm"]["scale"] = jnp.full_like(decoder["final_norm"]["scale"], jnp.nan)
  layers = decoder["layers"]
  for name, projection, layer in (("attention", "key", 3), ("mlp", "down", 2), ("mlp", "up", 2)):
    kernel = layers[name][projection]["kernel"]
    layers[name][projection]["kernel"] = kernel.at[layer, 0, 0].set(jnp.nan)
  assert describe(state).startswith("4 parameters are not finite")
  assert describe(state).endswith("decoder/layers/mlp/up/kernel of layer 2")


@slow
def test_a_spike_is_skipped():
  batches = make_batches(num_steps=1) * 60
  optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant")
  wrong = batches[0].replace(targets_BL=(batches[0].targets_BL + 31) % 61)
  batches.append(wrong)
  _, _, metrics = train(batches=batches, optimizer=optimizer, spike_sigmas=6.0)
  assert not any(m["is_skipped"] for m in metrics[:-1])
  assert metrics[-1]["is_skipped"]


@dataclasses.dataclass(frozen=True)
class GivenLoss:
  """Reports a loss of 2.8 and the millionths that a batch's one token says; learns nothing."""

  def weights(self, batch):
    return {"loss": jnp.float32(1), "tokens": jnp.float32(1)}

  def __call__(self, params, batch, hyper, key):
    loss = 2.8 + jnp.sum(batch.tokens_BL) * 1e-6
    return {"loss": 0 * params["weight"]}, {"loss": (loss, jnp.float32(1))}


def test_the_guard_knows_a_spike_where_losses_hardly_vary():
  """In float32 the mean of squares less the squared mean loses a deviation of a thousandth."""
  millionths = np.random.default_rng(0).normal(0, 1_000, 2_000)
  millionths[-1] = 20_000
  hyper = hyperparameters(WARM, resolve_durations(WARM, len(millionths), lambda k: k))
  state = init_state({"weight": jnp.float32(0)}, WARM, hyper, jax.random.key(0))
  step = make_train_step(GivenLoss(), WARM, spike_sigmas=6.0)

  def update(state, tokens):
    row = jnp.full((1, 1, 1), tokens)
    state, metrics = step(state, Batch(row, row, jnp.ones((1, 1, 1))), axis_name=None)
    return state, metrics["is_skipped"]

  _, is_skipped = jax.jit(lambda s, t: jax.lax.scan(update, s, t))(state, millionths.astype(int))
  assert not np.any(is_skipped[:-1])
  assert is_skipped[-1]


def test_ema_follows_and_is_what_evaluation_uses():
  optimizer = OptimizerConfig(warmup_steps=0, ema_decay=0.9)
  _, state, _ = train(optimizer=optimizer)
  assert state.eval_params is state.ema
  distance = [
    float(np.abs(a - b).max())
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params))
  ]
  assert 0 < max(distance) < 0.1


def test_hyperparameters_compile_nothing():
  parallel, init, _ = make_run(1, "pmap", (-1, 1, 1), TINY, WARM, ())
  step = parallel.compile_step(make_train_step(LanguageModelObjective(TINY), WARM))
  losses = set()
  for rate, beta2, decay in [(1e-3, 0.95, 0.1), (1e-2, 0.99, 0.0), (3e-3, 0.9, 0.2)]:
    other = OptimizerConfig(learning_rate=rate, beta2=beta2, weight_decay=decay, warmup_steps=1)
    durations = resolve_durations(other, NUM_STEPS, lambda k: k)
    state = init().replace(hyper=parallel.adopt(hyperparameters(other, durations, z_loss=rate)))
    for batch in make_batches()[:3]:
      state, metrics = step(state, parallel.shard_batch(batch, 1))
    losses.add(float(metrics["train_loss"]))
  assert len(losses) == 3
  assert step.compile_count == 1


@slow
def test_evaluation_sums_do_not_depend_on_devices():
  batch = make_batches()[0]
  sums = []
  for devices in (1, 8):
    parallel, init, _ = make_run(devices, "pmap", (-1, 1, 1), TINY, WARM, ())
    step = parallel.compile_eval(make_eval_step(LanguageModelObjective(TINY)))
    sums.append(parallel.to_host(step(init(), parallel.shard_batch(batch, 1)))["loss"])
  np.testing.assert_allclose(sums[0], sums[1], rtol=1e-6)
  assert sums[0][1] == batch.weights_BL.sum()


@slow
def test_dropout_changes_with_the_step_and_not_with_the_run():
  model = dataclasses.replace(
    TINY, embedding_dropout=0.1, attention_dropout=0.1, residual_dropout=0.1
  )
  same = make_batches(num_steps=1) * 2
  frozen = OptimizerConfig(learning_rate=0.0, weight_decay=0.0)
  losses, _, _ = train(model=model, batches=same, optimizer=frozen)
  again, _, _ = train(model=model, batches=same, optimizer=frozen)
  assert losses[0] != losses[1]
  np.testing.assert_array_equal(losses, again)
  plain, _, _ = train(batches=same, optimizer=frozen)
  assert plain[0] == plain[1] != losses[0]


@slow
def test_scanned_and_unrolled_layers_drop_the_same(reference_losses):
  model = dataclasses.replace(TINY, residual_dropout=0.3, attention_dropout=0.3)
  unrolled = dataclasses.replace(model, scan_layers=False, remat="full")
  losses, _, _ = train(model=model)
  assert_same_losses(train(model=unrolled)[0], losses)
  with pytest.raises(AssertionError):
    assert_same_losses(losses, reference_losses)


@slow
def test_bfloat16_stays_near_float32(reference_losses):
  losses, state, _ = train(model=dataclasses.replace(TINY, compute_dtype="bfloat16"))
  # bfloat16 keeps 8 bits; the loss averages many rounding errors of 2**-9.
  np.testing.assert_allclose(losses, reference_losses, rtol=2e-3)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
