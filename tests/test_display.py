"""The progress display: one bar in a terminal, plain lines elsewhere."""

import io
import re
import time

import pytest

from gptjax.train.display import ProgressDisplay


class _Terminal(io.StringIO):
  def isatty(self):
    return True


class _Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
  for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("TERM", "xterm-256color")


def _run_terminal(monkeypatch, columns, total_steps=2000):
  monkeypatch.setenv("COLUMNS", str(columns))
  stream, clock = _Terminal(), _Clock()
  with ProgressDisplay(total_steps, stream=stream, clock=clock) as display:
    display.update(1, train_loss=4.0, tokens_per_second=12345.0, mfu=0.623)
    clock.now += 100
    display.update(total_steps // 2, valid_loss=3.5012, valid_bits_per_byte=2.1811)
    display.say("saved [red]step[/red] 1000")
  return stream.getvalue()


def _last_line(output):
  return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.rstrip().split("\x1b[2K")[-1]).rstrip()


def test_bar_fits_eighty_columns(monkeypatch):
  line = _last_line(_run_terminal(monkeypatch, 80))
  assert len(line) <= 80
  for part in ("1000/2000", "loss 4.000", "valid 3.501", "2.18 b/B", "12.3k tok/s", "MFU 62%"):
    assert part in line
  assert line.endswith("ETA 1:40")


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 140])
def test_bar_is_one_line_at_any_width(monkeypatch, columns):
  line = _last_line(_run_terminal(monkeypatch, columns, total_steps=600_000))
  assert "\n" not in line and len(line) <= columns
  assert "300000/600000" in line and "loss 4.000" in line and "ETA" in line


def test_messages_are_printed_verbatim_above_the_bar(monkeypatch):
  output = _run_terminal(monkeypatch, 80)
  message = output.index("saved [red]step[/red] 1000\n")
  assert "1000/2000" in output[message:]


def test_plain_lines_without_a_terminal():
  stream, clock = io.StringIO(), _Clock()
  with ProgressDisplay(100, stream=stream, clock=clock) as display:
    for step in range(1, 101):
      clock.now += 1
      values = {"valid_loss": 3.0, "valid_bits_per_byte": 2.0} if step == 55 else {}
      display.update(step, train_loss=3.5, tokens_per_second=812.0, **values)
    display.say("finished " + "x" * 200)
  lines = stream.getvalue().splitlines()
  steps = [int(m.group(1)) for m in map(re.compile(r"step (\d+)/100").match, lines) if m]
  assert steps == [10, 20, 30, 40, 50, 55, 65, 75, 85, 95, 100]
  assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
  assert lines[5] == (
    "step 55/100  loss 3.500  valid 3.000  2.000 bits/byte  812 tokens/s  ETA 0:45"
  )
  assert "finished " + "x" * 200 in lines


def test_resumed_run_estimates_from_its_own_steps():
  stream, clock = io.StringIO(), _Clock()
  with ProgressDisplay(1000, start_step=900, stream=stream, clock=clock) as display:
    clock.now += 60  # compilation does not count
    display.update(901)
    clock.now += 2 * 49
    display.update(950, valid_loss=1.0)
  assert "step 950/1000  valid 1.000  ETA 1:40" in stream.getvalue()


def test_smoothed_loss_averages_and_skips_non_finite():
  stream, clock = io.StringIO(), _Clock()
  with ProgressDisplay(1000, stream=stream, clock=clock) as display:
    for step in range(1, 400):
      loss = float("nan") if step % 10 == 0 else 3.0 + (-1) ** step
      display.update(step, train_loss=loss)
    display.update(400, valid_loss=1.0)
  shown = float(re.search(r"step 400/1000  loss (\d\.\d+)", stream.getvalue()).group(1))
  # The odd steps, all present, are 2; of the even ones, 4, a fifth is missing.
  assert 2.5 < shown < 3.1


def test_status_is_shown_until_the_next_update(monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  stream, clock = _Terminal(), _Clock()
  with ProgressDisplay(10, stream=stream, clock=clock) as display:
    display.status("compiling")
    assert "compiling" in _last_line(stream.getvalue())
    clock.now += 1
    display.update(1, train_loss=1.0)
    assert "compiling" not in _last_line(stream.getvalue())


def test_disabled_display_is_silent():
  stream = _Terminal()
  with ProgressDisplay(10, stream=stream, is_enabled=False) as display:
    display.say("hello")
    display.status("compiling")
    display.update(10, valid_loss=1.0)
  assert stream.getvalue() == ""


def test_an_update_costs_little(monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  with ProgressDisplay(10_000, stream=_Terminal()) as display:
    start = time.process_time()
    for step in range(10_000):
      display.update(step, train_loss=3.0, tokens_per_second=1e4)
    seconds = time.process_time() - start
  assert seconds / 10_000 < 2e-4
