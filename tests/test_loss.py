"""Cross-entropy against float64 formulas, chunked against plain, and its memory."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.train.loss import chunked_next_token_loss, next_token_loss

NUM_TOKENS, MODEL_DIM, VOCAB, PADDED = 37, 16, 40, 48
Z_LOSS = 0.03
# float32 sums of some 40 terms; the float64 reference is exact beside it.
TOLERANCE = 1e-6


def make_inputs(dtype=jnp.float32, num_tokens=NUM_TOKENS):
  keys = jax.random.split(jax.random.key(0), 5)
  hidden_TD = jax.random.normal(keys[0], (num_tokens, MODEL_DIM)).astype(dtype)
  kernel_VD = 0.5 * jax.random.normal(keys[1], (PADDED, MODEL_DIM))
  bias_V = jax.random.normal(keys[2], (PADDED,))
  targets_T = jax.random.randint(keys[3], (num_tokens,), 0, VOCAB)
  weights_T = jax.random.uniform(keys[4], (num_tokens,)).at[::5].set(0)
  return hidden_TD, kernel_VD, bias_V, targets_T, weights_T


def reference(hidden_TD, kernel_VD, bias_V, targets_T, weights_T, z_loss=Z_LOSS):
  """Sums and gradients in float64, by the formulas."""
  hidden_TD, kernel_VD, bias_V, weights_T = (
    np.asarray(array, np.float64) for array in (hidden_TD, kernel_VD, bias_V, weights_T)
  )
  kernel_VD, bias_V = kernel_VD[:VOCAB], bias_V[:VOCAB]
  logits_TV = hidden_TD @ kernel_VD.T + bias_V[None]
  log_normalizer_T = np.log(np.exp(logits_TV).sum(-1))
  rows_T = np.arange(len(targets_T))
  loss = (weights_T * (log_normalizer_T - logits_TV[rows_T, targets_T])).sum()
  z = (weights_T * log_normalizer_T**2).sum()
  d_logits_TV = np.exp(logits_TV - log_normalizer_T[:, None])
  d_logits_TV *= (1 + 2 * z_loss * log_normalizer_T)[:, None]
  d_logits_TV[rows_T, targets_T] -= 1
  d_logits_TV *= weights_T[:, None]
  padding = PADDED - VOCAB
  gradients = (
    d_logits_TV @ kernel_VD,
    np.pad(d_logits_TV.T @ hidden_TD, ((0, padding), (0, 0))),
    np.pad(d_logits_TV.sum(0), (0, padding)),
  )
  return loss, z, gradients


def plain(hidden_TD, kernel_VD, bias_V, targets_T, weights_T, *, z_loss=Z_LOSS):
  """The head's logits at once, differentiated by jax."""
  logits_TV = jnp.dot(
    hidden_TD, kernel_VD.T.astype(hidden_TD.dtype), preferred_element_type=jnp.float32
  )
  if bias_V is not None:
    logits_TV += bias_V[None]
  return next_token_loss(logits_TV, targets_T, weights_T, vocab_size=VOCAB, z_loss=z_loss)


def chunked(*inputs, z_loss=Z_LOSS, chunk_tokens=0):
  return chunked_next_token_loss(
    *inputs, vocab_size=VOCAB, z_loss=z_loss, chunk_tokens=chunk_tokens
  )


in_chunks_of_10 = partial(chunked, chunk_tokens=10)


@cache
def differentiated(function, argnums, **options):
  return jax.jit(jax.value_and_grad(partial(function, **options), argnums, has_aux=True))


def value_and_gradients(function, inputs, **options):
  argnums = (0, 1) if inputs[2] is None else (0, 1, 2)
  return differentiated(function, argnums, **options)(*inputs)


def relative_error(got, expected):
  """Norm of the difference over the norm of what was expected."""
  got, expected = (np.asarray(array, np.float64) for array in (got, expected))
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def assert_near(got, expected, tolerance=TOLERANCE):
  errors = jax.tree.map(relative_error, got, expected)
  assert max(jax.tree.leaves(errors)) < tolerance, errors


