"""Checkpoints: exact values on any devices, the keeping policy, and every kind of damage."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.checkpoint import verified
from gptjax.checkpoint.store import CheckpointStore
from gptjax.errors import CheckpointError


def make_sharding(num_devices, axis=None):
  mesh = Mesh(np.array(jax.devices()[:num_devices]), ("x",))
  names = [] if axis is None else [None] * axis + ["x"]
  return NamedSharding(mesh, PartitionSpec(*names))


def make_state(seed=0, num_devices=1, axis=0, width=64):
  kernel_key, state_key = jax.random.split(jax.random.key(seed))
  params = {
    "decoder": {"kernel": jax.random.normal(kernel_key, (8, width)), "bias": jnp.arange(4.0)},
    "head": jnp.full((3,), seed, jnp.bfloat16),
  }
  state = {
    "params": params,
    "optimizer": optax.adam(1e-3).init(params),
    "step": jnp.int32(seed),
    "key": state_key,
    "nothing": None,
  }
  wide, narrow = make_sharding(num_devices, axis), make_sharding(num_devices)
  return jax.tree.map(lambda x: jax.device_put(x, wide if x.shape == (8, width) else narrow), state)


def to_abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def to_numpy(leaf):
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_same(actual, expected):
  """Structures, dtypes and every bit agree."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


def save_steps(path, steps, **options):
  """Saves make_state(step) at each step; returns the store."""
  with CheckpointStore(path, **options) as store:
    for step in steps:
      store.save(step, make_state(step))
  return store


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  """A folder with whole checkpoints 1 and 2, to be copied before it is harmed."""
  path = tmp_path_factory.mktemp("store") / "checkpoints"
  save_steps(path, [1, 2])
  return path


@pytest.fixture
def checkpoints(two_steps, tmp_path):
  return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def data_file(folder):
  """The file that holds the bytes of the arrays."""
  return max(folder.glob("state/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


# Round trips


@pytest.mark.parametrize(("num_devices", "axis"), [(8, 1), (4, 1), (2, 0), (1, 0)])
def test_restores_on_other_devices_exactly(tmp_path, num_devices, axis):
  state = make_state(3, num_devices=8, axis=0)
  with CheckpointStore(tmp_path / "checkpoints") as store:
    assert store.save(3, state, {"valid_loss": 1.0})
  wanted = to_abstract(make_state(0, num_devices, axis))
  restored = CheckpointStore(tmp_path / "checkpoints").restore_latest(wanted)
  assert (restored.step, restored.skipped) == (3, [])
  assert_same(restored.state, state)
  shardings = jax.tree.map(lambda x: x.sharding, restored.state)
  assert shardings == jax.tree.map(lambda x: x.sharding, wanted)


def test_round_trip_check_can_fail():
  state = make_state(3)
  other = dict(state, key=jax.random.key(99))
  with pytest.raises(AssertionError):
    assert_same(other, state)


def test_restored_key_draws_the_same_numbers(checkpoints):
  restored = CheckpointStore(checkpoints).restore_latest(to_abstract(make_state()))
  expected = jax.random.normal(make_state(2)["key"], (5,))
  np.testing.assert_array_equal(jax.random.normal(restored.state["key"], (5,)), expected)


def test_nothing_saved_restores_none_and_creates_nothing(tmp_path):
  store = CheckpointStore(tmp_path / "checkpoints")
  assert store.restore_latest(to_abstract(make_state())) is None
  assert store.latest_step() is None
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_devices", [1, 8])
def test_arrays_donated_right_after_save_are_saved_as_they_were(tmp_path, num_devices):
  sharding = make_sharding(num_devices, 0)
  values = np.arange(1 << 21, dtype=np.float32)
  array = jax.device_put(values, sharding)
  update = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  with CheckpointStore(tmp_path / "checkpoints") as store:
    store.save(1, {"params": array})
    for _ in range(3):
      array = update(array)
    array.block_until_ready()
    store.wait()
    restored = store.restore_latest(
      {"params": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)}
    )
  np.testing.assert_array_equal(restored.state["params"], values)
  assert array[7] == -1


# Parameters alone


def test_restore_params_reads_a_subtree_and_casts(checkpoints):
  sharding = make_sharding(4, 1)
  kernel = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16, sharding=sharding)
  restored = CheckpointStore(checkpoints).restore_params({"decoder": {"kernel": kernel}})
  assert restored.step == 2
  expected = make_state(2)["params"]["decoder"]["kernel"].astype(jnp.bfloat16)
  assert_same(restored.state, {"decoder": {"kernel": expected}})
  assert restored.state["decoder"]["kernel"].sharding == sharding


