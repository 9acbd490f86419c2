"""The API: what OpenAI's clients send and read, and what is refused."""

import asyncio
import base64
import dataclasses
import json
import math
import threading
import time

import numpy as np
import pytest
from serving import LIMITS, make_generator, serve
from starlette.testclient import TestClient
from task_models import make_model

from gptjax.data.examples import Example
from gptjax.evaluate.classify import Classifier
from gptjax.evaluate.predictions import describe_predictions
from gptjax.generate.generator import Generator
from gptjax.generate.options import DecodingOptions
from gptjax.generate.slots import Produced, Prompt
from gptjax.serve.app import Access, make_app
from gptjax.serve.chat_template import ChatTemplate
from gptjax.serve.engine import Call, Engine, Event
from gptjax.serve.schemas import Decoding
from gptjax.serve.served import Served

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def generator():
  return make_generator()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
  return Classifier(make_model(tmp_path_factory.mktemp("task"), "entailment", max_length=12))


@pytest.fixture(scope="module")
def server(generator, classifier):
  with serve(generator, classifier=classifier) as both:
    yield both


@pytest.fixture
def client(server):
  return server[0]


@pytest.fixture
def engine(server):
  return server[1]


def complete(client, **body):
  response = client.post("/v1/completions", json=body)
  assert response.status_code == 200, response.text
  return response.json()


def read_stream(response):
  """Returns the objects of a stream, which must end as streams do."""
  assert response.headers["content-type"].startswith("text/event-stream")
  lines = [line for line in response.text.split("\n\n") if line]
  assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
  return [json.loads(line[6:]) for line in lines[:-1]]


def read_error(response, status=400):
  """Returns what an answer that is an error has under "error", in OpenAI's format."""
  assert response.status_code == status, response.text
  error = response.json()["error"]
  assert set(error) == {"message", "type", "param", "code"}
  return error


def refused(response, status=400):
  """Returns the message of an answer that is an error."""
  return read_error(response, status)["message"]


@pytest.fixture(scope="module")
def greedy_texts(generator):
  """What generate gives for two prompts, alternatives included."""
  options = DecodingOptions(max_new_tokens=12, top_logprobs=2)
  return {prompt: generator.generate(prompt, options) for prompt in ("hello", "今日")}


def test_completions_are_those_of_generate(client, greedy_texts):
  answer = complete(client, prompt=list(greedy_texts), max_tokens=12, logprobs=2, **GREEDY)
  assert [choice["text"] for choice in answer["choices"]] == [
    out.texts[0] for out in greedy_texts.values()
  ]
  assert [choice["index"] for choice in answer["choices"]] == [0, 1]
  assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
  count = sum(len(out.prompts[0]) for out in greedy_texts.values())
  assert answer["usage"] == {
    "prompt_tokens": count,
    "completion_tokens": 24,
    "total_tokens": count + 24,
  }
  for choice, out in zip(answer["choices"], greedy_texts.values()):
    logprobs = choice["logprobs"]
    np.testing.assert_allclose(logprobs["token_logprobs"], out.logprobs[0], rtol=1e-4, atol=1e-5)
    for logprob, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"]):
      # Greedy: the token is the best of its alternatives, to the last bit.
      assert logprob == max(top.values())


def test_token_ids_and_repeated_choices(client, greedy_texts):
  ids = greedy_texts["hello"].prompts[0]
  of_ids = complete(client, prompt=ids, max_tokens=12, n=3, **GREEDY)
  assert [choice["text"] for choice in of_ids["choices"]] == greedy_texts["hello"].texts * 3
  assert [choice["index"] for choice in of_ids["choices"]] == [0, 1, 2]
  assert of_ids["seed"] is None and of_ids["usage"]["completion_tokens"] == 36


