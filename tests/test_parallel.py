"""One device, pmap and every mesh agree; donation, uneven rows, placement, and refusals."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.batch import Batch
from gptjax.errors import ConfigError, UserError
from gptjax.parallel import (
  arrange,
  initialize_processes,
  make_parallel,
  order_by_process,
  per_device,
  set_host_devices,
)

VOCAB, WIDTH, LENGTH = 32, 16, 8
RULES = (
  (r"embedding$", ("tensor", "fsdp")),
  (r"up/kernel$", ("fsdp", "tensor")),
  (r"down/kernel$", ("tensor", "fsdp")),
)
OPTIMIZER = optax.adam(1e-2)
# Five Adam steps in float32 differ by the order of sums alone; 1e-6 is eight times its epsilon.
TOLERANCE = 1e-6


def init_params(key):
  """A toy language model: embedding, two matrices, tied softmax; cheap to compile."""

  def spread(*shape):
    return jnp.cos(jnp.arange(np.prod(shape), dtype=jnp.float32) ** 1.5).reshape(shape) / 4

  return {
    "embedding": spread(VOCAB, WIDTH),
    "up": {"kernel": spread(WIDTH, 4 * WIDTH)},
    "down": {"kernel": spread(4 * WIDTH, WIDTH)},
  }


def init_state(key):
  params = init_params(key)
  return {
    "params": params,
    "optimizer": OPTIMIZER.init(params),
    "step": jnp.int32(0),
    "key": key,
  }


def loss_sums(params, batch):
  hidden_BLD = params["embedding"][batch.tokens_BL]
  hidden_BLD += jnp.tanh(hidden_BLD @ params["up"]["kernel"]) @ params["down"]["kernel"]
  losses_BL = optax.softmax_cross_entropy_with_integer_labels(
    hidden_BLD @ params["embedding"].T, batch.targets_BL
  )
  return (losses_BL * batch.weights_BL).sum(), batch.weights_BL.sum()


def summed(axis_name, tree):
  return jax.lax.psum(tree, axis_name) if axis_name else tree


def train_step(state, batch, *, axis_name, mean_of_means=False):
  """Sums over micro-batches and devices and divides once (or, wrongly, divides early)."""

  def accumulate(carry, micro_batch):
    gradient = jax.value_and_grad(loss_sums, has_aux=True)
    (loss_sum, weight_sum), gradients = gradient(state["params"], micro_batch)
    return jax.tree.map(jnp.add, carry, (loss_sum, weight_sum, gradients)), None

  zeros = jax.tree.map(jnp.zeros_like, (0.0, 0.0, state["params"]))
  sums, _ = jax.lax.scan(accumulate, zeros, batch)
  if mean_of_means:
    sums = jax.tree.map(lambda x: x / (sums[1] + 1e-9), sums)
  loss_sum, weight_sum, gradients = summed(axis_name, sums)
  gradients = jax.tree.map(lambda x: x / weight_sum, gradients)
  updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"], state["params"])
  params = optax.apply_updates(state["params"], updates)
  new_state = {**state, "params": params, "optimizer": optimizer, "step": state["step"] + 1}
  return new_state, {"loss": loss_sum / weight_sum}


def eval_sums(state, batch, *, axis_name):
  first = jax.tree.map(lambda x: x[0], batch)
  loss_sum, weight_sum = summed(axis_name, loss_sums(state["params"], first))
  return {"loss": (loss_sum, weight_sum)}


def decay_step(state, batch, *, axis_name):
  """Steps without learning: compiles at once."""
  weight_sum = summed(axis_name, batch.weights_BL.sum())
  return jax.tree.map(lambda x: x * 0.9, state), {"weight_sum": weight_sum}


def make_batch(seed, num_rows=16):
  """Makes rows with very uneven weights, so that a mean of means shows."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, VOCAB, (num_rows, LENGTH + 1)).astype(np.int32)
  lengths = rng.integers(1, LENGTH + 1, num_rows)
  weights = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
  return Batch(tokens[:, :-1], tokens[:, 1:], weights, labels_B=np.arange(num_rows, dtype=np.int32))


