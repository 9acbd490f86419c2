"""One-file HTML reports that open offline: text, tables, samples, and the charts of `chart.py`.

Pure functions build sections as HTML strings; `render_report` puts them into one file. Styles and
the few lines of script are inside it: nothing is requested from anywhere. Every string a caller
passes is escaped, except parts and sections, which are HTML that these functions made.
"""

import html
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def section(title: str, *parts: str) -> str:
  """Wraps HTML parts as one titled section."""
  return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def text(paragraph: str) -> str:
  """A paragraph."""
  return f"<p>{html.escape(paragraph)}</p>"


def table(
  header: Sequence[str], rows: Sequence[Sequence[Any]], best: Mapping[int, str] | None = None
) -> str:
  """A table; cells that are numbers align right.

  Args:
    header: column names.
    rows: cells; floats are shown with four significant digits, None as a dash.
    best: {column: "min" or "max"}; the best number of each such column is set in bold.
  """
  winners = {}
  for column, which in (best or {}).items():
    numbers = [row[column] for row in rows if _is_number(row[column])]
    winners[column] = (min if which == "min" else max)(numbers, default=None)

  def cell(column: int, value: Any) -> str:
    words = "–" if value is None else _format_value(value)
    kind = ' class="number"' if _is_number(value) else ""
    if _is_number(value) and value == winners.get(column):
      return f"<td{kind}><strong>{words}</strong></td>"
    return f"<td{kind}>{words}</td>"

  def heading(column: int, name: str) -> str:
    kind = ' class="number"' if rows and _is_number(rows[0][column]) else ""
    return f'<th scope="col"{kind}>{html.escape(name)}</th>'

  head = "".join(heading(i, name) for i, name in enumerate(header))
  body = "".join(
    f"<tr>{''.join(cell(i, value) for i, value in enumerate(row))}</tr>" for row in rows
  )
  return (
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
  )


def key_values(values: Mapping[str, Any]) -> str:
  """Names and values, one a line."""
  rows = "".join(
    f"<dt>{html.escape(name)}</dt><dd>{_format_value(value)}</dd>" for name, value in values.items()
  )
  return f'<dl class="pairs">{rows}</dl>'


def headline(values: Mapping[str, str]) -> str:
  """The few figures that matter, large, for the top of a report."""
  cards = "".join(
    f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
    for name, value in values.items()
  )
  return f'<dl class="cards">{cards}</dl>'


def collapsible(title: str, content: str) -> str:
  """HTML content that opens with a click."""
  return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def preformatted(content: str) -> str:
  """Text as it is, in a fixed-width font, long lines wrapped."""
  return f"<pre>{html.escape(content)}</pre>"


def samples(items: Sequence[tuple[str, str, str]]) -> str:
  """Texts over time: a timeline of (label, prompt, continuation), in order."""
  rows = "".join(
    f'<li><div class="when">{html.escape(label)}</div>'
    f'<pre><span class="prompt">{html.escape(prompt)}</span>{html.escape(continuation)}</pre></li>'
    for label, prompt, continuation in items
  )
  return f'<ol class="timeline">{rows}</ol>'


def grid(*parts: str) -> str:
  """Lays parts out side by side where there is room."""
  return f'<div class="grid">{"".join(parts)}</div>'


def environment(devices: Sequence[Any] = ()) -> dict[str, str]:
  """Collects where a report was made: versions, machine, commit, command line.

  Args:
    devices: jax devices of the run, described by kind and count.
  """
  versions = {name: _version(name) for name in ("gptjax", "jax", "jaxlib", "flax", "optax")}
  kinds = [f"{device.platform} {device.device_kind}" for device in devices]
  return {
    **versions,
    "python": platform.python_version(),
    "platform": platform.platform(),
    "processor": f"{_cpu_name()}, {os.cpu_count()} cores",
    **({"devices": _tally(kinds)} if kinds else {}),
    "commit": _git_commit(),
    "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
  }


def _tally(names: Sequence[str]) -> str:
  return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def _cpu_name() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


def _git_commit() -> str:
  """The commit of the package's own checkout, marked where files were changed."""

  def git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout

  try:
    changed = git("status", "--porcelain", "--untracked-files=no").strip()
    return git("rev-parse", "--short=12", "HEAD").strip() + (" with changes" if changed else "")
  except (OSError, subprocess.SubprocessError):
    return "none (installed package)"


def render_report(title: str, sections: Sequence[str]) -> str:
  """Builds the page: one self-contained HTML file as a string.

  Args:
    title: of the page.
    sections: HTML as `headline`, `section` and the others return it.
  """
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    # No picture: without this a browser asks a server for /favicon.ico.
    '<link rel="icon" href="data:,">'
    f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
    f"<body><main><h1>{html.escape(title)}</h1>\n"
    + "\n".join(sections)
    + f"\n</main><script>{_SCRIPT}</script></body></html>\n"
  )


def format_count(count: float) -> str:
  """Writes a count or rate in three digits: 7.5, 812, 12.3k, 124M, 1.56B."""
  rounded = float(f"{count:.3g}")
  for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if abs(rounded) >= unit:
      return f"{rounded / unit:.3g}{suffix}"
  return f"{rounded:.3g}"


