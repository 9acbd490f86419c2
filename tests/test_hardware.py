"""FLOPs, peaks and the memory estimate."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import optax
import pytest

from gptjax.batch import Batch
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import hidden_states
from gptjax.model.parameters import count_parameters, init_parameters, model_specs
from gptjax.train import hardware
from gptjax.train.config import OptimizerConfig, TrainConfig

SMALL = ModelConfig(vocab_size=512, context_length=128, num_layers=4, model_dim=128, num_heads=4)
GPT2 = ModelConfig(vocab_size=50257)
# Nothing is run: the machine code may be poor, buffers and operations are the same.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _loss(params, tokens_BL, targets_BL, config):
  hidden_BLD = hidden_states(params["decoder"], Batch(tokens_BL, targets_BL, None), config)
  head_VD = params["decoder"]["token_embedding"]["embedding"]
  logits_TV = hidden_BLD.reshape(-1, config.model_dim) @ head_VD.T
  losses = optax.softmax_cross_entropy_with_integer_labels(logits_TV, targets_BL.reshape(-1))
  return losses.mean()


def _abstract_params(config):
  return jax.eval_shape(lambda key: init_parameters(config, key), jax.random.key(0))


def test_flops_of_gpt2_are_papers():
  # PaLM's formula by hand: 6 (all parameters but embeddings' lookups, biases, norms) + 12 N L D.
  weights = 12 * 12 * 768**2 + 768 * 50257
  assert hardware.flops_per_token(GPT2) == 6 * weights + 12 * 12 * 1024 * 768
  # Nearly all parameters are in matrix products; the tied head stands for the lookup.
  assert weights / count_parameters(GPT2) == pytest.approx(1, rel=0.01)
  assert hardware.flops_per_token(GPT2, 256) < hardware.flops_per_token(GPT2)


def test_flops_of_local_layers_count_their_window():
  local = dataclasses.replace(SMALL, attention_pattern=("global", "local"), window_size=32)
  saved = hardware.flops_per_token(SMALL) - hardware.flops_per_token(local)
  assert saved == 12 * 2 * (128 - 32) * 128
  assert hardware.flops_per_token(local, 16) == hardware.flops_per_token(SMALL, 16)


def test_flops_agree_with_the_compiler():
  config = dataclasses.replace(
    SMALL, scan_layers=False, num_layers=2, model_dim=256, activation="relu"
  )
  tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)

  def step(params, tokens_BL, targets_BL):
    return jax.grad(_loss)(params, tokens_BL, targets_BL, config)

  compiled = jax.jit(step).lower(_abstract_params(config), tokens, tokens).compile(QUICKLY)
  counted = compiled.cost_analysis()["flops"]
  # XLA also counts norms, softmax and the activation: a few percent at this width.
  assert hardware.flops_per_token(config) * 256 / counted == pytest.approx(1, rel=0.08)


def _devices(kind, count=1, platform="gpu"):
  device = types.SimpleNamespace(device_kind=kind, platform=platform, process_index=0)
  return [device] * count


@pytest.mark.parametrize(
  "kind, dtype, tflops",
  [
    ("TPU v2", "bfloat16", 22.5),
    ("TPU v3", "float32", 61.5),
    ("TPU v4", "bfloat16", 275),
    ("TPU v5 lite", "bfloat16", 197),
    ("TPU v5e", "bfloat16", 197),
    ("TPU v5p", "bfloat16", 459),
    ("TPU v5", "bfloat16", 459),
    ("TPU v6 lite", "bfloat16", 918),
    ("TPU7x", "bfloat16", 1153.5),
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
    ("NVIDIA A100-SXM4-80GB", "float32", 156),
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
    ("NVIDIA H100 PCIe", "bfloat16", 756.5),
    ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ("Tesla T4", "float32", 8.1),
    ("Tesla V100-SXM2-16GB", "float32", 15.7),
    ("NVIDIA L4", "bfloat16", 121),
  ],
)
def test_known_peaks(kind, dtype, tflops):
  peak = hardware.peak_flops_per_second(_devices(kind, 4), dtype)
  assert peak.flops_per_second == pytest.approx(4e12 * tflops, rel=1e-12)


@pytest.mark.parametrize("kind", ["NVIDIA L40S", "TPU v9", "Radeon"])
def test_unknown_device_has_no_peak_and_says_so(kind):
  peak = hardware.peak_flops_per_second(_devices(kind), "bfloat16")
  assert peak.flops_per_second is None
  assert kind in peak.source and "train.peak_flops_per_second" in peak.source
  own = hardware.peak_flops_per_second(_devices(kind, 2), "bfloat16", of_one_device=1e12)
  assert own.flops_per_second == 2e12


def test_cpu_roof_does_not_grow_with_the_devices_shown(monkeypatch):
  monkeypatch.setattr(hardware, "PROBE_SECONDS", 0.1)
  monkeypatch.setattr(hardware, "PROBE_SIZES", (256,))
  peak = hardware.peak_flops_per_second(jax.devices(), "float32")
  # Between a slow board and a large server; eight fold counting would not be seen here ...
  assert 1e9 < peak.flops_per_second < 1e14
  # ... but is here.
  monkeypatch.setattr(hardware, "measure_matmul_roof", lambda dtype: 1e11)
  assert hardware.peak_flops_per_second(jax.devices(), "float32").flops_per_second == 1e11


MEMORY_CASES = {
  "activations": (SMALL, 16),
  "unrolled": (dataclasses.replace(SMALL, scan_layers=False, num_layers=2), 16),
  "remat": (dataclasses.replace(SMALL, remat="full"), 16),
  "parameters": (dataclasses.replace(SMALL, model_dim=384), 1),
  "logits": (dataclasses.replace(SMALL, vocab_size=8192, num_layers=1), 16),
}


@pytest.mark.parametrize(
  "case",
  [
    case if case == "activations" else pytest.param(case, marks=pytest.mark.slow)
    for case in MEMORY_CASES
  ],
)
def test_memory_is_near_xlas_own_figure(case):
  config, rows = MEMORY_CASES[case]
  optimizer = optax.adamw(1e-3)

  def step(state, tokens_BL, targets_BL):
    params, moments = state
    gradients = jax.grad(_loss)(params, tokens_BL, targets_BL, config)
    updates, moments = optimizer.update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments

  params = _abstract_params(config)
  state = (params, jax.eval_shape(optimizer.init, params))
  tokens = jax.ShapeDtypeStruct((rows, 128), jnp.int32)
  compiled = jax.jit(step, donate_argnums=0).lower(state, tokens, tokens).compile(QUICKLY)
  used = compiled.memory_analysis()
  total = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
  total += used.temp_size_in_bytes
  estimate = hardware.memory_estimate(
    model_specs(config), config, OptimizerConfig(), TrainConfig(batch_rows=rows), num_devices=1
  )
  assert 1 / 1.5 < estimate.total / total < 1.5


def _estimate(optimizer=None, model=SMALL, num_devices=1, **train):
  train = TrainConfig(batch_rows=32, **train)
  return hardware.memory_estimate(
    model_specs(model), model, optimizer or OptimizerConfig(), train, num_devices=num_devices
  )


def test_memory_follows_the_configs():
  base = _estimate()
  assert base.parameters == 4 * sum(a.size for a in jax.tree.leaves(_abstract_params(SMALL)))
  assert base.optimizer_state == 2 * base.parameters
  muon = _estimate(OptimizerConfig(name="muon", ema_decay=0.9))
  hidden_bytes = 4 * 4 * 12 * 128**2
  assert muon.optimizer_state == 3 * base.parameters - hidden_bytes
  assert _estimate(loss_chunk_tokens=512).logits * 8 == base.logits
  accumulated = _estimate(accumulation=4)
  assert accumulated.gradients == 2 * base.gradients
  assert accumulated.activations * 4 == base.activations
  assert base.total == sum(dataclasses.astuple(base))
  frozen = _estimate(OptimizerConfig(frozen_pattern="layers/"))
  trained = base.parameters - 4 * sum(
    a.size for a in jax.tree.leaves(_abstract_params(SMALL)["decoder"]["layers"])
  )
  assert frozen.parameters == base.parameters
  assert frozen.gradients == trained and frozen.optimizer_state == 2 * trained


def test_memory_is_divided_among_devices():
  base, data = _estimate(), _estimate(num_devices=8)
  assert data.parameters == base.parameters and data.activations * 8 == base.activations
  mesh = _estimate(num_devices=8, mode="mesh", mesh_fsdp=2, mesh_tensor=2)
  assert mesh.parameters * 4 == base.parameters and mesh.logits * 8 == base.logits


def test_available_bytes_shares_the_machine():
  device = jax.local_devices()[0]
  assert 2**24 < hardware.available_bytes(device) < 2**50
  reporting = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 16 * 2**30})
  assert hardware.available_bytes(reporting) == 16 * 2**30
