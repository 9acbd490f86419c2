"""What one step frees serves the next: counted in page faults, which do not depend on the load."""

import os
import platform
import subprocess
import sys

import pytest

# A program whose temporary buffers are larger than a thread's heap.
COUNT_FAULTS = """
import resource, sys
import jax
import jax.numpy as jnp
from gptjax.allocator import keep_freed_memory
from gptjax.parallel import set_host_devices

set_host_devices(1)
if sys.argv[1] == "keep":
  assert keep_freed_memory()

@jax.jit
def program(x):
  return (x @ x.T) @ x

def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x = jnp.ones((6_000, 32))
for _ in range(2):
  program(x).block_until_ready()
before = faults()
for _ in range(3):
  program(x).block_until_ready()
print((faults() - before) // 3)
"""


def count_faults(mode):
  """Returns the page faults of one call of the program."""
  without_huge_pages = {name: v for name, v in os.environ.items() if name != "GLIBC_TUNABLES"}
  command = [sys.executable, "-c", COUNT_FAULTS, mode]
  done = subprocess.run(command, env=without_huge_pages, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_memory_that_a_step_frees_serves_the_next():
  # Its buffer of 137 MiB is 35,156 pages of 4 KiB.
  assert count_faults("keep") < 1_000
  assert count_faults("free") > 10_000