def make(mode="pmap", num_devices=8, **options):
  return make_parallel(mode, devices=jax.devices()[:num_devices], sharding_rules=RULES, **options)


def run(parallel, num_steps=5, num_rows=16, step=train_step):
  """Returns (losses of the steps, final state on the devices)."""
  state = parallel.init_state(init_state, jax.random.key(0))
  program = parallel.compile_step(step)
  losses = []
  for i in range(num_steps):
    state, metrics = program(state, parallel.shard_batch(make_batch(i, num_rows), 2))
    losses.append(parallel.to_host(metrics)["loss"])
  assert program.compile_count == 1
  return np.array(losses), state


@functools.cache
def single_device(num_rows=16):
  return run(make(num_devices=1), num_rows=num_rows)


DRIVERS = {
  "pmap 2": {"num_devices": 2},
  "pmap 4": {"num_devices": 4},
  "pmap 8": {"num_devices": 8},
  "mesh 1": {"mode": "mesh", "num_devices": 1},
  "mesh 8x1x1": {"mode": "mesh"},
  "mesh 1x8x1": {"mode": "mesh", "mesh_data": 1, "mesh_fsdp": -1},
  "mesh 1x1x8": {"mode": "mesh", "mesh_data": 1, "mesh_tensor": 8},
  "mesh 2x2x2": {"mode": "mesh", "mesh_fsdp": 2, "mesh_tensor": 2},
  "mesh 2x1x4": {"mode": "mesh", "mesh_data": 2, "mesh_tensor": -1},
}


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_driver_gives_the_losses_of_one_device(driver):
  # 13 rows divide neither among micro-batches nor among devices.
  num_rows = 13 if driver in ("pmap 4", "mesh 2x2x2") else 16
  losses, state = run(make(**DRIVERS[driver]), num_rows=num_rows)
  expected_losses, expected_state = single_device(num_rows)
  np.testing.assert_allclose(losses, expected_losses, rtol=TOLERANCE)
  params, expected_params = jax.device_get((state["params"], expected_state["params"]))
  # Adam divides by the root of tiny second moments, which magnifies the order of sums.
  for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params)):
    np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_mean_of_means_is_noticed():
  """Companion: dividing on each device, before the sum, fails the comparison by far."""
  wrong_step = functools.partial(train_step, mean_of_means=True)
  losses, _ = run(make(num_devices=2), num_steps=1, step=wrong_step)
  expected, _ = single_device()
  assert np.abs(losses / expected[:1] - 1).max() > 100 * TOLERANCE


@pytest.mark.parametrize("mode", ["pmap", "mesh"])
def test_evaluation_sums_over_all_rows_and_keeps_the_state(mode):
  parallel = make(mode, num_devices=4)
  state = parallel.init_state(init_state, jax.random.key(0))
  batch = make_batch(3, num_rows=10)
  evaluate = parallel.compile_eval(eval_sums)
  loss_sum, weight_sum = parallel.to_host(evaluate(state, parallel.shard_batch(batch, 1)))["loss"]
  expected_loss_sum, _ = loss_sums(jax.device_get(state["params"]), batch)
  assert weight_sum == batch.weights_BL.sum()
  np.testing.assert_allclose(loss_sum, expected_loss_sum, rtol=TOLERANCE)


@pytest.mark.parametrize("options", [{"num_devices": 2}, {"mode": "mesh", "mesh_fsdp": 2}])
def test_state_is_donated_and_stays_where_it_was(options):
  parallel = make(**options)
  before = parallel.init_state(init_params, jax.random.key(0))
  placements = jax.tree.map(lambda leaf: leaf.sharding, before)
  program = parallel.compile_step(decay_step)
  after, _ = program(before, parallel.shard_batch(make_batch(0), 1))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
  assert jax.tree.map(lambda leaf: leaf.sharding, after) == placements


