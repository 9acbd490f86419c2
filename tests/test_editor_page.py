"""The editor's page in a real browser: keys, lists, colours, documents, errors, other browsers."""

import editor_browser
import pytest
from editor_browser import (
  NEEDS_BROWSER,
  SENTENCE,
  ask_server,
  chosen,
  expect,
  open_panel,
  press_tab,
  text,
  visit,
  write,
)

pytestmark = NEEDS_BROWSER
server, chromium, page = editor_browser.server, editor_browser.chromium, editor_browser.page


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
  page.click("#toggle-panel")
  page.fill("[name=count]", "3")
  page.fill("[name=num_tokens]", "2")
  write(page, "The king")
  assert len(press_tab(page)) == 3
  # What the context has room for is no mistake of the reader's.
  expect(page.locator("[name=max_tokens]")).to_have_value("24")
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
  # Greedy, which the options of drawing have no part in.
  page.fill("[name=temperature]", "0")
  page.locator("#text").focus()
  page.keyboard.press("Control+Enter")
  expect(page.locator("#status")).to_have_text("Written")


def test_writing_stops_for_whoever_wants_the_keyboard(page):
  page.click("#toggle-panel")
  page.fill("[name=max_tokens]", "24")
  page.route("**/v1/completions", lambda route: None)  # it does not come
  write(page, "The king")
  ways = [
    lambda: page.keyboard.press("Escape"),
    lambda: page.keyboard.type("s"),
    lambda: page.keyboard.press("ArrowLeft"),
    lambda: page.click("#write"),
    lambda: page.locator("[name=top_k]").focus(),
  ]
  for stop in ways:
    with page.expect_request("**/v1/completions"):
      page.locator("#text").focus()
      page.keyboard.press("Control+Enter")
    expect(page.locator("#write")).to_have_text("Stop")
    stop()
    expect(page.locator("#write")).to_contain_text("Write on")
  expect(page.locator("[name=top_k]")).to_be_focused()
  assert text(page) == "The kings"


def test_errors_are_said_and_the_text_is_kept(page):
  said = page.locator("#alert")
  busy = {"error": {"message": "64 requests wait already; try again later"}}
  answers = [
    lambda route: route.abort(),
    lambda route: route.fulfill(status=429, json=busy),
    lambda route: route.continue_(),
  ]
  page.route("**/editor/continuations", lambda route: answers.pop(0)(route))
  write(page, "The king")
  page.keyboard.press("Tab")
  expect(said).to_have_text("The server does not answer. Your text is kept in this browser.")
  page.keyboard.press("Tab")
  expect(said).to_contain_text("64 requests wait already; try again later.")
  press_tab(page)
  expect(said).to_have_text("")
  page.reload()
  assert text(page) == "The king"


def test_a_server_that_comes_back_is_forgiven(page):
  answers = [lambda route: route.abort(), lambda route: route.continue_()]
  page.route("**/editor/read", lambda route: answers.pop(0)(route))
  write(page, "The king")
  expect(page.locator("#alert")).to_contain_text("does not answer")
  page.keyboard.type("s")
  expect(page.locator("#alert")).to_have_text("")


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
