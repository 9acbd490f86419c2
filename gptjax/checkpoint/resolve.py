"""What a model argument is: a run, a folder or file of another library, or a name on the hub."""

import dataclasses
import fnmatch
import os
from pathlib import Path
from typing import Any

from gptjax.checkpoint.foreign_config import Report
from gptjax.checkpoint.run_directory import is_remote, is_run_directory
from gptjax.errors import CheckpointError

# Weights that we read, the best first; a hub repository often has several of the same model.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "flax_model*.msgpack")
# What goes with them, as far as it is there.
_BESIDE = ("*.json", "merges.txt", "vocab.txt", "vocab.bpe", "*.model", "*.vocab")
_TIMEOUT_SECONDS = 20


@dataclasses.dataclass(frozen=True)
class Model:
  """A model that was found.

  Attributes:
    kind: "run" (a run directory) or "foreign" (what `load_foreign` takes).
    path: of the folder or file.
  """

  kind: str
  path: str


def resolve_model(name: str | os.PathLike, report: Report = print) -> Model:
  """Finds out by looking what a model argument is; hub names are downloaded or found in the cache.

  Args:
    name: a run directory, a folder in the Hugging Face layout, one with OpenAI's GPT-1 or a
      minGPT JSON file, a nanoGPT ckpt.pt, or a name on the Hugging Face hub.
    report: takes a line about a download.

  Raises:
    CheckpointError: nothing of that name here, and none on the hub or no way to it.
  """
  name = os.fspath(name)
  if is_remote(name):
    if _is_remote_run(name):
      return Model("run", name)
    raise CheckpointError(f'"{name}" is no run directory; download other models to a folder')
  path = _find_local(name)
  if path is not None:
    return Model("run" if path.is_dir() and is_run_directory(path) else "foreign", str(path))
  if not _may_be_hub_name(name):
    raise CheckpointError(f'no model "{name}": there is no such folder or file')
  return Model("foreign", _download(name, report))


def _is_remote_run(name: str) -> bool:
  try:
    return is_run_directory(name)
  except CheckpointError:
    raise
  # Whatever the library of the object store raises, or its absence.
  except Exception as error:
    raise CheckpointError(f'"{name}" cannot be read: {type(error).__name__}: {error}') from error


def _find_local(name: str) -> Path | None:
  """Returns the path of that name if there is something; names too long or of nobody's home too."""
  try:
    path = Path(name).expanduser()
    return path if name and path.exists() else None
  except (OSError, RuntimeError, ValueError):
    return None


def _may_be_hub_name(name: str) -> bool:
  """Says whether a text has the form of `gpt2` or `owner/name`."""
  parts = name.split("/")
  plain = all(part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in parts)
  return len(parts) <= 2 and plain and not name.startswith(".")


def _download(name: str, report: Report) -> str:
  """Returns the local folder of a hub model with the files that are needed, and no others."""
  # Imported late: it takes a while, and most models are folders.
  import huggingface_hub
  from huggingface_hub import errors

  try:
    # The one call that does not try five times without a network.
    info = huggingface_hub.model_info(name, timeout=_TIMEOUT_SECONDS)
    report(f'"{name}" is no local folder; reading it from the Hugging Face hub')
    return huggingface_hub.snapshot_download(name, allow_patterns=_needed(info.siblings, name))
  except errors.GatedRepoError as error:
    raise CheckpointError(
      f'"{name}" needs its licence to be accepted on huggingface.co; then run `hf auth login`'
    ) from error
  except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
    raise CheckpointError(
      f'no model "{name}": it is no local folder, and the Hugging Face hub has none of that name'
    ) from error
  except CheckpointError:
    raise
  # Whatever its HTTP library raises where there is no network.
  except Exception as error:
    cached = _find_cached(huggingface_hub, name)
    if cached is not None:
      report(f'"{name}": the Hugging Face hub cannot be reached; using the copy of an earlier time')
      return cached
    raise CheckpointError(
      f'no model "{name}": it is no local folder, and the Hugging Face hub cannot be reached'
      f" ({type(error).__name__}); give a folder, or connect to the network"
    ) from error


def _needed(siblings: list[Any], name: str) -> list[str]:
  """Returns the patterns of what to download: one kind of weights, and what goes with them."""
  for pattern in _WEIGHTS:
    if any(fnmatch.fnmatchcase(file.rfilename, pattern) for file in siblings):
      return [pattern, *_BESIDE]
  raise CheckpointError(
    f'"{name}" on the Hugging Face hub has no weights that can be read ({", ".join(_WEIGHTS)})'
  )


def _find_cached(hub: Any, name: str) -> str | None:
  """Returns the folder of an earlier download that has weights, or None."""
  try:
    folder = hub.snapshot_download(name, local_files_only=True)
  except Exception:
    return None
  return folder if any(any(Path(folder).glob(pattern)) for pattern in _WEIGHTS) else None