def test_echo_scores_the_prompt_as_the_harness_reads_it(client, generator, greedy_texts):
  out = greedy_texts["hello"]
  text = "hello" + out.texts[0]
  ids = [*out.prompts[0], *out.tokens[0, len(out.prompts[0]) :].tolist()]
  choice = complete(client, prompt=ids, max_tokens=1, logprobs=1, echo=True, **GREEDY)["choices"][0]
  logprobs, start = choice["logprobs"], len(out.prompts[0])
  assert choice["text"].startswith(text)
  assert len(logprobs["tokens"]) == len(ids) + 1
  assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
  found = logprobs["token_logprobs"][start:-1]
  np.testing.assert_allclose(found, out.logprobs[0], rtol=1e-4, atol=1e-5)
  assert found == [max(top.values()) for top in logprobs["top_logprobs"][start:-1]]
  scored = complete(client, prompt=ids, max_tokens=0, logprobs=1, echo=True, **GREEDY)
  assert scored["choices"][0]["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]
  assert scored["choices"][0]["text"] == generator.tokenizer.decode(ids)
  assert scored["usage"]["completion_tokens"] == 0


def test_tokens_are_named_by_their_text_or_bytes(client, generator):
  prompt = "hello 今日🙂"
  ids = generator.tokenizer.encode(prompt)
  body = {"prompt": prompt, "max_tokens": 0, "logprobs": 0, "echo": True}
  logprobs = complete(client, **body, **GREEDY)["choices"][0]["logprobs"]
  spelled = b"".join(
    bytes(int(byte, 16) for byte in name.split("\\x")[1:])
    if name.startswith("bytes:")
    else name.encode()
    for name in logprobs["tokens"]
  )
  assert spelled.decode() == prompt and len(logprobs["tokens"]) == len(ids)
  spans = generator.tokenizer.byte_spans(prompt)
  places = [len(prompt.encode()[:start].decode(errors="ignore")) for start, _ in spans]
  whole = [not name.startswith("bytes:") for name in logprobs["tokens"]]
  assert [o for o, is_whole in zip(logprobs["text_offset"], whole) if is_whole] == [
    place for place, is_whole in zip(places, whole) if is_whole
  ]


def test_a_stream_joined_is_the_whole(client):
  body = {"prompt": ["hello", "今日"], "max_tokens": 20, "seed": 7, "n": 2, "logprobs": 1}
  whole = complete(client, **body)
  streamed = client.post(
    "/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}}
  )
  *events, last = read_stream(streamed)
  assert last["choices"] == [] and last["usage"] == whole["usage"]
  assert len({event["id"] for event in events}) == 1 and len(events) > 5
  for choice in whole["choices"]:
    pieces = [
      piece for event in events for piece in event["choices"] if piece["index"] == choice["index"]
    ]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    tokens = [name for piece in pieces for name in piece["logprobs"]["tokens"]]
    assert tokens == choice["logprobs"]["tokens"]
    offsets = [place for piece in pieces for place in piece["logprobs"]["text_offset"]]
    assert offsets == choice["logprobs"]["text_offset"]
    assert [p["finish_reason"] for p in pieces if p["finish_reason"]] == [choice["finish_reason"]]


def test_pieces_have_whole_characters(client):
  """Random weights write broken characters: they show as U+FFFD where the whole text has them."""
  body = {"prompt": "🙂", "max_tokens": 60, "seed": 1, "temperature": 2.0}
  text = complete(client, **body)["choices"][0]["text"]
  assert "\ufffd" in text
  pieces = read_stream(client.post("/v1/completions", json=body | {"stream": True}))
  assert "".join(piece["choices"][0]["text"] for piece in pieces) == text


def test_seeds_repeat_and_are_told(client):
  first = complete(client, prompt="hello", max_tokens=9)
  assert isinstance(first["seed"], int)
  again = complete(client, prompt="hello", max_tokens=9, seed=first["seed"])
  assert again["choices"] == first["choices"]
  assert complete(client, prompt="hello", max_tokens=9)["choices"] != first["choices"]


def test_best_of_keeps_the_likeliest(client):
  body = {"prompt": "hello", "max_tokens": 6, "seed": 2, "logprobs": 0}
  every = complete(client, **body, n=4)["choices"]
  best = complete(client, **body, n=2, best_of=4)
  means = [np.mean(choice["logprobs"]["token_logprobs"]) for choice in every]
  expected = [every[i]["text"] for i in np.argsort(means)[::-1][:2]]
  assert [choice["text"] for choice in best["choices"]] == expected
  assert best["usage"]["completion_tokens"] == 24


def test_stop_texts_are_cut_off(client):
  body = {"prompt": "hello", "max_tokens": 30, **GREEDY}
  text = complete(client, **body)["choices"][0]["text"]
  stop = text[3:5]
  choice = complete(client, **body, stop=["never", stop])["choices"][0]
  assert (choice["text"], choice["finish_reason"]) == (text[: text.find(stop)], "stop")
  pieces = read_stream(client.post("/v1/completions", json=body | {"stop": stop, "stream": True}))
  assert "".join(piece["choices"][0]["text"] for piece in pieces) == choice["text"]


def test_options_by_their_own_names_are_used(client, generator):
  ids = generator.generate("hello", DecodingOptions(max_new_tokens=1)).tokens[0, -1:].tolist()
  for bias in ({"suppress_tokens": ids}, {"logit_bias": {str(ids[0]): -100}}):
    body = {"prompt": "hello", "max_tokens": 1, "logprobs": 1, **GREEDY}
    logprobs = complete(client, **body, **bias)["choices"][0]["logprobs"]
    # The model's own opinion is told, whatever the bias.
    assert logprobs["token_logprobs"][0] < max(logprobs["top_logprobs"][0].values())


@pytest.mark.slow
def test_beams_run_between_steps(client, generator):
  options = DecodingOptions(max_new_tokens=5, num_beams=2, num_return_sequences=2)
  expected = generator.generate("hello", options).texts
  body = {"prompt": "hello", "max_tokens": 5, "num_beams": 2, "n": 2}
  assert [choice["text"] for choice in complete(client, **body)["choices"]] == expected
  assert "best_of" in refused(
    client.post("/v1/completions", json=body | {"best_of": 3, "num_beams": 3})
  )


def test_every_decoding_option_is_offered_or_said_to_be_something_else():
  names = {field.name for field in dataclasses.fields(DecodingOptions)}
  offered, instead = set(Decoding.model_fields), set(Decoding.instead) | {"top_logprobs"}
  assert names == offered | instead and not offered & instead


@pytest.mark.parametrize(
  ("body", "said"),
  [
    ({"max_tokns": 5}, 'did you mean "max_tokens"?'),
    ({"suffix": "x"}, '"suffix" is not supported'),
    ({"max_new_tokens": 5}, 'use "max_tokens"'),
    ({"top_logprobs": 5}, 'use "logprobs"'),
    ({"max_tokens": "5"}, "\"max_tokens\" is '5'"),
    ({"max_tokens": -1}, "greater than or equal to 0"),
    ({"max_tokens": 500}, "context of 64"),
    ({"temperature": 0, "top_k": 3}, "top_k=3 has no effect"),
    ({"length_penalty": 2.0}, "add num_beams"),
    ({"n": 3, "best_of": 2}, "best_of is 2"),
    ({"n": 5}, "5 texts of a prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "99999"),
    ({"stream_options": {"include_usage": True}}, "add it"),
    ({"stream": True, "stream_options": {"usage": True}}, 'unknown field "usage"'),
    ({"prompt": 5}, "a valid string or a valid list"),
    ({"prompt": ""}, "no tokens"),
    ({"prompt": [4, 99999]}, "99999"),
    ({"prompt": "x" * 500}, "context of 64"),
    ({"prompt": "\ud800"}, "half of a character"),
    ({"prompt": []}, "prompt"),
    ({"stop": ""}, "stop"),
  ],
)
def test_what_does_not_fit_is_named(client, body, said):
  # A lone surrogate is valid JSON only where it is escaped.
  content = json.dumps({"prompt": "hello"} | body)
  response = client.post(
    "/v1/completions", content=content, headers={"content-type": "application/json"}
  )
  assert said in refused(response)


@pytest.mark.parametrize(
  ("body", "code", "param"),
  [
    ({"max_tokns": 5}, "unknown_parameter", "max_tokns"),
    ({"stream_options": {"usage": True}}, "unknown_parameter", "stream_options.usage"),
    ({"suffix": "x"}, "unsupported_parameter", "suffix"),
    ({"prompt": "x" * 500}, "context_length_exceeded", None),
    ({"max_tokens": 500}, "context_length_exceeded", None),
    ({"max_tokens": "5"}, "invalid_type", "max_tokens"),
    ({"max_tokens": -1}, "invalid_value", "max_tokens"),
    ({"stop": ["x"] * 33}, "invalid_type", "stop"),
    ({"model": "other"}, "model_not_found", "model"),
  ],
)
def test_what_is_wrong_has_openais_code(client, body, code, param):
  status = 404 if "model" in body else 400
  error = read_error(client.post("/v1/completions", json={"prompt": "hello"} | body), status)
  assert (error["code"], error["param"]) == (code, param)
  assert error["type"] == "invalid_request_error"
  # Not what the API has no field for.
  assert "beyond_context" not in error["message"]


def test_a_missing_field_is_named(client):
  error = read_error(client.post("/v1/completions", json={}))
  assert (error["code"], error["param"]) == ("missing_required_parameter", "prompt")
  assert error["message"] == '"prompt" is missing; add it'


def test_fields_at_their_off_values_are_accepted(client):
  off = {"suffix": None, "user": None, "n": None, "stop": None, "stream": False, "best_of": 1}
  assert complete(client, prompt="hello", max_tokens=1, **off)["choices"]
  # As with OpenAI, the likeliest token is in every nucleus.
  assert complete(client, prompt="hello", max_tokens=1, temperature=0, top_p=0.5)["choices"]


@pytest.mark.parametrize(
  "content", [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": NaN}']
)
def test_malformed_bodies_are_refused(client, content):
  response = client.post(
    "/v1/completions", content=content, headers={"content-type": "application/json"}
  )
  assert refused(response)
  assert refused(client.post("/v1/completions", content=content))


def test_a_body_that_is_too_large_is_refused_before_it_is_read(client):
  def endless():
    for _ in range(9):
      yield b" " * (1 << 20)

  headers = {"content-type": "application/json"}
  said = refused(client.post("/v1/completions", content=endless(), headers=headers), 413)
  assert "bytes" in said
  assert refused(client.post("/v1/completions", content=b" " * (9 << 20), headers=headers), 413)


def test_other_paths_methods_and_models(client):
  assert "not served" in refused(
    client.post("/v1/completions", json={"prompt": "x", "model": "gpt-5"}), 404
  )
  assert "no GET /v2/completions" in refused(client.get("/v2/completions"), 404)
  assert "no GET /v1/completions" in refused(client.get("/v1/completions"), 405)
  [card] = client.get("/v1/models").json()["data"]
  assert card == client.get("/v1/models/tiny").json() and card["id"] == "tiny"
  assert refused(client.get("/v1/models/other"), 404)


def test_a_chat_has_a_plain_template(client, generator):
  body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, **GREEDY}
  answer = client.post("/v1/chat/completions", json=body).json()
  expected = generator.generate("User: hello\nAssistant:", DecodingOptions(max_new_tokens=6))
  [choice] = answer["choices"]
  assert choice["message"] == {"role": "assistant", "content": expected.texts[0], "refusal": None}
  assert (answer["chat_template"], answer["object"]) == ("plain", "chat.completion")
  body |= {"stream": True, "logprobs": True, "top_logprobs": 2}
  events = read_stream(client.post("/v1/chat/completions", json=body))
  pieces = [event["choices"][0] for event in events]
  assert "".join(piece["delta"]["content"] for piece in pieces) == expected.texts[0]
  assert [piece["delta"]["role"] for piece in pieces][:2] == ["assistant", None]
  tokens = [token for piece in pieces for token in piece["logprobs"]["content"]]
  logprobs = [token["logprob"] for token in tokens]
  np.testing.assert_allclose(logprobs, expected.logprobs[0], rtol=1e-4, atol=1e-5)
  assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] for token in tokens)


