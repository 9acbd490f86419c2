"""What a run costs and what the machine can give: FLOPs, peaks, bytes. Analytic, before compiling.

Model FLOPs utilisation (MFU) = tokens per second * `flops_per_token` / `peak_flops_per_second`.
"""

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gptjax import tree
from gptjax.batch import Batch
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import row_mixer, run_layers
from gptjax.model.parameters import decoder_specs
from gptjax.train.config import OptimizerConfig, TrainConfig
from gptjax.train.optimizer import HIDDEN_PATTERN

PROBE_SECONDS = 0.4
PROBE_SIZES = (512, 1024, 2048)

# Dense peaks of one jax device in TFLOP/s: (bfloat16, float32 at jax's default precision). The
# first whose words occur in device_kind wins. A TPU multiplies float32 in one bfloat16 pass by
# default, Ampere and newer GPUs in TF32; V100 and T4 have float16 tensor cores only, which neither
# type can use. A jax device is one core (half a chip) on TPU v2, v3 and 7x, else a whole chip.
# Sources: cloud.google.com/tpu/docs/system-architecture, NVIDIA's data sheets and GA102 and AD102
# whitepapers, without sparsity, with float32 accumulation.
_PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
  ("TPU v2", 22.5, 22.5),
  ("TPU v3", 61.5, 61.5),
  ("TPU v4 lite", 137.0, 137.0),
  ("TPU v4", 275.0, 275.0),
  ("TPU v5 lite", 197.0, 197.0),
  ("TPU v5e", 197.0, 197.0),
  ("TPU v5p", 459.0, 459.0),
  ("TPU v5", 459.0, 459.0),
  ("TPU v6 lite", 918.0, 918.0),
  ("TPU v6e", 918.0, 918.0),
  ("TPU7x", 1153.5, 1153.5),
  ("GB200", 2500.0, 1250.0),
  ("B200", 2250.0, 1125.0),
  ("GH200", 989.4, 494.7),
  ("H200", 989.4, 494.7),
  ("H100 NVL", 835.5, 417.5),
  ("H100 PCIe", 756.5, 378.0),
  ("H100", 989.4, 494.7),
  ("A100", 312.0, 156.0),
  ("V100", 15.7, 15.7),
  ("L4", 121.0, 60.0),
  ("T4", 8.1, 8.1),
  ("RTX 4090", 165.2, 82.6),
  ("RTX 3090", 71.0, 35.6),
)


@dataclasses.dataclass(frozen=True)
class Peak:
  """The fastest the devices of a run can multiply matrices.

  Attributes:
    flops_per_second: all devices together; None is unknown.
    source: where the figure is from, for people.
  """

  flops_per_second: float | None
  source: str


