"""Eight host CPU devices for every test, set before jax starts."""

import os
import sys

if "jax" in sys.modules:
  raise RuntimeError("jax was imported before tests/conftest.py could set the CPU devices")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
