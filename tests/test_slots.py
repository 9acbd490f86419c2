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
from gptjax.generate.slot_batch import Size, make_sizes
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
# All that the requests use.
MOST = DecodingOptions(
  max_new_tokens=9,
  do_sample=True,
  top_k=9,
  top_p=0.8,
  repetition_penalty=1.5,
  no_repeat_ngram_size=2,
  logit_bias={3: 2},
  bad_words_ids=[[3], [1, 2]],
  eos_token_id=[13, 14, 15],
  min_new_tokens=4,
  top_logprobs=4,
)
CONTEXT = 84


def make_slots(family="gpt3"):
  config = make_config(family, context_length=CONTEXT)
  tokenizer = make_char_tokenizer(["".join(map(chr, range(0x3042, 0x3042 + 61)))])
  slots = Slots(Generator(make_params(config), config, tokenizer), 3, CONTEXT)
  slots.warm_up(MOST)
  return slots


@pytest.fixture(scope="module")
def warm():
  """Slots, with local windows, that have compiled all they need."""
  return make_slots()


@pytest.fixture
def slots(warm):
  yield warm
  for slot in warm.active:
    warm.release(slot)


@pytest.fixture
def compiled():
  """What was compiled since."""
  said = []
  stop = programs.on_compile(said.append)
  yield said
  stop()


def admit(slots, prompt, options, **kinds):
  return slots.admit(slots.check(prompt, options, **kinds))


def serve(slots, requests, steps_between=2):
  """Admits a request every few steps; returns what each text, (request, copy), was given."""
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


def tokens_of(row):
  return [one.token for one in row]


def check_as_generated(generator, prompt, options, rows):
  alone = generator.generate([prompt], options)
  for copy, row in enumerate(rows):
    count = int(alone.num_new[copy])
    assert tokens_of(row) == alone.tokens[copy, len(prompt) : len(prompt) + count].tolist()
    assert row[-1].finish_reason == alone.finish_reasons[copy]
    assert all(one.finish_reason is None for one in row[:-1])
    # float32 sums in another order: another number of rows and slots.
    logprobs = [one.logprob for one in row]
    np.testing.assert_allclose(logprobs, alone.logprobs[copy, :count], rtol=1e-4, atol=1e-5)
    if options.top_logprobs:
      got = [[token for token, _ in one.alternatives] for one in row]
      assert got == alone.top_tokens[copy, :count].tolist()


def test_rows_in_company_are_what_they_are_alone(slots, compiled):
  together = serve(slots, REQUESTS)
  alone = {}
  for index, request in enumerate(REQUESTS):
    of_one = serve(slots, [request])
    alone |= {(index, copy): row for (_, copy), row in of_one.items()}
  assert {text: tokens_of(row) for text, row in together.items()} == {
    text: tokens_of(row) for text, row in alone.items()
  }
  assert compiled == []
  for index in (1, 3):
    rows = [row for (request, _), row in together.items() if request == index]
    check_as_generated(slots._generator, *REQUESTS[index], rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gpt3", "gptj"])
def test_slots_give_what_generate_gives(family):
  slots = make_slots(family)
  together = serve(slots, REQUESTS)
  for index, request in enumerate(REQUESTS):
    rows = [row for (number, _), row in together.items() if number == index]
    check_as_generated(slots._generator, *request, rows)


def test_arrays_grow_at_once_and_shrink_in_time(slots):
  request = [4, 5, 6], DecodingOptions(max_new_tokens=80, do_sample=True, seed=6)
  alone = tokens_of(serve(slots, [request])[0, 0])
  assert slots._batch.size.num_rows == 1
  short = DecodingOptions(max_new_tokens=5)
  _, _, [slot] = admit(slots, [9], short), admit(slots, [8], short), admit(slots, *request)
  new, rows = [], []
  while slots.active:
    events = slots.step()
    new += [one.token for one in events if isinstance(one, Produced) and one.slot == slot]
    rows.append(slots._batch.size.num_rows)
  assert new == alone
  assert rows[0] == 3 and rows[-1] == 1 and 30 < rows.count(3) < 50


def test_texts_for_short_positions_have_a_size_of_their_own():
  assert make_sizes(1, 1024) == [Size(1, 1024)]
  assert make_sizes(16, 1024) == [Size(1, 1024), Size(4, 1024), Size(16, 256), Size(16, 1024)]
  assert make_sizes(6, 64) == [Size(1, 64), Size(4, 64), Size(6, 64)]


def test_a_released_slot_is_used_again_without_a_trace(slots):
  expected = tokens_of(serve(slots, [REQUESTS[0]])[0, 0])
  for _ in range(3):
    admit(slots, [9] * 20, DecodingOptions(max_new_tokens=15, do_sample=True, seed=1))
  while not any(isinstance(event, Produced) for event in slots.step()):
    pass
  for slot in slots.active:
    slots.release(slot)
  assert (slots.num_free, slots.step()) == (3, [])
  assert tokens_of(serve(slots, [REQUESTS[0]])[0, 0]) == expected


def test_progress_of_a_start_is_told(slots):
  told = []
  slots.warm_up(MOST, progress=lambda *done: told.append(done))
  assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
  "options", [{"num_beams": 2}, {"beyond_context": "slide"}, {"num_return_sequences": 4}]
)
def test_what_slots_cannot_do_is_refused(slots, options):
  do_sample = {"do_sample": True} if "num_return_sequences" in options else {}
  with pytest.raises(UserError):
    slots.check([1, 2], DecodingOptions(**options, **do_sample))