def flops_per_token(config: ModelConfig, row_tokens: int | None = None) -> float:
  """Counts the floating-point operations that training on one token needs.

  6 N_matmul + 12 * sum over layers of (attended positions * H * K): a multiply and an add for each
  weight and for each entry of both attention products, forward once and backward twice.

  Args:
    config: the architecture; the true vocabulary counts, padding does not.
    row_tokens: L, tokens of a row; None is the context length.

  Returns:
    Operations a token. N_matmul holds the kernels and the head, tied or not; embedding lookups,
    norms, biases and softmax are not counted, nor is what remat computes again. Attention counts
    the whole row: causality is NOT halved, as in PaLM and nanoGPT. Local layers count their window.

  Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1; the attention term and its convention
    from Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B.
  """
  row_tokens = row_tokens or config.context_length
  D, A, F = config.model_dim, config.attention_dim, config.ffw_width
  matmul_weights = config.num_layers * (4 * D * A + 2 * D * F) + D * config.vocab_size
  kinds = config.attention_pattern * (config.num_layers // len(config.attention_pattern))
  window = min(config.window_size, row_tokens)
  attended = sum(window if kind == "local" else row_tokens for kind in kinds)
  return 6.0 * matmul_weights + 12.0 * attended * A


def peak_flops_per_second(
  devices: Sequence[jax.Device], compute_dtype: str, of_one_device: float | None = None
) -> Peak:
  """Finds the matrix-multiply peak of all devices together.

  Args:
    devices: of the whole run, all of one kind.
    compute_dtype: "float32" or "bfloat16".
    of_one_device: the user's own figure (train.peak_flops_per_second).

  Returns:
    On CPU the roof measured by `measure_matmul_roof`, once for each process, since the host devices
    of a process share its cores. Elsewhere the data sheet's figure times the number of devices;
    None for a device that the table does not know.
  """
  kind, count = devices[0].device_kind, len(devices)
  if of_one_device is not None:
    return Peak(of_one_device * count, "train.peak_flops_per_second")
  if devices[0].platform == "cpu":
    num_processes = len({device.process_index for device in devices})
    return Peak(measure_matmul_roof(compute_dtype) * num_processes, "measured matrix product")
  for name, bfloat16_tflops, float32_tflops in _PEAK_TFLOPS:
    if re.search(rf"\b{name}\b", kind, re.IGNORECASE):
      tflops = bfloat16_tflops if compute_dtype == "bfloat16" else float32_tflops
      return Peak(tflops * 1e12 * count, f"data sheet of {name}, {compute_dtype}")
  return Peak(None, f'unknown device "{kind}"; set train.peak_flops_per_second to see the MFU')


@functools.cache
def measure_matmul_roof(compute_dtype: str = "float32") -> float:
  """Measures the fastest square matrix product of this host, in FLOP/s.

  The best of several sizes and repetitions, in about half a second. One jax device runs it: on CPU
  its product uses the thread pool, that is all cores, which all host devices share; so the figure
  is the same whether one or eight are shown.
  """
  device = jax.local_devices()[0]
  product = jax.jit(lambda a, b: a @ b)
  deadline = time.perf_counter() + PROBE_SECONDS
  best = 0.0
  for size in PROBE_SIZES:
    matrix = jax.device_put(jnp.ones((size, size), compute_dtype), device)
    flops = 2.0 * size**3
    # The first call compiles; a size that would not fit the time left is not begun.
    if best and 3 * flops / best > deadline - time.perf_counter():
      break
    product(matrix, matrix).block_until_ready()
    for _ in range(10):
      start = time.perf_counter()
      product(matrix, matrix).block_until_ready()
      end = time.perf_counter()
      best = max(best, flops / (end - start))
      if end > deadline:
        return best
  return best


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
  """Bytes that a training step needs on one device.

  Attributes:
    parameters: float32 weights, vocabulary padding included.
    optimizer_state: moments, and the average of the parameters where one is kept.
    gradients: float32; twice under accumulation: the sum and the micro-batch's own.
    activations: what the backward pass keeps of the layers.
    logits: float32 logits and their gradient, of a chunk or of the whole micro-batch.
  """

  parameters: int
  optimizer_state: int
  gradients: int
  activations: int
  logits: int

  @property
  def total(self) -> int:
    """All of it, in bytes."""
    return sum(dataclasses.astuple(self))


def memory_estimate(
  specs: tree.PyTree,
  model: ModelConfig,
  optimizer: OptimizerConfig,
  train: TrainConfig,
  *,
  num_devices: int,
  row_tokens: int | None = None,
) -> MemoryEstimate:
  """Estimates the memory of a training step before anything is compiled.

  Args:
    specs: of all parameters, in ParameterSpecs.
    model, optimizer, train: the run.
    num_devices: of the whole run.
    row_tokens: L; None is the context length.

  Returns:
    Bytes on each device, of the arrays that jax keeps; XLA fuses some away and copies others. In
    float32 on CPU it lies within a factor of 1.5 of XLA's own figure (tests/test_hardware.py),
    except that XLA on CPU undoes remat in unrolled layers.
  """
  data, fsdp, tensor = _mesh_sizes(train, num_devices)
  row_tokens = row_tokens or model.context_length
  rows = math.ceil(train.batch_rows / (data * fsdp * train.accumulation))
  num_parameters = _count(specs) / (fsdp * tensor)
  trained, _ = tree.split_named(specs, optimizer.frozen_pattern)
  num_trained = _count(trained) / (fsdp * tensor)
  hidden = _count(tree.split_named(trained, HIDDEN_PATTERN)[1]) / (fsdp * tensor)
  moments = 2 * num_trained - (hidden if optimizer.name == "muon" else 0)
  average = num_parameters if optimizer.ema_decay else 0
  tokens = rows * row_tokens
  chunk = min(train.loss_chunk_tokens or tokens, tokens)
  return MemoryEstimate(
    parameters=round(4 * num_parameters),
    optimizer_state=round(4 * (moments + average)),
    gradients=round(4 * num_trained * (2 if train.accumulation > 1 else 1)),
    activations=round(rows * _activation_bytes(model, row_tokens) / tensor),
    logits=round(2 * 4 * chunk * model.padded_vocab_size / tensor),
  )


def _count(specs: tree.PyTree) -> int:
  return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))


def available_bytes(device: jax.Device) -> int:
  """Returns the memory of one device; on CPU its share of the machine's."""
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _mesh_sizes(train: TrainConfig, num_devices: int) -> tuple[int, int, int]:
  if train.mode == "pmap":
    return num_devices, 1, 1
  sizes = (train.mesh_data, train.mesh_fsdp, train.mesh_tensor)
  left = num_devices // math.prod(size for size in sizes if size > 0)
  data, fsdp, tensor = (size if size > 0 else max(left, 1) for size in sizes)
  return data, fsdp, tensor


def _activation_bytes(model: ModelConfig, row_tokens: int) -> float:
  """Bytes a row: what every layer keeps; under remat also one period of layers computed again."""
  num_periods = model.num_layers / len(model.attention_pattern)
  kept = num_periods * _residual_bytes(model, row_tokens)
  if model.remat == "none":
    return kept
  return kept + _residual_bytes(dataclasses.replace(model, remat="none"), row_tokens)


def _residual_bytes(model: ModelConfig, row_tokens: int) -> int:
  """Bytes a row that jax keeps of one period of layers, by tracing it, without compiling."""
  layers = dataclasses.replace(model, num_layers=len(model.attention_pattern), scan_layers=False)
  params = jax.tree.map(
    lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), decoder_specs(layers)["layers"]
  )
  rates = (model.attention_dropout, model.residual_dropout)

  def residuals(params, x_TD):
    key = jax.random.key(0) if any(rates) else None
    tokens_BL = jnp.zeros((x_TD.shape[0] // row_tokens, row_tokens), jnp.int32)
    mix = row_mixer(Batch(tokens_BL, tokens_BL, None), layers, key)
    return jax.vjp(lambda p, x: run_layers(p, x, layers, mix, key), params, x_TD)[1]

  def count(rows):
    x_TD = jax.ShapeDtypeStruct((rows * row_tokens, model.model_dim), model.compute_dtype)
    leaves = jax.tree.leaves(jax.eval_shape(residuals, params, x_TD))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

  # The difference of two and one rows leaves out kernels and masks, which every row shares.
  return count(2) - count(1)
