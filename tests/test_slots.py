"""Rows that join a running batch give what they give alone."""

import dataclasses

import jax
import numpy as np
import pytest
from families import make_config, make_params

from gptjax.api import Model
from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.errors import UserError
from gptjax.generate import programs
from gptjax.generate.generator import Generator
from gptjax.generate.options import DecodingOptions
from gptjax.generate.slots import Produced, Read, Slots

REQUESTS = [
  ([3, 5, 7], DecodingOptions(max_new_tokens=9, repetition_penalty=1.5)),
  ([9] * 17, DecodingOptions(max_new_tokens=6, top_logprobs=3)),
  ([1, 2], DecodingOptions(max_new_tokens=8, do_sample=True, top_k=9, seed=4)),
  (
    [8, 4, 4, 6],
    DecodingOptions(
      max_new_tokens=7, do_sample=True, top_p=0.8, seed=5, num_return_sequences=2, logit_bias={3: 2}
    ),
  ),
  ([11], DecodingOptions(max_new_tokens=12, no_repeat_ngram_size=2, eos_token_id=[13, 14, 15])),
  ([5, 6, 7, 8], DecodingOptions(max_new_tokens=5, bad_words_ids=[[3], [1, 2]], min_new_tokens=4)),
]


def make_generator(family="gpt2", tokenizer=None, context_length=40):
  config = make_config(family, context_length=context_length)
  return Generator(make_params(config), config, tokenizer)


def admit(slots, prompt, options, **kinds):
  return slots.admit(slots.check(prompt, options, **kinds))


def serve(slots, requests, steps_between=2):
  """Admits a request every few steps; returns the tokens and log-probabilities of each text."""
  found, text_of, waiting = {}, {}, list(enumerate(requests))
  ticks = 0
  while waiting or slots.active:
    if waiting and ticks % steps_between == 0:
      copies = waiting[0][1][1].num_return_sequences
      if slots.num_free >= copies:
        index, (prompt, options) = waiting.pop(0)
        for copy, slot in enumerate(admit(slots, prompt, options)):
          text_of[slot] = index, copy
          found[index, copy] = []
    for one in slots.step():
      if isinstance(one, Produced):
        found[text_of[one.slot]].append(one)
    ticks += 1
  return found


# One family every day: that with local windows. The cached step of each is in test_sample.py.
slow = pytest.mark.slow


@pytest.mark.parametrize(
  "family", ["gpt3", pytest.param("gpt2", marks=slow), pytest.param("gptj", marks=slow)]
)
def test_rows_in_company_are_what_they_are_alone(family):
  generator = make_generator(family)
  found = serve(Slots(generator, 3, 40), REQUESTS)
  for index, (prompt, options) in enumerate(REQUESTS):
    alone = generator.generate([prompt], options)
    for copy in range(options.num_return_sequences):
      row, count = found[index, copy], int(alone.num_new[copy])
      expected = alone.tokens[copy, len(prompt) : len(prompt) + count]
      assert [one.token for one in row] == expected.tolist()
      assert row[-1].finish_reason == alone.finish_reasons[copy]
      assert all(one.finish_reason is None for one in row[:-1])
      # float32 sums in another order: another number of rows and slots.
      np.testing.assert_allclose(
        [one.logprob for one in row], alone.logprobs[copy, :count], rtol=1e-4, atol=1e-5
      )
      if options.top_logprobs:
        got = [[token for token, _ in one.alternatives] for one in row]
        assert got == alone.top_tokens[copy, :count].tolist()


def test_a_second_round_compiles_nothing_and_memory_stays():
  slots = Slots(make_generator(), 3, 40)
  first = serve(slots, REQUESTS)
  shapes = [x.shape for x in jax.tree.leaves((slots._cache, slots._texts))]
  said = []
  stop = programs.on_compile(said.append)
  try:
    second = serve(slots, REQUESTS)
  finally:
    stop()
  assert said == []
  assert [[one.token for one in row] for row in second.values()] == [
    [one.token for one in row] for row in first.values()
  ]
  assert [x.shape for x in jax.tree.leaves((slots._cache, slots._texts))] == shapes


def test_a_released_slot_is_used_again_without_a_trace():
  generator = make_generator()
  slots = Slots(generator, 1, 40)
  [slot] = admit(slots, [9] * 20, DecodingOptions(max_new_tokens=15, do_sample=True, seed=1))
  while not any(isinstance(event, Produced) for event in slots.step()):
    pass
  slots.release(slot)
  assert (slots.num_free, slots.step()) == (1, [])
  prompt, options = REQUESTS[0]
  row = serve(slots, [(prompt, options)])[0, 0]
  assert [one.token for one in row] == generator.generate([prompt], options).tokens[0, 3:].tolist()