@pytest.mark.parametrize("function", [plain, chunked, in_chunks_of_10])
def test_sums_and_gradients_are_those_of_the_formulas(function):
  inputs = make_inputs()
  loss, z, gradients = reference(*inputs)
  (total, sums), got = value_and_gradients(function, inputs)
  weight = np.asarray(inputs[4], np.float64).sum()
  assert_near(sums, {"loss": (loss, weight), "z_loss": (z, weight)})
  assert_near(total, loss + Z_LOSS * z)
  assert_near(got, gradients)


@pytest.mark.parametrize("which", range(5))
def test_a_perturbed_input_is_noticed(which):
  inputs = list(make_inputs())
  _, _, expected = reference(*inputs)
  change = 1 if which == 3 else 1e-4
  inputs[which] = inputs[which].at[1].add(change)
  _, got = value_and_gradients(in_chunks_of_10, inputs)
  with pytest.raises(AssertionError):
    assert_near(got, expected)


@pytest.mark.parametrize(
  "has_bias, chunk_tokens",
  [(False, 0), (True, 8), (True, 100), (False, 1)],
)
def test_chunked_is_plain(has_bias, chunk_tokens):
  hidden_TD, kernel_VD, bias_V, *rest = make_inputs()
  inputs = (hidden_TD, kernel_VD, bias_V if has_bias else None, *rest)
  expected = value_and_gradients(plain, inputs)
  got = value_and_gradients(chunked, inputs, chunk_tokens=chunk_tokens)
  assert_near(got, expected)
  only_value = jax.jit(partial(chunked, chunk_tokens=chunk_tokens))(*inputs)
  assert_near(only_value, expected[0])


def test_bfloat16_accumulates_in_float32():
  inputs = make_inputs(jnp.bfloat16, num_tokens=512)
  exact = [inputs[0], inputs[1].astype(jnp.bfloat16), *inputs[2:]]
  loss, _, (d_hidden, d_kernel, d_bias) = reference(*exact)
  for chunk_tokens in (0, 16):
    (_, sums), got = value_and_gradients(chunked, inputs, chunk_tokens=chunk_tokens)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    # The sums and the bias see no rounding after the exact products of bfloat16 inputs.
    assert_near((sums["loss"][0], got[2]), (loss, d_bias), 5e-6)
    # Logit gradients are rounded once to bfloat16 (8 bits, 2**-9 = 2e-3), then summed exactly:
    # accumulating 32 chunks in bfloat16 would lose ten times as much.
    assert_near((got[0], got[1]), (d_hidden, d_kernel), 3e-3)


@pytest.mark.parametrize("function", [plain, in_chunks_of_10])
def test_padded_columns_and_ignored_targets_change_nothing(function):
  hidden_TD, kernel_VD, bias_V, targets_T, weights_T = make_inputs()
  inputs = (hidden_TD, kernel_VD, bias_V, targets_T, weights_T)
  wild_T = jnp.where(weights_T == 0, jnp.resize(jnp.array([-100, 45, 10**6]), 37), targets_T)
  wild = (hidden_TD, kernel_VD.at[VOCAB:].set(50.0), bias_V.at[VOCAB:].set(99.0), wild_T, weights_T)
  expected = value_and_gradients(function, inputs)
  got = value_and_gradients(function, wild)
  np.testing.assert_array_equal(got[0][0], expected[0][0])
  (_, d_kernel, d_bias) = got[1]
  assert not np.any(d_kernel[VOCAB:]) and not np.any(d_bias[VOCAB:])
  assert_near(got[1], expected[1])


@pytest.mark.parametrize("function", [plain, in_chunks_of_10])
def test_sums_weights_and_z_loss_carry_no_gradient(function):
  inputs = make_inputs()

  def reported(hidden_TD, weights_T, z_loss):
    total, sums = function(hidden_TD, *inputs[1:4], weights_T, z_loss=z_loss)
    return total * 0 + sums["loss"][0] + sums["z_loss"][0], total

  gradients = jax.grad(lambda *args: reported(*args)[0], (0,))(inputs[0], inputs[4], Z_LOSS)
  assert not any(np.any(leaf) for leaf in gradients)
  gradients = jax.grad(lambda *args: reported(*args)[1], (0, 1, 2))(inputs[0], inputs[4], Z_LOSS)
  assert np.any(gradients[0]) and not np.any(gradients[1]) and not np.any(gradients[2])


