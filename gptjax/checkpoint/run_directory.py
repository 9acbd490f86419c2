"""The files of a run, except the arrays: config, tokenizer, metrics, samples, report.

A run directory is a folder on a disk or on an object store (etils.epath). Small files are
replaced as a whole, so that a reader never sees half of one; the two logs, `metrics.jsonl` and
`samples.txt`, are appended to, and a line torn by a crash is passed over when they are read.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from etils import epath

from gptjax.errors import CheckpointError

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # some network file systems
_SAMPLES_HEADER = re.compile(r"^=== step (\d+) ===$", re.MULTILINE)


class RunDirectory:
  """Names and writes the files of one run.

  Attributes:
    path: the folder.
    config_path, tokenizer_path, data_path, metrics_path, samples_path, report_path,
      checkpoints_path: what is in it; results_path and predictions_path of a fine-tuned one.
  """

  def __init__(self, path: str | os.PathLike):
    """Names a run directory; nothing is touched.

    Raises:
      CheckpointError: it is on an object store, and the package that reaches it is missing.
    """
    if os.fspath(path).startswith("gs://") and not find_spec("gcsfs"):
      raise CheckpointError(
        f"\"{path}\" needs the package gcsfs; run `.venv/bin/pip install -e '.[cloud]'`"
      )
    self.path = epath.Path(path).expanduser()
    self.config_path = self.path / "config.json"
    self.tokenizer_path = self.path / "tokenizer.json"
    self.data_path = self.path / "data.json"
    self.metrics_path = self.path / "metrics.jsonl"
    self.samples_path = self.path / "samples.txt"
    self.report_path = self.path / "report.html"
    self.results_path = self.path / "results.json"
    self.predictions_path = self.path / "predictions.jsonl"
    self.checkpoints_path = self.path / "checkpoints"
    self._metrics = _Log(self.metrics_path)
    self._samples = _Log(self.samples_path)

  def create_or_check(
    self,
    config_json: str,
    tokenizer: Any = None,
    changeable: Collection[str] = (),
    data: Mapping[str, Any] | None = None,
  ) -> bool:
    """Starts a run here, or checks that the run that is here is this one.

    A run that was ended before its first checkpoint has learned nothing: it starts anew.

    Args:
      config_json: the resolved config, as `gptjax.config.to_json` writes it.
      tokenizer: a gptjax Tokenizer to keep beside it, or None.
      changeable: dotted keys, or groups of them, that may differ from the run that is here
        ("train.log_every_steps", "eval"); config.json then takes the new values.
      data: JSON values that tell its data from others, to keep in data.json, or None.

    Returns:
      Whether a run was here before.

    Raises:
      CheckpointError: the run here has another config, tokenizer or data, its config.json cannot
        be read, or the folder cannot be written.
    """
    exists, is_begun = self.config_path.exists(), self.latest_step() is not None
    if is_begun and not exists:
      raise CheckpointError(
        f'"{self.path}" holds checkpoints but no config.json; choose another --workdir'
      )
    if is_begun:
      self.check(config_json, tokenizer, changeable, data)
    else:
      self._check_ours()
      self.drop_after(0)
    _replace(self.config_path, config_json)
    if tokenizer is not None:
      _replace(self.tokenizer_path, _tokenizer_text(tokenizer))
    if data is not None:
      _replace(self.data_path, json.dumps(data, indent=2) + "\n")
    return exists

  def _check_ours(self) -> None:
    """Raises CheckpointError where files would be overwritten that are of no run."""
    if is_run_directory(self.path):
      return
    files = (self.config_path, self.tokenizer_path, self.data_path, self.metrics_path)
    files += (self.samples_path, self.report_path, self.results_path, self.predictions_path)
    there = [file.name for file in files if file.exists()]
    if there:
      raise CheckpointError(
        f'"{self.path}" is no run and has {", ".join(there)}, which a run would overwrite; choose'
        " another --workdir"
      )

  def check(
    self,
    config_json: str,
    tokenizer: Any = None,
    changeable: Collection[str] = (),
    data: Mapping[str, Any] | None = None,
  ) -> None:
    """Raises CheckpointError unless the run here is this one; see `create_or_check`."""
    self._check_config(json.loads(config_json), changeable)
    for path, text, name in (
      (self.tokenizer_path, tokenizer and _tokenizer_text(tokenizer), "the tokenizer of"),
      (self.data_path, data and json.dumps(data, indent=2) + "\n", "what was found in"),
    ):
      if text is not None and path.exists() and path.read_bytes() != text.encode():
        raise CheckpointError(
          f'"{path}" is not {name} this config\'s data; choose another --workdir, or restore the'
          " data the run was started on"
        )

  def read_config(self) -> dict[str, Any]:
    """Reads config.json. Raises CheckpointError if it is missing or no JSON object."""
    try:
      config = json.loads(self.config_path.read_text())
    except FileNotFoundError:
      raise CheckpointError(f'"{self.path}" is not a run directory: no config.json') from None
    except (ValueError, OSError, RecursionError) as error:
      raise CheckpointError(
        f'"{self.config_path}" cannot be read: {error}; restore it, or choose another --workdir'
      ) from error
    if not isinstance(config, dict):
      raise CheckpointError(f'"{self.config_path}" is not a JSON object')
    return config

  @contextlib.contextmanager
  def lock(self) -> Iterator[None]:
    """Keeps other processes from writing this run, for as long as the context is open.

    The lock dies with the process, however it dies. Object stores have none, and a file system
    without locks is used without.

    Raises:
      CheckpointError: another process holds it, or the folder cannot be written.
    """
    if is_remote(self.path):
      yield
      return
    with _writing(self.path):
      self.path.mkdir(parents=True, exist_ok=True)
      descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
      self._take_lock(descriptor)
      yield
    finally:
      os.close(descriptor)

  def append_metrics(self, metrics: Mapping[str, Any]) -> None:
    """Appends one object to metrics.jsonl.

    Args:
      metrics: `step` (completed updates) and scalars or strings. Floats keep full precision;
        those JSON cannot spell become the strings "NaN", "Infinity" and "-Infinity".
    """
    line = json.dumps({key: _to_json(value) for key, value in metrics.items()}, allow_nan=False)
    self._metrics.append(line + "\n")

  def read_metrics(self) -> list[dict[str, Any]]:
    """Reads metrics.jsonl back, floats and all; torn lines are passed over."""
    return [metrics for _, metrics in self._metrics_lines()]

  def append_samples(self, step: int, text: str) -> None:
    """Appends a text written by the model after `step` updates to samples.txt."""
    self._samples.append(f"=== step {step} ===\n{text.rstrip()}\n\n")

  def read_samples(self) -> list[tuple[int, str]]:
    """Reads samples.txt back: (step, text), in order."""
    pieces = _SAMPLES_HEADER.split(self._samples.read())[1:]
    steps, texts = pieces[0::2], pieces[1::2]
    return [(int(step), text.removeprefix("\n").rstrip()) for step, text in zip(steps, texts)]

  def drop_after(self, step: int) -> int:
    """Removes the metrics and samples of later steps; returns how many lines of metrics."""
    lines = self._metrics_lines()
    kept = [line for line, metrics in lines if metrics.get("step", 0) <= step]
    self._metrics.replace("".join(line + "\n" for line in kept))
    samples = self._samples.read()
    headers = _SAMPLES_HEADER.finditer(samples)
    later = next((header.start() for header in headers if int(header[1]) > step), len(samples))
    self._samples.replace(samples[:later])
    return len(lines) - len(kept)

  def flush(self) -> None:
    """Uploads what was appended since; on a local disk it is there already."""
    self._metrics.flush()
    self._samples.flush()

  def write_report(self, html: str) -> None:
    """Replaces report.html."""
    write_whole(self.report_path, html)

  def write_results(
    self, results: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]
  ) -> None:
    """Replaces predictions.jsonl, a line each, and then results.json: the run is complete."""
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in predictions)
    write_whole(self.predictions_path, "".join(lines))
    write_whole(self.results_path, json.dumps(results, indent=2) + "\n")

  def read_results(self) -> dict[str, Any] | None:
    """Reads results.json; None where there is none that can be read."""
    with contextlib.suppress(ValueError, OSError):
      return json.loads(self.results_path.read_text())
    return None

  def latest_step(self) -> int | None:
    """Returns the step of the newest committed checkpoint, or None."""
    return latest_step(self.path)

  def is_finished(self, num_steps: int) -> bool:
    """Says whether the last of `num_steps` updates has been saved."""
    return (self.latest_step() or 0) >= num_steps > 0

  def _check_config(self, config: dict[str, Any], changeable: Collection[str]) -> None:
    there, here = _flatten(self.read_config()), _flatten(config)
    different = [
      key
      for key in dict.fromkeys([*here, *there])
      if there.get(key, _ABSENT) != here.get(key, _ABSENT)
      and not any(key == allowed or key.startswith(allowed + ".") for allowed in changeable)
    ]
    if different:
      shown = "; ".join(
        f"{key} is {_spell(there, key)} there and {_spell(here, key)} here" for key in different[:3]
      )
      more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
      raise CheckpointError(
        f'"{self.path}" holds a run of another config: {shown}{more};'
        " choose another --workdir, or the same config to resume"
      )

  def _take_lock(self, descriptor: int) -> None:
    with _writing(self.path):
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        holder = os.read(descriptor, 20).decode() or "?"
        raise CheckpointError(
          f'"{self.path}" is being written by process {holder};'
          " wait for it to end, or choose another --workdir"
        ) from None
      except OSError as error:
        if error.errno not in _NO_LOCKS:
          raise
      os.ftruncate(descriptor, 0)
      os.pwrite(descriptor, str(os.getpid()).encode(), 0)

  def _metrics_lines(self) -> list[tuple[str, dict[str, Any]]]:
    lines = []
    for line in self._metrics.read().split("\n"):
      with contextlib.suppress(ValueError):
        metrics = json.loads(line)
        if isinstance(metrics, dict):
          lines.append((line, {key: _from_json(value) for key, value in metrics.items()}))
    return lines


class _Log:
  """A text file that grows. Object stores cannot append: there it is kept and uploaded whole."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._is_clean = False  # ends in a whole line
    self._text: str | None = None  # of a remote file with what is not uploaded yet

  def append(self, text: str) -> None:
    if is_remote(self._path):
      self._text = self.read() + text
      return
    with _writing(self._path):
      torn = not self._is_clean and self.read()[-1:] not in ("", "\n")
      with open(self._path, "ab") as file:
        file.write(("\n" * torn + text).encode())
      self._is_clean = True

  def read(self) -> str:
    if self._text is not None:
      return self._text
    return self._path.read_bytes().decode(errors="replace") if self._path.exists() else ""

  def replace(self, text: str) -> None:
    if text != self.read():
      write_whole(self._path, text)
    self._is_clean, self._text = False, None

  def flush(self) -> None:
    if self._text is not None:
      write_whole(self._path, self._text)


