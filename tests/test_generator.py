"""The generator: the same text alone or in company, whatever pads it, streamed or not."""

import functools
import json

import numpy as np
import pytest
from families import FAMILIES, make_config, make_params

import gptjax
from gptjax.api import Model
from gptjax.cli.main import main
from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.errors import UserError
from gptjax.generate import programs

PROMPTS = [[5, 3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 1, 8, 2, 8]]
STRATEGIES = [
  {},
  {"do_sample": True, "top_k": 9, "top_p": 0.9, "seed": 3, "num_return_sequences": 2},
  {"num_beams": 3, "no_repeat_ngram_size": 2, "num_return_sequences": 3, "early_stopping": True},
]
# A change must be the model's or the draw's doing; logits of the same sums in another order.
SAME = 1e-5


@functools.cache
def make_model(family=None, with_tokenizer=False):
  config = FAMILIES[family] if family else make_config("gpt2", num_layers=1)
  letters = "".join(chr(ord("0") + i) for i in range(config.vocab_size))
  tokenizer = make_char_tokenizer([letters]) if with_tokenizer else None
  return Model(config, make_params(config), tokenizer)


def greedy_by_hand(model, prompt, count):
  """Recomputes the whole row for every token."""
  row = list(prompt)
  for _ in range(count):
    padded = np.pad(row, (0, model.config.context_length - len(row)))
    row.append(int(np.argmax(model([padded])[0, len(row) - 1])))
  return row


@pytest.mark.parametrize(
  "family",
  # What GPT-Neo and GPT-NeoX have, others have too.
  [
    pytest.param(family, marks=pytest.mark.slow) if family.startswith("gptneo") else family
    for family in FAMILIES
  ],
)
def test_greedy_without_a_cache_is_the_same(family):
  model = make_model(family)
  out = model.generate(PROMPTS, max_new_tokens=7)
  for row, prompt in zip(out.tokens, PROMPTS):
    assert row[: len(prompt) + 7].tolist() == greedy_by_hand(model, prompt, 7)
  assert out.finish_reasons == ["length"] * 3


@pytest.mark.parametrize("options", STRATEGIES)
def test_a_prompt_does_not_know_its_companions(options):
  model = make_model()
  together = model.generate(PROMPTS, max_new_tokens=7, **options)
  alone = model.generate(PROMPTS[:1], max_new_tokens=7, **options)
  copies = options.get("num_return_sequences", 1)
  np.testing.assert_array_equal(alone.tokens, together.tokens[:copies, : alone.tokens.shape[1]])
  np.testing.assert_allclose(alone.logprobs, together.logprobs[:copies], rtol=SAME, atol=SAME)


def test_padding_on_either_side_is_cut_by_its_mask():
  model = make_model()
  expected = model.generate([PROMPTS[2]], max_new_tokens=5).tokens[0, 5:]
  for padded, mask in (
    ([[0, 0, *PROMPTS[2]]], [[0, 0, 1, 1, 1, 1, 1]]),
    ([[*PROMPTS[2], 9]], [[1, 1, 1, 1, 1, 0]]),
  ):
    out = model.generate(padded, max_new_tokens=5, attention_mask=mask)
    np.testing.assert_array_equal(out.tokens[0, 5:], expected)


def test_streamed_text_is_the_text():
  model = make_model(with_tokenizer=True)
  out = model.generate("1234", max_new_tokens=9)
  pieces = list(model.stream("1234", max_new_tokens=9))
  assert "".join(piece.text for piece in pieces) == out.texts[0]
  assert [piece.token for piece in pieces] == out.tokens[0, 4:].tolist()
  assert pieces[-1].finish_reason == "length"


def test_a_stop_text_across_tokens_ends_the_row_and_is_cut():
  model = make_model(with_tokenizer=True)
  text = model.generate("1234", max_new_tokens=9).texts[0]
  stop = text[3:5]
  out = model.generate("1234", max_new_tokens=9, stop=stop)
  assert out.texts[0] == text[: text.index(stop)]
  assert out.finish_reasons == ["stop"]
  streamed = "".join(piece.text for piece in model.stream("1234", max_new_tokens=9, stop=stop))
  assert streamed == out.texts[0]


