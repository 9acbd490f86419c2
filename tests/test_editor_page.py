"""The editor's page in a real browser: keys, lists, colours, documents, and who may be asked."""

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
pytestmark = [
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
  engine = Engine(generator, "tiny", Limits(num_slots=2), warm_up, report=lambda line: None)
  running = uvicorn.Server(uvicorn.Config(make_app(Served(engine)), port=0, log_level="error"))
  thread = threading.Thread(target=running.run, daemon=True)
  thread.start()
  deadline = time.monotonic() + START_SECONDS
  while not engine.is_ready:
    assert engine.status == "starting" and time.monotonic() < deadline
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


def test_tab_opens_lengthens_chooses_and_takes(page, server):
  write(page, "The king")
  short = press_tab(page)
  assert len(short) == 5
  options = page.locator("#choices [role=option]")
  assert all("%" in words for words in options.all_inner_texts())
  expect(page.locator("#text")).to_have_attribute("role", "combobox")
  expect(page.locator("#text")).to_have_attribute("aria-expanded", "true")
  long = press_tab(page)
  assert all(more.startswith(less) for more, less in zip(long, short)) and long != short
  for key, index in (
    ("ArrowDown", 1),
    ("ArrowDown", 2),
    ("ArrowUp", 1),
    ("ArrowUp", 0),
    ("ArrowUp", 4),
  ):
    page.keyboard.press(key)
    expect(chosen(page)).to_have_attribute("id", f"choice-{index}")
    expect(page.locator("#text")).to_have_attribute("aria-activedescendant", f"choice-{index}")
  page.keyboard.press("ArrowDown")
  page.keyboard.press("ArrowDown")
  page.keyboard.press("Enter")
  expect(page.locator("#choices")).to_be_hidden()
  assert text(page) == "The king" + long[1]
  assert page.locator("#text").get_attribute("role") is None
  # What was taken can be taken back, as anything typed.
  page.keyboard.press("Control+z")
  assert text(page) == "The king"
  # A click takes, too.
  found = press_tab(page)
  options.nth(2).click()
  assert text(page) == "The king" + found[2]


def test_it_goes_on_at_the_cursor(page):
  write(page, "The king and the queen")
  for _ in range(len(" and the queen")):
    page.keyboard.press("ArrowLeft")
  found = press_tab(page)
  page.keyboard.press("Enter")
  assert text(page) == "The king" + found[0] + " and the queen"


def test_the_second_press_reads_nothing_again(page):
  write(page, SENTENCE)
  page.wait_for_timeout(100)
  press_tab(page)
  with page.expect_response("**/editor/continuations") as response:
    page.keyboard.press("Tab")
  assert response.value.json()["num_run"] == 0


def test_a_pause_reads_ahead(page):
  with page.expect_response("**/editor/read") as response:
    write(page, "The king and the")
  assert response.value.json()["num_run"] > 0
  with page.expect_response("**/editor/continuations") as response:
    page.keyboard.press("Tab")
  assert response.value.json()["num_run"] == 0


def test_escape_leaves_and_then_tab_moves_on(page):
  write(page, "The king")
  press_tab(page)
  page.keyboard.press("Escape")
  expect(page.locator("#choices")).to_be_hidden()
  assert text(page) == "The king"
  expect(page.locator("#status")).to_contain_text("Tab now moves on")
  page.keyboard.press("Tab")
  expect(page.locator("#text")).not_to_be_focused()
  page.keyboard.press("Shift+Tab")
  expect(page.locator("#text")).to_be_focused()
  # Tab is the text's again; backwards it never was.
  press_tab(page)
  page.keyboard.press("Shift+Tab")
  expect(page.locator("#text")).not_to_be_focused()
  expect(page.locator("#choices")).to_be_hidden()
  assert "Esc" in page.locator("#keys").inner_text()


def test_typing_on_closes_the_list(page):
  write(page, "The king")
  press_tab(page)
  page.keyboard.type("s")
  expect(page.locator("#choices")).to_be_hidden()
  assert text(page) == "The kings"
  press_tab(page)
  page.keyboard.press("Home")
  expect(page.locator("#choices")).to_be_hidden()
  assert page.locator("#text").get_attribute("aria-activedescendant") is None


@pytest.mark.parametrize("typed, meant", [("にほん", "日本"), ("ㅎㅏㄴ", "한"), ("zhong", "中")])
def test_an_input_method_has_its_keys_to_itself(page, typed, meant):
  asked = []
  page.on("request", lambda request: asked.append(request.url))
  write(page, "猫 ")
  page.wait_for_timeout(600)
  asked.clear()
  keyboard = page.context.new_cdp_session(page)
  for length in range(1, len(typed) + 1):
    part = {"text": typed[:length], "selectionStart": length, "selectionEnd": length}
    keyboard.send("Input.imeSetComposition", part)
  assert text(page) == "猫 " + typed
  # The keys of the input method's own list of candidates.
  for key in ("Tab", "ArrowDown", "Escape", "Enter"):
    for kind in ("rawKeyDown", "keyUp"):
      event = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": 229}
      keyboard.send("Input.dispatchKeyEvent", event)
    assert page.evaluate(
      """key => !document.getElementById("text").dispatchEvent(new KeyboardEvent(
        "keydown", {key, keyCode: 229, isComposing: true, bubbles: true, cancelable: true}))""",
      key,
    ) is False  # fmt: skip
  page.wait_for_timeout(600)
  assert asked == []
  keyboard.send("Input.insertText", {"text": meant})
  assert text(page) == "猫 " + meant
  expect(page.locator("#text")).to_be_focused()
  found = press_tab(page)
  page.keyboard.press("Enter")
  assert text(page) == "猫 " + meant + found[0]


def open_panel(page):
  with page.expect_response("**/editor/insight") as response:
    page.click("#toggle-panel")
  return response.value.json()


def test_colours_are_the_models_surprise(page):
  write(page, "The queen 🦊 and 日本の猫")
  open_panel(page)
  assert page.locator("#mirror [class^=surprise]").count() == 0
  with page.expect_response("**/editor/insight") as response:
    page.check("#colour")
  expect(page.locator("#mirror [class^=surprise]")).not_to_have_count(0)
  surprise = response.value.json()["surprise"]
  spans = page.locator("#mirror span").evaluate_all(
    "all => all.map(x => [x.className, x.textContent])"
  )
  assert "".join(words for _, words in spans) == text(page)
  drawn = [(name, words) for name, words in spans if name]
  units = text(page).encode("utf-16-le")
  wanted = [
    (
      f"surprise-{sum(one['nats'] >= low for low in (1, 2, 4, 6, 9))}",
      units[2 * one["start"] : 2 * one["end"]].decode("utf-16-le"),
    )
    for one in surprise
    if one["nats"] is not None
  ]
  assert drawn == wanted
  mean = sum(one["nats"] for one in surprise[1:]) / (len(surprise) - 1)
  expect(page.locator("#surprise-summary")).to_contain_text(f"{mean:.2f} nats a token")
  # What stands behind a change has no colour until it is looked at anew.
  page.locator("#text").focus()
  page.keyboard.press("Control+Home")
  page.keyboard.insert_text("x")
  assert page.locator("#mirror [class^=surprise]").count() == 0
  page.uncheck("#colour")
  expect(page.locator("#mirror [class^=surprise]")).to_have_count(0)


def test_the_text_lies_on_its_mirror(page):
  """A line of the textarea is a line of the mirror: same font, same width, same height."""
  write(page, "The king and the queen, 日本の猫 " * 20 + "\n\nthe end\n")
  same = page.evaluate(
    """() => {
      const [one, other] = ["text", "mirror"].map(id => document.getElementById(id));
      const styles = ["font", "lineHeight", "padding", "letterSpacing", "tabSize", "overflowWrap"];
      return [...styles.map(name => getComputedStyle(one)[name] === getComputedStyle(other)[name]),
        one.clientWidth === other.clientWidth, one.scrollHeight === other.scrollHeight,
        one.scrollHeight <= one.clientHeight];
    }"""
  )
  assert all(same), same


def test_bars_show_the_distribution_and_what_is_cut(page):
  write(page, "The king")
  open_panel(page)
  with page.expect_response("**/editor/insight") as response:
    page.fill("[name=top_k]", "3")
  bars = page.locator("#next li")
  expect(bars).to_have_count(12)
  expect(page.locator("#next li.cut")).to_have_count(9)
  assert "cut" in bars.nth(3).inner_text() and "cut" not in bars.nth(2).inner_text()
  expect(page.locator("#next-summary")).to_contain_text("keeps 3 of these 12")
  shares = [one["probability"] for one in response.value.json()["next_tokens"]]
  page.wait_for_timeout(300)
  widths = page.locator("#next .bar").evaluate_all(
    "all => all.map(x => x.getBoundingClientRect().width)"
  )
  assert widths[5] / widths[0] == pytest.approx(shares[5] / shares[0], rel=0.05)


def test_settings_are_used_kept_and_checked(page, server):
  open_panel_without_text = page.locator("#toggle-panel")
  open_panel_without_text.click()
  page.fill("[name=count]", "3")
  page.fill("[name=num_tokens]", "2")
  write(page, "The king")
  assert len(press_tab(page)) == 3
  page.reload()
  expect(page.locator("[name=count]")).to_have_value("3")
  page.fill("[name=count]", "99")
  expect(page.locator("[name=count]")).to_have_attribute("aria-invalid", "true")
  expect(page.locator("#status")).to_contain_text("Shown")
  write(page, " and")
  assert len(press_tab(page)) == 5
  page.click("#reset")
  expect(page.locator("[name=num_tokens]")).to_have_value("6")


def test_documents_survive_a_reload(page, server):
  write(page, "First\nof two")
  page.click("#new")
  assert text(page) == ""
  write(page, "Second 日本")
  page.reload()
  assert text(page) == "Second 日本"
  names = page.locator("#document-list button")
  expect(names).to_have_text(["Second 日本", "First"])
  names.nth(1).click()
  assert text(page) == "First\nof two"
  with page.expect_download() as download:
    page.click("#download")
  assert download.value.suggested_filename == "First.txt"
  assert download.value.path().read_text("utf-8") == "First\nof two"
  page.click("#delete")
  expect(names).to_have_text(["Second 日本"])
  page.click("#status button")
  expect(names).to_have_text(["Second 日本", "First"])
  assert text(page) == "First\nof two"


def test_two_browsers_do_not_mix(chromium, server):
  words = ("The king", "日本の猫")
  with visit(chromium, server) as one, visit(chromium, server) as other:
    pages = (one, other)
    for page, begun in zip(pages, words):
      write(page, begun)
    for _ in range(3):
      found = [press_tab(page) for page in pages]
    for begun, continuations in zip(words, found):
      alone = ask_server(one, server, "continuations", begun, "somebody-else", num_tokens=18)
      assert continuations == ["".join(choice["pieces"]) for choice in alone["choices"]]
  assert found[0] != found[1]


def test_a_long_text_is_read_from_its_end(page):
  long = "".join(f"{i} the king and the queen, " for i in range(200))
  write(page, long)
  expect(page.locator("#window")).to_contain_text("do not fit its context")
  hatched = page.locator("#mirror .left-out").inner_text()
  assert long.startswith(hatched) and len(hatched) > len(long) // 2
  sent = []
  page.on("request", lambda request: sent.append(request.post_data_json))
  press_tab(page)
  page.keyboard.press("Enter")
  assert len(sent[0]["text"]) == len(long) - len(hatched)
  assert text(page).startswith(long)


def test_write_on_samples_with_a_seed_and_stops(page):
  page.click("#toggle-panel")
  page.fill("[name=seed]", "7")
  page.fill("[name=max_tokens]", "12")
  written = []
  for _ in range(2):
    page.click("#new")
    write(page, "The king")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("seed 7")
    written.append(text(page))
  assert written[0] == written[1] and len(written[0]) > len("The king")
  page.fill("[name=max_tokens]", "24")
  page.click("#write")
  page.keyboard.press("Escape")
  expect(page.locator("#status")).to_contain_text("Stopped")


def test_errors_are_said_and_the_text_is_kept(page):
  said = page.locator("#alert")
  write(page, "The king")
  page.route("**/editor/continuations", lambda route: route.abort())
  page.keyboard.press("Tab")
  expect(said).to_have_text("The server does not answer. Your text is kept in this browser.")
  page.unroute("**/editor/continuations")
  busy = {"error": {"message": "64 requests wait already; try again later"}}
  page.route("**/editor/continuations", lambda route: route.fulfill(status=429, json=busy))
  page.keyboard.press("Tab")
  expect(said).to_contain_text("64 requests wait already; try again later.")
  page.unroute("**/editor/continuations")
  press_tab(page)
  expect(said).to_have_text("")
  page.reload()
  assert text(page) == "The king"


def test_a_key_is_asked_for_and_sent(page):
  sent = []

  def check(route):
    sent.append(route.request.headers.get("authorization"))
    wrong = {"error": {"message": "wrong API key"}}
    if sent[-1] == "Bearer sesame":
      route.continue_()
    else:
      route.fulfill(status=401, json=wrong)

  page.route("**/editor/**", check)
  page.reload()
  page.fill("#key", "sesame")
  page.keyboard.press("Enter")
  expect(page.locator("#key-dialog")).to_be_hidden()
  expect(page.locator("#model")).to_contain_text("tiny")
  assert (sent[0], sent[-1]) == (None, "Bearer sesame")


def test_the_policy_stops_requests_elsewhere(page):
  """What `visit` would see if the page asked somebody else, the browser would not even send."""
  refused = page.evaluate(
    """async () => {
      const blocked = new Promise(resolve => addEventListener("securitypolicyviolation",
        event => resolve(event.effectiveDirective), {once: true}));
      await fetch("http://127.0.0.2:9/").catch(() => {});
      return blocked;
    }"""
  )
  assert refused == "connect-src"


# Contrast of every text on the page against what lies behind it: WCAG 2.2, 1.4.3.
CONTRAST = """() => {
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (one, other) => {
    const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const bad = [];
  const check = (what, ink, paper) => {
    const found = ratio(ink, paper);
    if (!(found >= 4.5)) bad.push(`${what}: ${found.toFixed(2)}`);
  };
  let count = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const isOther = element.closest("#mirror, noscript, dialog, textarea");
    if (isOther || !walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    count++;
    check(walker.currentNode.data, parse(getComputedStyle(element).color), behind(element));
  }
  const area = document.getElementById("text");
  check("the text", parse(getComputedStyle(area).color), behind(area));
  check("the placeholder", parse(getComputedStyle(area, "::placeholder").color), behind(area));
  for (const item of document.querySelectorAll("#legend li")) {
    check(`text on ${item.className}`, parse(getComputedStyle(area).color), behind(item));
  }
  return [count, bad];
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read(chromium, server, theme):
  with visit(chromium, server, color_scheme=theme) as page:
    write(page, "The king")
    open_panel(page)
    page.fill("[name=top_k]", "3")
    expect(page.locator("#next li.cut")).to_have_count(9)
    page.locator("#text").focus()
    press_tab(page)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper < "rgb(2") == (theme == "dark")
    count, bad = page.evaluate(CONTRAST)
    assert count > 60 and bad == []
    # The test can fail.
    page.evaluate("document.getElementById('status').style.color = 'rgb(127, 127, 127)'")
    assert page.evaluate(CONTRAST)[1]


def test_a_theme_of_ones_own(chromium, server):
  with visit(chromium, server, color_scheme="light") as page:
    page.click("#theme")
    page.click("#theme")
    expect(page.locator("#theme")).to_have_text("Theme: dark")
    page.reload()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"


NAMES = """() => {
  const named = element => element.ariaLabel || element.textContent.trim()
    || [...(element.labels ?? [])].map(label => label.textContent.trim()).join("")
    || document.getElementById(element.getAttribute("aria-labelledby"))?.textContent;
  const bad = [...document.querySelectorAll(
      "button, input, textarea, nav, aside, form, section, dialog, [role=listbox], [role=option]")]
    .filter(element => !named(element)).map(element => element.outerHTML.slice(0, 80));
  const ids = [...document.querySelectorAll("[id]")].map(element => element.id);
  const missing = ["aria-controls", "aria-describedby", "aria-labelledby", "aria-activedescendant"]
    .flatMap(name => [...document.querySelectorAll(`[${name}]`)]
      .filter(element => !document.getElementById(element.getAttribute(name)))
      .map(element => `${name}=${element.getAttribute(name)}`));
  return [...bad, ...missing, ...ids.filter((id, i) => ids.indexOf(id) !== i)];
}"""


def test_roles_names_and_the_order_of_focus(page):
  write(page, "The king")
  open_panel(page)
  page.locator("#text").focus()
  press_tab(page)
  assert page.evaluate(NAMES) == []
  tree = page.locator("body").aria_snapshot()
  for part in (
    "banner",
    "navigation",
    "main",
    "complementary",
    "contentinfo",
    "combobox",
    "listbox",
  ):
    assert part in tree, tree
  assert tree.count("- option ") == 5
  page.keyboard.press("Escape")
  page.locator(".skip").focus()
  order = ["A"]
  for _ in range(60):
    page.keyboard.press("Tab")
    name = page.evaluate(
      "document.activeElement.id || document.activeElement.name || document.activeElement.tagName"
    )
    if name == "text":
      page.keyboard.press("Escape")
    if name in ("A", "BODY"):
      break
    order.append(name)
  # As on the screen: skip link, header, documents, text, panel.
  places = [order.index(name) for name in ("theme", "new", "text", "colour", "count", "reset")]
  assert places == sorted(places)


def test_motion_can_be_done_without(chromium, server):
  duration = "getComputedStyle(document.querySelector('button')).transitionDuration"
  for motion, expected in (("reduce", "0s"), ("no-preference", "0.1s, 0.1s")):
    with visit(chromium, server, reduced_motion=motion) as page:
      assert page.evaluate(duration) == expected
