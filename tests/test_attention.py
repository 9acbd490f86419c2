"""The kernels agree, the right one is chosen, and what cannot run is refused in one line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import make_config, relative_error

from gptjax.errors import ConfigError
from gptjax.model.attention import (
  causal_attention,
  causal_mask,
  choose_kernel,
  dropout,
  masked_attention,
  self_attention,
)
from gptjax.parallel import make_parallel

HEAD_WIDTH = 8
SCALE = 0.4
# Both sides are float32 and differ by the order of sums over at most 256 weights.
KERNEL_TOLERANCE = 2e-6


def config_for(implementation, **changes):
  return make_config("gpt2", attention_implementation=implementation, head_dim=8, **changes)


def draw_heads(num_rows, length, num_heads=2, seed=0):
  rng = np.random.default_rng(seed)
  shape = (3, num_rows, length, num_heads, HEAD_WIDTH)
  return tuple(rng.standard_normal(shape).astype(np.float32))


def draw_segments(num_rows, length, num_segments=3, seed=0):
  rng = np.random.default_rng(seed)
  return np.sort(rng.integers(0, num_segments, (num_rows, length))).astype(np.int32)


def attend_with_gradients(query, key, value, segment_ids, *, implementation, window):
  """Returns the output and the gradients of a nonlinear function of it."""

  def attend(query, key, value):
    out = self_attention(
      query,
      key,
      value,
      config_for(implementation),
      scale=SCALE,
      window=window,
      segment_ids_BL=segment_ids,
    )
    return jnp.sin(out).sum(), out

  gradients, out = jax.grad(attend, argnums=(0, 1, 2), has_aux=True)(query, key, value)
  return out, *gradients


slow = functools.partial(pytest.param, marks=pytest.mark.slow)  # a program for each
compute = jax.jit(attend_with_gradients, static_argnames=("implementation", "window"))


def test_the_mask_is_causal_windowed_and_segmented():
  segments = np.array([[1, 1, 1, 2, 2, 0], [1] * 6], np.int32)
  mask = np.asarray(causal_mask(range(6), range(6), 2, segments))
  assert mask.shape == (2, 1, 6, 6)
  for row in range(2):
    for i in range(6):
      for j in range(6):
        seen = i - 1 <= j <= i and segments[row, i] == segments[row, j]
        assert mask[row, 0, i, j] == seen
  assert np.array_equal(causal_mask(range(6), range(6), None)[0, 0], np.tri(6, dtype=bool))
  assert np.array_equal(causal_mask(range(6), range(6), 6), causal_mask(range(6), range(6), None))


def test_a_row_that_sees_nothing_is_finite_with_its_gradient():
  query, key, value = draw_heads(1, 4)
  mask = np.tri(4, dtype=bool)
  mask[1] = False

  def loss(query, key, value):
    return masked_attention(query, key, value, mask[None, None], SCALE).sum()

  for gradient in jax.grad(loss, argnums=(0, 1, 2))(query, key, value):
    assert np.isfinite(gradient).all()


def test_scores_are_float32_when_heads_are_bfloat16():
  """Rounding the scores themselves to 8 bits would cost several per cent here."""
  query, key, value = (x.astype(jnp.bfloat16) for x in draw_heads(2, 16))
  query = query * 8
  mask = causal_mask(range(16), range(16), None)
  got = masked_attention(query, key, value, mask, 1.0)
  assert got.dtype == jnp.bfloat16
  exact = masked_attention(*(x.astype(jnp.float32) for x in (query, key, value)), mask, 1.0)
  # bfloat16 keeps 8 bits: half a unit of rounding is 0.2 %, twice (weights and output).
  assert relative_error(got.astype(jnp.float32), exact) < 5e-3


@pytest.mark.parametrize(
  ("length", "window", "is_packed"),
  [
    slow(128, None, False),
    (128, 40, True),
    slow(128, 200, False),
    slow(256, None, True),
    slow(256, 2, True),
    (256, 40, False),
  ],
)
def test_the_pallas_kernel_equals_xla(length, window, is_packed):
  heads = draw_heads(2, length)
  segments = draw_segments(2, length) if is_packed else None
  got = compute(*heads, segments, implementation="pallas", window=window)
  expected = compute(*heads, segments, implementation="xla", window=window)
  for name, array, wanted in zip(("output", "query", "key", "value"), got, expected):
    assert relative_error(array, wanted) < KERNEL_TOLERANCE, name


def test_the_comparison_of_kernels_notices_windows_and_segments():
  heads = draw_heads(2, 128)
  window = compute(*heads, None, implementation="xla", window=40)
  for changed in (
    compute(*heads, None, implementation="xla", window=41),
    compute(*heads, draw_segments(2, 128), implementation="xla", window=40),
  ):
    assert all(relative_error(*pair) > 1e-2 for pair in zip(changed, window))


@pytest.mark.parametrize(("num_rows", "is_packed"), [slow(8, True), (3, False)])
def test_the_pallas_kernel_runs_on_a_mesh(num_rows, is_packed):
  """Data x tensor: each device gets its rows and heads; 3 rows, which do not divide, go whole."""
  heads = draw_heads(num_rows, 128, num_heads=4)
  segments = draw_segments(num_rows, 128) if is_packed else None
  parallel = make_parallel("mesh", mesh_data=4, mesh_tensor=2)
  split = functools.partial(attend_with_gradients, implementation="pallas", window=40)
  evaluate = parallel.compile_eval(lambda state, batch, *, axis_name: split(*heads, segments))
  got = evaluate({}, {})
  expected = compute(*heads, segments, implementation="xla", window=40)
  for array, wanted in zip(got, expected):
    assert relative_error(array, wanted) < KERNEL_TOLERANCE


@pytest.mark.parametrize(("window", "is_packed"), [(None, False), (2, False), (3, True)])
def test_what_cudnn_is_asked_for_equals_xla(monkeypatch, window, is_packed):
  """No GPU here: jax's own reading of the same arguments stands in for the kernel's."""
  asked = []

  def stand_in(*heads, implementation, **arguments):
    asked.append(implementation)
    return original(*heads, implementation="xla", **arguments)

  original = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  segments = draw_segments(2, 12) if is_packed else None
  heads = draw_heads(2, 12)
  heads_16 = tuple(jnp.asarray(x, jnp.bfloat16) for x in heads)
  got, expected = (
    jax.jit(functools.partial(attend_with_gradients, implementation=implementation, window=window))(
      *heads_16, segments
    )
    for implementation in ("cudnn", "xla")
  )
  assert asked == ["cudnn"]
  for array, wanted in zip(got, expected):
    assert array.dtype == jnp.bfloat16
    # Two roundings to the 8 bits of bfloat16, in another order.
    assert relative_error(array.astype(np.float32), wanted.astype(np.float32)) < 2e-2


@pytest.mark.parametrize(
  ("asked", "length", "dtype", "has_dropout", "backend", "chosen"),
  [
    ("auto", 128, "bfloat16", False, "cpu", "xla"),
    ("auto", 128, "bfloat16", False, "gpu", "cudnn"),
    ("auto", 130, "float16", False, "gpu", "cudnn"),
    ("auto", 131, "bfloat16", False, "gpu", "xla"),
    ("auto", 128, "float32", False, "gpu", "xla"),
    ("auto", 128, "bfloat16", True, "gpu", "xla"),
    ("auto", 128, "float32", False, "tpu", "pallas"),
    ("auto", 384, "bfloat16", False, "tpu", "pallas"),
    ("auto", 100, "bfloat16", False, "tpu", "xla"),
    ("auto", 128, "bfloat16", True, "tpu", "xla"),
    ("xla", 128, "bfloat16", False, "tpu", "xla"),
    ("xla", 128, "bfloat16", True, "gpu", "xla"),
    ("cudnn", 128, "bfloat16", False, "gpu", "cudnn"),
    ("pallas", 256, "float32", False, "tpu", "pallas"),
    ("pallas", 256, "float32", False, "cpu", "pallas"),
  ],
)
def test_kernel_choice(asked, length, dtype, has_dropout, backend, chosen):
  config = config_for(asked, attention_dropout=0.1)
  assert choose_kernel(config, length, jnp.dtype(dtype), has_dropout, backend) == chosen


@pytest.mark.parametrize("head_dim", [6, 136])
def test_heads_that_cudnn_does_not_take_go_to_xla(head_dim):
  config = make_config("gpt2", head_dim=head_dim)
  assert choose_kernel(config, 128, jnp.dtype("bfloat16"), False, "gpu") == "xla"


@pytest.mark.parametrize(
  ("asked", "length", "dtype", "has_dropout", "backend", "complaint"),
  [
    ("cudnn", 128, "bfloat16", False, "cpu", 'needs a GPU, not "cpu"'),
    ("cudnn", 128, "bfloat16", False, "tpu", 'needs a GPU, not "tpu"'),
    ("cudnn", 128, "float32", False, "gpu", 'model.compute_dtype "bfloat16", not "float32"'),
    ("cudnn", 128, "bfloat16", True, "gpu", "model.attention_dropout 0, not 0.1"),
    ("cudnn", 129, "bfloat16", False, "gpu", "even length, not 129"),
    ("pallas", 100, "float32", False, "cpu", "a multiple of 128 tokens, not 100"),
    ("pallas", 128, "float32", False, "gpu", 'needs a TPU, not "gpu"'),
    ("pallas", 128, "float32", True, "tpu", "model.attention_dropout 0, not 0.1"),
  ],
)
def test_a_kernel_that_cannot_run_is_refused(asked, length, dtype, has_dropout, backend, complaint):
  config = config_for(asked, attention_dropout=0.1)
  with pytest.raises(ConfigError, match=complaint) as error:
    choose_kernel(config, length, jnp.dtype(dtype), has_dropout, backend)
  message = str(error.value)
  assert f'model.attention_implementation is "{asked}"' in message
  assert '"auto"' in message
  assert "\n" not in message


@pytest.mark.parametrize(("implementation", "length"), [("cudnn", 128), ("pallas", 100)])
def test_attention_refuses_before_it_computes(implementation, length):
  with pytest.raises(ConfigError, match="attention_implementation"):
    self_attention(*draw_heads(1, length), config_for(implementation), scale=SCALE)


def test_dropout_has_its_rate_and_keeps_the_mean():
  x = np.linspace(1, 2, 200_000, dtype=np.float32).reshape(400, 500)
  dropped = np.asarray(dropout(jnp.asarray(x), 0.3, jax.random.key(0)))
  is_kept = dropped != 0
  # Five standard errors of 200,000 draws.
  error = 5 * np.sqrt(0.3 * 0.7 / x.size)
  assert abs(is_kept.mean() - 0.7) < error
  np.testing.assert_allclose(dropped[is_kept], x[is_kept] / 0.7, rtol=1e-6)
  assert abs(dropped.mean() / x.mean() - 1) < 2 * error


def test_dropout_without_a_key_or_a_rate_is_the_identity():
  x = jnp.arange(10.0)
  assert dropout(x, 0.5, None) is x
  assert dropout(x, 0.0, jax.random.key(0)) is x
  first, second = (dropout(x + 1, 0.5, jax.random.key(0)) for _ in range(2))
  np.testing.assert_array_equal(first, second)


def test_attention_dropout_keeps_the_expectation():
  """Many rows of the same heads: the mean of their outputs is the output without dropout."""
  num_rows, rate = 2000, 0.25
  query, key, value = (np.tile(x, (num_rows, 1, 1, 1)) for x in draw_heads(1, 5))
  config = config_for("auto", attention_dropout=rate)

  @jax.jit
  def attend(key_):
    return self_attention(query, key, value, config, scale=SCALE, key=key_)

  exact, dropped = np.asarray(attend(None)), np.asarray(attend(jax.random.key(0)))
  # The first place sees itself alone: its output is dropped whole, head by head.
  is_zero = (dropped[:, 0] == 0).all(axis=-1)
  assert abs(is_zero.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / is_zero.size)
  errors = dropped.mean(axis=0) - exact[0]
  standard_errors = dropped.std(axis=0) / np.sqrt(num_rows)
  # The largest of 80 normal deviates.
  assert (np.abs(errors) < 5 * standard_errors).all()


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("length", [200, 300])
def test_blocks_of_queries_equal_the_whole_square(length, window):
  query, key, value = draw_heads(2, length)
  segment_ids_BL = np.tile(np.repeat([1, 2], [150, length - 150]), (2, 1))

  @jax.jit
  def whole_square(query, key, value):
    mask = causal_mask(range(length), range(length), window, segment_ids_BL)
    return masked_attention(query, key, value, mask, 0.3)

  whole = whole_square(query, key, value)
  attend = functools.partial(
    causal_attention, scale=0.3, window=window, segment_ids_BL=segment_ids_BL
  )
  blocks = jax.jit(attend)(query, key, value)
  # The same sums, over fewer masked zeros.
  np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-6)