def test_a_chat_without_a_limit_fills_the_context(client):
  body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}
  answer = client.post("/v1/chat/completions", json=body | {"seed": 3}).json()
  assert answer["usage"]["total_tokens"] == 64 or answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
  ("body", "said"),
  [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, 'did you mean "name"?'),
    ({"tools": [{"type": "function"}]}, '"tools" is not supported'),
    ({"max_tokens": 3, "max_completion_tokens": 3}, "give one of them"),
    ({"top_logprobs": 3}, "logprobs; add it"),
    (
      {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image": "y"}]}]},
      'unknown field "image"',
    ),
    ({"response_format": {"type": "json_object"}}, '"response_format" is not supported'),
  ],
)
def test_what_does_not_fit_a_chat_is_named(client, body, said):
  body = {"messages": [{"role": "user", "content": "x"}]} | body
  assert said in refused(client.post("/v1/chat/completions", json=body))


def test_templates_run_in_a_sandbox():
  messages = [{"role": "user", "content": "hello"}]
  template = ChatTemplate(
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}",
    {"eos_token": "<end>"},
  )
  assert template.render(messages) == "<user>hello<end>"
  # As in transformers: loops can be left, and JSON is not written for HTML.
  template = ChatTemplate("{% for m in messages * 2 %}{{ m | tojson }}{% break %}{% endfor %}")
  assert template.render([{"content": "<é>"}]) == '{"content": "<é>"}'
  for source in (
    "{{ raise_exception('no system message') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{% for",
    "{{ nothing.at.all }}",
  ):
    with pytest.raises(Exception, match="chat template of the model refuses"):
      ChatTemplate(source).render(messages)


