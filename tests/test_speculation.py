"""Guesses change how fast text comes, and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, make_config, make_params
from scipy import stats

from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.errors import ConfigError
from gptjax.generate import programs, speculation
from gptjax.generate.candidates import Candidates
from gptjax.generate.generator import Generator
from gptjax.generate.options import parse_options
from gptjax.generate.sampling import new_texts

PROMPTS = [[5, 3, 1, 4, 1, 5, 3], [2], [7, 1, 8, 2, 7, 1, 8, 2, 7]]
NUM_NEW = 12
# Logits of several places at once are the same sums in another order.
SAME = 1e-5
slow = functools.partial(pytest.param, marks=pytest.mark.slow)  # a program for each
SAMPLED = {"do_sample": True, "seed": 3}
LOOKUP = {"prompt_lookup_num_tokens": 3}


@functools.cache
def make_generator(family="gpt2", seed=0):
  config = FAMILIES[family]
  letters = "".join(chr(ord("0") + i) for i in range(config.vocab_size))
  return Generator(make_params(config, seed), config, make_char_tokenizer([letters]))


@functools.cache
def make_draft(**changes):
  """A model with other weights, of another family, and no better than chance at guessing."""
  config = make_config("gptneox", num_layers=1, model_dim=12, num_heads=2, **changes)
  return Generator(make_params(config, 1), config)


@functools.cache
def make_near_draft(family="gpt2"):
  """The model itself after a small accident: often right."""
  config = FAMILIES[family]
  rng = np.random.default_rng(5)

  def shake(x):
    return x + 0.15 * np.std(x) * rng.standard_normal(x.shape).astype(np.float32)

  return Generator(jax.tree.map(shake, make_params(config)), config)


def generate(generator, prompts=PROMPTS, **options):
  return generator.generate(prompts, parse_options({"max_new_tokens": NUM_NEW} | options))


def assert_same(got, expected):
  np.testing.assert_array_equal(got.tokens, expected.tokens)
  np.testing.assert_allclose(got.logprobs, expected.logprobs, rtol=SAME, atol=SAME)
  np.testing.assert_array_equal(got.num_new, expected.num_new)
  assert got.finish_reasons == expected.finish_reasons
  assert got.texts == expected.texts
  if expected.top_tokens is not None:
    np.testing.assert_array_equal(got.top_tokens, expected.top_tokens)
    np.testing.assert_allclose(got.top_logprobs, expected.top_logprobs, rtol=SAME, atol=SAME)


# Local attention every day.
@pytest.mark.parametrize(
  "family", ["gpt3", *map(slow, ("gpt1", "gpt2", "gptj", "gptneo", "gptneox"))]
)
def test_greedy_text_is_the_same_in_every_family(family):
  generator = make_generator(family)
  expected = generate(generator)
  assert_same(generate(generator, **LOOKUP), expected)
  near = generate(generator, draft_model=make_near_draft(family), num_draft_tokens=3)
  assert_same(near, expected)
  assert near.num_rounds.sum() < expected.num_new.sum() - 3  # some guesses were right


RULES = {
  "logits": {
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.4,
    "presence_penalty": 0.2,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[60, 9], [24, 9]],
    "logit_bias": {9: 3.0},
    "suppress_tokens": [26],
    "begin_suppress_tokens": [9],
    "forced_eos_token_id": 6,
  },
  "ends": {
    "eos_token_id": [53, 26],
    "min_new_tokens": 5,
    "stop": ["fll", "no"],
    "forced_bos_token_id": 60,
    "top_logprobs": 3,
  },
}


@pytest.mark.parametrize("rules", [slow("logits"), "ends"])
def test_rules_see_the_tokens_before_each_guess(rules):
  generator = make_generator()
  expected = generate(generator, **RULES[rules])
  drafts = {"draft_model": make_near_draft(), "num_draft_tokens": 4}
  for guesser in (LOOKUP, drafts):
    assert_same(generate(generator, **RULES[rules], **guesser), expected)


@pytest.mark.slow  # a program for each option
@pytest.mark.parametrize("rules", RULES)
def test_every_rule_of_the_table_changes_the_answer(rules):
  def answer(**options):
    out = generate(make_generator(), **options)
    return repr(dataclasses.astuple(out))

  whole = answer(**RULES[rules])
  for left_out in RULES[rules]:
    others = {name: value for name, value in RULES[rules].items() if name != left_out}
    assert answer(**others) != whole, left_out


@pytest.mark.slow  # compiles much
def test_rows_end_at_their_own_limits():
  generator = make_generator()
  itself = {"draft_model": generator, "num_draft_tokens": 9}
  for guesser, limits in (
    (LOOKUP, {"max_length": 24}),  # the context is full
    (itself, {"max_length": 11}),
    (itself, {"max_length": 10}),
  ):
    lengths = {"max_new_tokens": None} | limits
    assert_same(generate(generator, **lengths, **guesser), generate(generator, **lengths))


@pytest.mark.parametrize(
  "options",
  [{"top_k": 5, "top_p": 0.9}, slow({}), slow({"repetition_penalty": 1.5, "temperature": 0.5})],
)
def test_looking_up_draws_the_same_tokens(options):
  generator = make_generator()
  options = SAMPLED | options | {"num_return_sequences": 3}
  assert_same(generate(generator, **options, **LOOKUP), generate(generator, **options))


def test_a_row_does_not_know_its_companions():
  options = SAMPLED | {"draft_model": make_near_draft(), "num_return_sequences": 2}
  together = generate(make_generator(), **options)
  alone = generate(make_generator(), PROMPTS[:1], **options)
  np.testing.assert_array_equal(alone.tokens, together.tokens[:2, : alone.tokens.shape[1]])
  np.testing.assert_array_equal(alone.num_rounds, together.num_rounds[:2])


# The distribution.

TINY = {"vocab_size": 5, "vocab_multiple": 1, "context_length": 16}
NUM_DRAWN, NUM_ROWS = 3, 6000
UNLIKELY = 1e-3


@functools.cache
def make_tiny(family="gpt2", seed=0, num_layers=2):
  config = make_config(family, **TINY, num_layers=num_layers)
  return Generator(make_params(config, seed), config)


def count_texts(seed, **options):
  """Counts each text of three tokens among many draws, rows of one batch."""
  out = generate(
    make_tiny(),
    [[1, 2, 1]],
    max_new_tokens=NUM_DRAWN,
    num_return_sequences=NUM_ROWS,
    do_sample=True,
    seed=seed,
    **options,
  )
  cells = out.tokens[:, -NUM_DRAWN:] @ (TINY["vocab_size"] ** np.arange(NUM_DRAWN))
  return np.bincount(cells, minlength=TINY["vocab_size"] ** NUM_DRAWN)


def chance_of_difference(counts, others):
  """Returns how likely counts of one distribution differ that much, by a chi-square test."""
  total = counts + others
  is_rare = total < 20
  pairs = np.stack([counts, others])
  pairs = np.append(pairs[:, ~is_rare], pairs[:, is_rare].sum(axis=1, keepdims=True), axis=1)
  pairs = pairs[:, pairs.sum(axis=0) > 0]
  return stats.chi2_contingency(pairs).pvalue


WARPERS = {
  "none": {},
  "candidates": {"top_k": 4, "temperature": 1.5},
  "top_p": {"top_p": 0.9, "min_p": 0.05, "temperature": 1.2},
  "rules": {"repetition_penalty": 1.5, "logit_bias": {3: 1.0}, "temperature": 1.5},
}


@pytest.mark.slow  # compiles much
@pytest.mark.parametrize("warpers", WARPERS)
def test_a_draft_changes_no_probability(warpers):
  options = WARPERS[warpers]
  drafts = {"draft_model": make_tiny("gptneox", 1, 1), "num_draft_tokens": 2}
  expected = count_texts(1, **options)
  assert chance_of_difference(count_texts(2, **options, **drafts), expected) > UNLIKELY


def _always_accept(candidates, guess_R, probs_RV, texts):
  right = RIGHT(candidates, guess_R, probs_RV, texts)
  return jnp.where(guess_R < 0, right, guess_R)


def _draw_anew(candidates, guess_R, probs_RV, texts):
  """Draws from p, not from what of it is left, where a guess is rejected."""
  right = RIGHT(candidates, guess_R, probs_RV, texts)
  fresh = RIGHT(candidates, jnp.full_like(guess_R, -1), probs_RV, texts)
  return jnp.where(right == guess_R, guess_R, fresh)


RIGHT = speculation.accept_or_draw


@pytest.mark.slow  # compiles much
@pytest.mark.parametrize("wrong", [_always_accept, _draw_anew])
def test_the_test_of_probabilities_finds_wrong_ones(monkeypatch, wrong):
  monkeypatch.setattr(speculation, "accept_or_draw", wrong)
  programs.speculate.clear_cache()
  drafts = {"draft_model": make_tiny("gptneox", 1, 1), "num_draft_tokens": 2}
  counts = count_texts(2, **drafts)
  programs.speculate.clear_cache()
  assert chance_of_difference(counts, count_texts(1)) < UNLIKELY


def test_guesses_are_accepted_as_often_as_can_be():
  rng = np.random.default_rng(0)
  p, q = rng.dirichlet(np.ones(6), 2).astype(np.float32)
  guess_R = rng.choice(6, NUM_ROWS, p=q / q.sum()).astype(np.int32)
  ids_RC = jnp.tile(jnp.arange(6, dtype=jnp.int32)[::-1], (NUM_ROWS, 1))
  log_p_RC = jnp.tile(jnp.log(p[::-1]), (NUM_ROWS, 1))
  texts = _texts(jax.random.split(jax.random.key(0), NUM_ROWS))
  q_RV = jnp.tile(q, (NUM_ROWS, 1))
  token_R = speculation.accept_or_draw(Candidates(ids_RC, log_p_RC), guess_R, q_RV, texts)
  expected = np.minimum(p, q).sum()
  # Four standard deviations.
  assert abs(np.mean(token_R == guess_R) - expected) < 4 * np.sqrt(0.25 / NUM_ROWS)
  counts = np.bincount(token_R, minlength=6)
  assert stats.chisquare(counts, p / p.sum(dtype=float) * NUM_ROWS).pvalue > UNLIKELY


def _texts(keys_R):
  length_R = jnp.ones(len(keys_R), jnp.int32)
  return new_texts(jnp.zeros((len(keys_R), 4), jnp.int32), length_R, length_R, keys_R, None, 0)


# How many rounds.


@pytest.mark.parametrize(
  ("num_guesses", "options"),
  [
    (3, {}),
    slow(1, {}),
    slow(5, {}),
    slow(1, SAMPLED),
    slow(3, SAMPLED),
    slow(5, SAMPLED | {"top_k": 8}),
  ],
)
def test_of_a_draft_that_is_the_model_every_guess_is_right(options, num_guesses):
  generator = make_generator()
  out = generate(generator, **options, draft_model=generator, num_draft_tokens=num_guesses)
  # The first token comes with the prompt.
  assert out.num_rounds.tolist() == [-(-(NUM_NEW - 1) // (num_guesses + 1))] * len(PROMPTS)


def test_looking_up_saves_rounds_where_text_repeats():
  generator = make_generator()
  says_7 = {"logit_bias": {7: 1000.0}}
  assert generate(generator, **says_7, **LOOKUP).num_rounds.tolist() == [4, 4, 3]
  never_twice = {"no_repeat_ngram_size": 1}
  assert generate(generator, **never_twice, **LOOKUP).num_rounds.tolist() == [NUM_NEW - 1] * 3
  assert generate(generator).num_rounds is None


@pytest.mark.parametrize(
  ("row", "expected"),
  [
    ([1, 2, 3], [-1, -1, -1, -1]),
    ([1], [-1, -1, -1, -1]),
    ([7, 7], [7, 7, 7, 7]),
    ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1]),
    # The longest ending, not the last place.
    ([1, 2, 3, 4, 9, 3, 5, 2, 3], [4, 9, 3, 5]),
    # Of the longest the last.
    ([2, 3, 4, 2, 3, 5, 6, 6, 2, 3], [5, 6, 6, 2]),
    # A repetition goes on.
    ([9, 1, 2, 1, 2], [1, 2, 1, 2]),
  ],
)
def test_look_up(row, expected):
  tokens_RS = jnp.asarray([[*row, *[1, 2, 3, 7] * 3]], jnp.int32)
  guesses_RG = speculation.look_up(tokens_RS, jnp.asarray([len(row)]), 4)
  assert guesses_RG.tolist() == [expected]


# Programs and refusals.


def test_a_second_call_compiles_nothing():
  generator, said = make_generator("gptj"), []
  stop_listening = programs.on_compile(said.append)
  for prompts in (PROMPTS, [[4] * 9, [3], [9]]):
    generate(generator, prompts, **LOOKUP)
    generate(generator, prompts, draft_model=make_draft())
  stop_listening()
  assert len(said) == 2
  assert "3 looked-up guesses" in said[0] and "5 drafted guesses" in said[1]


def test_drafts_that_do_not_fit_are_refused():
  generator = make_generator()
  for draft, complaint in (
    (make_draft(vocab_size=60), "60 tokens and the model 61"),
    (make_draft(context_length=20), "context of 20"),
    ("gpt2", "draft_model is a str"),
  ):
    with pytest.raises(ConfigError, match=complaint) as error:
      generate(generator, draft_model=draft)
    assert "\n" not in str(error.value)


@pytest.mark.slow  # compiles much
def test_a_draft_may_have_a_shorter_context():
  generator, draft = make_generator(), make_draft(context_length=12)
  prompts = [[1, 2], [5, 5, 5]]
  expected = generate(generator, prompts, max_length=12, max_new_tokens=None)
  got = generate(generator, prompts, max_length=12, max_new_tokens=None, draft_model=draft)
  assert_same(got, expected)


def test_streaming_refuses_guesses():
  with pytest.raises(ConfigError, match="streaming"):
    make_generator().stream([1, 2], parse_options(LOOKUP))
