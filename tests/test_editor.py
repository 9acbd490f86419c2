"""What the editor's page is told: the model's continuations, surprise and places, by session."""

import re

import numpy as np
import pytest
from families import make_config, make_params
from fastapi import FastAPI
from fastapi.testclient import TestClient

from gptjax.data.tokenizer import make_char_tokenizer, train_bpe
from gptjax.errors import DataError
from gptjax.generate.generator import Generator
from gptjax.generate.options import DecodingOptions
from gptjax.serve import editor
from gptjax.serve.editor_text import make_prompt
from gptjax.serve.failures import add_handlers
from gptjax.serve.served import Served

SENTENCE = "The king and the queen, the kind and the quick; the keen 🦊 and the quiet. これは猫。"
TEXT = SENTENCE * 4
CONTEXT = 64


class DirectEngine:
  """An engine without others, which runs what it is given at once."""

  model_name = "tiny"

  def __init__(self, generator):
    self.generator = generator

  async def run(self, function):
    return function()


@pytest.fixture(scope="module")
def generator():
  tokenizer = train_bpe([TEXT], 320)
  config = make_config("gpt2", context_length=CONTEXT, vocab_size=tokenizer.vocab_size)
  return Generator(make_params(config), config, tokenizer, end_ids=(tokenizer.end_id,))


@pytest.fixture(scope="module")
def client(generator):
  app = FastAPI()
  add_handlers(app)
  app.include_router(editor.make_pages())
  app.include_router(editor.make_editor(Served(DirectEngine(generator))))
  return TestClient(app)


def ask(client, what, text, session="session-1", status=200, **more):
  answer = client.post(f"/editor/{what}", json={"session": session, "text": text} | more)
  assert answer.status_code == status, answer.text
  return answer.json()


def expect(generator, ids, first, num_tokens):
  """Goes on greedily after ids and a first token."""
  if num_tokens == 1:
    return [first]
  options = DecodingOptions(max_new_tokens=num_tokens - 1)
  return [first, *generator.generate([[*ids, first]], options).tokens[0, len(ids) + 1 :].tolist()]


def test_continuations_are_the_models_and_grow(client, generator):
  ids = generator.tokenizer.encode("The king")
  top = generator.generate([ids], DecodingOptions(max_new_tokens=1, top_logprobs=3))
  short = ask(client, "continuations", "The king", count=3, num_tokens=3)
  long = ask(client, "continuations", "The king", count=3, num_tokens=8)
  assert (short["num_run"], long["num_run"], short["num_tokens"]) == (len(ids), 0, len(ids))
  assert len(long["choices"]) == 3
  for first, logprob, one, longer in zip(
    top.top_tokens[0, 0].tolist(), top.top_logprobs[0, 0], short["choices"], long["choices"]
  ):
    stream = generator.tokenizer.decode_stream()
    for token in ids:
      stream.step(token)
    wanted = [stream.step(token) for token in expect(generator, ids, first, 8)]
    assert longer["pieces"] == wanted
    assert one["pieces"] == wanted[:3]
    np.testing.assert_allclose(one["probability"], np.exp(logprob), rtol=1e-4)
    np.testing.assert_allclose(one["logprobs"][0], logprob, rtol=1e-4)


def test_two_sessions_do_not_mix(client):
  texts = ("The king", "the quick; ")

  def press(session, num_tokens):
    return [
      ask(client, "continuations", text, f"{session}-{i}", num_tokens=num_tokens)["choices"]
      for i, text in enumerate(texts)
    ]

  alone = press("pressed-once", 9)
  for num_tokens in (3, 6, 9):
    mixed = press("pressed-often", num_tokens)
  assert mixed == alone
  assert alone[0] != alone[1]


def test_sessions_are_bounded_in_number_size_and_time(generator, monkeypatch):
  now = 0.0
  sessions = editor.Sessions(generator, clock=lambda: now)

  def get(name):
    return sessions.use(name, lambda tab: tab)

  kept = [get(str(i)) for i in range(editor.MAX_SESSIONS)]
  assert get("0") is kept[0]
  get("another")
  assert len(sessions) == editor.MAX_SESSIONS
  # The longest unused went, and that is not the first.
  assert get("0") is kept[0]
  assert get("1") is not kept[1]
  now = editor.SESSION_SECONDS - 1
  assert get("0") is kept[0]
  now += 2
  sessions.sweep()
  assert len(sessions) == 1
  sessions.use("large", lambda tab: tab.open([1, 2]))
  assert len(sessions) == 2
  monkeypatch.setattr(editor, "MAX_BYTES", get("large").num_bytes)
  sessions.use("0", lambda tab: tab.open([1, 2]))
  assert len(sessions) == 1
  # One that failed may be anything.
  with pytest.raises(ZeroDivisionError):
    sessions.use("0", lambda tab: 1 / 0)
  assert len(sessions) == 0


def test_a_space_before_the_cursor_belongs_to_the_next_token(client, generator):
  prompt = make_prompt("and the ", generator)
  assert prompt.ids == generator.tokenizer.encode("and the")
  assert prompt.has_space
  names = [generator.tokenizer.backend.id_to_token(i) for i in np.flatnonzero(prompt.only_V)]
  assert {"Ġ", "Ġthe", "Ġquick"} <= set(names)
  assert all(name.startswith("Ġ") for name in names)
  found = ask(client, "continuations", "and the ", count=8, num_tokens=4)["choices"]
  # The whole vocabulary's likeliest tokens do not all begin with a space.
  plain = ask(client, "continuations", "and the", count=8, num_tokens=4)["choices"]
  assert not all(one["pieces"][0].startswith(" ") for one in plain)
  texts = ["".join(one["pieces"]) for one in found]
  firsts = [generator.tokenizer.encode(" " + text)[0] for text in texts if text.strip()]
  assert firsts and all(prompt.only_V[first] for first in firsts)
  assert not make_prompt("and the", generator).has_space


