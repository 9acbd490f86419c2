"""Eight host CPU devices for every test, set before jax starts; and no network."""

import os
import socket
import sys
from importlib import metadata

import pytest

if "jax" in sys.modules:
  raise RuntimeError("jax was imported before tests/conftest.py could set the CPU devices")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Compiling is most of the tests' time; tests of speed or memory switch this off. In the
# environment, so that the processes that tests start compute the same bits.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# XLA's older way to compile fusions takes half the time. Later releases have it no more, and XLA
# aborts on a flag it does not know.
if metadata.version("jaxlib").startswith("0.10."):
  flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def no_network():
  """Tests reach this machine only; a name look-up or a connection elsewhere fails by name."""
  local = {"127.0.0.1", "::1", "::", "0.0.0.0", "localhost", "", None, socket.gethostname()}
  connect, look_up = socket.socket.connect, socket.getaddrinfo

  def check(host):
    if host not in local:
      raise RuntimeError(f'a test tried to reach "{host}"; tests use no network')

  def guarded_connect(self, address):
    if self.family != socket.AF_UNIX:
      check(address[0])
    return connect(self, address)

  def guarded_look_up(host, *args, **kwargs):
    check(host)
    return look_up(host, *args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket, "getaddrinfo", guarded_look_up)
    yield
