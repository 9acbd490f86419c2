"""Attention: what may be seen, and one function that picks the kernel.

cuDNN on GPU, the Pallas splash kernel on TPU, XLA elsewhere and wherever the kernels do not
apply (dropout on the weights, odd lengths). All of them agree; the tests run Pallas interpreted.
"""

import functools

import jax
import jax.numpy as jnp

from gptjax.errors import ConfigError
from gptjax.model.config import ModelConfig
from gptjax.parallel import per_device

MASKED = -1e30  # finite: a row that sees nothing must not become NaN
SMALLEST_QUERY_BLOCK = 64
MOST_QUERY_BLOCKS = 4  # more save little and compile longer


def causal_mask(
  queries: range, keys: range, window: int | None, segment_ids_BL: jax.Array | None = None
) -> jax.Array:
  """Returns who sees whom within rows: bool [1 or B, 1, len(queries), len(keys)].

  Args:
    queries, keys: places in the row; causality goes by them.
    window: a query sees itself and the window - 1 tokens before; None sees all before.
    segment_ids_BL: of whole rows; tokens see only their own segment. None is one segment a row.
  """
  distance_LM = (
    jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)[None, :]
  )
  mask_11LM = (distance_LM >= 0)[None, None]
  if window is not None:
    mask_11LM &= (distance_LM < window)[None, None]
  if segment_ids_BL is None:
    return mask_11LM
  query_ids_BL = segment_ids_BL[:, queries.start : queries.stop]
  key_ids_BM = segment_ids_BL[:, keys.start : keys.stop]
  return mask_11LM & (query_ids_BL[:, None, :, None] == key_ids_BM[:, None, None, :])


