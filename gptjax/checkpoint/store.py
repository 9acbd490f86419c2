"""Checkpoints of one run: saved in the background, kept by policy, verified when read.

Orbax writes and reads the arrays; what it does not do is added here. Its arrays carry no checksum
(a flipped byte restores as a wrong number without a word), so the size and CRC-32 of every file
go into `checksums.json` just before a save is committed, and are compared before anything is
restored: a checkpoint is whole if they agree. Object stores such as gs:// checksum for themselves
and are not read twice. The names and shapes of all leaves travel along, so that a checkpoint of
another model is told from a damaged one.
"""

import concurrent.futures
import contextlib
import fnmatch
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import orbax.checkpoint as ocp
from etils import epath

from gptjax import tree as tree_lib
from gptjax.checkpoint.run_directory import is_remote, list_steps
from gptjax.errors import CheckpointError

PyTree = Any

# Trouble of the machine, not of the checkpoint: falling back would hide it and lose progress.
_TRANSIENT = (
  "RESOURCE_EXHAUSTED",
  "PERMISSION_DENIED",
  "UNAVAILABLE",
  "UNAUTHENTICATED",
  "DEADLINE_EXCEEDED",
  "Permission denied",
  "Too many open files",
  "Cannot allocate memory",
)
_CHECKSUMS = "checksums.json"
_UNCOMMITTED = "orbax-checkpoint-tmp"
_READ_BYTES = 1 << 24


class Restored(NamedTuple):
  """What came back: the step, its pytree, and one line for each newer checkpoint passed over."""

  step: int
  state: PyTree
  skipped: list[str]


class _DamagedError(Exception):
  """This checkpoint is not whole; an older one may be."""