def test_restore_params_of_a_step(checkpoints):
  params = make_state(1)["params"]
  restored = CheckpointStore(checkpoints).restore_params(to_abstract(params), step=1)
  assert restored.step == 1
  assert_same(restored.state, params)


def test_restore_params_changes_nothing_on_disk(checkpoints):
  data_file(checkpoints / "2").unlink()
  before = sorted(checkpoints.rglob("*"))
  restored = CheckpointStore(checkpoints).restore_params(to_abstract(make_state()["params"]))
  assert restored.step == 1
  assert len(restored.skipped) == 1 and "is missing" in restored.skipped[0]
  assert sorted(checkpoints.rglob("*")) == before


def test_restore_params_names_a_missing_step(checkpoints, tmp_path):
  params = to_abstract(make_state()["params"])
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .*there are: \[1, 2\]"):
    CheckpointStore(checkpoints).restore_params(params, step=7)
  with pytest.raises(CheckpointError, match="no checkpoint in"):
    CheckpointStore(tmp_path / "none").restore_params(params)


def test_saved_params_gives_names_and_shapes(checkpoints, tmp_path):
  flip(checkpoints / "2" / "record" / "metadata")
  with pytest.raises(CheckpointError, match="record/metadata has been altered"):
    CheckpointStore(checkpoints).saved_params(step=2)
  with pytest.raises(CheckpointError, match="no checkpoint in"):
    CheckpointStore(tmp_path / "none").saved_params()
  saved = CheckpointStore(checkpoints).saved_params()
  assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in saved.items()} == {
    "decoder/kernel": ((8, 64), "float32"),
    "decoder/bias": ((4,), "float32"),
    "head": ((3,), "bfloat16"),
  }


# What is kept


def test_keeps_latest_best_and_every_nth_over_a_restart(tmp_path):
  path = tmp_path / "checkpoints"
  losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: 4.0, 6: 6.0, 7: 7.0, 8: 8.0}
  for steps in ([1, 2, 3, 4], [5, 6, 7, 8]):
    with CheckpointStore(path, keep_latest=2, keep_every_steps=5) as store:
      for step in steps:
        store.save(step, {"params": jnp.float32(step)}, {"valid_loss": losses[step], "other": 1})
  assert store.steps() == [2, 5, 7, 8]
  assert store.best_step() == 2
  assert store.latest_step() == 8


def test_steps_without_or_with_nan_metrics_are_kept_by_age_alone(tmp_path):
  with CheckpointStore(tmp_path / "checkpoints", keep_latest=1) as store:
    for step, metrics in enumerate(
      [None, {"valid_loss": float("nan")}, {"valid_loss": 2.0}, {"other": 0.0}, None], start=1
    ):
      store.save(step, {"params": jnp.float32(step)}, metrics)
  assert store.steps() == [3, 5]
  assert store.best_step() == 3


def test_a_step_is_saved_once_unless_forced(tmp_path):
  abstract = to_abstract({"params": jnp.float32(0)})
  with CheckpointStore(tmp_path / "checkpoints") as store:
    assert store.save(1, {"params": jnp.float32(1)})
    assert not store.save(1, {"params": jnp.float32(2)})
    assert store.restore_latest(abstract).state["params"] == 1
    assert store.save(1, {"params": jnp.float32(3)}, force=True)
    assert store.restore_latest(abstract).state["params"] == 3


def test_saving_before_the_latest_step_is_refused(tmp_path):
  store = save_steps(tmp_path / "checkpoints", [5])
  with pytest.raises(CheckpointError, match="step 4 cannot be saved after step 5"):
    store.save(4, make_state())


# Damage


def truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


