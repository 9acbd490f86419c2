"""Receipts: a score with all that it takes to get it again, and what differs where it does not."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.checkpoint.models import Loaded
from gptjax.errors import DataError
from gptjax.model.recipe import TRAINING_FIELDS, spell_out
from gptjax.tree import named_leaves

# What float32 sums in another order may differ by, relatively; another model differs by far more.
TOLERANCE = 1e-5
_HASHES = {
  "model_hash": "the parameters are not the same",
  "tokenizer_hash": "the tokenizer is not the same",
  "data_hash": "the data is not the same",
}
_PADDED = ("token_embedding/embedding", "lm_head/kernel", "lm_head/bias")
_PACKAGES = ("gptjax", "jax", "jaxlib", "numpy", "tokenizers")


def make_receipt(
  task: str,
  identity: Mapping[str, str | None],
  figures: Mapping[str, Any],
  protocol: dict[str, Any],
  data_hash: str,
) -> dict[str, Any]:
  """Puts a receipt together, as `--json` prints it.

  Args:
    task: the verb that made it.
    identity: of the model, from `identify`.
    figures: of the task.
    protocol: resolved, as fields.
    data_hash: of what it was scored on.
  """
  return {
    "task": task,
    **figures,
    "protocol": protocol,
    **identity,
    "data_hash": data_hash,
    "versions": versions(),
  }


def identify(model: Loaded) -> dict[str, str | None]:
  """Returns the hashes of a model and of its tokenizer; neither knows where it lies."""
  return {
    "model_hash": hash_model(model),
    "tokenizer_hash": model.tokenizer.fingerprint if model.tokenizer else None,
  }


def hash_model(model: Loaded) -> str:
  """Hashes parameters and architecture; padding of the vocabulary, and how to compute, are out."""
  fields = spell_out(model.config)
  fields = {name: fields[name] for name in sorted(fields) if name not in TRAINING_FIELDS}
  digest = hashlib.sha256(json.dumps(fields).encode())
  for name, leaf in sorted(named_leaves(model.params).items()):
    array = np.asarray(leaf)
    if name.endswith(_PADDED):
      array = array[: model.config.vocab_size]
    digest.update(f"{name} {array.dtype} {array.shape} ".encode())
    # As bytes: NumPy lends out no bfloat16.
    digest.update(np.ascontiguousarray(array).view(np.uint8))
  return digest.hexdigest()


def versions() -> dict[str, str]:
  """Returns what computed: packages, Python, and the kind of device."""
  device = jax.local_devices()[0]
  return {
    **{name: importlib.metadata.version(name) for name in _PACKAGES},
    "python": platform.python_version(),
    "devices": f"{jax.local_device_count()} x {device.platform} {device.device_kind}",
  }


def read_receipt(path: str, tasks: Mapping[str, Callable]) -> dict[str, Any]:
  """Reads a receipt that `--json` printed.

  Args:
    path: its file.
    tasks: by name, those that can be repeated.

  Raises:
    DataError: not a receipt, or one of another task.
  """
  try:
    receipt = json.loads(Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise DataError(f'receipt "{path}" cannot be read: {error}') from error
  if not isinstance(receipt, dict) or not isinstance(receipt.get("protocol"), dict):
    raise DataError(f'"{path}" is no receipt; it is what `gptjax evaluate ... --json` prints')
  if receipt.get("task") not in tasks:
    raise DataError(
      f'"{path}" is a receipt of "{receipt.get("task")}"; those of {", ".join(tasks)} can be'
      " repeated"
    )
  return receipt


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Says what differs between two receipts, causes first; nothing where the score is the same.

  Versions and devices are named only beside another difference: alone they change nothing.
  """
  causes = [
    f"{why} ({_short(old.get(key))}, now {_short(new.get(key))})"
    for key, why in _HASHES.items()
    if old.get(key) != new.get(key)
  ]
  numbers = [
    f"{name} was {old[name]:.8g} and is {value:.8g}"
    for name, value in new.items()
    if _is_number(value) and _is_number(old.get(name)) and not _is_close(old[name], value)
  ]
  if not causes and numbers:
    before, now = old.get("versions", {}), new.get("versions", {})
    causes = [
      f"{name} was {before.get(name)} and is {now[name]}"
      for name in now
      if before.get(name) != now[name]
    ]
  return causes + numbers


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_close(before: float, now: float) -> bool:
  return bool(np.isclose(before, now, rtol=TOLERANCE, atol=1e-12))


def _short(digest: Any) -> str:
  return str(digest)[:12]
