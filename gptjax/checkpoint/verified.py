"""One committed checkpoint: its checksums, and reading it no further than they hold.

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
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from gptjax import tree as tree_lib
from gptjax.checkpoint.run_directory import is_remote
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
  "Stale file handle",
)
_CHECKSUMS = "checksums.json"
_READ_BYTES = 1 << 24


class DamagedError(Exception):
  """This checkpoint is not whole; an older one may be."""


def describe_leaves(state: PyTree) -> dict[str, list]:
  """Returns {path: [shape, dtype]}, as it is written into a checkpoint."""
  return {
    name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in tree_lib.named_leaves(state).items()
  }


def write_checksums(folder: epath.Path) -> None:
  """Notes the size and CRC-32 of every file of a checkpoint that is about to be committed."""
  (folder / _CHECKSUMS).write_text(json.dumps(_checksums(folder)))


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


def check_whole(folder: epath.Path, item: str = "*") -> None:
  """Raises DamagedError unless every file (of one item) is the one that was written."""
  if is_remote(folder):
    return
  with _finding_damage():
    try:
      expected = json.loads((folder / _CHECKSUMS).read_text())
    except FileNotFoundError:
      raise DamagedError(f"{_CHECKSUMS} is missing") from None
    except ValueError:
      raise DamagedError(f"{_CHECKSUMS} has been altered") from None
    found = _checksums(folder, item)
  for name in fnmatch.filter(expected, f"{item}/*"):
    if name not in found:
      raise DamagedError(f"{name} is missing")
    if found[name][0] != expected[name][0]:
      raise DamagedError(f"{name} has {found[name][0]} of {expected[name][0]} bytes")
    if found[name] != expected[name]:
      raise DamagedError(f"{name} has been altered (its checksum differs)")


def read_record(folder: epath.Path) -> dict[str, Any]:
  """Reads the leaves' names and shapes, and the metrics."""
  check_whole(folder, "record")
  with _finding_damage(), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    return reader.restore(folder / "record")


def restore_state(folder: epath.Path, abstract_state: PyTree) -> PyTree:
  """Restores all that was saved. Raises DamagedError, or CheckpointError for another model."""
  check_whole(folder)
  _check_same_model(folder, read_record(folder)["leaves"], abstract_state)
  return _read_arrays(folder, abstract_state)


def restore_params(folder: epath.Path, abstract_params: PyTree, item: str) -> PyTree:
  """Restores a part of an item, cast to the dtypes asked for. Raises as `restore_state`."""
  check_whole(folder)
  abstract = {item: abstract_params}
  _check_same_model(folder, read_record(folder)["leaves"], abstract, whole=False)
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
  """Turns what the system and orbax raise on unreadable files into DamagedError."""
  try:
    yield
  except DamagedError:
    raise
  except Exception as error:
    if isinstance(error, MemoryError) or any(word in str(error) for word in _TRANSIENT):
      raise CheckpointError(f"checkpoint cannot be read now: {one_line(error)}") from error
    raise DamagedError(f"it cannot be read ({one_line(error)})") from error


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
  wanted = describe_leaves(abstract)
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


def one_line(error: BaseException) -> str:
  """Shortens an error to one line; the cause of a full disk hides in pages of specification."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error)
  for words in ("No space left on device", "File too large", "Read-only file system", *_TRANSIENT):
    if words in text:
      return words
  line = " ".join(text.split()) or type(error).__name__
  return line if len(line) <= 160 else line[:157] + "..."