def test_embeddings_are_directions(client, generator):
  body = {"input": ["hello", "今日は世界。" * 3]}
  answer = client.post("/v1/embeddings", json=body).json()
  vectors = np.array([item["embedding"] for item in answer["data"]])
  assert vectors.shape == (2, generator.config.model_dim)
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
  packed = client.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
  of_bytes = [np.frombuffer(base64.b64decode(x["embedding"]), "<f4") for x in packed["data"]]
  np.testing.assert_allclose(of_bytes, vectors, rtol=1e-6)
  alone = client.post("/v1/embeddings", json={"input": "hello"}).json()["data"][0]["embedding"]
  np.testing.assert_allclose(alone, vectors[0], rtol=1e-5)
  assert '"dimensions"' in refused(client.post("/v1/embeddings", json=body | {"dimensions": 2}))
  assert refused(client.post("/v1/embeddings", json={"input": "x" * 500}))


def test_what_a_model_was_taught_is_told(client, classifier):
  items = [{"text": "abc", "text2": "ha"}, {"text": "ab cd", "text2": "ef"}]
  examples = [Example(str(i), (x["text"],), (x["text2"],)) for i, x in enumerate(items)]
  expected = describe_predictions(classifier.task, examples, classifier.outputs(examples))
  answer = client.post("/classify", json={"input": items})
  assert answer.status_code == 200, answer.text
  for found, one in zip(answer.json()["data"], expected, strict=True):
    assert found["label"] == one["label"]
    np.testing.assert_allclose(
      list(found["probabilities"].values()), list(one["probabilities"].values()), rtol=1e-5
    )
  for wrong, said in (
    ("abc", "needs text2"),
    ([items[0], items[0] | {"choices": ["a", "b"]}], "choices has no effect"),
    ([items[0] | {"text": " "}], "empty text"),
  ):
    assert said in refused(client.post("/classify", json={"input": wrong}))


