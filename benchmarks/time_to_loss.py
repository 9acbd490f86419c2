"""Time to quality: shakespeare_char.py:fast to nanoGPT's final loss, beside nanoGPT's own recipe.

Ours: `gptjax pretrain` in a fresh process, run directory, token cache and home, so that nothing
was compiled or tokenised before; the time from the start of the process to the first validation
loss at or below 1.898 nats over the whole split (the last tenth of the text, rows of 64 that do
not overlap), imports, compilation and evaluation included. The twin: nanoGPT's recipe in PyTorch,
2,000 updates, from the start of its process to the end of training, its own loss estimates
included as in nanoGPT's command; its loss over the whole split is computed after that, uncharged.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import (
  NO_TORCH,
  Figure,
  is_installed,
  machine,
  print_result,
  ratio,
  summarize,
)
from gptjax.checkpoint.run_directory import RunDirectory

ROOT = Path(__file__).parent.parent
TEXT = ROOT.parent / "shared" / "data" / "corpora" / "en" / "tinyshakespeare.txt"
EXPERIMENT = "experiments/shakespeare_char.py:fast"
TARGET_NATS = 1.898
ROW_TOKENS = 64
LARGEST_RATIO = 0.5
POLL_SECONDS = 0.05


def run_ours(text: Path, overrides: Mapping[str, str]) -> dict[str, Any]:
  """Trains by the command line.

  Returns:
    seconds: of wall time to the target, None if it was not reached; logged_seconds: those of the
    line that reached it, counted by the run itself, imports excluded; total_seconds: to the end
    of the process; valid_loss and step: of that line, or of the last one.
  """
  with tempfile.TemporaryDirectory() as folder:
    run = RunDirectory(f"{folder}/run")
    seconds, total_seconds = run_and_watch(run, pretrain_command(run, text, folder, overrides))
    lines = [line for line in run.read_metrics() if "valid_loss" in line]
    config = run.read_config()
  if config["model"]["context_length"] != ROW_TOKENS:
    raise RuntimeError(f"{EXPERIMENT} is not scored in rows of {ROW_TOKENS}: not comparable")
  line = lines[-1] if seconds is None else first_reaching(lines)
  logged_seconds = None if seconds is None else line["seconds"]
  check_clocks(seconds, logged_seconds)
  return {
    "seconds": seconds,
    "logged_seconds": logged_seconds,
    "total_seconds": total_seconds,
    "valid_loss": line["valid_loss"],
    "step": line["step"],
  }


def pretrain_command(
  run: RunDirectory, text: Path, folder: str, overrides: Mapping[str, str]
) -> list[str]:
  """Returns the command line of ours."""
  given = {
    "data.hub": "",
    "data.files": json.dumps([str(text)]),
    "data.cache_dir": f"{folder}/tokens",
    "eval.max_rows": "0",
    **overrides,
  }
  command = [sys.executable, "-m", "gptjax", "pretrain", "--config", EXPERIMENT]
  return [*command, f"--workdir={run.path}", *(f"--config.{k}={v}" for k, v in given.items())]


def run_and_watch(run: RunDirectory, command: list[str]) -> tuple[float | None, float]:
  """Runs a command; returns the seconds after which the run reached the target, and all of them."""
  with tempfile.TemporaryDirectory() as home, open(f"{home}/log.txt", "w+") as log:
    seconds = None
    started = time.perf_counter()
    process = subprocess.Popen(
      command, cwd=ROOT, env=fresh_environment(home), stdout=log, stderr=log
    )
    while process.poll() is None:
      time.sleep(POLL_SECONDS)
      if seconds is None and first_reaching(run.read_metrics()):
        seconds = time.perf_counter() - started
    total_seconds = time.perf_counter() - started
    if seconds is None and first_reaching(run.read_metrics()):
      seconds = total_seconds
    log.seek(0)
    if process.returncode:
      raise RuntimeError(f"gptjax pretrain failed: {log.read()[-2000:]}")
  return seconds, total_seconds


def first_reaching(lines: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
  """Returns the first line of metrics whose validation loss is at most the target."""
  return next((line for line in lines if line.get("valid_loss", math.inf) <= TARGET_NATS), None)


def check_clocks(seconds: float | None, logged_seconds: float | None) -> None:
  """Raises RuntimeError if the run counted more time than passed on the wall."""
  if seconds is not None and logged_seconds > seconds:
    raise RuntimeError(f"the run logged {logged_seconds} s, but only {seconds} s passed")


def fresh_environment(home: str) -> dict[str, str]:
  """Returns the environment without anything that could bring a compilation from earlier."""
  kept = {key: v for key, v in os.environ.items() if "COMPILATION_CACHE" not in key}
  return kept | {"HOME": home, "XDG_CACHE_HOME": f"{home}/cache"}


def run_twin(text: Path, steps: int) -> dict[str, Any]:
  """Trains the PyTorch twin; returns seconds, estimate_seconds (part of them) and valid_loss."""
  command = [sys.executable, "-m", "benchmarks.torch_twin", "--text", str(text)]
  started = time.perf_counter()
  process = subprocess.Popen(
    [*command, "--steps", str(steps)], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  for line in process.stdout:
    if line.strip() == "trained":
      seconds = time.perf_counter() - started
  if process.wait():
    raise RuntimeError("the PyTorch twin failed")
  return {"seconds": seconds, **json.loads(line)}


def skip(reason: str) -> dict[str, Any]:
  """Says why nothing was measured."""
  result = {"benchmark": "time_to_loss", "machine": machine(), "skipped": reason}
  print_result("time_to_loss: skipped", ["reason"], [[reason]], result)
  return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
  """Measures, prints, and returns the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--text", type=Path, default=TEXT, help=f"default: {TEXT}")
  parser.add_argument("--rounds", type=int, default=1, help="both sides take turns")
  parser.add_argument("--twin-steps", type=int, default=2_000, help="0 leaves the twin out")
  parser.add_argument(
    "--set", metavar="KEY=VALUE", action="append", default=[], help="a config key of ours"
  )
  options = parser.parse_args(arguments)
  if not options.text.is_file():
    return skip(f"{options.text} is missing; give --text")
  has_twin = is_installed("torch") and options.twin_steps > 0
  here = machine()
  ours, twins = [], []
  for _ in range(options.rounds):
    ours.append(run_ours(options.text.resolve(), dict(item.split("=", 1) for item in options.set)))
    if has_twin:
      twins.append(run_twin(options.text.resolve(), options.twin_steps))

  reached = all(run["seconds"] is not None for run in ours)
  ours_seconds = summarize([run["seconds"] for run in ours]) if reached else None
  twin_seconds = summarize([run["seconds"] for run in twins]) if twins else None
  result = {
    "benchmark": "time_to_loss",
    "machine": here,
    "target_nats": TARGET_NATS,
    "reached": reached,
    "ours_seconds": ours_seconds,
    "twin_seconds": twin_seconds,
    "twin_steps": options.twin_steps,
    "ratio": ratio(ours_seconds, twin_seconds),
    "goal": LARGEST_RATIO,
    "ours": ours,
    "twin": twins,
  }
  print_result("time_to_loss", COLUMNS, table_rows(result), result, NOTES)
  return result


