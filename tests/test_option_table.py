"""No decoding option is accepted and ignored: each changes the answer of one small model."""

import dataclasses
import functools

import pytest
from families import make_config, make_params
from option_cases import CASES, PROMPT

from gptjax.api import Model
from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.errors import UserError
from gptjax.generate.options import DecodingOptions

# Speculation changes how often the model reads, never what it says.
SAME_TOKENS = ("prompt_lookup_num_tokens", "draft_model", "num_draft_tokens", "top_logprobs")


@functools.cache
def make_model(seed=0):
  config = make_config("gpt2", context_length=32, num_layers=1)
  letters = "".join(chr(ord("0") + i) for i in range(config.vocab_size))
  tokenizer = make_char_tokenizer([letters])
  return Model(config, make_params(config, seed), tokenizer)


def fill_in(options):
  """Gives the cases that need the tokenizer or another model what they need."""
  tokenizer = make_model().tokenizer
  filled = dict(options)
  for name in ("stop", "bad_words"):
    if name in filled:
      filled[name] = tokenizer.decode([7])
  if "draft_model" in filled:
    filled["draft_model"] = make_model(seed=1)
  return filled


def answer(name, options):
  """Returns all that an option may change."""
  prompts = [PROMPT, PROMPT[:2]]
  if name == "attention_mask":
    prompts = [[0, 0, *PROMPT]]
  if name == "early_stopping":
    prompts = [[i, j] for i in range(6) for j in range(5)]
  try:
    out = make_model().generate(prompts, **fill_in(options))
  except UserError as error:
    return str(error)
  values = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
  return {key: getattr(value, "tolist", lambda v=value: v)() for key, value in values.items()}


def test_the_table_has_every_option():
  assert CASES.keys() == {field.name for field in dataclasses.fields(DecodingOptions)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_option_changes_the_answer(name):
  base, change = CASES[name]
  before, after = answer(name, base), answer(name, {**base, **change})
  assert not isinstance(after, str), after
  if isinstance(before, str):
    assert name == "beyond_context"
    return
  changed = {key for key in before if before[key] != after[key]}
  assert changed - {"seed"}
  if name in SAME_TOKENS:
    assert "tokens" not in changed
  assert answer(name, base) == before
