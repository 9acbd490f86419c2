"""What a run sets for its process, and how one process of several ends when it fails alone."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from gptjax.errors import DataError
from gptjax.train.config import PretrainConfig, TrainConfig
from gptjax.train.setup import ending_at_once, start_devices


@pytest.mark.parametrize("error", ["UserError('full\\ndisk')", "ValueError()"])
def test_one_process_of_several_ends_without_waiting_for_the_others(error):
  """As it leaves, jax would wait for the others: here, for an hour."""
  code = f"""
import atexit, time
from types import SimpleNamespace
from gptjax.errors import UserError
from gptjax.train.setup import ending_at_once
atexit.register(time.sleep, 3600)
with ending_at_once(SimpleNamespace(process_count=2, process_index=1)):
  raise {error}
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
  assert done.returncode == 2
  last = done.stderr.splitlines()[-1]
  assert last.startswith("gptjax: process 1: ")
  assert "full disk" in last or "another process" in last
  assert ("Traceback" in done.stderr) == ("ValueError" in error)


def test_a_single_process_leaves_as_always():
  with (
    pytest.raises(DataError, match="gone"),
    ending_at_once(SimpleNamespace(process_count=1, process_index=0)),
  ):
    raise DataError("gone")


def test_the_precision_of_one_run_is_not_that_of_the_next():
  for name, expected in (("highest", "highest"), ("default", None)):
    start_devices(PretrainConfig(train=TrainConfig(host_devices=8, matmul_precision=name)))
    assert jax.config.jax_default_matmul_precision == expected