def empty(path):
  path.write_bytes(b"")


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, empty, flip, os.unlink])
def test_every_file_harmed_gives_exact_values_or_the_older_checkpoint(checkpoints, tmp_path, harm):
  abstract = to_abstract(make_state())
  for number, file in enumerate(sorted(p for p in checkpoints.glob("2/**/*") if p.is_file())):
    harmed = Path(shutil.copytree(checkpoints, tmp_path / str(number)))
    harm(harmed / file.relative_to(checkpoints))
    with CheckpointStore(harmed) as store:
      restored = store.restore_latest(abstract)
      assert_same(restored.state, make_state(restored.step))
      if file.parent.name != "2" or file.name == "checksums.json":
        assert restored.step == 1, file
        (line,) = restored.skipped
        assert line.startswith("checkpoint 2 skipped, ") and "2.damaged" in line
        assert "\n" not in line
      else:  # orbax's own notes, which nothing is read from: they must not stop it either
        assert restored.step == 2, file
        assert store.save(3, make_state(3))


def save_one_leaf(path, steps):
  """One leaf: orbax abandons the reads beside one that fails, which complain when they end."""
  values = jax.random.normal(jax.random.key(0), (1 << 12,))
  with CheckpointStore(path) as store:
    for step in steps:
      store.save(step, {"params": values + step})
  return values, to_abstract({"params": values})


def test_without_the_checksums_a_flipped_byte_of_an_array_is_silently_wrong(tmp_path, monkeypatch):
  """The companion that must fail: why checksums.json exists."""
  values, abstract = save_one_leaf(tmp_path, [1])
  flip(data_file(tmp_path / "1"))
  with pytest.raises(CheckpointError, match=r"state/ocdbt.* has been altered"):
    CheckpointStore(tmp_path).restore_params(abstract["params"])
  monkeypatch.setattr(verified, "check_whole", lambda *args: None)
  restored = CheckpointStore(tmp_path).restore_params(abstract["params"])
  assert not np.array_equal(restored.state, values + 1)


def test_what_orbax_cannot_read_is_skipped_where_there_are_no_checksums(tmp_path, monkeypatch):
  """On object stores, that is."""
  values, abstract = save_one_leaf(tmp_path, [1, 2])
  monkeypatch.setattr(verified, "check_whole", lambda *args: None)
  truncate(tmp_path / "2" / "state" / "manifest.ocdbt")
  restored = CheckpointStore(tmp_path).restore_latest(abstract)
  assert restored.step == 1
  np.testing.assert_array_equal(restored.state["params"], values + 1)
  (line,) = restored.skipped
  assert "it cannot be read (" in line and "\n" not in line and len(line) < 300


def test_several_damaged_are_all_named(checkpoints):
  save_steps(checkpoints, [3], keep_latest=3)
  for step in (2, 3):
    flip(data_file(checkpoints / str(step)))
  restored = CheckpointStore(checkpoints).restore_latest(to_abstract(make_state()))
  assert restored.step == 1
  assert [line.split(",")[0] for line in restored.skipped] == [
    "checkpoint 3 skipped",
    "checkpoint 2 skipped",
  ]


def test_all_damaged_is_an_error_and_moves_nothing(checkpoints):
  for step in (1, 2):
    empty(data_file(checkpoints / str(step)))
  with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read .*0 of") as error:
    CheckpointStore(checkpoints).restore_latest(to_abstract(make_state()))
  assert "\n" not in str(error.value)
  assert sorted(path.name for path in checkpoints.iterdir()) == ["1", "2"]


def test_a_damaged_step_can_be_saved_again_and_again(checkpoints):
  abstract = to_abstract(make_state())
  for seed in (7, 8):
    flip(data_file(checkpoints / "2"))
    with CheckpointStore(checkpoints) as store:
      assert store.restore_latest(abstract).step == 1
      store.save(2, make_state(seed))
  assert_same(CheckpointStore(checkpoints).restore_latest(abstract).state, make_state(8))
  assert {"2", "2.damaged", "2.damaged2"} <= {path.name for path in checkpoints.iterdir()}