def is_run_directory(path: str | os.PathLike) -> bool:
  """Says whether a folder is a run's (and not, say, a Hugging Face model's)."""
  run = RunDirectory(path)
  try:
    return isinstance(run.read_config().get("model"), dict)
  except CheckpointError:
    return False


def is_remote(path: str | os.PathLike) -> bool:
  """Says whether a path is on an object store, such as gs:// or s3://."""
  return "://" in os.fspath(path)


def list_steps(checkpoints_path: str | os.PathLike) -> list[int]:
  """Lists the steps of the committed checkpoints in a folder, oldest first."""
  path = epath.Path(checkpoints_path)
  names = [child.name for child in path.iterdir()] if path.is_dir() else []
  steps = sorted(int(name) for name in names if name.isdecimal())
  if is_remote(path):  # no atomic rename there: a commit is a file written last
    steps = [step for step in steps if (path / str(step) / "commit_success.txt").exists()]
  return steps


def latest_step(path: str | os.PathLike) -> int | None:
  """Returns the newest committed step of the run in a folder, or None."""
  return max(list_steps(epath.Path(path) / "checkpoints"), default=None)


def write_whole(path: epath.Path, text: str) -> None:
  """Replaces a text file at once: after a crash it is the old one or the new one.

  Raises:
    CheckpointError: the file cannot be written.
  """
  with _writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
      path.write_text(text)
      return
    partial = f"{os.fspath(path)}.{os.getpid()}.partial"
    try:
      with open(partial, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
      os.replace(partial, path)
    except BaseException:
      with contextlib.suppress(OSError):
        os.remove(partial)
      raise


def _replace(path: epath.Path, text: str) -> None:
  if not path.exists() or path.read_bytes() != text.encode():
    write_whole(path, text)


def _tokenizer_text(tokenizer: Any) -> str:
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    return (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise CheckpointError(
      f'"{path}" cannot be written: {error.strerror or error};'
      " free space, mend its permissions, or choose another --workdir"
    ) from error


_ABSENT = object()


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      flat.update(_flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = value
  return flat


def _spell(config: Mapping[str, Any], key: str) -> str:
  return json.dumps(config[key], ensure_ascii=False) if key in config else "absent"


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(value: Any) -> Any:
  if value is None or isinstance(value, bool | int | str):
    return value
  value = value.item() if hasattr(value, "item") else value
  if isinstance(value, float) and not math.isfinite(value):
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
  return value


def _from_json(value: Any) -> Any:
  return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
