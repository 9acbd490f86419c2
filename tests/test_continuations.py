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
  """The same from whole prompts."""
  first = generator.generate([prompt], DecodingOptions(max_new_tokens=1, top_logprobs=n))
  prompts = [[*prompt, token] for token in first.top_tokens[0, 0].tolist()]
  more = generator.generate(prompts, DecodingOptions(max_new_tokens=m - 1))
  return more.tokens[:, len(prompt) :].tolist(), np.exp(first.top_logprobs[0, 0])


@pytest.mark.parametrize(
  "family", ["gpt3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gptj"))]
)
def test_continuations_are_those_of_full_recomputation(family):
  generator = make_generator(family)
  tab = Continuations(generator)
  tab.open([*PROMPT[:5], 8, 8])
  assert tab.open(PROMPT) == 3
  expected, probabilities = expect(generator, PROMPT, 4, 34)
  found = tab.options(4, 5)
  assert [one.tokens for one in found] == [row[:5] for row in expected]
  # float32 sums in another order.
  np.testing.assert_allclose([one.probability for one in found], probabilities, rtol=1e-4)
  assert [one.tokens for one in tab.options(4, 10)] == [row[:10] for row in expected]
  # Beyond the first bucket, and back.
  assert [one.tokens for one in tab.options(4, 34)] == expected
  assert [one.tokens for one in tab.options(4, 3)] == [row[:3] for row in expected]


def test_only_what_is_new_is_run():
  tab = Continuations(make_generator())
  assert tab.open(PROMPT) == 8
  assert tab.open(PROMPT) == 0
  assert tab.open([*PROMPT, 7]) == 1
  assert tab.open(PROMPT[:4]) == 0
  # The longer text is not forgotten by looking at the shorter one.
  assert tab.num_known([*PROMPT, 7]) == 9
  assert tab.open([*PROMPT[:2], *range(20)]) == 20


def test_a_prompt_in_blocks_and_at_its_beginning_is_read_as_at_once():
  """20 and 13 tokens, in blocks of 16 and 16, and 16; then the 20 again."""
  long = [*PROMPT, *range(12)]
  generator = make_generator()
  tab, fresh = Continuations(generator), Continuations(generator)
  tab.open(long[:13])
  tab.open(long)
  tab.open(long[:13])
  fresh.open(long[:13])
  for n in (13, 20):
    for one in (tab, fresh):
      one.open(long[:n])
    np.testing.assert_allclose(tab.surprise(), fresh.surprise(), rtol=1e-4)
    assert [x.tokens for x in tab.options(3, 4)] == [x.tokens for x in fresh.options(3, 4)]


def test_first_tokens_are_among_those_allowed():
  tab = Continuations(make_generator())
  tab.open(PROMPT)
  every = {one.token: one.probability for one in tab.next_tokens(61)}
  only_V = np.zeros(61, bool)
  only_V[[7, 11]] = True
  found = tab.options(3, 4, only_V)
  assert {one.tokens[0] for one in found} == {7, 11}
  share = {token: every[token] / (every[7] + every[11]) for token in (7, 11)}
  for one in (*found, *tab.next_tokens(5, only_V=only_V)):
    token = one.tokens[0] if hasattr(one, "tokens") else one.token
    np.testing.assert_allclose(one.probability, share[token], rtol=1e-4)


def test_a_second_press_compiles_nothing():
  tab, said = Continuations(make_generator()), []
  tab.open(PROMPT)
  tab.options(3, 4)
  stop = programs.on_compile(said.append)
  try:
    tab.options(3, 8)
    tab.open([*PROMPT, 7])
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


def test_what_cannot_be_is_refused():
  tab = Continuations(make_generator())
  with pytest.raises(UserError, match="call open"):
    tab.options(3, 3)
  tab.open(PROMPT)
  for n, m in ((0, 3), (62, 3), (3, 0)):
    with pytest.raises(UserError, match="1 to 61"):
      tab.options(n, m)
