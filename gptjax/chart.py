"""Line charts as inline SVG, with the data that a report's script reads out under the pointer.

Knows nothing of what is drawn. The style sheet and the script are in `report.py`.
"""

import dataclasses
import html
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from gptjax.report import format_count

CHART_WIDTH, CHART_HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 12, 40
MAX_POINTS = 1000  # of a drawn line; more would not be seen at this width
COLORS = 6  # distinct series colours in the style sheet


@dataclasses.dataclass(frozen=True)
class Series:
  """One line of a chart.

  Attributes:
    name: in the legend.
    xs, ys: points in order of x; non-finite or None y's are left out.
    smoothing: points that the thick line averages over; the values themselves are drawn thin
      behind it. 0 draws the values only.
    has_markers: a dot at each point, for values that are few.
    is_faint: grey, behind the others, with no place in the legend and the read-out.
  """

  name: str
  xs: Sequence[float]
  ys: Sequence[float | None]
  smoothing: int = 0
  has_markers: bool = False
  is_faint: bool = False


def line_chart(
  title: str,
  series: Sequence[Series],
  *,
  x_label: str = "step",
  y_label: str = "",
  is_log: bool = False,
  is_log_x: bool = False,
  y_range: tuple[float | None, float | None] = (None, None),
) -> str:
  """Draws lines as an inline SVG figure with a read-out under the pointer.

  Args:
    title: caption, and the accessible name.
    series: at most six are told apart by colour.
    x_label, y_label: of the axes.
    is_log: logarithmic y; values that are not positive are left out.
    is_log_x: logarithmic x, whose values are positive.
    y_range: ends of the y axis; None is fitted to the values. What lies outside runs along
      the frame, as do the highest 0.5 % of a smoothed series.

  Returns:
    A <figure>; a paragraph that says so where there is nothing to draw.
  """
  lines = [_clean(one, is_log) for one in series]
  lines = sorted((one for one in lines if one.xs), key=lambda one: not one.is_faint)
  if not lines:
    return f"<figure><figcaption>{html.escape(title)}</figcaption><p>No values yet.</p></figure>"
  xs = [x for one in lines for x in one.xs]
  x_axis = Axis.fit(
    min(xs), max(xs), _LEFT, CHART_WIDTH - _RIGHT, is_log=is_log_x, is_tight=not is_log_x
  )
  low, high = _y_limits(lines, y_range)
  y_axis = Axis.fit(low, high, CHART_HEIGHT - _BOTTOM, _TOP, is_log=is_log)
  named = [one for one in lines if not one.is_faint] or lines
  drawn = [_draw_series(one, "faint", x_axis, y_axis) for one in lines if one not in named]
  drawn += [
    _draw_series(one, f"c{index % COLORS}", x_axis, y_axis) for index, one in enumerate(named)
  ]
  scales = {
    "x": dataclasses.asdict(x_axis),
    "y": dataclasses.asdict(y_axis),
    "label": x_label,
    "series": [_thin(_main_line(one)) for one in named],
  }
  legend = "".join(
    f'<span class="c{index % COLORS}"><i></i>{html.escape(one.name)}</span>'
    for index, one in enumerate(named)
    if len(lines) > 1
  )
  return (
    f'<figure class="chart"><figcaption>{html.escape(title)}<output></output></figcaption>'
    f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
    f"<title>{html.escape(_describe(title, named))}</title>"
    f"{_draw_axes(x_axis, y_axis, x_label, y_label)}{''.join(drawn)}"
    f'<g class="hover"></g></svg><div class="legend">{legend}</div>'
    f'<script type="application/json">{_script_json(scales)}</script></figure>'
  )


@dataclasses.dataclass(frozen=True)
class Axis:
  """Maps values low .. high to pixels start .. end."""

  low: float
  high: float
  start: float
  end: float
  is_log: bool = False

  @classmethod
  def fit(
    cls,
    low: float,
    high: float,
    start: float,
    end: float,
    *,
    is_log: bool = False,
    is_tight: bool = False,
  ) -> "Axis":
    """Widens the range a little so that no line runs along the frame, and never to nothing."""
    if low == high:
      pad = abs(low) * 0.1 or 1.0
      low, high = (low / 2, high * 2) if is_log else (low - pad, high + pad)
    elif is_log:
      pad = (high / low) ** 0.04
      low, high = low / pad, high * pad
    elif not is_tight:
      pad = (high - low) * 0.04
      # Values that start at zero keep their zero.
      low, high = (low if low == 0 else low - pad), high + pad
    return cls(low, high, start, end, is_log)

  def pixel(self, value: float) -> float:
    """Returns the place of a value, clipped to the frame."""
    low, high = self._scaled(self.low), self._scaled(self.high)
    fraction = (self._scaled(value) - low) / (high - low)
    return self.start + min(max(fraction, 0.0), 1.0) * (self.end - self.start)

  def ticks(self) -> list[float]:
    """Returns round values inside the range: 1, 2 or 5 times a power of ten."""
    if self.is_log and self.high / self.low >= 10:
      powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
      steps = (1,) if len(powers) > 4 else (1, 2, 5)
      ticks = [m * 10.0**power for power in powers for m in steps]
    else:
      step = nice_step((self.high - self.low) / 5)
      first = math.ceil(self.low / step)
      ticks = [i * step for i in range(first, math.floor(self.high / step) + 1)]
    return [tick for tick in ticks if self.low <= tick <= self.high]

  def _scaled(self, value: float) -> float:
    return math.log(value) if self.is_log else value


