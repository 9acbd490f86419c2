"""One-file reports: offline, escaped, and charts that put points where they belong."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from gptjax import report
from gptjax.chart import CHART_HEIGHT, CHART_WIDTH, Axis, Series, line_chart, nice_step, smooth
from gptjax.train.run_report import best_evaluation, training_report

HOSTILE = '</script><script src="https://example.com/x.js"></script><img src=x onerror=alert(1)>'


class _Page(HTMLParser):
  """Collects elements, and checks that they nest."""

  VOID = ("meta", "link", "br", "img")

  def __init__(self, page):
    super().__init__()
    self.elements, self.stack, self.words = [], [], []
    self.feed(page)
    assert not self.stack

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.stack.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_data(self, data):
    self.words.append(data)

  def tags(self, name):
    return [attrs for tag, attrs in self.elements if tag == name]


def _metrics(num_steps=300):
  lines = []
  for step in range(1, num_steps + 1):
    line = {
      "step": step,
      "train_loss": 3 + 5 * math.exp(-step / 50) + 0.1 * (-1) ** step,
      "learning_rate": 6e-4 * min(step / 30, 1),
      "grad_norm": 1.0 + 1 / step,
      "tokens_per_second": 40_000.0,
      "mfu": 0.6,
      "seconds": step / 2,
    }
    if step % 100 == 0:
      line |= {"valid_loss": 3.2 - step / 1000, "valid_bits_per_byte": 2.0}
    lines.append(line)
  lines[120] |= {"train_loss": float("nan"), "grad_norm": float("inf")}
  return lines


def _full_report():
  return training_report(
    HOSTILE,
    _metrics(),
    samples=[(100, HOSTILE, "吾輩は猫である 한국어 🙂\n  indented"), (300, "", "To be")],
    facts={"Parameters": HOSTILE},
    config_json='{"files": "' + HOSTILE + '"}',
    environment=report.environment(),
    notes=[HOSTILE],
  )


def test_report_requests_nothing():
  page = _full_report()
  parsed = _Page(page)
  for _, attrs in parsed.elements:
    assert not {"src", "srcset", "action", "data", "poster"} & set(attrs)
    # The empty icon is what keeps a browser from asking for /favicon.ico.
    assert attrs.get("href", "data:,") == "data:,"
    assert not any(name.startswith("on") for name in attrs)
  assert not parsed.tags("img") and not parsed.tags("iframe")
  style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
  assert "url(" not in style and "@import" not in style
  scripts = " ".join(re.findall(r"<script>(.*?)</script>", page, re.DOTALL))
  for request in ("fetch", "XMLHttpRequest", "import", "http:", "https:", "WebSocket"):
    assert request not in scripts


def test_hostile_text_is_shown_as_it_is():
  parsed = _Page(_full_report())
  words = "".join(parsed.words)
  assert words.count(HOSTILE) >= 5
  assert "吾輩は猫である 한국어 🙂\n  indented" in words
  assert all(set(attrs) <= {"type"} for attrs in parsed.tags("script"))


def test_a_page_of_hostile_chart_names_still_parses():
  page = report.render_report(
    "t", [line_chart(HOSTILE, [Series(HOSTILE, [1, 2], [1, 2]), Series("b", [1], [1])])]
  )
  parsed = _Page(page)
  assert HOSTILE in "".join(parsed.words)
  assert parsed.tags("svg")[0]["aria-label"] == HOSTILE
  assert len(parsed.tags("script")) == 2


def test_report_shows_every_part():
  parsed = _Page(_full_report())
  words = " ".join(parsed.words)
  for part in ("Best valid loss", "2.9000", "Bits per byte", "Loss", "Learning rate"):
    assert part in words
  for part in ("Gradient norm", "Throughput", "Model FLOPs utilisation", "step 300"):
    assert part in words
  for part in ("Configuration", "Environment", "python", "commit", "command", "2:30"):
    assert part in words
  assert len(parsed.tags("svg")) == 6
  assert parsed.elements[0][0] == "html" and parsed.elements[0][1]["lang"] == "en"


def test_report_of_a_run_that_has_not_begun():
  parsed = _Page(training_report("empty", []))
  assert "No values yet." in " ".join(parsed.words)
  assert not parsed.tags("svg")


def test_best_evaluation_ignores_non_finite():
  lines = [{"step": 1, "valid_loss": float("nan")}, {"step": 2, "valid_loss": 3.0}, {"step": 3}]
  assert best_evaluation(lines)["step"] == 2
  assert best_evaluation([]) is None


def test_long_runs_stay_small():
  steps = range(100_000)
  losses = [3 + math.sin(step) for step in steps]
  chart = line_chart("Loss", [Series("train", steps, losses, smoothing=20)])
  assert len(chart) < 100_000
  points = json.loads(re.search(r"<script[^>]*>(.*?)</script>", chart).group(1))["series"][0]
  assert points[0][0] == 0 and points[-1][0] == 99_999


def _places(chart, kind="line"):
  (text,) = re.findall(rf'<polyline class="{kind}" points="([^"]*)"', chart)
  return [tuple(map(float, place.split(","))) for place in text.split()]


@pytest.mark.parametrize("is_log", [False, True])
def test_points_lie_where_the_axis_says(is_log):
  ys = [1.0, 10.0, 100.0]
  places = _places(line_chart("c", [Series("a", [0, 1, 2], ys)], is_log=is_log))
  (x0, y0), (x1, y1), (x2, y2) = places
  assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # written to a tenth of a pixel
  part = 1 / 2 if is_log else 9 / 99
  assert (y0 - y1) / (y0 - y2) == pytest.approx(part, abs=0.01)
  assert all(0 <= x <= CHART_WIDTH and 0 <= y <= CHART_HEIGHT for x, y in places)


@pytest.mark.parametrize(
  "ys",
  [[5.0], [0.0, 0.0], [1e-9, 2e-9], [1e12, 3e12], [-1.0, 1.0], [None, 2.0, float("nan"), 3.0]],
)
def test_any_values_can_be_drawn(ys):
  chart = line_chart("c", [Series("a", range(len(ys)), ys, smoothing=3, has_markers=True)])
  assert "nan" not in chart.lower().replace("nano", "") and "inf" not in chart
  assert all(0 <= y <= CHART_HEIGHT for _, y in _places(chart))


def test_log_chart_leaves_out_what_has_no_logarithm():
  chart = line_chart("c", [Series("a", [1, 2, 3, 4], [0.0, -1.0, 1.0, 10.0])], is_log=True)
  assert len(_places(chart)) == 2


def test_ticks_are_round_and_inside():
  assert Axis(0, 1000, 0, 1).ticks() == [0, 200, 400, 600, 800, 1000]
  assert Axis(2.7, 8.9, 0, 1).ticks() == [4, 6, 8]
  assert Axis(0.4, 6, 0, 1, is_log=True).ticks() == pytest.approx([0.5, 1, 2, 5])
  assert Axis(1e-5, 1, 0, 1, is_log=True).ticks() == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])
  assert [nice_step(x) for x in (0.9, 1.1, 2.1, 7.0)] == pytest.approx([1, 2, 5, 10])


def test_smoothing_does_not_lag():
  line = [float(i) for i in range(50)]
  assert smooth(line, 10)[:45] == pytest.approx(line[:45])
  noisy = [3.0 + (-1) ** i for i in range(100)]
  assert max(abs(y - 3.0) for y in smooth(noisy, 20)[10:]) < 0.1


def test_table_marks_the_best_and_aligns_numbers():
  page = report.table(["name", "loss"], [["<b>", 3.21987], ["c", 2.5], ["d", None]], {1: "min"})
  assert "<td>&lt;b&gt;</td>" in page and "3.22" in page and "–" in page
  assert '<td class="number"><strong>2.5</strong></td>' in page
  assert page.count("<strong>") == 1
  assert '<th scope="col" class="number">loss</th>' in page


def test_environment_names_versions_and_command():
  found = report.environment()
  assert {"python", "jax", "flax", "optax", "processor", "commit", "command"} <= set(found)
  assert all(isinstance(value, str) and value for value in found.values())


@pytest.mark.parametrize(
  "count, text",
  [(0, "0"), (0.25, "0.25"), (812.2, "812"), (12_345, "12.3k"), (999_999, "1M"), (1.56e9, "1.56B")],
)
def test_format_count(count, text):
  assert report.format_count(count) == text


@pytest.mark.parametrize(
  "size, text", [(0, "0 B"), (812, "812 B"), (1023, "0.999 KiB"), (1.5 * 2**30, "1.5 GiB")]
)
def test_format_bytes(size, text):
  assert report.format_bytes(size) == text


@pytest.mark.parametrize(
  "seconds, text",
  [(None, "-:--"), (6.6, "0:07"), (201, "3:21"), (3723, "1:02:03"), (183_600, "2d 3h")],
)
def test_format_seconds(seconds, text):
  assert report.format_seconds(seconds) == text


def test_faint_series_stand_behind_and_are_not_named():
  chart = line_chart(
    "Loss", [Series("best", [1, 2], [2, 1]), Series("other", [1, 2], [3, 2], is_faint=True)]
  )
  assert chart.index('<g class="faint">') < chart.index('<g class="c0">')
  assert "other" not in chart
  (scales,) = re.findall(r'<script type="application/json">(.*?)</script>', chart)
  assert json.loads(scales)["series"] == [[[1, 2], [2, 1]]]


def test_a_logarithmic_x_spreads_ratios_and_names_its_powers():
  chart = line_chart("Loss", [Series("a", [1e-5, 1e-3, 1e-1], [3, 1, 2])], is_log_x=True)
  (points,) = re.findall(r'<polyline class="line" points="([^"]*)"', chart)
  first, middle, last = (float(point.split(",")[0]) for point in points.split())
  assert middle == pytest.approx((first + last) / 2, abs=0.11)
  assert {"1e-05", "0.0001", "0.1"} <= set(re.findall(r'<text class="x"[^>]*>([^<]*)<', chart))