def test_letters_have_no_space_before_words(generator):
  tokenizer = make_char_tokenizer(["abc xyz"])
  config = make_config("gpt2", vocab_size=tokenizer.vocab_size)
  letters = Generator(make_params(config), config, tokenizer)
  prompt = make_prompt("abc ", letters)
  assert (prompt.ids, prompt.has_space) == (tokenizer.encode("abc "), False)
  with pytest.raises(DataError, match="write a few words"):
    make_prompt("", letters)
  with pytest.raises(DataError, match="no tokenizer"):
    make_prompt("abc", Generator(make_params(config), config))
  # A document begins after an end token, where there is one.
  assert make_prompt("", generator).ids == [generator.tokenizer.end_id]


def test_a_long_text_is_cut_for_a_while(generator, client):
  long = TEXT * 3
  start = make_prompt(long, generator).start
  assert start > 0
  kept = long[start:]
  room = CONTEXT - len(generator.tokenizer.encode(kept))
  assert CONTEXT // 4 <= room < CONTEXT // 2
  # What was kept is kept until it, too, outgrows the context.
  assert make_prompt(kept + " the", generator).start == 0
  answer = ask(client, "read", long)
  # Of the fox, a browser counts two.
  assert answer["left_out"] == start + long[:start].count("🦊") > start
  assert ask(client, "read", kept)["num_run"] == 0


def test_surprise_stands_where_its_tokens_do(client, generator):
  text, after = "The keen 🦊 is", " the 猫。"
  ids = generator.tokenizer.encode(text + after)
  answer = ask(client, "insight", text, after=after)
  whole = (text + after).encode("utf-16-le")
  parts = [whole[2 * x["start"] : 2 * x["end"]].decode("utf-16-le") for x in answer["surprise"]]
  assert "".join(parts) == text + after
  assert {" keen", " 🦊"} <= set(parts)
  # One by one, by the probabilities of the next token.
  expected, size = 0.0, generator.config.vocab_size
  for i in range(1, len(ids)):
    out = generator.generate([ids[:i]], DecodingOptions(max_new_tokens=1, top_logprobs=size))
    expected -= dict(zip(out.top_tokens[0, 0].tolist(), out.top_logprobs[0, 0].tolist()))[ids[i]]
  assert answer["surprise"][0]["nats"] is None
  given = sum(x["nats"] for x in answer["surprise"][1:])
  np.testing.assert_allclose(given, expected, rtol=1e-4)
  # TAB at the cursor finds it read.
  assert ask(client, "continuations", text)["num_run"] == 0


def test_bars_show_what_the_options_cut(client, generator):
  text = "The king"
  plain = ask(client, "insight", text, count=6)["next_tokens"]
  cut = ask(client, "insight", text, count=6, top_k=2)["next_tokens"]
  assert not any(one["is_cut"] for one in plain)
  assert [one["is_cut"] for one in cut] == [False] * 2 + [True] * 4
  assert [one["probability"] for one in cut] == [one["probability"] for one in plain]
  ids = generator.tokenizer.encode(text)
  top = generator.generate([ids], DecodingOptions(max_new_tokens=1, top_logprobs=6))
  np.testing.assert_allclose(
    [one["probability"] for one in plain], np.exp(top.top_logprobs[0, 0]), rtol=1e-4
  )
  two = sum(one["probability"] for one in plain[:2])
  kept = ask(client, "insight", text, count=6, top_p=two - 1e-4)["next_tokens"]
  assert [one["is_cut"] for one in kept] == [False] * 2 + [True] * 4


@pytest.mark.parametrize(
  "what, body, says",
  [
    ("continuations", {"num_token": 3}, 'unknown field "num_token"; did you mean "num_tokens"'),
    ("continuations", {"count": 9}, '"count" is 9'),
    ("continuations", {"num_tokens": "3"}, "num_tokens"),
    ("read", {"session": "../../etc"}, "session"),
    ("read", {"text": 5}, "text"),
    ("insight", {"top_p": 1.5}, "top_p"),
    ("insight", {"seed": 1}, 'unknown field "seed"'),
    ("read", {"text": "a" * (editor.MAX_CHARACTERS + 1)}, "text"),
  ],
)
def test_what_is_wrong_is_named(client, what, body, says):
  answer = client.post(f"/editor/{what}", json={"session": "session-1", "text": "The"} | body)
  assert answer.status_code == 400
  assert says in answer.json()["error"]["message"]


def test_the_page_asks_nobody_else(client):
  page = client.get("/")
  assert page.status_code == 200
  policy = page.headers["content-security-policy"]
  assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
  files = set(re.findall(r'(?:href|src)="(page/[^"]+)"', page.text))
  scripts = [name for name in files if name.endswith(".js")]
  while scripts:
    found = re.findall(r'from "\./([^"]+)"', client.get(f"/{scripts.pop()}").text)
    scripts += [f"page/{name}" for name in found if f"page/{name}" not in files]
    files |= {f"page/{name}" for name in found}
  assert len(files) > 5
  for name in files:
    answer = client.get(f"/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == policy
    # A name that SVG must have is no address.
    assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
  for name in ("/page/../editor.py", "/page/%2e%2e/editor.py", "/page/nothing"):
    assert client.get(name).status_code == 404