def format_bytes(size: float) -> str:
  """Writes a size in binary units: 812 B, 1.5 GiB."""
  for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
    if abs(size) < 999.5 or unit == "TiB":
      return f"{size:.3g} {unit}"
    size /= 1024
  raise AssertionError("unreachable")


def format_seconds(seconds: float | None) -> str:
  """Writes a duration as 0:07, 3:21, 1:02:03 or 2d 3h; None as -:--."""
  if seconds is None:
    return "-:--"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours >= 24:
    return f"{hours // 24}d {hours % 24}h"
  return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _format_value(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.4g}"
  return html.escape(str(value))


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1c1e21; --dim: #666b73;
  --rule: #e4e5e7; --c0: #2463c9; --c1: #d9631e; --c2: #17876b; --c3: #8a4fbf; --c4: #b8860b;
  --c5: #c2335f; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1d2024; --ink: #e6e7e9;
  --dim: #9aa0a8; --rule: #33373d; --c0: #6ea3f7; --c1: #f29559; --c2: #4cc3a2; --c3: #bd8fe8;
  --c4: #e0b84c; --c5: #f07b9f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK JP",
  sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 20px; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 36px 0 12px; }
p { max-width: 75ch; margin: 0 0 12px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px;
  margin: 0 0 18px; }
.cards div, figure, .timeline li, details { background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; }
.cards div { padding: 12px 14px; }
.cards dt { color: var(--dim); font-size: 13px; }
.cards dd { margin: 2px 0 0; font-size: 21px; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr));
  gap: 14px; }
figure { margin: 0; padding: 12px 14px 10px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px;
  font-weight: 600; font-size: 14px; margin-bottom: 4px; }
output { color: var(--dim); font-weight: 400; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { fill: var(--dim); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .x { text-anchor: middle; } svg .y { text-anchor: end; }
.axes line { stroke: var(--dim); stroke-width: 1; } .axes .rule { stroke: var(--rule); }
polyline { fill: none; stroke: currentColor; stroke-linejoin: round; }
.line { stroke-width: 2; } .raw { stroke-width: 1; opacity: .3; }
circle { fill: currentColor; stroke: none; }
.hover line { stroke: var(--dim); stroke-dasharray: 3 3; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.faint { color: var(--dim); opacity: .35; } .faint .line { stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  background: currentColor; margin-right: 6px; vertical-align: middle; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { color: var(--dim); font-weight: 500; } td.number, th.number { text-align: right; }
.pairs { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 22px;
  margin: 0 0 12px; font-size: 14px; }
.pairs dt { color: var(--dim); } .pairs dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Noto Sans Mono",
  "Noto Sans Mono CJK JP", monospace; }
.timeline { list-style: none; margin: 0; padding: 0; display: grid; gap: 10px; }
.timeline li { display: grid; grid-template-columns: 110px minmax(0, 1fr); gap: 16px;
  padding: 12px 14px; }
.when { color: var(--dim); font-size: 13px; font-variant-numeric: tabular-nums; }
.prompt { color: var(--c0); font-weight: 600; }
details { padding: 10px 14px; margin-bottom: 10px; }
summary { cursor: pointer; font-weight: 600; font-size: 14px; }
details > :last-child { margin-top: 10px; margin-bottom: 0; }
@media (max-width: 600px) { .timeline li { grid-template-columns: 1fr; gap: 4px; } }
@media print { body { background: #fff; } figure, .timeline li { break-inside: avoid; } }
"""

# Under the pointer: a rule at the nearest x, a dot and the value of every series there.
_SCRIPT = """
for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg"), hover = figure.querySelector(".hover");
  const output = figure.querySelector("output");
  const {x, y, label, series} = JSON.parse(figure.querySelector("script").textContent);
  const place = (axis, value) => {
    const f = axis.is_log ? Math.log : (v) => v;
    const part = (f(value) - f(axis.low)) / (f(axis.high) - f(axis.low));
    return axis.start + Math.min(Math.max(part, 0), 1) * (axis.end - axis.start);
  };
  const nearest = (points, at) => points.reduce((a, b) =>
    Math.abs(place(x, b[0]) - at) < Math.abs(place(x, a[0]) - at) ? b : a);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const found = series.map((points) => nearest(points, at));
    const main = found.reduce((a, b) =>
      Math.abs(place(x, b[0]) - at) < Math.abs(place(x, a[0]) - at) ? b : a);
    const px = place(x, main[0]);
    hover.innerHTML = `<line x1="${px}" x2="${px}" y1="${y.end}" y2="${y.start}"/>` +
      found.map((p, i) => `<circle class="c${i % 6}" r="4" cx="${place(x, p[0])}" ` +
        `cy="${place(y, p[1])}"/>`).join("");
    const words = found.map((p, i) => {
      const word = document.createElement("span");
      if (found.length > 1) word.className = `c${i % 6}`;
      word.textContent = " " + p[1].toLocaleString("en", {maximumSignificantDigits: 4});
      return word;
    });
    output.replaceChildren(`${label} ${main[0].toLocaleString("en")}:`, ...words);
  });
  svg.addEventListener("pointerleave", () => { hover.innerHTML = ""; output.textContent = ""; });
}
"""
