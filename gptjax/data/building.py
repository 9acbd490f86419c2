"""Building a file or folder once: atomically, by one process at a time, with a progress bar."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gptjax.errors import DataError
from gptjax.report import format_count


def build_once(
  target: Path, is_built: Callable[[Path], bool], build: Callable[[Path], None]
) -> None:
  """Builds `target` unless it is whole; a second process waits for the first.

  The lock is freed when its process dies, however it dies, so what lies in the temporary place
  while we hold it is debris.
  """
  if is_built(target):
    return
  temporary = target.with_name(f"{target.name}.building")
  with open(target.with_name(f"{target.name}.lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if is_built(target):
      return
    _remove(temporary)
    try:
      build(temporary)
      _sync(temporary)
      _remove(target)
      os.replace(temporary, target)
    finally:
      _remove(temporary)


def _sync(path: Path) -> None:
  """Writes what was built through to the disk: a rename may reach it before what it names."""
  for part in (path, *path.rglob("*")):
    descriptor = os.open(part, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def _remove(path: Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def show_progress(
  name: str, total: int | None = None, unit: str = "bytes"
) -> Iterator[Callable[[int], None]]:
  """Shows a bar on standard error, if that is a terminal."""
  console = Console(stderr=True)
  columns = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.fields[amount]}"),
    TimeRemainingColumn(),
  )
  done = 0
  with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
    task = bar.add_task(name, total=total, amount="")

    def advance(count: int) -> None:
      nonlocal done
      done += count
      amount = f"{done / 1e6:.0f} MB" if unit == "bytes" else f"{format_count(done)} {unit}"
      bar.update(task, completed=done, amount=amount)

    yield advance


@contextlib.contextmanager
def disk_errors_named(
  directory: str, remedy: str = "set data.cache_dir to a folder with room"
) -> Iterator[None]:
  """Turns an unwritable or full disk into one line that names the directory and the remedy."""
  try:
    yield
  except OSError as error:
    reason = error.strerror or error
    raise DataError(f'"{directory}" cannot be written: {reason}; {remedy}') from error
