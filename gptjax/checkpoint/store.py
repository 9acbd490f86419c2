"""Checkpoints of one run: saved in the background, kept by policy, and the newest whole one read.

What one of them is, and when it is whole, is `verified`'s to know.
"""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import absl.logging
import jax
import orbax.checkpoint as ocp
from etils import epath

from gptjax.checkpoint.run_directory import is_remote, list_steps
from gptjax.checkpoint.verified import (
  DamagedError,
  check_whole,
  describe_leaves,
  one_line,
  read_record,
  restore_params,
  restore_state,
  write_checksums,
)
from gptjax.errors import CheckpointError

PyTree = Any

_UNCOMMITTED = "orbax-checkpoint-tmp"


class Restored(NamedTuple):
  """What came back: the step, its pytree, and one line for each newer checkpoint passed over."""

  step: int
  state: PyTree
  skipped: list[str]


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
      with contextlib.suppress(DamagedError):
        metrics[step] = read_record(self.path / str(step))["metrics"].get(self._metric)
    metrics = {step: value for step, value in metrics.items() if value is not None}
    return min(metrics, key=lambda step: (metrics[step], -step)) if metrics else None

  def is_whole(self, step: int) -> bool:
    """Says whether the checkpoint of a step is, to the bit, what was saved."""
    try:
      check_whole(self.path / str(step))
    except DamagedError:
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
    record = {"leaves": describe_leaves(state), "metrics": finite}
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

  def drop_after(self, step: int) -> None:
    """Removes the checkpoints of later steps. Raises CheckpointError if that fails."""
    self.wait()
    later = [there for there in self.steps() if there > step]
    with self._reporting():
      for there in later:
        self._open().delete(there)

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
      lambda path: restore_state(path, abstract_state), steps
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
      lambda path: restore_params(path, abstract_params, item), self._candidates(step)
    )
    restored.skipped.extend(f"checkpoint {s} skipped, {why}" for s, why in damaged.items())
    return restored

  def saved_params(self, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Names the parameters `restore_params` would find, with their saved shapes and dtypes.

    Raises:
      CheckpointError: no (such) checkpoint, or none readable.
    """
    record, _ = self._restore_newest(read_record, self._candidates(step))
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
      except DamagedError as error:
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
          check_whole(folder, "metrics")
        except DamagedError as error:
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
      write_checksums(folder)

  @contextlib.contextmanager
  def _reporting(self) -> Iterator[None]:
    """Turns what a save raises into a CheckpointError and forgets the manager, which is stale."""
    try:
      yield
    except Exception as error:
      self._manager = None
      raise CheckpointError(
        f'checkpoint {self._saving_step} could not be saved to "{self.path}": {one_line(error)};'
        " earlier checkpoints are intact; free space or mend the folder and run again"
      ) from error


def _quiet_orbax() -> None:
  """Silences its warnings about its own defaults, and tracebacks of errors it raises as well."""
  absl.logging.set_verbosity(absl.logging.ERROR)
  absl.logging.get_absl_logger().addFilter(_is_not_raised_too)


def _is_not_raised_too(record: logging.LogRecord) -> bool:
  return not (record.exc_info and "orbax" in record.pathname)


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
        f'damaged checkpoint "{folder / str(step)}" cannot be renamed: {one_line(error)};'
        " remove it and run again"
      ) from error
  ocp.multihost.sync_global_processes(f"gptjax_moved_aside_{step}")
  return name
