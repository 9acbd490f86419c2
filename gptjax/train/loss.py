"""Next-token cross-entropy in float32, at once or over chunks of tokens.

Both functions return `(total, sums)`. `total` is the scalar to differentiate, a sum over tokens,
`loss_sum + z_loss * z_sum`. `sums` is {name: (sum, weight)} to report, and carries no gradient:

  "loss": sum of weight * -log p(target), in nats, and the sum of the weights.
  "z_loss": sum of weight * log(normaliser)^2, before its coefficient, and the sum of the weights.

Sums and gradients are divided by the weight once, after all micro-batches and devices were added.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Sums = dict[str, tuple[jax.Array, jax.Array]]


def next_token_loss(
  logits_TV: jax.Array,
  targets_T: jax.Array,
  weights_T: jax.Array,
  *,
  vocab_size: int,
  z_loss: jax.Array | float = 0.0,
) -> tuple[jax.Array, Sums]:
  """Sums the weighted next-token cross-entropy of logits.

  Args:
    logits_TV: unnormalised, any float dtype; V may be padded beyond `vocab_size`. T stands for
      any leading dimensions.
    targets_T: int32 in [0, vocab_size). Values where the weight is 0 are ignored.
    weights_T: float32 >= 0; 0 marks padding and prompt positions. A constant: no gradient.
    vocab_size: true vocabulary; columns beyond it have probability 0 and gradient 0.
    z_loss: coefficient of the squared log normaliser, may be traced. A constant: no gradient.

  Returns:
    (total, sums), see the module.

  Source: the z-loss is that of Chowdhery et al. 2022 (PaLM), section 5.
  """
  weights_T, z_loss = lax.stop_gradient((weights_T, z_loss))
  logits_TV = _mask_padding(logits_TV, vocab_size)
  log_normalizer_T = jax.nn.logsumexp(logits_TV, axis=-1)
  return _weigh(logits_TV, log_normalizer_T, targets_T, weights_T, z_loss)


def chunked_next_token_loss(
  hidden_TD: jax.Array,
  kernel_VD: jax.Array,
  bias_V: jax.Array | None,
  targets_T: jax.Array,
  weights_T: jax.Array,
  *,
  vocab_size: int,
  z_loss: jax.Array | float = 0.0,
  chunk_tokens: int = 0,
) -> tuple[jax.Array, Sums]:
  """Sums the next-token cross-entropy of an output head, a chunk of tokens at a time.

  The gradients with respect to hidden_TD, kernel and bias_V are formed while a chunk's logits are
  at hand, so that the logits of a whole batch never exist and the backward pass computes no
  product. Without differentiation only the sums are computed. Equal to `next_token_loss` of the
  head's logits.

  Args:
    hidden_TD: float32 or bfloat16. Products take this dtype and accumulate in float32.
    kernel_VD: float32 (the token embedding where tied); V may be padded.
    bias_V: float32, or None.
    targets_T, weights_T, vocab_size, z_loss: as of `next_token_loss`.
    chunk_tokens: most tokens in a chunk; T need not be a multiple. 0 is one chunk.

  Returns:
    (total, sums), see the module.
  """
  num_tokens = hidden_TD.shape[0]
  num_chunks = -(-num_tokens // chunk_tokens) if chunk_tokens else 1
  head = (kernel_VD, bias_V)
  z_loss = jnp.asarray(z_loss, jnp.float32)
  return _head_loss(hidden_TD, head, targets_T, weights_T, z_loss, vocab_size, num_chunks)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _head_loss(hidden_TD, head, targets_T, weights_T, z_loss, vocab_size, num_chunks):
  """Computes (total, sums) alone."""

  def chunk_sums(sums, chunk):
    hidden_TD, targets_T, weights_T = chunk
    logits_TV = _head_logits(hidden_TD, head)
    new_sums = next_token_loss(
      logits_TV, targets_T, weights_T, vocab_size=vocab_size, z_loss=z_loss
    )
    return jax.tree.map(jnp.add, sums, new_sums), None

  chunks = _split((hidden_TD, targets_T, weights_T), num_chunks)
  sums, _ = lax.scan(chunk_sums, _zero_sums(), chunks)
  return sums


def _head_loss_forward(hidden_TD, head, targets_T, weights_T, z_loss, vocab_size, num_chunks):
  """Computes (total, sums) and the gradient of total."""

  def chunk_gradients(carry, chunk):
    hidden_TD, targets_T, weights_T = chunk
    logits_TV = _mask_padding(_head_logits(hidden_TD, head), vocab_size)
    # As jax.nn.softmax and logsumexp, but with one exponential for both.
    peak_T = jnp.max(logits_TV, axis=-1)
    exp_TV = jnp.exp(logits_TV - peak_T[:, None])
    normalizer_T = jnp.sum(exp_TV, axis=-1)
    log_normalizer_T = peak_T + jnp.log(normalizer_T)
    sums = _weigh(logits_TV, log_normalizer_T, targets_T, weights_T, z_loss)
    slope_T = (1 + 2 * z_loss * log_normalizer_T) / normalizer_T
    d_logits_TV = slope_T[:, None] * exp_TV - _is_target(targets_T, logits_TV)
    d_logits_TV = weights_T[:, None] * d_logits_TV
    d_hidden_TD, d_head = _head_gradients(hidden_TD, head, d_logits_TV)
    return jax.tree.map(jnp.add, carry, (sums, d_head)), d_hidden_TD

  chunks = _split((hidden_TD, targets_T, weights_T), num_chunks)
  start = (_zero_sums(), jax.tree.map(jnp.zeros_like, head))
  (sums, d_head), d_hidden = lax.scan(chunk_gradients, start, chunks)
  d_hidden_TD = _join(d_hidden, hidden_TD.shape[0])
  return sums, (d_hidden_TD, d_head, weights_T)


def _head_loss_backward(vocab_size, num_chunks, residuals, cotangents):
  """Scales the gradient of total; the sums carry none."""
  del vocab_size, num_chunks
  d_hidden_TD, d_head, weights_T = residuals
  d_total, _ = cotangents
  d_hidden_TD, d_head = jax.tree.map(
    lambda gradient: (d_total * gradient).astype(gradient.dtype), (d_hidden_TD, d_head)
  )
  return d_hidden_TD, d_head, None, jnp.zeros_like(weights_T), jnp.zeros_like(d_total)


_head_loss.defvjp(_head_loss_forward, _head_loss_backward)


def _weigh(logits_TV, log_normalizer_T, targets_T, weights_T, z_loss) -> tuple[jax.Array, Sums]:
  """Computes (total, sums) from logits and their log normaliser."""
  is_target_TV = _is_target(targets_T, logits_TV)
  target_logits_T = jnp.sum(jnp.where(is_target_TV, logits_TV, 0), axis=-1)
  weight_sum = jnp.sum(weights_T)
  loss_sum = jnp.sum(weights_T * (log_normalizer_T - target_logits_T))
  z_sum = jnp.sum(weights_T * log_normalizer_T**2)
  sums = {"loss": (loss_sum, weight_sum), "z_loss": (z_sum, weight_sum)}
  return loss_sum + z_loss * z_sum, lax.stop_gradient(sums)


def _zero_sums() -> tuple[jax.Array, Sums]:
  zero = jnp.float32(0)
  return zero, {"loss": (zero, zero), "z_loss": (zero, zero)}


def _is_target(targets_T, logits_TV):
  """Marks each row's target; compared rather than gathered, which fuses with what follows."""
  return _columns(logits_TV) == targets_T[..., None]


