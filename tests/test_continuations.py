"""Continuations that reuse the prompt are those of computing everything again."""

import numpy as np
import pytest
from families import make_config, make_params

from gptjax.errors import UserError
from gptjax.generate import programs
from gptjax.generate.continuations import Continuations
from gptjax.generate.generator import Generator
from gptjax.generate.options import DecodingOptions

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def make_generator(family="gpt2"):
  config = make_config(family, context_length=64)
  return Generator(make_params(config), config)


def expect(generator, prompt, n, m):
  """The same from whole prompts, one by one."""
  first = generator.generate([prompt], DecodingOptions(max_new_tokens=1, top_logprobs=n))
  rows = []
  for token in first.top_tokens[0, 0].tolist():
    more = generator.generate([[*prompt, token]], DecodingOptions(max_new_tokens=m - 1))
    rows.append(more.tokens[0, len(prompt) :].tolist())
  return rows, np.exp(first.top_logprobs[0, 0])


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt3"])
def test_continuations_are_those_of_full_recomputation(family):
  generator = make_generator(family)
  tab = Continuations(generator)
  tab.open([*PROMPT[:5], 8, 8])
  assert tab.open(PROMPT) == 3
  expected, probabilities = expect(generator, PROMPT, 4, 22)
  found = tab.options(4, 5)
  assert [one.tokens for one in found] == [row[:5] for row in expected]
  # float32 sums in another order.
  np.testing.assert_allclose([one.probability for one in found], probabilities, rtol=1e-4)
  assert [one.tokens for one in tab.lengthen(5)] == [row[:10] for row in expected]
  # Beyond the first bucket.
  assert [one.tokens for one in tab.lengthen(12)] == expected


def test_only_what_is_new_is_run():
  tab = Continuations(make_generator())
  assert tab.open(PROMPT) == 8
  assert tab.open(PROMPT) == 0
  assert tab.open([*PROMPT, 7]) == 1
  assert tab.open(PROMPT[:4]) == 1
  assert tab.open([*PROMPT[:2], *range(20)]) == 20


def test_a_second_press_compiles_nothing():
  tab, said = Continuations(make_generator()), []
  tab.open(PROMPT)
  tab.options(3, 4)
  stop = programs.on_compile(said.append)
  try:
    tab.lengthen(4)
    tab.options(3, 6)
  finally:
    stop()
  assert said == []


def test_surprise_and_next_tokens_of_a_changed_prompt():
  generator = make_generator()
  tab, fresh = Continuations(generator), Continuations(generator)
  tab.open(PROMPT)
  tab.surprise()
  changed = [*PROMPT[:6], 7, 8, 9]
  tab.open(changed)
  fresh.open(changed)
  assert len(tab.surprise()) == len(changed) - 1
  np.testing.assert_allclose(tab.surprise(), fresh.surprise(), rtol=1e-4)
  first = generator.generate([changed[:-1]], DecodingOptions(max_new_tokens=1, top_logprobs=61))
  logprob = dict(zip(first.top_tokens[0, 0].tolist(), first.top_logprobs[0, 0].tolist()))[9]
  np.testing.assert_allclose(tab.surprise()[-1], -logprob, rtol=1e-4)
  likely = tab.next_tokens(6, DecodingOptions(do_sample=True, top_k=4))
  assert [one.is_cut for one in likely] == [False] * 4 + [True] * 2


def test_nothing_open_and_nothing_to_lengthen_are_refused():
  tab = Continuations(make_generator())
  with pytest.raises(UserError):
    tab.options(3, 3)
  tab.open(PROMPT)
  with pytest.raises(UserError):
    tab.lengthen(2)