class CheckpointStore:
  """Saves and restores the checkpoints `<path>/<step>` of one run.

  Reading alone creates and changes nothing, so it may go on beside a process that writes.

  Attributes:
    path: the folder, local or on an object store.
  """

  def __init__(
    self,
    path: str | epath.Path,
    keep_latest: int = 2,
    keep_every_steps: int = 0,
    metric: str = "valid_loss",
  ):
    """Opens a store; nothing is touched before the first save or restore.

    Args:
      path: the folder of the checkpoints; made at the first save.
      keep_latest: the newest n are kept, at least 1.
      keep_every_steps: and those at multiples of this, 0 for none.
      metric: and the one whose metric of this name is lowest.
    """
    _quiet_orbax()
    # Orbax takes absolute paths only.
    self.path = epath.Path(path if is_remote(path) else os.path.abspath(path))
    self._keep_latest = keep_latest
    self._keep_every_steps = keep_every_steps
    self._metric = metric
    self._manager: ocp.CheckpointManager | None = None
    self._saving_step: int | None = None

  def __enter__(self) -> "CheckpointStore":
    return self

  def __exit__(self, error_type, error, traceback) -> None:
    if error is None:
      self.close()
    else:
      with contextlib.suppress(CheckpointError):  # the first error is the one to report
        self.close()

  def steps(self) -> list[int]:
    """Lists the steps of all committed checkpoints, whole or damaged since, oldest first."""
    return list_steps(self.path)

  def latest_step(self) -> int | None:
    """Returns the newest committed step, or None."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """Returns the step with the lowest metric among the readable checkpoints, or None."""
    self.wait()
    metrics = {}
    for step in self.steps():
      with contextlib.suppress(_DamagedError):
        metrics[step] = _read_record(self.path / str(step))["metrics"].get(self._metric)
    metrics = {step: value for step, value in metrics.items() if value is not None}
    return min(metrics, key=lambda step: (metrics[step], -step)) if metrics else None

  def is_whole(self, step: int) -> bool:
    """Says whether the checkpoint of a step is, to the bit, what was saved."""
    try:
      _check_whole(self.path / str(step))
    except _DamagedError:
      return False
    return True

  def save(
    self,
    step: int,
    state: PyTree,
    metrics: Mapping[str, float] | None = None,
    force: bool = False,
  ) -> bool:
    """Starts saving `state`; returns when its arrays may be donated or overwritten.

    Args:
      step: completed updates.
      state: a pytree of jax arrays, sharded or not, typed PRNG keys included.
      metrics: scalars of this very state; those that are not finite are left out.
      force: replace a checkpoint of the same step, which otherwise is left as it is.

    Returns:
      Whether a save was started: False if the step is already there.

    Raises:
      CheckpointError: this save or the one before it failed, or newer checkpoints exist.
    """
    self.wait()
    self._saving_step = step
    finite = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
    record = {"leaves": _describe(state), "metrics": finite}
    with self._reporting():
      manager = self._open()
      if step in manager.all_steps():
        if not force:
          return False
        manager.delete(step)
      started = manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        ),
        metrics=finite if self._metric in finite else None,
      )
    if not started:
      raise CheckpointError(
        f"step {step} cannot be saved after step {manager.latest_step()}, which is in"
        f' "{self.path}"; remove the newer checkpoints or choose another --workdir'
      )
    return True

  def wait(self) -> None:
    """Blocks until the save under way is on disk. Raises CheckpointError if it failed."""
    if self._manager is not None:
      with self._reporting():
        self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save under way and frees the threads. Raises CheckpointError if it failed."""
    if self._manager is not None:
      with self._reporting():
        self._manager.close()
      self._manager = None

  def restore_latest(self, abstract_state: PyTree) -> Restored | None:
    """Restores the newest whole checkpoint and puts damaged newer ones aside.

    Args:
      abstract_state: jax.ShapeDtypeStruct leaves with the shardings wanted now, which need not
        be those it was saved with.

    Returns:
      None if nothing was ever saved here. Damaged checkpoints that would be in the way of saving
      are renamed to `<step>.damaged`; `skipped` has a line about each.

    Raises:
      CheckpointError: no checkpoint can be read, or it is of another model, which names the
        leaves that differ.
    """
    self.wait()
    steps = self.steps()
    if not steps:
      return None
    restored, damaged = self._restore_newest(
      lambda path: _restore_state(path, abstract_state), steps
    )
    damaged |= self._find_damaged_metrics(restored.step)
    if damaged:
      self.close()
      for step, reason in damaged.items():
        moved = _move_aside(self.path, step)
        restored.skipped.append(f"checkpoint {step} skipped, {reason}; kept as {moved}")
    return restored

  def restore_params(
    self, abstract_params: PyTree, step: int | None = None, item: str = "params"
  ) -> Restored:
    """Restores only the parameters, an item of the state, and changes nothing on disk.

    Args:
      abstract_params: jax.ShapeDtypeStruct leaves with shardings; a subtree is enough, and
        another floating dtype is cast to.
      step: None is the newest whole checkpoint.
      item: "params", or "ema" of a run that kept their average.

    Raises:
      CheckpointError: no (such) checkpoint, none readable, or parameters of another model.
    """
    restored, damaged = self._restore_newest(
      lambda path: _restore_params(path, abstract_params, item), self._candidates(step)
    )
    restored.skipped.extend(f"checkpoint {s} skipped, {why}" for s, why in damaged.items())
    return restored

  def saved_params(self, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Names the parameters `restore_params` would find, with their saved shapes and dtypes.

    Raises:
      CheckpointError: no (such) checkpoint, or none readable.
    """
    record, _ = self._restore_newest(_read_record, self._candidates(step))
    return {
      name.removeprefix("params/"): jax.ShapeDtypeStruct(tuple(shape), dtype)
      for name, (shape, dtype) in record.state["leaves"].items()
      if name.startswith("params/")
    }

  def _candidates(self, step: int | None) -> list[int]:
    """Returns the one step asked for, or all; CheckpointError if there is none."""
    self.wait()
    steps = self.steps()
    if not steps or (step is not None and step not in steps):
      wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
      raise CheckpointError(f'{wanted} in "{self.path}"; there are: {steps or "none"}')
    return steps if step is None else [step]

  def _restore_newest(
    self, restore: Callable[[epath.Path], PyTree], steps: list[int]
  ) -> tuple[Restored, dict[int, str]]:
    """Tries `restore` on steps, newest first; returns what came and why newer ones did not."""
    damaged = {}
    for step in sorted(steps, reverse=True):
      try:
        return Restored(step, restore(self.path / str(step)), []), damaged
      except _DamagedError as error:
        damaged[step] = str(error)
    reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
    raise CheckpointError(
      f'no checkpoint in "{self.path}" can be read ({reasons}); restore a copy of one of them,'
      " or choose another --workdir to start afresh"
    )

  def _find_damaged_metrics(self, before_step: int) -> dict[int, str]:
    """Finds older steps that would stop orbax: to save, it reads the metrics of all there are."""
    damaged = {}
    for step in self.steps():
      folder = self.path / str(step)
      if step < before_step and (folder / "metrics").exists():
        try:
          _check_whole(folder, "metrics")
        except _DamagedError as error:
          damaged[step] = str(error)
    return damaged

  def _open(self) -> ocp.CheckpointManager:
    """Creates orbax's manager at the first save: reading needs none, and it is not free."""
    if self._manager is None:
      self._manager = ocp.CheckpointManager(
        self.path,
        options=ocp.CheckpointManagerOptions(
          best_fn=lambda metrics: metrics[self._metric],
          best_mode="min",
          preservation_policy=self._policy(),
          cleanup_tmp_directories=True,
          async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        ),
        item_names=("state", "record"),
      )
    return self._manager

  def _policy(self) -> Any:
    """Keeps latest, best and every n-th. (best_fn with max_to_keep would delete the latest.)"""
    policies = ocp.checkpoint_managers.preservation_policy
    kept = [
      policies.LatestN(self._keep_latest),
      policies.BestN(
        get_metric_fn=lambda metrics: metrics[self._metric],
        reverse=True,
        n=1,
        keep_checkpoints_without_metrics=False,
      ),
    ]
    if self._keep_every_steps:
      kept.append(policies.EveryNSteps(self._keep_every_steps))
    return policies.AnyPreservationPolicy(kept)

  def _write_checksums(self) -> None:
    """Runs in orbax's thread, on process 0, when all is written and not yet committed."""
    if not is_remote(self.path):
      (folder,) = self.path.glob(f"{self._saving_step}.{_UNCOMMITTED}*")
      (folder / _CHECKSUMS).write_text(json.dumps(_checksums(folder)))

  @contextlib.contextmanager
  def _reporting(self) -> Iterator[None]:
    """Turns what a save raises into a CheckpointError and forgets the manager, which is stale."""
    try:
      yield
    except Exception as error:
      self._manager = None
      raise CheckpointError(
        f'checkpoint {self._saving_step} could not be saved to "{self.path}": {_one_line(error)};'
        " earlier checkpoints are intact; free space or mend the folder and run again"
      ) from error


def _quiet_orbax() -> None:
  """Silences its warnings about its own defaults, and tracebacks of errors it raises as well."""
  absl.logging.set_verbosity(absl.logging.ERROR)
  absl.logging.get_absl_logger().addFilter(_is_not_raised_too)


def _is_not_raised_too(record: logging.LogRecord) -> bool:
  return not (record.exc_info and "orbax" in record.pathname)


def _describe(state: PyTree) -> dict[str, list]:
  return {
    name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in tree_lib.named_leaves(state).items()
  }


def _checksums(folder: epath.Path, item: str = "*") -> dict[str, list[int]]:
  """Returns {file: [bytes, CRC-32]} of a checkpoint's items; orbax's own notes change later."""
  files = sorted(path for path in Path(folder).glob(f"{item}/**/*") if path.is_file())
  names = [path.relative_to(folder).as_posix() for path in files]
  with concurrent.futures.ThreadPoolExecutor() as pool:  # zlib and reading release the GIL
    return dict(zip(names, pool.map(_crc32, files), strict=True))


def _crc32(path: Path) -> list[int]:
  size, crc = 0, 0
  with path.open("rb") as file:
    while chunk := file.read(_READ_BYTES):
      size, crc = size + len(chunk), zlib.crc32(chunk, crc)
  return [size, crc]


def _check_whole(folder: epath.Path, item: str = "*") -> None:
  """Raises _DamagedError unless every file (of one item) is the one that was written."""
  if is_remote(folder):
    return
  with _finding_damage():
    try:
      expected = json.loads((folder / _CHECKSUMS).read_text())
    except FileNotFoundError:
      raise _DamagedError(f"{_CHECKSUMS} is missing") from None
    except ValueError:
      raise _DamagedError(f"{_CHECKSUMS} has been altered") from None
    found = _checksums(folder, item)
  for name in fnmatch.filter(expected, f"{item}/*"):
    if name not in found:
      raise _DamagedError(f"{name} is missing")
    if found[name][0] != expected[name][0]:
      raise _DamagedError(f"{name} has {found[name][0]} of {expected[name][0]} bytes")
    if found[name] != expected[name]:
      raise _DamagedError(f"{name} has been altered (its checksum differs)")


def _read_record(folder: epath.Path) -> dict[str, Any]:
  """Reads the leaves' names and shapes, and the metrics."""
  _check_whole(folder, "record")
  with _finding_damage(), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    return reader.restore(folder / "record")


def _restore_state(folder: epath.Path, abstract_state: PyTree) -> PyTree:
  _check_whole(folder)
  _check_same_model(folder, _read_record(folder)["leaves"], abstract_state)
  return _read_arrays(folder, abstract_state)


def _restore_params(folder: epath.Path, abstract_params: PyTree, item: str) -> PyTree:
  _check_whole(folder)
  abstract = {item: abstract_params}
  _check_same_model(folder, _read_record(folder)["leaves"], abstract, whole=False)
  return _read_arrays(folder, abstract)[item]


def _read_arrays(folder: epath.Path, abstract: PyTree) -> PyTree:
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  with _finding_damage(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    return reader.restore(
      folder / "state",
      args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True),
    )


@contextlib.contextmanager
def _finding_damage() -> Iterator[None]:
  """Turns what the system and orbax raise on unreadable files into _DamagedError."""
  try:
    yield
  except _DamagedError:
    raise
  except Exception as error:
    if isinstance(error, MemoryError) or any(word in str(error) for word in _TRANSIENT):
      raise CheckpointError(f"checkpoint cannot be read now: {_one_line(error)}") from error
    raise _DamagedError(f"it cannot be read ({_one_line(error)})") from error


def _check_same_model(
  folder: epath.Path, saved: Mapping[str, list], abstract: PyTree, whole: bool = True
) -> None:
  """Raises CheckpointError naming the leaves in which a checkpoint and a model differ.

  Args:
    folder: of the checkpoint, for the message.
    saved: its leaves.
    abstract: the model's leaves.
    whole: also refuse dtypes that differ and saved leaves that nobody asks for.
  """
  wanted = _describe(abstract)
  differences = []
  for name in [*wanted, *saved]:
    there, here = saved.get(name), wanted.get(name)
    if here is None and not whole:
      continue
    if not whole and there is not None:
      there, here = there[:1], here[:1]
    if there != here:
      differences.append(f"{name} is {_spell(there)} there and {_spell(here)} here")
  differences = list(dict.fromkeys(differences))
  if differences:
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise CheckpointError(
      f'checkpoint "{folder}" is of another model: {"; ".join(differences[:3])}{more};'
      " use the config it was trained with, or another --workdir"
    )


def _spell(leaf: list | None) -> str:
  return "absent" if leaf is None else " ".join(map(str, reversed(leaf)))


def _move_aside(folder: epath.Path, step: int) -> str:
  """Renames a damaged checkpoint out of the way of later saves; returns its new name."""
  name, count = f"{step}.damaged", 1
  while (folder / name).exists():
    count += 1
    name = f"{step}.damaged{count}"
  ocp.multihost.sync_global_processes(f"gptjax_move_aside_{step}")
  if jax.process_index() == 0:
    try:
      (folder / str(step)).rename(folder / name)
    except OSError as error:
      raise CheckpointError(
        f'damaged checkpoint "{folder / str(step)}" cannot be renamed: {_one_line(error)};'
        " remove it and run again"
      ) from error
  ocp.multihost.sync_global_processes(f"gptjax_moved_aside_{step}")
  return name


def _one_line(error: BaseException) -> str:
  """Shortens an error to one line; the cause of a full disk hides in pages of specification."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error)
  for words in ("No space left on device", "File too large", "Read-only file system", *_TRANSIENT):
    if words in text:
      return words
  line = " ".join(text.split()) or type(error).__name__
  return line if len(line) <= 160 else line[:157] + "..."