def test_z_loss_is_traced():
  inputs = make_inputs()
  step = jax.jit(jax.grad(lambda hidden_TD, z: chunked(hidden_TD, *inputs[1:], z_loss=z)[0]))
  got = [step(inputs[0], jnp.float32(z_loss)) for z_loss in (0.0, 0.01, 0.5)]
  assert step._cache_size() == 1
  for z_loss, gradient in zip((0.0, 0.01, 0.5), got, strict=True):
    assert_near(gradient, reference(*inputs, z_loss=z_loss)[2][0])


def test_the_gradient_scales_with_what_follows():
  inputs = make_inputs()

  def mean(hidden_TD, function):
    total, sums = function(hidden_TD, *inputs[1:])
    return total / sums["loss"][1]

  expected = jax.grad(mean)(inputs[0], plain)
  assert_near(jax.grad(mean)(inputs[0], in_chunks_of_10), expected)


def test_under_pmap_and_on_a_mesh():
  inputs = make_inputs(num_tokens=64)
  (total, _), expected = value_and_gradients(plain, inputs)
  function = jax.value_and_grad(partial(chunked, chunk_tokens=6), (0, 1, 2), has_aux=True)

  def reduced(*inputs):
    (total, _), (d_hidden, *d_head) = function(*inputs)
    return jax.lax.psum((total, d_head), "data"), d_hidden

  hidden_TD, kernel_VD, bias_V, targets_T, weights_T = inputs
  share = jax.tree.map(lambda x: x.reshape(4, 16, *x.shape[1:]), (hidden_TD, targets_T, weights_T))
  pmapped = jax.pmap(reduced, axis_name="data", in_axes=(0, None, None, 0, 0), out_axes=(None, 0))
  (got_total, d_head), d_hidden = pmapped(share[0], kernel_VD, bias_V, *share[1:])
  got = (d_hidden.reshape(64, -1), *d_head)
  assert_near((got_total, got), (total, expected))

  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  rows, head = P(("data", "fsdp")), P("tensor", "fsdp")
  specs = (rows, head, P("tensor"), rows, rows)
  placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(inputs, specs, strict=True)]
  (got_total, _), got = jax.jit(function)(*placed)
  assert_near((got_total, got), (total, expected))


def test_chunks_keep_the_logits_from_existing():
  num_tokens, vocab, chunk_tokens = 2048, 8192, 128
  hidden_TD = jax.ShapeDtypeStruct((num_tokens, 16), jnp.float32)
  kernel_VD = jax.ShapeDtypeStruct((vocab, 16), jnp.float32)
  targets_T = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
  weights_T = jax.ShapeDtypeStruct((num_tokens,), jnp.float32)

  def temporary_bytes(chunk_tokens, differentiate):
    def total(hidden_TD, kernel_VD, targets_T, weights_T):
      return chunked_next_token_loss(
        hidden_TD, kernel_VD, None, targets_T, weights_T,
        vocab_size=vocab - 7, chunk_tokens=chunk_tokens,
      )[0]  # fmt: skip

    function = jax.value_and_grad(total, (0, 1)) if differentiate else total
    compiled = jax.jit(function).lower(hidden_TD, kernel_VD, targets_T, weights_T).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits_bytes = 4 * num_tokens * vocab
  at_once, in_chunks = (temporary_bytes(chunk, True) for chunk in (0, chunk_tokens))
  print(f"temporary MB: {at_once / 1e6:.1f} at once, {in_chunks / 1e6:.1f} in chunks")
  assert at_once >= logits_bytes
  assert in_chunks < at_once / 4
  # Scoring keeps no gradient: not even the head's.
  assert temporary_bytes(chunk_tokens, False) < in_chunks