SIDES = ("ours", "twin")
COLUMNS = ("", "seconds, median", "min", "rounds", "valid loss, nats")
NOTES = (
  "Seconds of wall time from the start of the process: ours to the target, the twin's to its end.",
)


def table_rows(result: Mapping[str, Any]) -> list[tuple]:
  """Writes the result as rows of the table."""
  loss = {side: [f"{run['valid_loss']:.4f}" for run in result[side]][-1:] for side in SIDES}
  missed = f"{TARGET_NATS} not reached"
  absent = "left out" if is_installed("torch") else NO_TORCH
  share = None if result["ratio"] is None else f"{result['ratio']:.3f}, goal <= {LARGEST_RATIO}"
  return [
    (f"gptjax, to {TARGET_NATS} nats", *cells(result["ours_seconds"], missed), *loss["ours"]),
    (
      f"PyTorch twin, {result['twin_steps']} updates",
      *cells(result["twin_seconds"], absent),
      *loss["twin"],
    ),
    ("  ours / twin", share),
  ]


def cells(figure: Figure | None, missing: str) -> tuple[str, ...]:
  """Writes a figure in seconds."""
  if figure is None:
    return missing, "-", "-"
  return f"{figure.median:.1f}", f"{figure.minimum:.1f}", str(figure.rounds)


if __name__ == "__main__":
  sys.exit(not main().get("reached", True))