def test_texts_and_ids(client, generator):
  text = "hello 今日"
  answer = client.post("/tokenize", json={"prompt": text}).json()
  assert answer["tokens"] == generator.tokenizer.encode(text)
  assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
  special = {"prompt": "<|endoftext|>"}
  end = client.post("/tokenize", json=special).json()["tokens"]
  assert end == [generator.tokenizer.end_id]
  as_text = client.post("/tokenize", json=special | {"parse_special_tokens": False}).json()
  assert as_text["tokens"] == generator.tokenizer.encode("<|endoftext|>") != end
  assert client.get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"
  assert "99999" in refused(client.post("/detokenize", json={"tokens": [99999]}))


def test_metrics_count(client):
  complete(client, prompt="hello", max_tokens=3)
  text = client.get("/metrics").text
  samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
  assert float(samples["gptjax_new_tokens_total"]) >= 3
  assert float(samples['gptjax_requests_total{route="/v1/completions",status="200"}']) >= 1
  assert float(samples["gptjax_running_texts"]) == 0


def test_many_at_once_get_what_they_get_alone(client):
  bodies = [
    {"prompt": prompt, "max_tokens": 10 + i, "temperature": i % 2, "seed": i}
    for i, prompt in enumerate(["hello", "world", "今日", "안녕", "你好 hello world", "🙂"])
  ]
  alone = [complete(client, **body)["choices"] for body in bodies]
  together = [None] * len(bodies)

  def ask(index):
    while (response := client.post("/v1/completions", json=bodies[index])).status_code == 429:
      time.sleep(0.05)
    together[index] = response.json()["choices"]

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert together == alone


def test_a_full_queue_says_when_to_come_again(client, engine):
  gate, started = threading.Event(), threading.Event()

  def hold():
    started.set()
    gate.wait(30)

  asyncio.run_coroutine_threadsafe(engine.run(hold), engine._loop)
  started.wait(30)
  results = []
  body = {"prompt": "hello", "max_tokens": 1}
  threads = [
    threading.Thread(target=lambda: results.append(client.post("/v1/completions", json=body)))
    for _ in range(LIMITS.max_queue)
  ]
  try:
    for thread in threads:
      thread.start()
    while len(engine._waiting) < LIMITS.max_queue:
      time.sleep(0.01)
    response = client.post("/v1/completions", json=body)
    assert "wait already" in refused(response, 429)
    assert int(response.headers["retry-after"]) >= 1
  finally:
    gate.set()
    for thread in threads:
      thread.join()
  assert [response.status_code for response in results] == [200] * LIMITS.max_queue


