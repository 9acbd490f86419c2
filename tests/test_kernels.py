"""Weights of decoding: int8 says what its rounded parameters say, and float32 something else."""

import numpy as np
from families import make_config, make_params

from gptjax.api import Model
from gptjax.generate.kernels import round_to_int8

OPTIONS = {"max_new_tokens": 6, "top_logprobs": 3}


def test_parameters_rounded_to_int8_say_what_int8_says():
  config = make_config("gpt3")  # its layers are stacked in a period of two
  params = make_params(config)
  exact, rounded = Model(config, params), Model(config, round_to_int8(params))
  int8 = exact.generate([[1, 2, 3]], weights="int8", **OPTIONS)
  same = rounded.generate([[1, 2, 3]], **OPTIONS)
  np.testing.assert_array_equal(int8.top_tokens, same.top_tokens)
  # The scale is multiplied after the product here, and before it there.
  np.testing.assert_allclose(int8.top_logprobs, same.top_logprobs, rtol=1e-5, atol=1e-5)
  other = exact.generate([[1, 2, 3]], **OPTIONS)
  assert np.abs(other.top_logprobs[0, 0] - same.top_logprobs[0, 0]).max() > 1e-4


def test_rounding_is_to_half_a_step_and_leaves_the_rest():
  config = make_config("gpt2")
  params = make_params(config)
  rounded = round_to_int8(params)
  kernel = params["decoder"]["layers"]["mlp"]["up"]["kernel"]
  error = np.abs(rounded["decoder"]["layers"]["mlp"]["up"]["kernel"] - kernel)
  step = np.abs(kernel).max(axis=1, keepdims=True) / 127
  assert (error <= step * 0.5001).all() and error.max() > 0
  table = params["decoder"]["token_embedding"]["embedding"]
  np.testing.assert_array_equal(rounded["decoder"]["token_embedding"]["embedding"], table)