def nice_step(rough: float) -> float:
  """Rounds up to 1, 2 or 5 times a power of ten."""
  power = 10.0 ** math.floor(math.log10(rough))
  return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def smooth(values: Sequence[float], span: int) -> list[float]:
  """Averages each value with its neighbours, about `span` values together.

  The window is centred, so the line does not lag where a loss falls fast, as an exponential mean
  does; it shrinks towards the first value, and at the end keeps what lies behind.
  """
  sums, half, count = [0.0, *itertools.accumulate(values)], span // 2, len(values)
  windows = [(i - min(half, i), min(i + min(half, i), count - 1) + 1) for i in range(count)]
  return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def _clean(series: Series, is_log: bool) -> Series:
  kept = [
    (float(x), float(y))
    for x, y in zip(series.xs, series.ys, strict=True)
    if y is not None and math.isfinite(y) and (y > 0 or not is_log)
  ]
  return dataclasses.replace(series, xs=[x for x, _ in kept], ys=[y for _, y in kept])


def _y_limits(
  lines: Sequence[Series], y_range: tuple[float | None, float | None]
) -> tuple[float, float]:
  """Takes the whole range, but of noisy lines only up to their 99.5th percentile."""
  values = []
  for one in lines:
    ordered = sorted(one.ys)
    values += ordered[: math.ceil(0.995 * len(ordered))] if one.smoothing else ordered
  low, high = (min(values), max(values))
  return (low if y_range[0] is None else y_range[0], high if y_range[1] is None else y_range[1])


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
  """Keeps at most MAX_POINTS, evenly, first and last among them, with what a reader can read."""
  stride = max(1, math.ceil(len(points) / MAX_POINTS))
  kept = points[::stride]
  if kept[-1] != points[-1]:
    kept.append(points[-1])
  return [(x, float(f"{y:.6g}")) for x, y in kept]


def _main_line(series: Series) -> list[tuple[float, float]]:
  ys = smooth(series.ys, series.smoothing) if series.smoothing else series.ys
  return [*zip(series.xs, ys, strict=True)]


def _draw_series(series: Series, color: str, x_axis: Axis, y_axis: Axis) -> str:
  points = [*zip(series.xs, series.ys, strict=True)]
  parts = [_polyline(points, "raw", x_axis, y_axis)] if series.smoothing else []
  parts.append(_polyline(_main_line(series), "line", x_axis, y_axis))
  if series.has_markers or len(points) == 1:
    parts += [
      f'<circle cx="{x_axis.pixel(x):.1f}" cy="{y_axis.pixel(y):.1f}" r="3"/>'
      for x, y in _thin(points)
    ]
  return f'<g class="{color}">{"".join(parts)}</g>'


def _polyline(points: list[tuple[float, float]], kind: str, x_axis: Axis, y_axis: Axis) -> str:
  places = " ".join(f"{x_axis.pixel(x):.1f},{y_axis.pixel(y):.1f}" for x, y in _thin(points))
  return f'<polyline class="{kind}" points="{places}"/>'


def _draw_axes(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
  bottom, right = CHART_HEIGHT - _BOTTOM, CHART_WIDTH - _RIGHT
  parts = []
  y_ticks, x_ticks = y_axis.ticks(), x_axis.ticks()
  for value, words in zip(y_ticks, _tick_labels(y_ticks), strict=True):
    y = y_axis.pixel(value)
    parts.append(
      f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
      f'<text class="y" x="{_LEFT - 8}" y="{y + 4:.1f}">{words}</text>'
    )
  for value, words in zip(x_ticks, _tick_labels(x_ticks), strict=True):
    x = x_axis.pixel(value)
    parts.append(f'<text class="x" x="{x:.1f}" y="{bottom + 17}">{words}</text>')
  center, middle = (_LEFT + right) / 2, (_TOP + bottom) / 2
  return (
    f'<g class="axes">{"".join(parts)}'
    f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    f'<text class="x label" x="{center}" y="{bottom + 34}">{html.escape(x_label)}</text>'
    f'<text class="x label" transform="translate(13 {middle}) rotate(-90)">'
    f"{html.escape(y_label)}</text>"
    "</g>"
  )


def _tick_labels(ticks: Sequence[float]) -> list[str]:
  """Writes ticks with the digits that tell them apart; large and small ones in short."""
  largest = max((abs(tick) for tick in ticks), default=0.0)
  if largest >= 10_000:
    return [format_count(tick) for tick in ticks]
  for digits in range(4):
    labels = [f"{tick:.{digits}f}" for tick in ticks]
    pairs = zip(labels, ticks, strict=True)
    if all(math.isclose(float(label), tick, rel_tol=1e-6, abs_tol=1e-9) for label, tick in pairs):
      return labels
  if min(ticks) > 0 and largest / min(ticks) >= 100:  # of a logarithmic axis
    return [f"{tick:g}" for tick in ticks]
  # One exponent for all: 2e-4, 4e-4.
  exponent = math.floor(math.log10(largest))
  return [f"{tick / 10.0**exponent:.3g}e{exponent}" if tick else "0" for tick in ticks]


def _describe(title: str, lines: Sequence[Series]) -> str:
  ends = "; ".join(f"{one.name} ends at {one.ys[-1]:.4g}" for one in lines)
  return f"{title}: {ends}"


def _script_json(value: Any) -> str:
  # "<" would let a name close the script element.
  return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