def test_another_shape_is_counted_as_another_program():
  parallel = make(num_devices=2)
  state = parallel.init_state(init_params, jax.random.key(0))
  program = parallel.compile_step(decay_step)
  for num_rows in (4, 4, 6):
    state, _ = program(state, parallel.shard_batch(make_batch(0, num_rows), 1))
  assert program.compile_count == 2


@pytest.mark.parametrize("options", [{"num_devices": 2}, {"mode": "mesh", "mesh_fsdp": 2}])
def test_memory_is_known_from_shapes_alone(options):
  """Donated state is aliased, so its bytes on one device are known exactly."""
  parallel = make(**options)
  state = parallel.abstract_state(init_params, jax.random.key(0))
  batch = parallel.shard_batch(make_batch(0), 2)
  analysis = parallel.compile_step(decay_step).lower(state, batch).compile().memory_analysis()
  local_bytes = [
    np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(state)
  ]
  assert analysis.alias_size_in_bytes == sum(local_bytes)


def test_rules_place_parameters_and_optimizer_state_alike():
  parallel = make("mesh", mesh_data=1, mesh_fsdp=4, mesh_tensor=2)
  state = parallel.init_state(init_state, jax.random.key(0))
  for tree in (state["params"], state["optimizer"][0].mu):
    assert tree["embedding"].addressable_shards[0].data.shape == (VOCAB // 2, WIDTH // 4)
    assert tree["up"]["kernel"].addressable_shards[0].data.shape == (WIDTH // 4, 4 * WIDTH // 2)
  assert state["step"].is_fully_replicated


def test_a_dimension_that_does_not_divide_is_replicated():
  parallel = make("mesh", mesh_data=1, mesh_fsdp=4, mesh_tensor=2)

  def init_fn(key):
    return {"embedding": jnp.zeros((7, 8)), "moment": {"embedding": jnp.zeros(8)}}

  state = parallel.init_state(init_fn, jax.random.key(0))
  assert state["embedding"].addressable_shards[0].data.shape == (7, 2)
  assert state["moment"]["embedding"].is_fully_replicated


def test_random_initialisation_does_not_depend_on_the_devices():
  def init_fn(key):
    return {"embedding": jax.random.normal(key, (VOCAB, WIDTH))}

  key = jax.random.key(5)
  expected = np.asarray(jax.jit(init_fn)(key)["embedding"])
  for parallel in (make(), make("mesh", mesh_fsdp=2, mesh_tensor=2)):
    np.testing.assert_array_equal(parallel.init_state(init_fn, key)["embedding"], expected)


@pytest.mark.parametrize("options", [{}, {"mode": "mesh", "mesh_fsdp": 2, "mesh_tensor": 2}])
def test_placed_host_arrays_lie_as_an_initialised_state_does(options):
  parallel = make(**options)
  state = parallel.init_state(init_params, jax.random.key(0))
  placed = parallel.adopt(jax.device_get(state))
  for leaf, expected in zip(jax.tree.leaves(placed), jax.tree.leaves(state)):
    assert leaf.sharding == expected.sharding
    np.testing.assert_array_equal(leaf, expected)


def test_a_program_serves_states_of_more_than_one_structure():
  parallel = make("mesh", mesh_fsdp=4)
  program = parallel.compile_step(decay_step)
  for names in (("weight",), ("weight", "adapter")):
    state = parallel.init_state(lambda: dict.fromkeys(names, jnp.ones(8)))  # noqa: B023
    state, _ = program(state, parallel.shard_batch(make_batch(0), 1))
    np.testing.assert_allclose(state[names[-1]], 0.9, rtol=1e-6)


class FakeDevice(types.SimpleNamespace):
  """A device of another machine, as jax's own tests fake them."""

  __hash__ = object.__hash__


def tpu_v6e_4x4():
  """Sixteen chips of four hosts, two by two each."""
  shared = {"platform": "tpu", "device_kind": "TPU v6 lite", "core_on_chip": 0, "slice_index": 0}
  return [
    FakeDevice(id=4 * y + x, coords=(x, y, 0), process_index=y // 2 * 2 + x // 2, **shared)
    for y in range(4)
    for x in range(4)
  ]


@pytest.mark.parametrize("sizes", [(16, 1, 1), (1, 8, 2), (2, 8, 1), (2, 2, 4)])
def test_meshes_of_any_shape_fit_a_tpu_slice(sizes):
  arranged = arrange(sizes, tpu_v6e_4x4())
  assert arranged.shape == sizes
  assert sorted(device.id for device in arranged.flat) == list(range(16))


def test_gpus_of_several_nodes_lie_by_process():
  nodes = [FakeDevice(id=i, platform="gpu", process_index=i // 4, slice_index=i // 4)
           for i in range(8)]  # fmt: skip
  assert [device.id for device in arrange((2, 4, 1), nodes).flat] == list(range(8))


def test_rows_are_dealt_to_the_processes_that_fed_them():
  # Parts of a ring over 2 x 2 hosts.
  owners = {0: 0, 1: 0, 2: 1, 3: 1, 4: 3, 5: 3, 6: 2, 7: 2}
  assert order_by_process(owners) == [0, 1, 2, 3, 6, 7, 4, 5]
  rows = np.arange(16).reshape(16, 1)
  for options in ({}, {"mode": "mesh", "mesh_fsdp": 4}):
    np.testing.assert_array_equal(make(**options).by_process(rows), rows[None])


def micro_batch_labels(parallel, num_rows, accumulation):
  """Returns for each micro-batch the labels of its rows that are no padding, sorted."""
  batch = make_batch(0, num_rows)
  placed = parallel.shard_batch(batch, accumulation)

  def labels(state, batch, *, axis_name):
    gathered = jnp.where(batch.weights_BL.sum(-1) > 0, batch.labels_B, -1)
    return jax.lax.all_gather(gathered, "data", axis=1, tiled=True) if axis_name else gathered

  found = parallel.to_host(parallel.compile_eval(labels)({}, placed))
  return [sorted(row[row >= 0].tolist()) for row in found]


@pytest.mark.parametrize("options", [{"num_devices": 1}, {}, {"mode": "mesh", "mesh_fsdp": 4}])
def test_micro_batches_hold_the_same_rows_on_any_devices(options):
  expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
  assert micro_batch_labels(make(**options), num_rows=10, accumulation=3) == expected


def test_padded_rows_are_zero_and_absent_fields_stay_absent():
  placed = make(num_devices=4).shard_batch(make_batch(0, num_rows=6), 1)
  assert placed.positions_BL is None and placed.segment_ids_BL is None
  assert placed.tokens_BL.shape == (4, 1, 2, LENGTH) and placed.labels_B.shape == (4, 1, 2)
  assert not np.asarray(placed.tokens_BL)[3].any()
  assert not np.asarray(placed.weights_BL)[3].any()


@pytest.mark.parametrize(
  ("mode", "sizes", "message"),
  [
    ("pmpa", {}, 'did you mean "pmap"'),
    ("mesh", {"mesh_fsdp": 3}, "-1 x 3 x 1, which does not fit 8 devices"),
    ("mesh", {"mesh_data": 2, "mesh_fsdp": 2}, "2 x 2 x 1, which does not fit 8 devices"),
    ("mesh", {"mesh_fsdp": -1}, "only one may be -1"),
    ("mesh", {"mesh_tensor": 0}, "at least 1"),
    ("pmap", {"mesh_fsdp": 2}, "no effect"),
  ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_numbers(mode, sizes, message):
  with pytest.raises(ConfigError, match=message):
    make_parallel(mode, **sizes)


def attention(seen):
  """A stand-in for a kernel: independent over rows [B] and heads [H]; notes its shapes."""

  def kernel(query_BLHK, key_BLHK, segment_ids_BL):
    seen.append(query_BLHK.shape)
    scores = jnp.einsum("BLHK,BMHK->BHLM", query_BLHK, key_BLHK)
    same = segment_ids_BL[:, None, :, None] == segment_ids_BL[:, None, None, :]
    return jnp.einsum("BHLM,BMHK->BLHK", jax.nn.softmax(jnp.where(same, scores, -1e9)), key_BLHK)

  heads = ("rows", None, "heads", None)
  return kernel, per_device(kernel, (heads, heads, ("rows", None)), heads)


@pytest.mark.parametrize(
  ("num_rows", "num_heads", "local_shape"),
  [(8, 4, (2, 3, 2, 2)), (8, 3, (2, 3, 3, 2)), (6, 4, (6, 3, 2, 2))],
)
def test_a_kernel_sees_its_own_rows_and_heads_and_keeps_its_gradient(
  num_rows, num_heads, local_shape
):
  parallel = make("mesh", mesh_fsdp=2, mesh_tensor=2)
  rng = np.random.default_rng(0)
  query, key = rng.normal(size=(2, num_rows, 3, num_heads, 2)).astype(np.float32)
  segment_ids = rng.integers(0, 2, (num_rows, 3)).astype(np.int32)
  seen = []
  kernel, split_kernel = attention(seen)

  def gradients(function):
    def loss(query_BLHK, key_BLHK):
      return jnp.sin(function(query_BLHK, key_BLHK, segment_ids)).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))(query, key)

  expected = jax.jit(lambda: gradients(kernel))()
  seen.clear()
  evaluate = parallel.compile_eval(lambda state, batch, *, axis_name: gradients(split_kernel))
  got = evaluate({}, {})
  assert set(seen) == {local_shape}
  for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_a_kernel_is_left_alone_outside_of_a_mesh():
  seen = []
  _, split_kernel = attention(seen)
  operands = (np.ones((8, 3, 4, 2), np.float32),) * 2 + (np.ones((8, 3), np.int32),)
  split_kernel(*operands)
  parallel = make(num_devices=2)

  def evaluate(state, batch, *, axis_name):
    return split_kernel(*(x[0] for x in batch))

  parallel.compile_eval(evaluate)({}, parallel.shard_batch(operands, 1))
  assert seen == [(8, 3, 4, 2), (4, 3, 4, 2)]


def test_host_devices_cannot_change_once_jax_runs():
  assert jax.device_count() == 8
  set_host_devices(8)
  with pytest.raises(ConfigError, match="host_devices is 2, but jax already runs with 8"):
    set_host_devices(2)
  with pytest.raises(ConfigError, match="at least 1"):
    set_host_devices(0)


def test_one_process_needs_no_network(monkeypatch):
  monkeypatch.setattr("socket.socket", None)
  initialize_processes()
  initialize_processes("nowhere:1", 1, 0)
  assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"coordinator": "a:1"}, "not set: train.num_processes, train.process_id"),
    ({"num_processes": 2, "process_id": 0}, "not set: train.coordinator"),
    ({"coordinator": "a:1", "num_processes": 2}, "not set: train.process_id"),
    ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id is 2; it must"),
    ({"coordinator": "a", "num_processes": 2, "process_id": 1}, '"a"; it must be "host:port"'),
  ],
)
def test_half_given_processes_are_refused_by_the_flag(flags, message):
  with pytest.raises(ConfigError, match=message):
    initialize_processes(**flags)


def test_a_slurm_job_is_detected(monkeypatch):
  """Process 1 of 2 looks for the first node of the job, and says so when nobody is there."""
  for name, value in {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
  }.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=r"process 0 of 2 did not reach localhost:61447 within 0.2 s"):
    initialize_processes(timeout_seconds=0.2)
