"""Decoding with a cache is the full forward pass; a row does not know its companions; draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, make_batch, make_config, make_params, relative_error

from gptjax.errors import UserError
from gptjax.generate.cache import decode_step, prefill
from gptjax.generate.sample import draw, sample, sample_long
from gptjax.model.decoder import hidden_states, unstack_layers
from gptjax.model.heads import lm_logits

# The same float32 sums in another order.
SAME = 2e-6
PROMPTS = [[5, 3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 1, 8, 2, 8]]


@functools.partial(jax.jit, static_argnames="config")
def compute_hidden(params, tokens_BL, config):
  batch = make_batch(jnp.pad(tokens_BL, ((0, 0), (0, 1))))
  return hidden_states(params["decoder"], batch, config)


@functools.partial(jax.jit, static_argnames=("config", "num_slots"))
def start(params, tokens_BL, first_slot_B, num_slots, config):
  decoder = params["decoder"]
  layers = unstack_layers(decoder["layers"], config)
  return prefill(decoder, layers, tokens_BL, first_slot_B, num_slots, config)


@functools.partial(jax.jit, static_argnames="config")
def advance(params, token_B, cache, config):
  layers = unstack_layers(params["decoder"]["layers"], config)
  return decode_step(params["decoder"], layers, token_B, cache, config)


def pad_left(prompts, filler=0):
  """Returns (tokens [B, L], first slots [B])."""
  length = max(map(len, prompts))
  tokens = np.full((len(prompts), length), filler, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[length - len(prompt) :] = prompt
  return tokens, np.array([length - len(prompt) for prompt in prompts], np.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cached_step_is_the_full_forward_pass(family):
  """With rows of unlike lengths, each compared with its own row alone, unpadded."""
  config, params = FAMILIES[family], make_params(FAMILIES[family])
  num_new, length = 8, len(PROMPTS[0])
  new_tokens = np.random.default_rng(4).integers(0, 61, (3, num_new)).astype(np.int32)
  tokens, first_slots = pad_left(PROMPTS)
  hidden, cache = start(params, tokens, first_slots, length + num_new, config)
  found = [hidden]
  for token_B in new_tokens.T:
    hidden, cache = advance(params, token_B, cache, config)
    found.append(hidden)
  assert int(cache.next_slot) == length + num_new
  for row, prompt in enumerate(PROMPTS):
    whole = np.array([*prompt, *new_tokens[row]], np.int32)
    # Padded on the right, where causality hides it, so that one shape serves all rows.
    whole = np.pad(whole, (0, length + num_new - len(whole)))
    expected = compute_hidden(params, whole[None], config)[0]
    for step, hidden in enumerate(found):
      assert relative_error(hidden[row], expected[len(prompt) - 1 + step]) < SAME, (row, step)


def test_what_fills_the_padding_does_not_matter():
  config, params = FAMILIES["gpt3"], make_params(FAMILIES["gpt3"])
  ends = []
  for filler in (0, 60):
    tokens, first_slots = pad_left(PROMPTS, filler)
    hidden, cache = start(params, tokens, first_slots, 17, config)
    ends.append((hidden, advance(params, np.int32([1, 2, 3]), cache, config)[0]))
  for first, second in zip(*ends):
    np.testing.assert_array_equal(first, second)


def test_the_first_slot_matters():
  config, params = FAMILIES["gpt2"], make_params(FAMILIES["gpt2"])
  tokens, first_slots = pad_left(PROMPTS)
  right, wrong = (
    start(params, tokens, slots, 17, config)[0] for slots in (first_slots, first_slots * 0)
  )
  np.testing.assert_array_equal(right[0], wrong[0])
  assert relative_error(wrong[1], right[1]) > 1e-2


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
  num_draws = 20_000
  logits_V = np.array([2.0, 1.0, 0.0, -1.0, -9.0], np.float32)
  keys = jax.random.split(jax.random.key(1), num_draws)
  logits_BV = np.tile(logits_V, (num_draws, 1))
  drawn = jax.jit(draw)(logits_BV, jnp.float32(temperature), keys, 7)
  counts = np.bincount(drawn, minlength=5)
  probabilities = np.exp(logits_V / temperature) / np.exp(logits_V / temperature).sum()
  # Five standard deviations of a binomial count, and one for the rarest.
  spread = 5 * np.sqrt(num_draws * probabilities * (1 - probabilities)) + 1
  assert (np.abs(counts - num_draws * probabilities) < spread).all()
  later = jax.jit(draw)(logits_BV, jnp.float32(temperature), keys, 8)
  assert (later != drawn).mean() > 0.1


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
