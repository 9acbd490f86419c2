"""What a person sees while a run goes on: one bar in a terminal, plain short lines elsewhere.

Everything goes to standard error. Knows nothing of models or steps beyond the numbers it is given.
"""

import math
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gptjax.report import format_count, format_seconds

REFRESH_SECONDS = 0.25  # a redraw costs about 1 ms, so the bar takes less than 1 % of a core
PLAIN_SECONDS = 10.0
MIN_BAR_WIDTH = 4
SMOOTHING = 0.98  # per step: the shown train loss averages about the last 50 steps


class ProgressDisplay:
  """Shows the progress of a run; a context manager.

  Args:
    total_steps: updates of the whole run.
    start_step: updates already done when resuming.
    stream: where to write; None is standard error.
    is_enabled: False shows nothing, for all processes but the first.
    clock: seconds, monotonic.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    *,
    stream: TextIO | None = None,
    is_enabled: bool = True,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._total_steps = total_steps
    self._step = start_step
    self._is_enabled = is_enabled
    self._clock = clock
    self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
    self._live: Live | None = None
    self._shown: dict[str, Any] = {}
    self._status = ""
    self._loss = _SmoothedLoss(start_step)
    self._first: tuple[int, float] | None = None
    self._drawn_at = clock()
    self._drawn_step: int | None = None

  def __enter__(self) -> "ProgressDisplay":
    if self._is_enabled and self._console.is_terminal:
      self._live = Live(
        get_renderable=self._bar,
        console=self._console,
        auto_refresh=False,
        redirect_stdout=False,
      )
      self._live.start(refresh=True)
    return self

  def __exit__(self, *_: Any) -> None:
    self._status = ""
    if self._live:
      self._live.stop()
      self._live = None
    elif self._drawn_step != self._step and self._first:
      self._draw()

  def update(self, step: int, **values: float | None) -> None:
    """Takes the newest numbers and redraws now and then.

    Args:
      step: completed updates.
      **values: any of train_loss, valid_loss, valid_bits_per_byte, tokens_per_second, mfu,
        skipped (updates so far), as Python numbers; others, None and non-finite values
        are ignored. A validation loss is shown at once.
    """
    now = self._clock()
    self._step, self._status = step, ""
    self._first = self._first or (step, now)
    if values:
      self._take(step, values)
    is_evaluation = values.get("valid_loss") is not None
    interval = REFRESH_SECONDS if self._live else PLAIN_SECONDS
    if is_evaluation or now - self._drawn_at >= interval:
      self._drawn_at = now
      self._draw()

  def say(self, message: str) -> None:
    """Prints a message above the bar."""
    if self._is_enabled:
      # Text, not markup: a message may hold [brackets].
      self._console.print(Text(message))

  def status(self, text: str) -> None:
    """Names what the run does while no step completes ("evaluating"); the next update ends it."""
    self._status = text
    if self._live:
      self._live.refresh()

  def _take(self, step: int, values: dict[str, float | None]) -> None:
    known = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
    if "train_loss" in known:
      known["train_loss"] = self._loss.add(step, known["train_loss"])
    self._shown.update(known)

  def _draw(self) -> None:
    if self._live:
      self._live.refresh()
    elif self._is_enabled:
      self._drawn_step = self._step
      step = f"step {self._step}/{self._total_steps}"
      self._console.print("  ".join([step, *self._parts(is_wide=True)]), markup=False)

  def _bar(self) -> Table:
    is_wide = self._console.width >= 100
    counter = f"{self._step}/{self._total_steps}"
    parts = [self._status] * bool(self._status) + self._parts(is_wide)
    gap = 2 if is_wide else 1
    room = self._console.width - len(counter) - 2 * gap - MIN_BAR_WIDTH
    # On a narrow terminal the figures before the remaining time give way, the last one first.
    while len(parts) > 2 and len((" " * gap).join(parts)) > room:
      parts.pop(-2)
    line = Table.grid(expand=True, padding=(0, gap, 0, 0))
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    bar = ProgressBar(total=max(self._total_steps, 1), completed=self._step)
    figures = Text((" " * gap).join(parts))
    figures.highlight_regex(r"[a-zA-Z/]{2,}", "dim")  # words recede, numbers stand out
    line.add_row(counter, bar, figures)
    return line

  def _parts(self, is_wide: bool) -> list[str]:
    """The figures known so far, the most important first, and the remaining time."""
    formats = {
      "train_loss": "loss {:.3f}",
      "valid_loss": "valid {:.3f}",
      "valid_bits_per_byte": "{:.3f} bits/byte" if is_wide else "{:.2f} b/B",
      "tokens_per_second": "{} tokens/s" if is_wide else "{} tok/s",
      "mfu": "MFU {:.0%}",
      "skipped": "{} skipped",
    }
    shown = dict(self._shown)
    if "tokens_per_second" in shown:
      shown["tokens_per_second"] = format_count(shown["tokens_per_second"])
    parts = [text.format(shown[name]) for name, text in formats.items() if name in shown]
    return [*parts, f"ETA {format_seconds(self._remaining_seconds())}"]

  def _remaining_seconds(self) -> float | None:
    """Remaining time at the pace since the first step, which compilation does not count into."""
    if self._step >= self._total_steps:
      return 0.0
    if self._first is None or self._step <= self._first[0]:
      return None
    pace = (self._clock() - self._first[1]) / (self._step - self._first[0])
    return pace * (self._total_steps - self._step)


class _SmoothedLoss:
  """Exponential mean over steps, corrected for its start, whatever the spacing of the values."""

  def __init__(self, start_step: int):
    self._last_step, self._mean, self._weight = start_step, 0.0, 0.0

  def add(self, step: int, loss: float) -> float:
    keep = SMOOTHING ** max(step - self._last_step, 1)
    self._mean = keep * self._mean + (1 - keep) * loss
    self._weight = keep * self._weight + (1 - keep)
    self._last_step = step
    return self._mean / self._weight