def causal_attention(
  query_BLHK: jax.Array,
  key_BLHK: jax.Array,
  value_BLHK: jax.Array,
  *,
  scale: float | jax.Array,
  window: int | None = None,
  segment_ids_BL: jax.Array | None = None,
  dropout_rate: float = 0.0,
  key: jax.Array | None = None,
) -> jax.Array:
  """Attends within rows in plain XLA, a block of queries at a time.

  A block computes no scores with the keys after it, nor with those before its window: half of the
  products, and on two cores a third of the time of the whole square at 256 tokens.
  Arguments and result are those of `self_attention` and `masked_attention`.
  """
  length = query_BLHK.shape[1]
  block = max(SMALLEST_QUERY_BLOCK, -(-length // MOST_QUERY_BLOCKS))
  mixed = []
  for start in range(0, length, block):
    queries = range(start, min(start + block, length))
    keys = range(0 if window is None else max(0, start - window + 1), queries.stop)
    seen = slice(keys.start, keys.stop)
    mixed.append(
      masked_attention(
        query_BLHK[:, queries.start : queries.stop],
        key_BLHK[:, seen],
        value_BLHK[:, seen],
        causal_mask(queries, keys, window, segment_ids_BL),
        scale,
        dropout_rate,
        None if key is None else jax.random.fold_in(key, start),
      )
    )
  return mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, axis=1)


def masked_attention(
  query_BLHK: jax.Array,
  key_BMHK: jax.Array,
  value_BMHK: jax.Array,
  mask: jax.Array,
  scale: float | jax.Array,
  dropout_rate: float = 0.0,
  key: jax.Array | None = None,
) -> jax.Array:
  """Scaled dot-product attention in plain XLA; scores and softmax in float32.

  Args:
    query_BLHK, key_BMHK, value_BMHK: compute dtype.
    mask: bool, broadcastable to [B, H, L, M]; True is seen.
    scale: scores are multiplied by it.
    dropout_rate, key: dropout on the weights; no key, no dropout.

  Returns:
    [B, L, H, K] in the dtype of value. Source: Vaswani et al. 2017, section 3.2.1.
  """
  # Heads first, once: XLA on CPU multiplies contiguous matrices only.
  query_BHLK, key_BHMK, value_BHMK = (
    jnp.swapaxes(x, 1, 2) for x in (query_BLHK * scale, key_BMHK, value_BMHK)
  )
  scores_BHLM = jnp.einsum(
    "bhlk,bhmk->bhlm", query_BHLK, key_BHMK, preferred_element_type=jnp.float32
  )
  weights_BHLM = jax.nn.softmax(jnp.where(mask, scores_BHLM, MASKED), axis=-1)
  weights_BHLM = dropout(weights_BHLM, dropout_rate, key).astype(value_BMHK.dtype)
  return jnp.swapaxes(jnp.einsum("bhlm,bhmk->bhlk", weights_BHLM, value_BHMK), 1, 2)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes entries at `rate` and rescales the rest; the identity without a key or a rate."""
  if key is None or not rate:
    return x
  kept = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def self_attention(
  query_BLHK: jax.Array,
  key_BLHK: jax.Array,
  value_BLHK: jax.Array,
  config: ModelConfig,
  *,
  scale: float | jax.Array,
  window: int | None = None,
  segment_ids_BL: jax.Array | None = None,
  key: jax.Array | None = None,
) -> jax.Array:
  """Attends causally within each row, by the kernel that config and backend choose.

  Returns:
    [B, L, H, K] in the compute dtype.
  """
  length = query_BLHK.shape[1]
  has_dropout = key is not None and config.attention_dropout > 0
  kernel = choose_kernel(config, length, query_BLHK.dtype, has_dropout, jax.default_backend())
  if kernel == "xla":
    return causal_attention(
      query_BLHK,
      key_BLHK,
      value_BLHK,
      scale=scale,
      window=window,
      segment_ids_BL=segment_ids_BL,
      dropout_rate=config.attention_dropout,
      key=key,
    )
  run = {"cudnn": _cudnn_attention, "pallas": _splash_attention}[kernel]
  heads, ids = ("rows", None, "heads", None), () if segment_ids_BL is None else ("rows", None)
  run = per_device(functools.partial(run, window=window), (heads, heads, heads, ids), heads)
  # The kernels take a static scale or none, and ours may depend on the scanned layer.
  return run(query_BLHK * scale, key_BLHK, value_BLHK, segment_ids_BL)


def choose_kernel(
  config: ModelConfig, length: int, dtype: jnp.dtype, has_dropout: bool, backend: str
) -> str:
  """Names the kernel for one shape: what config asks for, or under "auto" the backend's own.

  Under "auto" XLA takes over wherever the backend's kernel does not apply.

  Raises:
    ConfigError: the kernel that config asks for cannot run here.
  """
  asked = config.attention_implementation
  kernel = {"gpu": "cudnn", "tpu": "pallas"}.get(backend, "xla") if asked == "auto" else asked
  lacking = _lacking(kernel, config, length, dtype, has_dropout, backend)
  if lacking and asked != "auto":
    raise ConfigError(
      f'model.attention_implementation is "{asked}", which needs {lacking};'
      ' change that or set it to "auto"'
    )
  return "xla" if lacking else kernel


def _lacking(kernel, config, length, dtype, has_dropout, backend) -> str | None:
  """Says the first thing that a kernel needs and does not have."""
  K = config.head_width
  no_dropout = (not has_dropout, f"model.attention_dropout 0, not {config.attention_dropout}")
  needs = {
    "xla": [],
    "cudnn": [
      (backend == "gpu", f'a GPU, not "{backend}"'),
      (dtype in (jnp.bfloat16, jnp.float16), f'model.compute_dtype "bfloat16", not "{dtype}"'),
      (K % 8 == 0 and K <= 128, f"heads of a multiple of 8 up to 128, not {K}"),
      (length % 2 == 0, f"rows of an even length, not {length}"),
      no_dropout,
    ],
    # Interpreted on CPU, for tests.
    "pallas": [
      (backend in ("tpu", "cpu"), f'a TPU, not "{backend}"'),
      (length % 128 == 0, f"rows of a multiple of 128 tokens, not {length}"),
      no_dropout,
    ],
  }
  return next((need for is_met, need in needs[kernel] if not is_met), None)


def _cudnn_attention(query_BLHK, key_BLHK, value_BLHK, segment_ids_BL, window):
  """Runs the GPU kernel; causality and windows skip work, only segments need a mask."""
  is_same_segment = None
  if segment_ids_BL is not None:
    is_same_segment = segment_ids_BL[:, None, :, None] == segment_ids_BL[:, None, None, :]
  return jax.nn.dot_product_attention(
    query_BLHK,
    key_BLHK,
    value_BLHK,
    mask=is_same_segment,
    scale=1.0,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn",
  )


def _splash_attention(query_BLHK, key_BLHK, value_BLHK, segment_ids_BL, window):
  """Runs the TPU kernel a row at a time; elsewhere interpreted, for tests."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  _, length, num_heads, _ = query_BLHK.shape
  kernel = _splash_kernel(num_heads, length, window, jax.default_backend() != "tpu")
  # The kernel wants heads first.
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query_BLHK, key_BLHK, value_BLHK))
  if segment_ids_BL is None:
    out_BHLK = jax.vmap(lambda q, k, v: kernel(q, k, v))(query, key, value)
  else:
    ids = splash.SegmentIds(q=segment_ids_BL, kv=segment_ids_BL)
    out_BHLK = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=s))(query, key, value, ids)
  return jnp.swapaxes(out_BHLK, 1, 2).astype(value_BLHK.dtype)


@functools.cache
def _splash_kernel(num_heads: int, length: int, window: int | None, interpret: bool):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  shape = (length, length)
  mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
  block = next(size for size in (512, 384, 256, 128) if length % size == 0)
  sizes = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  # The mask tables are built from concrete NumPy data even when the caller is being traced.
  with jax.ensure_compile_time_eval():
    return splash.make_splash_mha_single_device(
      splash.MultiHeadMask([mask] * num_heads), block_sizes=sizes, interpret=interpret
    )
