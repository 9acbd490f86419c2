"""What the benchmarks share: contestants that take turns, figures, tables, the JSON line."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NO_TORCH = "PyTorch not installed"
# Thread pools spin for a while after their last task; this lets them fall asleep.
PAUSE_SECONDS = 0.3


@dataclasses.dataclass(frozen=True)
class Figure:
  """One measured quantity over all rounds."""

  median: float
  minimum: float
  rounds: int


class Contestant:
  """A program under test in a process of its own, asleep while it is not its turn.

  In one process the thread pools of PyTorch and XLA would spin against each other; in two that run
  one after the other, a machine whose speed drifts would favour one of them.

  Args:
    make: "module:function"; called in the process with `arguments`, returns `run(count)`, whose
      result comes back. It must compile and warm up.
    **arguments: picklable.
  """

  def __init__(self, make: str, **arguments: Any):
    # As the Makefile has it, for both sides; malloc reads it when a process starts.
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
    self._process.start()
    theirs.close()
    self._receive()

  def run(self, count: int) -> Any:
    """Runs `count` units of work and returns what they gave."""
    self._connection.send(count)
    return self._receive()

  def _receive(self) -> Any:
    error, value = self._connection.recv()
    if error is not None:
      raise RuntimeError(f"a contestant failed: {error}")
    return value

  def __enter__(self) -> "Contestant":
    return self

  def __exit__(self, *_: Any) -> None:
    self._connection.close()
    self._process.terminate()
    self._process.join()


def _serve(connection, make: str, arguments: Mapping[str, Any]) -> None:
  module, name = make.split(":")
  try:
    run = getattr(importlib.import_module(module), name)(**arguments)
    connection.send((None, None))
    while True:
      connection.send((None, run(connection.recv())))
  except EOFError:
    pass
  except BaseException as error:
    connection.send((f"{type(error).__name__}: {error}", None))
    raise


def alternate(
  contestants: Mapping[str, Contestant], counts: Mapping[str, int], rounds: int
) -> dict[str, list[Any]]:
  """Lets contestants take turns; every second round goes backwards.

  Returns:
    {name: what it gave in each round}.
  """
  results = {name: [] for name in contestants}
  for number in range(rounds):
    for name in list(contestants)[:: -1 if number % 2 else 1]:
      time.sleep(PAUSE_SECONDS)
      results[name].append(contestants[name].run(counts[name]))
  return results


def summarize(values: Sequence[float]) -> Figure:
  """Returns median, minimum and number of the values of all rounds."""
  return Figure(statistics.median(values), min(values), len(values))


def ratio(ours: Figure | None, peers: Figure | None) -> float | None:
  """Divides medians; None where one side was not measured."""
  return None if ours is None or peers is None else ours.median / peers.median


def is_installed(package: str) -> bool:
  """Says whether a package can be imported, without importing it."""
  return importlib.util.find_spec(package) is not None


def machine() -> dict[str, Any]:
  """Describes the machine, its load before the start, and the versions that decide the figures."""
  packages = [name for name in ("jax", "jaxlib", "torch") if is_installed(name)]
  return {
    "processor": _processor(),
    "cores": os.cpu_count(),
    "load_average": os.getloadavg()[0],
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def print_result(
  title: str,
  columns: Sequence[str],
  rows: Iterable[Sequence[Any]],
  result: Mapping[str, Any],
  notes: Iterable[str] = (),
) -> None:
  """Prints a table, the machine, notes, and the result as one line of JSON.

  Args:
    title, columns, rows: of the table; None prints as "-".
    result: figures and ratios; "benchmark" and "machine" among them.
    notes: lines below the table.
  """
  table = Table(*columns, title=title)
  for row in rows:
    table.add_row(*("-" if cell is None else str(cell) for cell in row))
  console = Console(width=None if os.isatty(1) else 100, highlight=False)
  console.print(table)
  console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
  for note in notes:
    console.print(note)
  print(json.dumps(result, default=dataclasses.asdict), flush=True)


def milliseconds(figure: Figure | None) -> tuple[str, str, str]:
  """Writes the median, minimum and rounds of a figure in seconds as cells of a table."""
  if figure is None:
    return NO_TORCH, "-", "-"
  return f"{1e3 * figure.median:,.1f}", f"{1e3 * figure.minimum:,.1f}", str(figure.rounds)


def _processor() -> str:
  with open("/proc/cpuinfo") if Path("/proc/cpuinfo").exists() else open(os.devnull) as lines:
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
