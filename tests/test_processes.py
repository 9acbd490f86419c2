"""Two processes with four CPU devices each do what one process with eight does.

Run as a script, this file is one of the processes.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_parallel import RULES, TOLERANCE, init_state, make, make_batch, train_step
from test_rendezvous import free_port

from gptjax.errors import ConfigError, UserError
from gptjax.parallel import initialize_processes, make_parallel, set_host_devices

DRIVERS = {
  "pmap": {"mode": "pmap"},
  "mesh": {"mode": "mesh", "mesh_fsdp": 2, "mesh_tensor": 2},
}


def train(parallel, state, steps, num_rows=18):
  """Feeds every process_count-th row; returns (losses, state)."""
  program = parallel.compile_step(train_step)
  losses = []
  for i in steps:
    rows = slice(parallel.process_index, None, parallel.process_count)
    batch = make_batch(i, num_rows).map(lambda array, rows=rows: array[rows])
    state, metrics = program(state, parallel.shard_batch(batch, 2))
    losses.append(parallel.to_host(metrics)["loss"])
  return losses, state


def save_and_restore(parallel, state, folder):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, parallel.for_saving(state))
    checkpointer.wait_until_finished()
  return restore(parallel, folder)


def restore(parallel, folder):
  with ocp.StandardCheckpointer() as checkpointer:
    abstract = parallel.abstract_state(init_state, jax.random.key(0))
    return parallel.from_saved(checkpointer.restore(folder, abstract))


def process_main(process_id, port, folder):
  """Trains five steps, saves, restores, trains one more, with both drivers."""
  set_host_devices(4)
  initialize_processes(f"127.0.0.1:{port}", 2, process_id, timeout_seconds=60)
  found = {}
  for name, options in DRIVERS.items():
    parallel = make_parallel(**options, sharding_rules=RULES)
    assert (parallel.num_devices, parallel.process_count) == (8, 2)
    state = parallel.init_state(init_state, jax.random.key(0))
    losses, state = train(parallel, state, range(5))
    state = save_and_restore(parallel, state, folder / name)
    last, state = train(parallel, state, [5])
    found[f"{name} losses"] = np.array([*losses, *last])
    found[f"{name} embedding"] = parallel.to_host(state["params"])["embedding"]
  np.savez(folder / f"process_{process_id}.npz", **found)
  with pytest.raises(ConfigError, match="each of the 2 processes must own an equal part"):
    make_parallel("mesh", mesh_data=1, mesh_tensor=8)


def start(*arguments):
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
  return subprocess.Popen(
    [sys.executable, __file__, *map(str, arguments)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
  """Returns (folder with their checkpoints, what each process found)."""
  folder = tmp_path_factory.mktemp("two_processes")
  port = free_port()
  processes = [start("train", i, port, folder) for i in range(2)]
  for process in processes:
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
  return folder, [dict(np.load(folder / f"process_{i}.npz")) for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("driver", DRIVERS)
def test_two_processes_give_the_losses_of_one(two_processes, driver):
  _, found = two_processes
  parallel = make(**DRIVERS[driver])
  losses, state = train(parallel, parallel.init_state(init_state, jax.random.key(0)), range(6))
  embedding = parallel.to_host(state["params"])["embedding"]
  for process in found:
    np.testing.assert_allclose(process[f"{driver} losses"], losses, rtol=TOLERANCE)
    # As in test_parallel: Adam magnifies the order of sums.
    np.testing.assert_allclose(
      process[f"{driver} embedding"], embedding, rtol=1e-5, atol=1e-5 * np.abs(embedding).max()
    )


@pytest.mark.slow
@pytest.mark.parametrize("driver", DRIVERS)
def test_one_process_continues_what_two_have_saved(two_processes, driver):
  """On four devices, by the other driver."""
  folder, found = two_processes
  parallel = make(num_devices=4, mode="mesh" if driver == "pmap" else "pmap")
  (loss,), state = train(parallel, restore(parallel, folder / driver), [5])
  assert int(state["step"]) == 6
  np.testing.assert_allclose(loss, found[0][f"{driver} losses"][5], rtol=TOLERANCE)


def test_a_missing_process_is_named_by_all_that_came():
  """jax alone would abort both with a C++ stack trace that names nobody."""
  port = free_port()
  processes = [start("wait", i, port) for i in (0, 1)]
  for process in processes:
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 2
    assert messages.splitlines()[-1].startswith(f"process 2 of 3 did not reach 127.0.0.1:{port}")


if __name__ == "__main__":
  if sys.argv[1] == "train":
    process_main(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
  else:
    try:
      initialize_processes(f"127.0.0.1:{sys.argv[3]}", 3, int(sys.argv[2]), timeout_seconds=8)
    except UserError as error:
      print(error, file=sys.stderr)
      sys.exit(2)