def test_warm_up_compiles_what_comes_later():
  slots = Slots(make_generator(), 2, 40)
  told, said = [], []
  kinds = {}, {"do_sample": True, "min_p": 0.1}, {"repetition_penalty": 1.5, "top_logprobs": 4}
  every = [DecodingOptions(**kind) for kind in (*kinds, kinds[1] | kinds[2])]
  slots.warm_up(every[-1], progress=lambda *done: told.append(done))
  assert told == [(1, 2), (2, 2)]
  stop = programs.on_compile(said.append)
  try:
    serve(slots, [([5] * length, options) for length in (4, 19) for options in every])
  finally:
    stop()
  assert said == []


@pytest.mark.parametrize(
  "options", [{"num_beams": 2}, {"beyond_context": "slide"}, {"num_return_sequences": 3}]
)
def test_what_slots_cannot_do_is_refused(options):
  slots = Slots(make_generator(), 2, 40)
  do_sample = {"do_sample": True} if "num_return_sequences" in options else {}
  with pytest.raises(UserError):
    slots.check([1, 2], DecodingOptions(**options, **do_sample))


def test_a_prompt_is_scored_while_it_is_read():
  generator = make_generator(context_length=100)
  slots, prompt = Slots(generator, 2, 100), [7 * i % 61 for i in range(90)]
  options = DecodingOptions(max_new_tokens=3, top_logprobs=2)
  admit(slots, [4, 5], DecodingOptions(max_new_tokens=9))
  admit(slots, prompt, options, wants="scores")
  events = [event for _ in range(12) for event in slots.step()]
  [scored] = [event for event in events if isinstance(event, Read) and event.logprobs]
  model = Model(generator.config, make_params(generator.config))
  log_probs_LV = jax.nn.log_softmax(model([prompt])[0], axis=-1)
  expected = [float(log_probs_LV[i, token]) for i, token in enumerate(prompt[1:])]
  np.testing.assert_allclose(scored.logprobs, expected, rtol=1e-4, atol=1e-5)
  tops = [[token for token, _ in pairs] for pairs in scored.alternatives]
  assert tops == np.argsort(-log_probs_LV[:-1])[:, :2].tolist()
  new = [event.token for event in events if isinstance(event, Produced) and event.slot == 1]
  assert new == generator.generate([prompt], options).tokens[0, 90:].tolist()


def test_a_prompt_that_fills_the_context_is_read_only():
  slots = Slots(make_generator(), 1, 40)
  admit(slots, [3] * 40, DecodingOptions(), wants="scores", is_continued=False)
  events = [event for _ in range(3) for event in slots.step()]
  assert [type(event) for event in events] == [Read] and len(events[0].logprobs) == 39
  assert slots.num_free == 1
  with pytest.raises(UserError, match="41"):
    slots.check([3] * 41, DecodingOptions(), is_continued=False)


def test_texts_come_in_whole_characters_and_stop_before_stop_texts():
  tokenizer = make_char_tokenizer(["".join(map(chr, range(0x3042, 0x3042 + 61)))])
  generator = make_generator(tokenizer=tokenizer)
  options = DecodingOptions(max_new_tokens=20, do_sample=True, seed=3)
  whole = generator.generate([[1, 2]], options).texts[0]
  stop = whole[7:10]
  slots = Slots(generator, 2, 40)
  found = serve(slots, [([1, 2], dataclasses.replace(options, stop=[stop])), ([1, 2], options)], 1)
  stopped, free = found[0, 0], found[1, 0]
  assert "".join(one.text for one in free) == whole
  assert "".join(one.text for one in stopped) == whole[: whole.find(stop)]
  assert (stopped[-1].finish_reason, free[-1].finish_reason) == ("stop", "length")
  # The slot is free at once.
  assert len(stopped) == whole.find(stop) + len(stop)


def test_a_text_that_leaves_while_its_prompt_is_read_takes_nothing_with_it():
  generator = make_generator()
  options = DecodingOptions(max_new_tokens=4, do_sample=True, seed=8, num_return_sequences=2)
  slots, prompt = Slots(generator, 2, 40), [i % 61 for i in range(30)]
  first, second = admit(slots, prompt, options)
  slots._read_chunk(slots._readings[0], 16)
  slots.release(first)
  events = [event for _ in range(6) for event in slots.step()]
  new = [event.token for event in events if isinstance(event, Produced)]
  assert new == generator.generate([prompt], options).tokens[1, 30:].tolist()
  assert second == 1 and slots.num_free == 2


def test_the_embedding_of_a_prompt_is_the_mean_of_its_hidden_states():
  generator = make_generator(context_length=100)
  slots, prompt = Slots(generator, 1, 100), [5 * i % 61 for i in range(83)]
  admit(slots, prompt, DecodingOptions(), wants="embedding", is_continued=False)
  [read] = slots.step()
  hidden_LD = Model(generator.config, make_params(generator.config)).hidden_states([prompt])[0]
  np.testing.assert_allclose(read.mean_D, hidden_LD.mean(axis=0), rtol=1e-4, atol=1e-5)
  assert read.is_last and slots.num_free == 1
