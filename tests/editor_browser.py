"""A served model, a browser, and the page in it, for the tests of the editor."""

import contextlib
import functools
import shutil
import threading
import time

import pytest
import uvicorn
from families import make_config, make_params

from gptjax.data.tokenizer import train_bpe
from gptjax.generate.generator import Generator
from gptjax.serve import editor
from gptjax.serve.app import make_app
from gptjax.serve.engine import Engine, Limits
from gptjax.serve.served import Served

CHROMIUM = shutil.which("chromium")
FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
]
SENTENCE = (
  "The king and the queen, the kind and the quick; the keen and the quiet. 日本の猫、고양이、中文。"
)
START_SECONDS, WAIT_MS = 240, 30_000

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
expect.set_options(WAIT_MS)
NEEDS_BROWSER = [
  pytest.mark.slow,
  pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt-get install chromium"),
  # Starting the server compiles all that it needs.
  pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def server():
  """Serves a tiny model; its address."""
  tokenizer = train_bpe([SENTENCE * 4], 320)
  config = make_config("gpt2", context_length=96, vocab_size=tokenizer.vocab_size)
  generator = Generator(make_params(config), config, tokenizer, end_ids=(tokenizer.end_id,))
  warm_up = functools.partial(editor.warm_up, generator)
  engine = Engine(generator, "tiny", Limits(num_slots=2), [warm_up], report=lambda line: None)
  running = uvicorn.Server(uvicorn.Config(make_app(Served(engine)), port=0, log_level="error"))
  thread = threading.Thread(target=running.run, daemon=True)
  thread.start()
  deadline = time.monotonic() + START_SECONDS
  while not engine.is_ready:
    assert engine.status != "failed" and time.monotonic() < deadline
    time.sleep(0.1)
  yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
  running.should_exit = True
  thread.join()


@pytest.fixture(scope="module")
def chromium():
  with playwright.sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield browser
    browser.close()


@contextlib.contextmanager
def visit(chromium, server, **options):
  """Opens the page as somebody who was never there; what goes wrong on it is an error here."""
  context = chromium.new_context(**options)
  context.set_default_timeout(WAIT_MS)
  page, wrong = context.new_page(), []
  page.on("pageerror", lambda error: wrong.append(str(error)))
  page.on(
    "request",
    lambda request: request.url.startswith((server, "blob:")) or wrong.append(request.url),
  )
  page.goto(server)
  expect(page.locator("#model")).to_contain_text("tiny")
  yield page
  context.close()
  assert wrong == []


@pytest.fixture
def page(chromium, server):
  with visit(chromium, server) as page:
    yield page


def text(page):
  return page.locator("#text").input_value()


def write(page, words):
  page.locator("#text").focus()
  page.keyboard.insert_text(words)


def press_tab(page):
  """Presses TAB and returns the continuations, once they are there."""
  with page.expect_response("**/editor/continuations") as response:
    page.keyboard.press("Tab")
  found = response.value.json()["choices"]
  expect(page.locator("#choices [role=option]")).to_have_count(len(found))
  return ["".join(one["pieces"]) for one in found]


def ask_server(page, server, what, words, session, **more):
  answer = page.request.post(
    f"{server}/editor/{what}", data={"session": session, "text": words} | more
  )
  assert answer.ok, answer.text()
  return answer.json()


def chosen(page):
  return page.locator("#choices [aria-selected=true]")


def open_panel(page):
  with page.expect_response("**/editor/insight") as response:
    page.click("#toggle-panel")
  return response.value.json()