def test_a_prompt_is_scored_while_it_is_read(slots):
  prompt = [7 * i % 61 for i in range(80)]
  options = DecodingOptions(max_new_tokens=3, top_logprobs=2)
  admit(slots, [4, 5], DecodingOptions(max_new_tokens=9))
  [slot] = admit(slots, prompt, options, wants="scores")
  events = [event for _ in range(12) for event in slots.step()]
  [scored] = [event for event in events if isinstance(event, Read) and event.logprobs]
  config = slots._generator.config
  log_probs_LV = jax.nn.log_softmax(Model(config, make_params(config))([prompt])[0], axis=-1)
  expected = [float(log_probs_LV[i, token]) for i, token in enumerate(prompt[1:])]
  np.testing.assert_allclose(scored.logprobs, expected, rtol=1e-4, atol=1e-5)
  tops = [[token for token, _ in pairs] for pairs in scored.alternatives]
  assert tops == np.argsort(-log_probs_LV[:-1])[:, :2].tolist()
  new = [event.token for event in events if isinstance(event, Produced) and event.slot == slot]
  assert new == slots._generator.generate([prompt], options).tokens[0, 80:].tolist()


def test_a_prompt_that_fills_the_context_is_read_only(slots):
  admit(slots, [3] * CONTEXT, DecodingOptions(), wants="scores", is_continued=False)
  events = [event for _ in range(3) for event in slots.step()]
  assert [type(event) for event in events] == [Read] and len(events[0].logprobs) == CONTEXT - 1
  assert slots.num_free == 3
  with pytest.raises(UserError, match=str(CONTEXT + 1)):
    slots.check([3] * (CONTEXT + 1), DecodingOptions(), is_continued=False)


def test_texts_come_in_whole_characters_and_stop_before_stop_texts(slots):
  options = DecodingOptions(max_new_tokens=20, do_sample=True, seed=3)
  whole = "".join(one.text for one in serve(slots, [([1, 2], options)])[0, 0])
  assert len(whole) == 20
  stop = whole[7:10]
  found = serve(slots, [([1, 2], dataclasses.replace(options, stop=[stop])), ([1, 2], options)], 1)
  stopped, free = found[0, 0], found[1, 0]
  assert "".join(one.text for one in free) == whole
  assert "".join(one.text for one in stopped) == whole[: whole.find(stop)]
  assert (stopped[-1].finish_reason, free[-1].finish_reason) == ("stop", "length")
  # The slot is free at once.
  assert len(stopped) == whole.find(stop) + len(stop)


def test_a_text_that_leaves_while_its_prompt_is_read_takes_nothing_with_it(slots):
  options = DecodingOptions(max_new_tokens=4, do_sample=True, seed=8, num_return_sequences=2)
  prompt = [i % 61 for i in range(30)]
  expected = tokens_of(serve(slots, [(prompt, options)])[0, 1])
  first, _ = admit(slots, prompt, options)
  slots._read_chunk(slots._readings[0], 16)
  slots.release(first)
  events = [event for _ in range(6) for event in slots.step()]
  assert [event.token for event in events if isinstance(event, Produced)] == expected
  assert slots.num_free == 3


def test_the_embedding_of_a_prompt_is_the_mean_of_its_hidden_states(slots):
  prompt = [5 * i % 61 for i in range(80)]
  admit(slots, prompt, DecodingOptions(), wants="embedding", is_continued=False)
  [read] = slots.step()
  config = slots._generator.config
  hidden_LD = Model(config, make_params(config)).hidden_states([prompt])[0]
  np.testing.assert_allclose(read.mean_D, hidden_LD.mean(axis=0), rtol=1e-4, atol=1e-5)
  assert read.is_last and slots.num_free == 3