@pytest.mark.parametrize("harm", [truncate, empty, flip, os.unlink])
def test_harmed_metrics_of_an_older_checkpoint_do_not_stop_saving(tmp_path, harm):
  abstract = to_abstract({"params": jnp.float32(0)})
  with CheckpointStore(tmp_path, keep_latest=1) as store:
    for step in (1, 2, 3):
      store.save(step, {"params": jnp.float32(step)}, {"valid_loss": step})
  harm(tmp_path / "1" / "metrics" / "metrics")
  with CheckpointStore(tmp_path, keep_latest=1) as store:
    restored = store.restore_latest(abstract)
    assert restored.step == 3
    assert len(restored.skipped) == 1 and "1.damaged" in restored.skipped[0]
    store.save(4, restored.state, {"valid_loss": 2.0})
    assert store.best_step() == 4
  assert store.steps() == [4]


def test_a_checkpoint_half_deleted_by_a_crash_does_not_stop_saving(checkpoints):
  shutil.rmtree(checkpoints / "1" / "state")
  os.unlink(checkpoints / "1" / "checksums.json")
  (checkpoints / "0").mkdir()
  with CheckpointStore(checkpoints) as store:
    restored = store.restore_latest(to_abstract(make_state()))
    assert (restored.step, restored.skipped) == (2, [])
    store.save(3, make_state(3))
  assert store.steps() == [2, 3]


def test_trouble_of_the_machine_is_not_taken_for_damage(checkpoints, monkeypatch):
  def out_of_memory(self, *args, **kwargs):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate\n1 byte")

  monkeypatch.setattr(verified.ocp.PyTreeCheckpointHandler, "restore", out_of_memory)
  with pytest.raises(CheckpointError, match="cannot be read now: RESOURCE_EXHAUSTED"):
    CheckpointStore(checkpoints).restore_latest(to_abstract(make_state()))
  assert sorted(path.name for path in checkpoints.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
  ("number", "expected"), [(errno.EIO, "(Input/output error)"), (errno.EACCES, "now: Permission")]
)
def test_a_bad_sector_is_damage_and_a_missing_permission_is_not(
  checkpoints, monkeypatch, number, expected
):
  def fail(path):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(verified, "_crc32", fail)
  with pytest.raises(CheckpointError, match=re.escape(expected)) as error:
    CheckpointStore(checkpoints).restore_latest(to_abstract(make_state()))
  assert ("no checkpoint in" in str(error.value)) == (number == errno.EIO)


# Another model


def test_another_shape_is_refused_by_name_and_not_skipped(checkpoints):
  with pytest.raises(CheckpointError) as error:
    CheckpointStore(checkpoints).restore_latest(to_abstract(make_state(width=32)))
  message = str(error.value)
  assert "params/decoder/kernel is float32 [8, 64] there and float32 [8, 32] here" in message
  assert "another model" in message and "\n" not in message
  assert sorted(path.name for path in checkpoints.iterdir()) == ["1", "2"]


def test_leaves_on_one_side_only_and_dtypes_are_refused(checkpoints):
  state = make_state()
  del state["step"]
  state["extra"] = jnp.zeros(2)
  state["params"]["head"] = state["params"]["head"].astype(jnp.float32)
  with pytest.raises(CheckpointError) as error:
    CheckpointStore(checkpoints).restore_latest(to_abstract(state))
  for part in (
    "extra is absent there and float32 [2] here",
    "step is int32 [] there and absent here",
    "params/head is bfloat16 [3] there and float32 [3] here",
  ):
    assert part in str(error.value)


def test_params_of_another_model_are_refused_by_name(checkpoints):
  params = to_abstract(make_state(width=32)["params"])
  with pytest.raises(CheckpointError, match=r"params/decoder/kernel is .*\[8, 64\] there"):
    CheckpointStore(checkpoints).restore_params(params)
  with pytest.raises(CheckpointError, match="params/new is absent there"):
    CheckpointStore(checkpoints).restore_params({"new": params["head"]})


# Crashes and disks


