"""Charts of sweeps that `gptjax.chart` does not have: parallel coordinates, and bars.

SVG that uses the style sheet of `gptjax.report`.
"""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

from gptjax.chart import Axis
from gptjax.sweep.space import spell

WIDTH, HEIGHT = 1080, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 90, 34, 30
_WORST, _BEST = (196, 200, 206), (36, 99, 201)  # RGB; lines go from grey to blue
_HALO = "paint-order:stroke;stroke:var(--card);stroke-width:5px"  # words over lines
_LOG_RATIO = 10  # positive values that differ as much are spread by their logarithm


@dataclasses.dataclass(frozen=True)
class Column:
  """A vertical axis of parallel coordinates, with a value of every line; None where it has none."""

  name: str
  values: Sequence[Any]
  is_log: bool | None = None  # None: by the spread of the values


def parallel_coordinates(
  title: str, columns: Sequence[Column], labels: Sequence[str], direction: str
) -> str:
  """Draws a line for each trial through its value on every axis; the last axis gives the colour.

  Args:
    title: caption.
    columns: axes from left to right; the last one is the objective, with numbers only.
    labels: of the lines, shown under the pointer.
    direction: "minimize" or "maximize" the objective: good lines are blue, and drawn last.
  """
  step = (WIDTH - _LEFT - _RIGHT) / max(len(columns) - 1, 1)
  xs = [_LEFT + i * step for i in range(len(columns))]
  axes = [_fit(column) for column in columns]
  objective = columns[-1].values
  ranks = {value: rank for rank, value in enumerate(sorted(set(objective)))}
  worth = [1 - ranks[value] / max(len(ranks) - 1, 1) for value in objective]
  if direction == "maximize":
    worth = [1 - value for value in worth]
  drawn = []
  for line in sorted(range(len(objective)), key=lambda line: worth[line]):
    points = [
      f"{x:.1f},{axis.pixel(column.values[line]):.1f}"
      for x, axis, column in zip(xs, axes, columns)
      if column.values[line] is not None
    ]
    drawn.append(
      f'<polyline points="{" ".join(points)}" style="stroke:{_mix(worth[line])};'
      f'stroke-width:{1 + worth[line]:.2f}"><title>{html.escape(labels[line])}</title></polyline>'
    )
  return _figure(
    title, HEIGHT, "".join(drawn) + "".join(a.draw(c.name, x) for a, c, x in zip(axes, columns, xs))
  )


def bars(title: str, shares: dict[str, float]) -> str:
  """Draws named shares of 1 as horizontal bars, in their order."""
  row, left = 26, 250
  parts = []
  for i, (name, share) in enumerate(shares.items()):
    y, width = _TOP / 2 + i * row, share * (WIDTH - left - _RIGHT)
    parts.append(
      f'<text class="y" x="{left - 10}" y="{y + 15:.0f}">{html.escape(name)}</text>'
      f'<rect class="c0" x="{left}" y="{y:.0f}" width="{width:.1f}" height="{row - 8}"'
      f' fill="currentColor"/><text x="{left + width + 8:.1f}" y="{y + 15:.0f}">{share:.0%}</text>'
    )
  return _figure(title, round(_TOP + row * len(shares)), "".join(parts))


@dataclasses.dataclass(frozen=True)
class _Numbers:
  """An axis of numbers."""

  axis: Axis

  def pixel(self, value: float) -> float:
    return self.axis.pixel(value)

  def draw(self, name: str, x: float) -> str:
    return _draw_axis(name, x, [(spell(float(t)), self.axis.pixel(t)) for t in self.axis.ticks()])


@dataclasses.dataclass(frozen=True)
class _Names:
  """An axis of names, evenly spaced."""

  places: dict[str, float]

  def pixel(self, value: Any) -> float:
    return self.places[spell(value)]

  def draw(self, name: str, x: float) -> str:
    return _draw_axis(name, x, list(self.places.items()))


def _fit(column: Column) -> _Numbers | _Names:
  present = [value for value in column.values if value is not None]
  start, end = HEIGHT - _BOTTOM, _TOP
  if present and all(_is_number(value) for value in present):
    low, high = min(present), max(present)
    is_log = column.is_log
    if is_log is None:
      is_log = low > 0 and high / low >= _LOG_RATIO
    return _Numbers(Axis.fit(low, high, start, end, is_log=is_log))
  names = list(dict.fromkeys(spell(value) for value in present))
  gap = (start - end) / (len(names) + 1)
  return _Names({name: start - (i + 1) * gap for i, name in enumerate(names)})


def _draw_axis(name: str, x: float, ticks: Sequence[tuple[str, float]]) -> str:
  words = "".join(
    f'<text class="y" x="{x - 7:.1f}" y="{y + 4:.1f}" style="{_HALO}">{html.escape(word)}</text>'
    for word, y in ticks
  )
  return (
    f'<g class="axes"><line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>{words}'
    f'<text class="x label" x="{x:.1f}" y="{HEIGHT - 8}">{html.escape(name)}</text></g>'
  )


def _figure(title: str, height: int, content: str) -> str:
  name = html.escape(title)
  return (
    f'<figure><figcaption>{name}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img"'
    f' aria-label="{name}">{content}</svg></figure>'
  )


def _mix(worth: float) -> str:
  """Returns the colour between that of the worst, 0, and that of the best, 1."""
  emphasis = math.pow(worth, 1.5)
  parts = (round(bad + (good - bad) * emphasis) for bad, good in zip(_WORST, _BEST))
  return f"rgb({','.join(map(str, parts))})"


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
