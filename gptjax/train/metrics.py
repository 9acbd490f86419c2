"""Where a run's numbers go: `metrics.jsonl` always, TensorBoard and Weights & Biases by config.

Owns the form of a line and the trackers; the file itself belongs to the run directory.
"""

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from gptjax.checkpoint.run_directory import is_remote
from gptjax.errors import ConfigError

# The order in which a line lists its fields; others follow as they come.
FIELDS = (
  "train_loss",
  "valid_loss",
  "valid_bits_per_byte",
  "learning_rate",
  "grad_norm",
  "tokens_per_second",
  "mfu",
  "seconds",
)


def metrics_line(step: int, values: Mapping[str, Any]) -> dict[str, int | float]:
  """Builds one line of `metrics.jsonl`.

  Args:
    step: completed updates.
    values: numbers or scalar arrays of any kind; None is left out.

  Returns:
    Plain Python numbers at full precision, non-finite ones included: that a step had no usable
    value is worth a line, and the run directory knows how to spell it in JSON.
  """
  names = [name for name in FIELDS if name in values]
  names += [name for name in values if name not in FIELDS]
  numbers = {name: values[name] for name in names if values[name] is not None}
  plain = {name: x.item() if hasattr(x, "item") else x for name, x in numbers.items()}
  return {"step": int(step), **plain}


class Tracker(Protocol):
  """Something that receives every line besides the file."""

  def write(self, step: int, values: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


class MetricsWriter:
  """Writes lines of metrics to the run's file and to its trackers.

  Args:
    append: stores one line; `RunDirectory.append_metrics`.
    trackers: as `make_trackers` returns them.
  """

  def __init__(self, append: Callable[[dict[str, Any]], None], trackers: Sequence[Tracker] = ()):
    self._append = append
    self._trackers = tuple(trackers)

  def write(self, step: int, **values: Any) -> None:
    """Writes the line of `step` (completed updates); see `metrics_line` for the values."""
    line = metrics_line(step, values)
    self._append(dict(line))
    step = line.pop("step")
    finite = {name: value for name, value in line.items() if math.isfinite(value)}
    for tracker in self._trackers:
      tracker.write(step, finite)

  def close(self) -> None:
    """Flushes and closes the trackers."""
    for tracker in self._trackers:
      tracker.close()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


def make_trackers(
  names: Sequence[str], workdir: str, config_json: str, *, resume_step: int = 0
) -> list[Tracker]:
  """Opens the trackers that `train.trackers` names.

  Args:
    names: of "tensorboard" and "wandb".
    workdir: the run directory.
    config_json: the resolved config, kept with the run.
    resume_step: the restored step; what a tracker holds after it will be written again.

  Raises:
    ConfigError: a tracker's package is not installed, or the run is on an object store.
  """
  if names and is_remote(workdir):
    raise ConfigError(
      f'train.trackers {", ".join(names)} write local files only, and the run is in "{workdir}";'
      " leave them out (metrics.jsonl has every number), or choose a local --workdir"
    )
  makers = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}
  return [makers[name](workdir, config_json, resume_step) for name in names]


class TensorBoardTracker:
  """Event files in RUN/tensorboard."""

  def __init__(self, workdir: str, config_json: str, resume_step: int):
    tensorboard = _import_tracker("tensorboardX", "tensorboard")
    self._writer = tensorboard.SummaryWriter(
      f"{workdir}/tensorboard",
      # Events at purge_step and later are hidden by TensorBoard: they belong to the lost steps.
      purge_step=resume_step + 1,
      # Files are named by the second; a restart within one would overwrite the file before.
      filename_suffix=f".{time.time_ns()}",
    )
    if not resume_step:
      self._writer.add_text("config", f"```json\n{config_json}\n```", 0)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class WandbTracker:
  """A Weights & Biases run in RUN/wandb, offline unless the user sets WANDB_MODE.

  A resumed run keeps its id. W&B ignores steps that it already has, which is right here: a resumed
  run repeats the lost steps bit for bit.
  """

  def __init__(self, workdir: str, config_json: str, resume_step: int):
    wandb = _import_tracker("wandb", "wandb")
    folder = Path(workdir, "wandb")
    folder.mkdir(parents=True, exist_ok=True)
    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", "gptjax"),
      name=Path(workdir).name,
      dir=workdir,
      id=_wandb_id(folder / "run_id.txt", wandb, is_resumed=resume_step > 0),
      resume="allow",
      mode=os.environ.get("WANDB_MODE", "offline"),
      config=json.loads(config_json),
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    self._run.finish()


def _wandb_id(path: Path, wandb: ModuleType, *, is_resumed: bool) -> str:
  if is_resumed and path.exists():
    return path.read_text().strip()
  run_id = wandb.util.generate_id()
  path.write_text(run_id + "\n")
  return run_id


def _import_tracker(module: str, extra: str) -> ModuleType:
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise ConfigError(
      f'train.trackers names "{extra}", but the package {module} is not installed;'
      f" run `.venv/bin/pip install -e '.[{extra}]'` or leave it out"
    ) from error
