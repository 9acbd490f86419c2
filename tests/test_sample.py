"""Decoding with a cache is the full forward pass; a row does not know its companions; draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, make_batch, make_config, make_params, relative_error

from gptjax.errors import UserError
from gptjax.generate.cache import extend, prefill
from gptjax.generate.kernels import prepare
from gptjax.generate.sample import sample, sample_long
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_logits

# The same float32 sums in another order.
SAME = 2e-6
PROMPTS = [[5, 3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 1, 8, 2, 8]]


@functools.partial(jax.jit, static_argnames="config")
def compute_hidden(params, tokens_BL, config):
  batch = make_batch(jnp.pad(tokens_BL, ((0, 0), (0, 1))))
  return hidden_states(params["decoder"], batch, config)


@functools.partial(jax.jit, static_argnames=("config", "num_slots"))
def start(params, tokens_RL, num_slots, config):
  return prefill(prepare(params, config), tokens_RL, num_slots, config)


@functools.partial(jax.jit, static_argnames="config")
def advance(params, tokens_RQ, position_R, cache, config):
  return extend(prepare(params, config), tokens_RQ, position_R, cache, config)


def pad_right(prompts, filler=0):
  """Returns (tokens [R, L], lengths [R])."""
  tokens = np.full((len(prompts), max(map(len, prompts))), filler, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


@pytest.mark.parametrize("num_at_once", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cached_step_is_the_full_forward_pass(family, num_at_once):
  """With rows of unlike lengths, each compared with its own row alone, unpadded."""
  config, params = FAMILIES[family], make_params(FAMILIES[family])
  num_new, length = 8, len(PROMPTS[0])
  new_tokens = np.random.default_rng(4).integers(0, 61, (3, num_new)).astype(np.int32)
  tokens, lengths = pad_right(PROMPTS, filler=60)
  hidden, cache = start(params, tokens, length + num_new, config)
  found = [hidden[np.arange(3), lengths - 1][:, None]]
  for first in range(0, num_new, num_at_once):
    part = new_tokens[:, first : first + num_at_once]
    hidden, cache = advance(params, part, lengths + first, cache, config)
    found.append(hidden)
  found = np.concatenate(found, axis=1)
  for row, prompt in enumerate(PROMPTS):
    whole = np.array([*prompt, *new_tokens[row]], np.int32)
    # Padded on the right, where causality hides it, so that one shape serves all rows.
    whole = np.pad(whole, (0, length + num_new - len(whole)))
    expected = compute_hidden(params, whole[None], config)[0]
    for step in range(num_new + 1):
      error = relative_error(found[row, step], expected[len(prompt) - 1 + step])
      assert error < SAME, (row, step)


def test_what_fills_the_padding_does_not_matter():
  config, params = FAMILIES["gpt3"], make_params(FAMILIES["gpt3"])
  ends = []
  for filler in (0, 60):
    tokens, lengths = pad_right(PROMPTS, filler)
    _, cache = start(params, tokens, 17, config)
    ends.append(advance(params, np.int32([[1], [2], [3]]), lengths, cache, config)[0])
  np.testing.assert_array_equal(*ends)


def test_the_position_matters():
  config, params = FAMILIES["gpt2"], make_params(FAMILIES["gpt2"])
  tokens, lengths = pad_right(PROMPTS)
  _, cache = start(params, tokens, 17, config)
  right, wrong = (
    advance(params, np.int32([[1], [2], [3]]), position, cache, config)[0]
    for position in (lengths, lengths + 1)
  )
  assert relative_error(wrong, right) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_weights_stay_near(family):
  config, params = FAMILIES[family], make_params(FAMILIES[family])
  tokens, _ = pad_right(PROMPTS)
  run = jax.jit(prefill, static_argnums=(2, 3))
  exact, near = (
    run(prepare(params, config, weights), tokens, 16, config)[0] for weights in ("float32", "int8")
  )
  # Half a step of 127 on each weight, by chance of either sign.
  assert 1e-5 < relative_error(near, exact) < 2e-2


@pytest.mark.parametrize("family", ["gpt1", "gpt3", "gptj", "gptneox"])
def test_greedy_is_the_argmax_of_the_full_forward_pass(family):
  config, params = FAMILIES[family], make_params(FAMILIES[family], seed=3)
  new = sample(params, config, PROMPTS, max_new_tokens=7, temperature=0, key=jax.random.key(0))
  assert new.shape == (3, 7)
  assert new.dtype == np.int32
  for prompt, row in zip(PROMPTS, new):
    whole = np.pad(np.array([*prompt, *row], np.int32), (0, 16 - len(prompt) - 7))
    hidden = compute_hidden(params, whole[None], config)
    expected = lm_logits(params, hidden, config)[0].argmax(axis=-1)
    np.testing.assert_array_equal(row, expected[len(prompt) - 1 :][:7])


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_a_row_does_not_depend_on_its_companions(temperature):
  """Neither on their number nor on the padding they cause; its stream goes by its place."""
  config, params = FAMILIES["gpt2"], make_params(FAMILIES["gpt2"])
  draw_with = functools.partial(
    sample, params, config, max_new_tokens=7, temperature=temperature, key=jax.random.key(5)
  )
  together = draw_with(PROMPTS[:2])
  np.testing.assert_array_equal(draw_with(PROMPTS[:1]), together[:1])
  np.testing.assert_array_equal(draw_with([[1], PROMPTS[1]])[1], together[1])
  np.testing.assert_array_equal(draw_with(PROMPTS[:2]), together)


def test_equal_prompts_draw_apart_and_keys_repeat():
  config, params = FAMILIES["gpt2"], make_params(FAMILIES["gpt2"])
  first, again, other = (
    sample(params, config, [[1, 2]] * 3, max_new_tokens=12, key=jax.random.key(seed))
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert len({tuple(row) for row in [*first, *other]}) == 6


def test_the_first_draw_of_a_model_follows_its_softmax():
  config, params = make_config("gpt2", vocab_size=7), make_params(make_config("gpt2", vocab_size=7))
  num_draws = 4000
  new = sample(params, config, [[3, 1]] * num_draws, max_new_tokens=1, key=jax.random.key(2))
  hidden = compute_hidden(params, np.array([[3, 1]], np.int32), config)
  probabilities = np.asarray(jax.nn.softmax(lm_logits(params, hidden, config)[0, -1]))
  spread = 5 * np.sqrt(num_draws * probabilities * (1 - probabilities)) + 1
  assert (np.abs(np.bincount(new[:, 0], minlength=7) - num_draws * probabilities) < spread).all()


def test_padded_vocabulary_is_never_drawn():
  config = make_config("gptj", vocab_size=3, vocab_multiple=64)
  params = make_params(config)
  params["lm_head"]["bias"][3:] = 1e4
  new = sample(params, config, [[0]] * 50, max_new_tokens=4, temperature=5.0, key=jax.random.key(0))
  assert set(new.flat) == {0, 1, 2}


def test_no_new_tokens_are_none():
  config, params = FAMILIES["gpt2"], make_params(FAMILIES["gpt2"])
  new = sample(params, config, [[1]], max_new_tokens=0, key=jax.random.key(0))
  assert new.shape == (1, 0)


def test_the_whole_context_is_usable():
  config, params = FAMILIES["gpt2"], make_params(FAMILIES["gpt2"])
  prompt = list(range(17))
  new = sample(params, config, [prompt], max_new_tokens=7, temperature=0, key=jax.random.key(0))
  whole = np.array([*prompt, *new[0]], np.int32)
  expected = lm_logits(params, compute_hidden(params, whole[None], config), config)[0]
  np.testing.assert_array_equal(new[0], expected.argmax(axis=-1)[16:23])


@pytest.mark.parametrize(
  ("prompts", "max_new_tokens", "complaint"),
  [
    ([[1], []], 3, "a prompt has no tokens"),
    ([], 3, "there are no prompts"),
    ([[1], [2, 61]], 3, "the token 61, but the model's are 0 to 60"),
    ([[-1]], 3, "the token -1"),
    ([[1] * 20], 5, "a prompt of 20 tokens and 5 new ones exceed the model's context of 24"),
  ],
)
def test_impossible_prompts_are_refused(prompts, max_new_tokens, complaint):
  config, params = FAMILIES["gpt2"], make_params(FAMILIES["gpt2"])
  with pytest.raises(UserError, match=complaint):
    sample(params, config, prompts, max_new_tokens=max_new_tokens, key=jax.random.key(0))


def test_only_ids_that_a_tokenizer_knows_are_drawn():
  """The others of a larger vocabulary would not decode."""
  config, params = FAMILIES["gpt2"], make_params(FAMILIES["gpt2"])
  draw_some = functools.partial(
    sample, params, config, PROMPTS, max_new_tokens=15, temperature=5.0, key=jax.random.key(0)
  )
  assert draw_some().max() >= 5
  assert draw_some(num_ids=5).max() < 5


@pytest.mark.slow
def test_sampling_goes_on_beyond_the_context():
  config = dataclasses.replace(FAMILIES["gpt2"], context_length=8)
  params = make_params(config)
  draw_long = functools.partial(sample_long, params, config, temperature=0, key=jax.random.key(0))
  new = draw_long([[1, 2, 3], [4]], max_new_tokens=11)
  assert new.shape == (2, 11)
  # The first round knows the prompt, the next the last four tokens before it.
  greedy = functools.partial(sample, params, config, temperature=0, key=jax.random.key(0))
  first = greedy([[1, 2, 3]], max_new_tokens=5)
  np.testing.assert_array_equal(new[0, :5], first[0])
  kept = [1, 2, 3, *new[0, :5].tolist()][-4:]
  second = greedy([kept], max_new_tokens=4)
  np.testing.assert_array_equal(new[0, 5:9], second[0])