def start(script, *args):
  """Runs a script that has `CheckpointStore`, jax and sys, on one CPU device."""
  header = """
    import sys, jax, jax.numpy as jnp
    from gptjax.checkpoint.store import CheckpointStore
  """
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(header) + textwrap.dedent(script), *map(str, args)],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_kill_in_the_middle_of_saving_leaves_the_newest_whole_checkpoint(tmp_path):
  path = tmp_path / "checkpoints"
  process = start(
    """
    with CheckpointStore(sys.argv[1], keep_latest=2) as store:
      for step in range(1, 10**6):
        store.save(step, {"params": jax.random.normal(jax.random.key(step), (1 << 21,))})
    """,
    path,
  )
  deadline = time.monotonic() + 60

  def is_saving_third():
    return any(int(p.name.split(".")[0]) >= 3 for p in path.glob("*.orbax-checkpoint-tmp*"))

  while not is_saving_third() and time.monotonic() < deadline and process.poll() is None:
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert list(path.glob("*.orbax-checkpoint-tmp*"))  # killed with a save half done
  abstract = {"params": jax.ShapeDtypeStruct((1 << 21,), jnp.float32, sharding=make_sharding(8, 0))}
  with CheckpointStore(path) as store:
    restored = store.restore_latest(abstract)
    assert restored.step >= 2 and restored.skipped == []
    expected = jax.random.normal(jax.random.key(restored.step), (1 << 21,))
    np.testing.assert_array_equal(restored.state["params"], expected)
    assert store.save(restored.step + 1, restored.state)
  assert store.latest_step() == restored.step + 1
  assert not list(path.glob("*.orbax-checkpoint-tmp*"))


def test_full_disk_is_one_line_and_the_earlier_checkpoint_survives(tmp_path):
  """RLIMIT_FSIZE stands for the disk: it fails the same system call, and needs no root."""
  path = tmp_path / "checkpoints"
  process = start(
    """
    import resource
    from gptjax.errors import CheckpointError
    small, large = {"params": jnp.ones(8)}, {"params": jnp.arange(1 << 20) * 0.37}
    with CheckpointStore(sys.argv[1]) as store:
      store.save(1, small)
      store.wait()
      limits = resource.getrlimit(resource.RLIMIT_FSIZE)
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
      for attempt in (store.wait, lambda: store.save(3, small)):
        try:
          store.save(2, large)
          attempt()
        except CheckpointError as error:
          print(error)
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
      print(store.steps())
      store.save(2, large)
    print(store.steps())
    """,
    path,
  )
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  first, second, before, after = output.splitlines()
  for line in (first, second):
    assert line.startswith("checkpoint 2 could not be saved") and "File too large" in line
  assert (before, after) == ("[1]", "[1, 2]")
  assert "Traceback" not in errors


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk_is_named(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("this machine does not allow mounting")
  try:
    store = CheckpointStore(disk / "checkpoints")
    store.save(1, {"params": jnp.ones(8)})
    noise = jax.random.normal(jax.random.key(0), (1 << 20,))
    with pytest.raises(CheckpointError, match="No space left on device") as error:
      store.save(2, {"params": noise})
      store.wait()
    assert "\n" not in str(error.value)
    restored = store.restore_latest(to_abstract({"params": jnp.ones(8)}))
    assert restored.step == 1
    store.close()
  finally:
    subprocess.run(["umount", str(disk)], check=True)


def test_failed_background_save_is_raised_by_the_next_save_and_by_close(tmp_path, monkeypatch):
  def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(verified, "_checksums", no_space)
  store = CheckpointStore(tmp_path / "checkpoints")
  store.save(1, make_state())
  with pytest.raises(CheckpointError, match=r"checkpoint 1 .*No space left on device"):
    store.save(2, make_state())
  store.save(3, make_state())
  with pytest.raises(CheckpointError, match=r"checkpoint 3 .*No space left on device"):
    store.close()
  assert store.steps() == []


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  store = CheckpointStore(tmp_path / "file" / "checkpoints")
  with pytest.raises(CheckpointError, match=r"checkpoint 1 could not be saved .*Not a directory"):
    store.save(1, make_state())


def test_record_and_checksums_are_plain_json(checkpoints):
  checksums = json.loads((checkpoints / "2" / "checksums.json").read_text())
  record = json.loads((checkpoints / "2" / "record" / "metadata").read_text())
  assert (
    checksums["record/metadata"][0] == (checkpoints / "2" / "record" / "metadata").stat().st_size
  )
  assert record["leaves"]["params/decoder/kernel"] == [[8, 64], "float32"]


def test_a_relative_path_works(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  state = {"params": {"x": jnp.arange(3.0)}}
  with CheckpointStore("relative/checkpoints") as store:
    assert store.save(1, state)
  assert CheckpointStore(tmp_path / "relative" / "checkpoints").latest_step() == 1
