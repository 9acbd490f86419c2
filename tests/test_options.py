"""Decoding options: names, kinds and ranges alone; and together, with a model and its prompts."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from option_cases import CASES, PROMPT, REFUSED

from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.errors import ConfigError, DataError
from gptjax.generate import options as options_module
from gptjax.generate.checks import check_options, resolve_lengths
from gptjax.generate.options import (
  ALIASES,
  FOREIGN_OFF,
  DecodingOptions,
  encode_bad_words,
  end_ids,
  is_sampled,
  parse_options,
  remove_padding,
  strategy,
)
from gptjax.model.config import ModelConfig

CONFIG = ModelConfig(vocab_size=40, context_length=32)
FIELDS = {field.name: field for field in dataclasses.fields(DecodingOptions)}

# Values of the wrong type or out of range, by option.
WRONG = {
  "max_new_tokens": [0, -1, 2.5, 20.0, "ten", True, [3], float("nan")],
  "max_length": [0, "20", False],
  "min_new_tokens": [-1, 0.5],
  "min_length": [-1, "0"],
  "beyond_context": ["slid", True, 1],
  "do_sample": [1, 0, "true", [True]],
  "temperature": [-0.1, float("nan"), float("inf"), "1", True],
  "top_k": [-1, 1.5, "50"],
  "top_p": [-0.1, 1.1, float("nan"), True],
  "min_p": [-0.1, 1.1, float("nan")],
  "typical_p": [0, 1.1, -1, float("nan")],
  "seed": [-1, 2**32, 1.5, "42"],
  "num_beams": [0, -2, 1.5, 60_000],
  "length_penalty": [float("nan"), float("inf"), "1"],
  "early_stopping": [1, 0, "always"],
  "num_return_sequences": [0, 1.5, 100_000],
  "repetition_penalty": [0, -1, float("nan"), float("inf")],
  "frequency_penalty": [float("nan"), float("inf"), "a"],
  "presence_penalty": [float("nan"), float("-inf")],
  "no_repeat_ngram_size": [-1, 2.5, 2**31],
  "bad_words_ids": [[1, 2], [[]], [[-1]], 5, "ab", [["a"]], [[1.5]], [[True]]],
  "bad_words": [5, [""], "", [5]],
  "logit_bias": [
    5,
    [1],
    {"a": 1},
    {-1: 1.0},
    {1: "x"},
    {1: float("nan")},
    {1: float("inf")},
    {(): 1},
  ],
  "suppress_tokens": [[-1], "a", [1.5], [[1]], True],
  "begin_suppress_tokens": [[-1], "a"],
  "forced_bos_token_id": [-1, [3], "a"],
  "forced_eos_token_id": [-1, "a", [1.5]],
  "allowed_tokens": [5, [1, 2], "f"],
  "eos_token_id": [-2, [-1, 3], "a", 1.5],
  "pad_token_id": [-1, [3], -100],
  "stop": ["", [""], 5, [5]],
  "top_logprobs": [-1, 1.5],
  "prompt_lookup_num_tokens": [-1, 1.5],
  "num_draft_tokens": [0, 1.5],
  "attention_mask": [[1, 1], [[1, 2]], [[1], [1, 1]], "a", 5, [[0.5]]],
}


def check(end_ids=(0,), prompt_lengths=(5,), **given):
  """Parses and checks options for CONFIG."""
  check_options(parse_options(given), CONFIG, prompt_lengths, end_ids)


def test_every_option_has_wrong_values_and_a_case_that_changes_the_answer():
  assert set(WRONG) == set(FIELDS) - {"draft_model"}  # which may be anything
  assert set(CASES) == set(FIELDS)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_in_one_line_that_names_option_and_value(name):
  for value in WRONG[name]:
    with pytest.raises(ConfigError) as error:
      parse_options({name: value})
    message = str(error.value)
    assert message.startswith(f"{name} is ") and "; it must be " in message
    assert "\n" not in message and len(message) < 200


@pytest.mark.parametrize("name", FIELDS)
def test_none_and_the_off_value_are_always_accepted(name):
  check(**{name: None})
  assert parse_options({name: None}) == DecodingOptions()
  check(**{name: FIELDS[name].default})


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_accepted_with_and_without_the_option(name):
  base, change = CASES[name]
  assert name in change
  for given in (base, base | change):
    options = parse_options({key: value for key, value in given.items() if key != "bad_words"})
    prompt_length = 7 if name == "attention_mask" else len(PROMPT)
    context_length = 32 if name != "beyond_context" or "beyond_context" in given else 10_000
    config = dataclasses.replace(CONFIG, context_length=context_length)
    check_options(options, config, [prompt_length], end_ids(options, 0))


@pytest.mark.parametrize("given, message", REFUSED, ids=lambda value: str(value)[:40])
def test_what_has_no_effect_or_contradicts_is_refused_in_one_line(given, message):
  with pytest.raises(ConfigError) as error:
    check(**given)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_names_come_with_the_nearest():
  with pytest.raises(ConfigError, match='unknown decoding option "temprature"; did you mean "temp'):
    parse_options({"temprature": 1.0})
  with pytest.raises(ConfigError, match='did you mean "prefix_allowed_tokens_fn"'):
    parse_options({"prefix_allowed_tokens": len})
  with pytest.raises(ConfigError, match=r"it must be one of: .*num_beams"):
    parse_options({"zzzzqqqq": 1})


def test_aliases_are_one_option():
  for alias, name in ALIASES.items():
    value = CASES[name][1][name]
    assert getattr(parse_options({alias: value}), name) == getattr(
      parse_options({name: value}), name
    )
    with pytest.raises(ConfigError, match=f"{name} and {alias} are one option"):
      parse_options({name: value, alias: value})
    assert getattr(parse_options({name: value, alias: None}), name) is not None


def test_options_of_transformers_that_we_lack_are_accepted_when_off():
  for name, values in FOREIGN_OFF.items():
    assert parse_options(dict.fromkeys([name], values[0])) == DecodingOptions()
    assert parse_options({name: None}) == DecodingOptions()
    with pytest.raises(ConfigError, match=f"{name} is 0.5; gptjax does not have"):
      parse_options({name: 0.5})


def test_values_become_plain_and_hashable():
  options = parse_options(
    {
      "max_new_tokens": np.int64(3),
      "temperature": np.float32(0.5),
      "do_sample": np.bool_(True),
      "eos_token_id": np.array([5, 6, 5]),
      "bad_words_ids": [[1, 2], [1, 2], [3]],
      "logit_bias": {"5": 1, 6: 0.0, (7, 8): -2},
      "stop": "a",
      "top_p": 1,
    }
  )
  assert type(options.max_new_tokens) is int and options.max_new_tokens == 3
  assert type(options.temperature) is float and type(options.top_p) is float
  assert options.do_sample is True
  assert options.eos_token_id == (5, 6)
  assert options.bad_words_ids == ((1, 2), (3,))
  assert options.logit_bias == (((5,), 1.0), ((7, 8), -2.0))
  assert options.stop == ("a",)
  assert hash(options) == hash(dataclasses.replace(options))
  assert parse_options({"sequence_bias": [[[7, 8], -2.0]]}).logit_bias == (((7, 8), -2.0),)


def test_direct_construction_checks_too():
  with pytest.raises(ConfigError, match="top_p is 3"):
    DecodingOptions(top_p=3)
  with pytest.raises(ConfigError, match="num_beams is 0"):
    dataclasses.replace(DecodingOptions(), num_beams=0)


def test_strategies():
  for given, expected in [
    ({}, "greedy"),
    ({"do_sample": True}, "sample"),
    ({"do_sample": True, "temperature": 0}, "greedy"),
    ({"temperature": 0}, "greedy"),
    ({"num_beams": 3}, "beams"),
    ({"num_beams": 3, "do_sample": True}, "beam_sample"),
    ({"num_beams": 3, "do_sample": True, "temperature": 0.0}, "beams"),
    ({"prompt_lookup_num_tokens": 3, "do_sample": True}, "lookup"),
    ({"draft_model": object()}, "draft"),
  ]:
    options = parse_options(given)
    assert strategy(options) == expected
    check_options(options, CONFIG, [5], [0])
  assert is_sampled(parse_options({"do_sample": True}))


def test_end_tokens():
  assert end_ids(parse_options({}), 7) == (7,)
  assert end_ids(parse_options({}), None) == ()
  assert end_ids(parse_options({"eos_token_id": 3}), 7) == (3,)
  assert end_ids(parse_options({"eos_token_id": [3, 4]}), 7) == (3, 4)
  for none in (-1, [-1], [], np.array([-1])):
    assert end_ids(parse_options({"eos_token_id": none}), 7) == ()


def lengths(prompt_lengths, context_length=32, **given):
  resolved = resolve_lengths(parse_options(given), prompt_lengths, context_length)
  return resolved.min_lengths, resolved.limits


def test_lengths_are_totals_of_each_prompt():
  assert lengths([5, 2]) == ((0, 0), (25, 22))
  assert lengths([5, 2], max_new_tokens=3) == ((0, 0), (8, 5))
  assert lengths([5, 2], max_length=9) == ((0, 0), (9, 9))
  assert lengths([5, 2], min_new_tokens=2) == ((7, 4), (25, 22))
  assert lengths([5, 2], min_length=6) == ((6, 6), (25, 22))
  assert lengths([5, 2], min_new_tokens=3, max_new_tokens=3) == ((8, 5), (8, 5))


def test_the_context_is_an_error_or_a_window():
  assert lengths([30, 12]) == ((0, 0), (32, 32))  # no length was asked for
  assert lengths([30], max_new_tokens=2) == ((0,), (32,))
  assert lengths([30], max_length=32) == ((0,), (32,))
  for given in ({"max_new_tokens": 3}, {"max_length": 33}):
    with pytest.raises(ConfigError, match='beyond_context="slide"'):
      lengths([30], **given)
  for length in (32, 33):
    with pytest.raises(ConfigError, match=f"a prompt has {length} tokens, and the model's context"):
      lengths([2, length])
    assert lengths([length], beyond_context="slide", max_new_tokens=9) == ((0,), (length + 9,))
  assert lengths([40], beyond_context="slide") == ((0,), (60,))
  assert lengths([5], beyond_context="slide", max_length=100) == ((0,), (100,))


def test_prompts_must_be_there():
  with pytest.raises(ConfigError, match="there are no prompts"):
    check(prompt_lengths=[])
  with pytest.raises(ConfigError, match="a prompt has no tokens"):
    check(prompt_lengths=[3, 0])


def test_bad_words_are_spelled_with_and_without_a_space():
  tokenizer = make_char_tokenizer(["abc "], end_token=None)
  a, b, space = (tokenizer.encode(x)[0] for x in "ab ")
  options = encode_bad_words(parse_options({"bad_words": "ab", "bad_words_ids": [[2]]}), tokenizer)
  assert options.bad_words_ids == ((2,), (a, b), (space, a, b)) and options.bad_words == ()
  with pytest.raises(DataError):
    encode_bad_words(parse_options({"bad_words": "z"}), tokenizer)
  no_space = make_char_tokenizer(["abc"], end_token=None)
  assert len(encode_bad_words(parse_options({"bad_words": "ab"}), no_space).bad_words_ids) == 1
  with pytest.raises(ConfigError, match="bad_words needs a tokenizer"):
    encode_bad_words(parse_options({"bad_words": "ab"}), None)
  assert encode_bad_words(parse_options({}), None) == DecodingOptions()


def test_padding_is_removed_at_either_side():
  rows = [[0, 0, 5, 6], [7, 8, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]]
  mask = [[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
  options = parse_options({"attention_mask": mask})
  assert remove_padding(rows, options) == [[5, 6], [7, 8], [], [1, 2, 3, 4]]
  assert remove_padding(rows, parse_options({})) is rows
  assert remove_padding(np.array(rows), options)[0].tolist() == [5, 6]
  with pytest.raises(ConfigError, match="zeros between the tokens of row 1"):
    remove_padding([[1, 2, 3]] * 2, parse_options({"attention_mask": [[1, 1, 1], [1, 0, 1]]}))
  for wrong in (rows[:2], [row[:3] for row in rows], [*rows[:3], [1]]):
    with pytest.raises(ConfigError, match="attention_mask has 4 rows of 4"):
      remove_padding(wrong, options)


def test_every_option_explains_itself():
  for field in FIELDS.values():
    assert len(field.metadata["help"]) > 15
    assert field.type is not None


def test_the_module_starts_without_jax():
  code = f"import {options_module.__name__}, sys; assert 'jax' not in sys.modules"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