@pytest.mark.parametrize("options", STRATEGIES)
def test_a_function_says_what_may_follow_each_prompt(options):
  """Asked before each token, by another program; where it allows all, the text is the same."""
  model = make_model()
  free = model.generate(PROMPTS, max_new_tokens=7, **options)
  all_ids = range(model.config.vocab_size)
  asked = model.generate(
    PROMPTS, max_new_tokens=7, allowed_tokens=lambda prompt, ids: all_ids, **options
  )
  np.testing.assert_array_equal(asked.tokens, free.tokens)
  np.testing.assert_allclose(asked.logprobs, free.logprobs, rtol=SAME, atol=SAME)

  def allow(prompt, ids):
    assert ids[: len(PROMPTS[prompt])] == PROMPTS[prompt]
    return [(len(ids) + prompt) % 20, 20 + (len(ids) + prompt) % 20]

  out = model.generate(PROMPTS, max_new_tokens=7, allowed_tokens=allow, **options)
  assert (out.tokens[0] != free.tokens[0]).any()
  copies = options.get("num_return_sequences", 1)
  for row, num_new in enumerate(out.num_new):
    start = len(PROMPTS[row // copies])
    for place in range(start, start + num_new):
      ids = out.tokens[row, :place].tolist()
      assert out.tokens[row, place] in allow(row // copies, ids)


def test_an_end_token_ends_the_row():
  model = make_model()
  plain = model.generate([PROMPTS[0]], max_new_tokens=7).tokens[0, 9:]
  end = int(plain[3])
  out = model.generate([PROMPTS[0]], max_new_tokens=7, eos_token_id=end)
  assert out.num_new[0] == plain.tolist().index(end) + 1
  assert out.finish_reasons == ["stop"]


def test_a_second_call_of_the_same_sizes_compiles_nothing():
  model, compiled = make_model(), []
  model.generate([[1, 2, 3]], max_new_tokens=4)
  stop = programs.on_compile(compiled.append)
  model.generate([[4, 5, 6, 7]], max_new_tokens=6)
  assert not compiled
  model.generate([[4, 5, 6, 7]] * 5, max_new_tokens=6)
  stop()
  assert any("5 rows" in line for line in compiled)


def test_logprobs_are_those_of_the_model_and_alternatives_begin_with_the_likeliest():
  model = make_model()
  out = model.generate([PROMPTS[0]], max_new_tokens=5, top_logprobs=3)
  logits = np.asarray(model([out.tokens[0]]), np.float64)[0, 8:-1]
  expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  np.testing.assert_allclose(out.logprobs[0], expected.max(-1), rtol=SAME, atol=SAME)
  np.testing.assert_array_equal(out.top_tokens[0, :, 0], out.tokens[0, 9:])
  beams = model.generate([PROMPTS[0]], max_new_tokens=5, num_beams=1 + 1, top_logprobs=3)
  assert (beams.top_logprobs[0, :, 0] >= beams.logprobs[0] - SAME).all()


def test_beyond_the_context_is_refused_or_slides():
  model = make_model()
  with pytest.raises(UserError, match="context"):
    model.generate([PROMPTS[0]], max_new_tokens=40)
  out = model.generate(PROMPTS, max_new_tokens=40, beyond_context="slide")
  assert out.num_new.tolist() == [40, 40, 40]
  inside = model.generate(PROMPTS, max_new_tokens=10)
  np.testing.assert_array_equal(out.tokens[0, :19], inside.tokens[0, :19])


def test_set_seed_repeats_the_calls_that_follow():
  model, options = make_model(), {"max_new_tokens": 8, "do_sample": True}
  try:
    drawn = []
    for _ in range(2):
      gptjax.set_seed(42)
      drawn.append([model.generate([[1]], **options).tokens for _ in range(2)])
  finally:
    gptjax.set_seed(None)
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert (drawn[0][0] != drawn[0][1]).any()


def test_the_pipeline_has_transformers_shape():
  generator = gptjax.pipeline("text-generation", model=make_model(with_tokenizer=True))
  out = generator("123", max_length=10, num_return_sequences=3, top_p=0.95, top_k=50, seed=1)
  assert len(out) == 3
  assert all(list(item) == ["generated_text"] for item in out)
  assert all(item["generated_text"].startswith("123") for item in out)
  nested = generator(["123", "4"], max_new_tokens=3, return_full_text=False, seed=1)
  assert [len(item[0]["generated_text"]) for item in nested] == [3, 3]
  with pytest.raises(UserError, match="text-generation"):
    gptjax.pipeline("text-generatoin", model=make_model())


def test_a_pipeline_keeps_what_it_was_made_with():
  model = make_model(with_tokenizer=True)
  made = gptjax.pipeline(
    "text-generation", model=model, max_length=8, do_sample=False, return_full_text=False
  )
  [item] = made("123")
  assert item["generated_text"] == model.generate("123", max_length=8).texts[0]
  assert len(item["generated_text"]) == 5
  # What a call says goes before it; a total and a number of new tokens are one thing.
  [item] = made("123", max_new_tokens=2, return_full_text=True)
  assert item["generated_text"].startswith("123") and len(item["generated_text"]) == 5


@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    ({"max_lenght": 8}, "pipeline has no option 'max_lenght'; did you mean \"max_length\""),
    ({"pad_toekn": "[PAD]"}, 'did you mean "pad_token"'),
    ({"top_k": -1}, "top_k is -1; it must be"),
    ({"dtype": "bfloat16"}, "dtype has no effect on a model that is loaded already"),
  ],
)
def test_a_pipeline_refuses_at_once(options, complaint):
  with pytest.raises(UserError, match=complaint):
    gptjax.pipeline("text-generation", model=make_model(with_tokenizer=True), **options)


@pytest.mark.parametrize(
  ("prompts", "options", "complaint"),
  [
    ([[]], {}, "no tokens"),
    ([[1, 99]], {}, "99"),
    ([[1]], {"top_kk": 3}, "top_k"),
    ([[1]], {"top_k": 3}, "no effect"),
    ([[1]], {"max_length": 5, "max_new_tokens": 5}, "one of them"),
    ([[1]], {"draft_model": object()}, "draft_model is a object"),
    ([[1]], {"stop": "x"}, "tokenizer"),
    ("text", {}, "tokenizer"),
  ],
)
def test_bad_input_is_one_line(prompts, options, complaint):
  with pytest.raises(UserError, match=complaint) as error:
    make_model().generate(prompts, **options)
  assert "\n" not in str(error.value)


def test_the_command_line(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("GPTJAX_CACHE", "off")
  model = make_model(with_tokenizer=True)
  model.save(tmp_path / "run", format="gptjax")
  flags = ["generate", "--model", str(tmp_path / "run"), "--max-new-tokens", "5"]
  assert main([*flags, "--prompt", "123", "--json"]) == 0
  result = json.loads(capsys.readouterr().out)
  expected = model.generate("123", max_new_tokens=5)
  assert result["texts"] == expected.texts
  assert result["tokens"] == expected.tokens.tolist()
  assert main([*flags, "--prompt", "123", "--stream"]) == 0
  assert capsys.readouterr().out == "123" + expected.texts[0] + "\n"
  stops = [expected.texts[0][4], expected.texts[0][2:4]]
  assert main([*flags, "--prompt", "123", *(f"--stop={stop}" for stop in stops), "--json"]) == 0
  result = json.loads(capsys.readouterr().out)
  assert result["texts"] == model.generate("123", max_new_tokens=5, stop=stops).texts
  assert result["texts"] == [expected.texts[0][: expected.texts[0].index(stops[1])]]
  assert main([*flags, "--prompt", "123", "--num-beam", "3"]) == 2
  assert "--num-beams" in capsys.readouterr().err