def _mask_padding(logits_TV, vocab_size):
  """Casts logits to float32 and gives padded columns probability 0."""
  logits_TV = logits_TV.astype(jnp.float32)
  if logits_TV.shape[-1] == vocab_size:
    return logits_TV
  # Finite, since an ignored target may be a padded column and 0 * inf is not 0.
  return jnp.where(_columns(logits_TV) < vocab_size, logits_TV, jnp.finfo(jnp.float32).min)


def _columns(logits_TV):
  return lax.broadcasted_iota(jnp.int32, logits_TV.shape, logits_TV.ndim - 1)


def _head_logits(hidden_TD, head):
  kernel_VD, bias_V = head
  logits_TV = _contract(hidden_TD, kernel_VD.astype(hidden_TD.dtype), 1, 1)
  return logits_TV if bias_V is None else logits_TV + bias_V[None]


def _head_gradients(hidden_TD, head, d_logits_TV):
  """Computes the gradients of hidden_TD and of the head from those of the logits."""
  kernel_VD, bias_V = head
  d_bias_V = None if bias_V is None else jnp.sum(d_logits_TV, axis=0)
  d_logits_TV = d_logits_TV.astype(hidden_TD.dtype)
  d_hidden_TD = _contract(d_logits_TV, kernel_VD.astype(hidden_TD.dtype), 1, 0)
  return d_hidden_TD.astype(hidden_TD.dtype), (_contract(d_logits_TV, hidden_TD, 0, 0), d_bias_V)


def _contract(left, right, left_axis, right_axis):
  """Multiplies two matrices over the given axes, accumulating in float32."""
  dims = (((left_axis,), (right_axis,)), ((), ()))
  return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _split(arrays, num_chunks):
  """Cuts the leading axis into [num_chunks, chunk, ...], padded with zeros (weight 0).

  Chunk i takes tokens i, i + num_chunks, ...: where tokens are sharded, every device has its share
  of every chunk.
  """

  def split(array):
    padding = [(0, -array.shape[0] % num_chunks)] + [(0, 0)] * (array.ndim - 1)
    padded = jnp.pad(array, padding)
    return padded.reshape(-1, num_chunks, *array.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, arrays)


def _join(chunks, num_tokens):
  """Undoes `_split` of one array."""
  return chunks.swapaxes(0, 1).reshape(-1, *chunks.shape[2:])[:num_tokens]
