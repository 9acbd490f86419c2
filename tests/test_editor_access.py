"""Who can use the editor's page: contrast, names and roles, the order of focus, motion, themes."""

import editor_browser
import pytest
from editor_browser import (
  NEEDS_BROWSER,
  expect,
  open_panel,
  press_tab,
  visit,
  write,
)

pytestmark = NEEDS_BROWSER
server, chromium, page = editor_browser.server, editor_browser.chromium, editor_browser.page


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