def test_what_takes_too_long_ends(client, engine, monkeypatch):
  monkeypatch.setattr(engine, "limits", dataclasses.replace(LIMITS, seconds=1e-6))
  body = {"prompt": "hello", "max_tokens": 50}
  assert "more than 1e-06 seconds" in refused(client.post("/v1/completions", json=body), 504)
  # Also between the steps.
  beams = {"prompt": "hello", "max_tokens": 5, "num_beams": 2, "n": 2}
  assert refused(client.post("/v1/completions", json=beams), 504)
  monkeypatch.undo()
  assert engine._slots.num_free == LIMITS.num_slots
  assert complete(client, **body)["choices"]


def test_who_gives_up_frees_the_slots(engine):
  async def give_up():
    prompts = await engine.check(["hello"] * 3, DecodingOptions(max_new_tokens=50))
    call = engine.submit(prompts)
    events = call.events()
    await anext(events)
    await events.aclose()

  asyncio.run_coroutine_threadsafe(give_up(), engine._loop).result(30)
  deadline = time.monotonic() + 30
  while engine._running or engine._waiting:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  assert engine._slots.num_free == LIMITS.num_slots


def test_events_that_come_while_the_reader_is_busy_are_read():
  async def read():
    call = Call([Prompt([1], DecodingOptions(), 0, 3)], math.inf)
    last = Produced(0, 5, -1.0, [], "b", "length", False)
    first = dataclasses.replace(last, finish_reason=None)
    call.deliver([Event(0, 0, first)], None)
    seen = []
    async for events in call.events():
      if not seen:
        call.deliver([Event(0, 0, last)], None)
      seen += events
    return seen

  assert len(asyncio.run(read())) == 2


def test_a_failure_of_the_device_ends_what_runs_and_nothing_else(client, engine, monkeypatch):
  def fail():
    monkeypatch.undo()
    raise RuntimeError("out of memory")

  monkeypatch.setattr(engine._slots, "step", fail)
  body = {"prompt": "hello", "max_tokens": 3, **GREEDY}
  assert "the device failed" in refused(client.post("/v1/completions", json=body), 500)
  assert complete(client, **body)["choices"]


def test_a_server_that_starts_says_so(generator):
  engine = Engine(generator, "tiny", LIMITS)
  app = make_app(Served(engine))
  # Without its life: the engine never starts.
  client = TestClient(app)
  assert client.get("/health").status_code == 503
  assert client.get("/health").json() == {"status": "starting"}
  response = client.post("/v1/completions", json={"prompt": "x"})
  assert "starting" in refused(response, 503) and response.headers["retry-after"]


def test_keys_and_origins(generator):
  app = make_app(Served(Engine(generator, "tiny", LIMITS)), Access("secret", ("http://page",)))
  client = TestClient(app)
  assert client.get("/health").status_code == 503
  assert client.get("/").status_code == 200
  assert client.get("/openapi.json").status_code == 200
  for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
    response = client.post("/v1/completions", content=b"{", headers=headers)
    assert "API key" in refused(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"
  response = client.get("/v1/models", headers={"Authorization": "Bearer secret"})
  assert response.status_code == 200
  asked = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
  response = client.options("/v1/completions", headers=asked)
  assert response.headers["access-control-allow-origin"] == "http://page"
  response = client.options("/v1/completions", headers=asked | {"Origin": "http://other"})
  assert "access-control-allow-origin" not in response.headers


def test_without_a_tokenizer_ids_are_all(generator):
  bare = Generator.__new__(Generator)
  bare.__dict__.update(generator.__dict__ | {"tokenizer": None})
  with serve(bare) as (client, _):
    assert "not fine-tuned" in refused(client.post("/classify", json={"input": "x"}))
    choice = complete(client, prompt=[5, 6], max_tokens=3, logprobs=1, **GREEDY)["choices"][0]
    assert choice["text"] == "" and choice["logprobs"]["tokens"][0].startswith("token_id:")
    for path, body in (
      ("/v1/completions", {"prompt": "hello"}),
      ("/v1/completions", {"prompt": [5], "stop": "x"}),
      ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
      ("/tokenize", {"prompt": "hello"}),
    ):
      assert "tokenizer" in refused(client.post(path, json=body))
