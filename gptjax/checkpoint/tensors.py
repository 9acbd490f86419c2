"""Opens other people's checkpoints as named tensors that stay on disk until they are read.

Owns which files make a checkpoint and in which order they are preferred. Knows no model: names,
shapes and layouts are those of the file.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptjax.checkpoint import (
  lazy_tensor,
  msgpack_files,
  openai_files,
  safetensors_files,
  torch_files,
)
from gptjax.checkpoint.lazy_tensor import LazyTensor, Malformed, TensorSource
from gptjax.errors import CheckpointError

# What a folder is looked through for, the best first. Names with a star must be the only match.
_NAMES = (
  *("model.safetensors", "model.safetensors.index.json"),
  *("pytorch_model.bin", "pytorch_model.bin.index.json"),
  *("flax_model.msgpack", "flax_model.msgpack.index.json"),
  *("ckpt.pt", openai_files.SHAPES_FILE),
  *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.msgpack", "*-model.json"),
)
_FOLDERS = ("", ".", "..")
_NO_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
_WEB_PAGE = "it is a web page, not the file; download it again"
_NOT_CHECKPOINTS = {
  b"version https://git-lfs": "it is a Git LFS pointer, not the file; run `git lfs pull`",
  b"<!": _WEB_PAGE,
  b"<html": _WEB_PAGE,
  b"\x89HDF": "it is HDF5 (of TensorFlow), which is not read; give safetensors or PyTorch weights",
  b"GGUF": "it is GGUF (of llama.cpp), which is not read; give safetensors or PyTorch weights",
}

__all__ = ["LazyTensor", "TensorSource", "open_tensors"]


def open_tensors(path: str | Path) -> TensorSource:
  """Opens a checkpoint of another program and reads nothing but the description of its tensors.

  Args:
    path: a file, or a folder with one of: `model.safetensors`, `pytorch_model.bin`,
      `flax_model.msgpack`, each whole or as shards with an index (preferred in this order);
      nanoGPT's `ckpt.pt`; OpenAI's GPT-1 `params_*.npy` with `params_shapes.json`; else the only
      file of one of these kinds, or minGPT's `*-model.json`.

  Returns:
    The tensors by the file's own names. Flax's nested names are joined with "/"; OpenAI's GPT-1
    gets TensorFlow's names; the `_orig_mod.` of torch.compile is taken off.

  Raises:
    CheckpointError: nothing to read, or a file that is truncated, missing, damaged, contradicts
      itself, or asks to run code, which nothing here does. One line that names the file.
  """
  path = Path(path)
  with _reading(path):
    if not path.exists():
      raise CheckpointError(f'"{path}" does not exist; give a folder or a file of weights')
    found = _find(path) if path.is_dir() else path
  if found.name == openai_files.SHAPES_FILE:
    with _reading(found.parent):
      tensors, metadata = openai_files.read_openai_gpt1(found.parent)
    return TensorSource(tensors, metadata, str(found.parent), "openai-gpt1")
  if found.name.endswith(".index.json"):
    return _open_shards(found)
  return _open_file(found)


def _find(folder: Path) -> Path:
  for pattern in _NAMES:
    matches = sorted(path for path in folder.glob(pattern) if _may_be_weights(path.name))
    if len(matches) > 1:
      names = ", ".join(path.name for path in matches[:4])
      raise CheckpointError(
        f'"{folder}" holds {len(matches)} files of weights and no index ({names}); give one file'
      )
    if matches:
      return matches[0]
  there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
  raise CheckpointError(
    f'"{folder}" holds no weights that can be read: no model.safetensors, pytorch_model.bin,'
    f" flax_model.msgpack, ckpt.pt or {openai_files.SHAPES_FILE}; there is {there}"
  )


def _may_be_weights(name: str) -> bool:
  return name not in _NO_WEIGHTS and not name.startswith(".")


def _open_file(path: Path) -> TensorSource:
  """Reads one file as what its first bytes say it is; names of files are often wrong."""
  with _reading(path):
    if not path.is_file():
      raise Malformed("it is not a regular file")
    with lazy_tensor.open_mapped(path) as buffer:
      tensors, metadata, format = _read(path, buffer)
  return TensorSource(tensors, metadata, str(path), format)


def _read(path: Path, buffer: Any) -> tuple[dict[str, LazyTensor], dict[str, Any], str]:
  """Returns (tensors, metadata, format)."""
  start = buffer[:32]
  is_safetensors = start[6:9] == b"\0\0{"  # first: its length can spell the others' magic
  for magic, reason in _NOT_CHECKPOINTS.items():
    if start.startswith(magic) and not is_safetensors:
      raise Malformed(reason)
  if is_safetensors or path.suffix == ".safetensors":
    return *safetensors_files.read_safetensors(buffer, path.name), "safetensors"
  if start.startswith(b"PK"):
    return *torch_files.read_torch_zip(path, buffer), "torch"
  if start[0] == 0x80:
    return *torch_files.read_torch_legacy(path, buffer), "torch"
  if path.suffix == ".msgpack" or 0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF):
    return *msgpack_files.read_msgpack(buffer, path.name), "flax"
  if start.lstrip()[:1] == b"{":
    content = lazy_tensor.parse_json(buffer[: lazy_tensor.MAX_INDEX_BYTES + 1])
    return *openai_files.read_mingpt(content, path.name), "mingpt"
  raise Malformed(
    "it is neither safetensors, nor of torch.save, flax or minGPT; is it whole and the right file?"
  )


def _open_shards(index: Path) -> TensorSource:
  """Opens the shards of an index and takes from each the tensors the index says are there."""
  with _reading(index):
    content = lazy_tensor.read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
      raise Malformed("it has no weight_map of names to files")
    shard_names = _check_shard_names(weight_map.values())
    missing = [name for name in shard_names if not (index.parent / name).exists()]
  if missing:
    raise CheckpointError(
      f'"{index}" names {len(shard_names)} shards and {len(missing)} of them are missing, the first'
      f" is {lazy_tensor.spell(missing[0])}; copy or download it to the same folder"
    )
  shards = {name: _open_file(index.parent / name) for name in shard_names}
  for name, shard_name in weight_map.items():
    if name not in shards[shard_name]:
      raise CheckpointError(
        f'"{index.parent / shard_name}" does not hold {lazy_tensor.spell(name)}, which the index'
        " says is there; the shard is of another checkpoint: download it again"
      )
  tensors = {name: shards[shard_name][name] for name, shard_name in weight_map.items()}
  metadata = content.get("metadata")
  (format, *_) = {shard.format for shard in shards.values()}
  return TensorSource(
    tensors, metadata if isinstance(metadata, dict) else {}, str(index.parent), format
  )


def _check_shard_names(names: Iterable[Any]) -> list[str]:
  """Returns the names once each; Malformed unless they are files beside the index."""
  for name in names:
    is_name = isinstance(name, str) and not set(name) & set("/\\\0") and name not in _FOLDERS
    if not is_name:
      raise Malformed(f"it names the shard {lazy_tensor.spell(name)}, which is no file beside it")
  return sorted(set(names))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
  """Turns what a damaged file does to a reader into one CheckpointError line."""
  try:
    yield
  except Malformed as error:
    raise CheckpointError(f'"{path}" cannot be read: {error}') from error
  except OSError as error:
    raise CheckpointError(f'"{path}" cannot be read: {error.strerror or error}') from error
  except MemoryError as error:
    raise CheckpointError(f'"{path}" needs more memory than there is') from error
