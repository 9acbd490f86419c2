"""Writes a language model as a Hugging Face folder that transformers, vLLM and llama.cpp read."""

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checkpoint.export_config import (
  find_model_type,
  with_written_biases,
  write_foreign_config,
)
from gptjax.checkpoint.foreign_config import CLASS_PREFIXES
from gptjax.checkpoint.key_tables import LAYOUTS, Layout, Source, find_sources, full_index, is_head
from gptjax.checkpoint.task_heads import filling_id, write_head
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.task_inputs import mark_texts
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import CheckpointError
from gptjax.model.config import ModelConfig
from gptjax.model.mup import standard_form
from gptjax.model.parameters import model_specs
from gptjax.tree import named_leaves

PyTree = Any

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def save_hf(
  path: str | os.PathLike,
  config: ModelConfig,
  params: PyTree,
  tokenizer: Any = None,
  max_shard_bytes: float = 5e9,
  task: TaskDataConfig | None = None,
) -> None:
  """Writes a model in the Hugging Face layout, in the dtype of its parameters.

  The folder appears when all of it is written. Rows that pad the vocabulary are left out, a tied
  head is written once, and biases that transformers has and this model has not are zeros.

  Args:
    path: a folder that does not exist or is empty.
    config: the architecture.
    params: the whole tree, arrays that this process can read whole.
    tokenizer: a gptjax Tokenizer to put beside it, or None.
    max_shard_bytes: a larger model is cut into files of about this size, with an index.
    task: writes the "task_head" of this task too, as transformers' class for it (`task_heads`);
      the tokenizer then marks texts as the head was taught. None writes a language model alone.

  Raises:
    CheckpointError: the folder is not empty or cannot be written, transformers has no such model,
      or the parameters are not those of the config.
  """
  path = Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise CheckpointError(f'"{path}" exists and is not empty; choose another folder or remove it')
  config, params = standard_form(config, params)
  head = None
  if task is not None:
    head = write_head(params, config, task, find_model_type(config), tokenizer)
    params = head.params
  tensors = _Tensors(config, params, head.tensors if head else {})
  ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  if tokenizer is not None:
    _check_tokenizer(tokenizer, config)
    found = (tokenizer.bos_id, tokenizer.end_id, tokenizer.pad_id)
    kept = (i if i is not None and i < config.vocab_size else None for i in found)
    ids = dict(zip(ids, kept, strict=True))
  fields = write_foreign_config(config) | ids | {"torch_dtype": tensors.common_dtype()}
  if head is not None:
    prefix = CLASS_PREFIXES[fields["model_type"]]
    fields |= head.fields | {"architectures": [prefix + head.class_suffix]}
  with _appearing(path) as folder:
    _write_json(folder / "config.json", fields)
    _write_json(folder / "generation_config.json", {"_from_model_config": True} | ids)
    if tokenizer is not None:
      _write_tokenizer(folder, tokenizer, config, task)
    _write_shards(folder, tensors, max_shard_bytes)


def _check_tokenizer(tokenizer: Any, config: ModelConfig) -> None:
  """Raises CheckpointError for another model's; tokens added to a model's own may lie beyond it."""
  own = tokenizer.backend.get_vocab(with_added_tokens=False)
  num_ids = max(own.values(), default=-1) + 1
  if num_ids > config.vocab_size:
    raise CheckpointError(
      f"the tokenizer has {num_ids} ids and the model {config.vocab_size}; give the tokenizer of"
      " this model"
    )


def foreign_tensors(config: ModelConfig, params: PyTree) -> dict[str, np.ndarray]:
  """Returns parameters, or anything of their structure such as gradients, by transformers' names.

  Raises:
    CheckpointError: transformers has no such model, or the arrays are not those of the config.
  """
  tensors = _Tensors(config, params)
  return {name: tensors.make(name) for name in tensors.parts}


class _Tensors:
  """The foreign tensors of a model, made one at a time.

  Attributes:
    parts: {foreign name: the (our path, source) that it is made of}, none of those made before.
  """

  def __init__(
    self, config: ModelConfig, params: PyTree, made: Mapping[str, np.ndarray] | None = None
  ):
    params = {name: tree for name, tree in params.items() if name != "task_head"}
    self._leaves = named_leaves(params)
    self._made = dict(made or {})
    layout = LAYOUTS[find_model_type(config)]
    self._check(config)
    sources = find_sources(with_written_biases(config), layout)
    self.parts: dict[str, list[tuple[str, Source]]] = {}
    for path, layers in sources.items():
      for source in layers:
        self.parts.setdefault(_full_name(source.name, layout), []).append((path, source))
    self.parts |= {name: [] for name in self._made}

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a foreign tensor."""
    return self._made[name].shape if name in self._made else self.parts[name][0][1].shape

  def dtype(self, name: str) -> np.dtype:
    """Returns the dtype of a foreign tensor: that of our arrays, or of all for one of zeros."""
    if name in self._made:
      return self._made[name].dtype
    found = {self._leaves[path].dtype for path, _ in self.parts[name] if path in self._leaves}
    found = found or {leaf.dtype for leaf in self._leaves.values()}
    return np.result_type(*found)

  def nbytes(self, name: str) -> int:
    """Returns the size of a foreign tensor."""
    return math.prod(self.shape(name)) * self.dtype(name).itemsize

  def common_dtype(self) -> str:
    """Names the dtype that holds all of them."""
    return np.result_type(*(self.dtype(name) for name in self.parts)).name

  def make(self, name: str) -> np.ndarray:
    """Puts a foreign tensor together."""
    if name in self._made:
      return np.ascontiguousarray(self._made[name])
    tensor = np.zeros(self.shape(name), self.dtype(name))
    for path, source in self.parts[name]:
      if path not in self._leaves:
        continue  # a bias of theirs
      ours = np.asarray(self._leaves[path])
      ours = ours if source.layer is None else ours[source.layer]
      index = full_index(source.our_shape)
      for here, there in source.pieces(index):
        piece = ours[index][here]
        tensor[there] = piece.T if source.is_transposed else piece
    return tensor

  def _check(self, config: ModelConfig) -> None:
    """Raises CheckpointError unless the parameters are those of the config."""
    expected = {path: spec.shape for path, spec in named_leaves(model_specs(config)).items()}
    for name in [*expected, *self._leaves]:
      there, here = self._leaves.get(name), expected.get(name)
      if there is None or here is None or tuple(there.shape) != here:
        found = "absent" if there is None else list(there.shape)
        wanted = "absent" if here is None else list(here)
        raise CheckpointError(
          f"parameter {name} is {found}, and its config makes it {wanted}; only language models as"
          " their config describes them can be written"
        )
      if there.dtype.name not in _DTYPES:
        raise CheckpointError(
          f"parameter {name} is {there.dtype}; it must be one of {', '.join(_DTYPES)}"
        )


def _full_name(name: str, layout: Layout) -> str:
  return name if is_head(name) else layout.prefix + name


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
  """Gives a folder to write that becomes `path` at the end, or is removed."""
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    partial.mkdir(parents=True)
    yield partial
    os.replace(partial, path)
  except OSError as error:
    raise CheckpointError(
      f'"{path}" cannot be written: {error.strerror or error}; free space or choose another folder'
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
  _write(path, [json.dumps(fields, indent=2, ensure_ascii=False).encode() + b"\n"])


def _write_tokenizer(
  folder: Path, tokenizer: Tokenizer, config: ModelConfig, task: TaskDataConfig | None
) -> None:
  fields = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": config.context_length,
    "clean_up_tokenization_spaces": False,
  } | tokenizer.roles
  if task is None:
    tokenizer.save(folder / "tokenizer.json")
  else:
    mark_texts(tokenizer, task).save(str(folder / "tokenizer.json"))
    fields["pad_token"] = tokenizer.backend.id_to_token(filling_id(task, tokenizer))
    fields["model_max_length"] = task.max_length or config.context_length
  _write_json(folder / "tokenizer_config.json", fields)


def _write_shards(folder: Path, tensors: _Tensors, max_shard_bytes: float) -> None:
  """Writes model.safetensors, or shards of it and their index."""
  shards, size = [[]], 0
  for name in tensors.parts:
    if shards[-1] and size + tensors.nbytes(name) > max_shard_bytes:
      shards, size = [*shards, []], 0
    shards[-1].append(name)
    size += tensors.nbytes(name)
  if len(shards) == 1:
    _write_safetensors(folder / "model.safetensors", tensors, shards[0])
    return
  weight_map = {}
  for number, names in enumerate(shards, start=1):
    file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
    _write_safetensors(folder / file_name, tensors, names)
    weight_map |= dict.fromkeys(names, file_name)
  total = sum(tensors.nbytes(name) for name in tensors.parts)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  _write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, tensors: _Tensors, names: list[str]) -> None:
  """Streams tensors into one file; the library's writer wants all of them in memory at once."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  stop = 0
  for name in names:
    start, stop = stop, stop + tensors.nbytes(name)
    header[name] = {
      "dtype": _DTYPES[tensors.dtype(name).name],
      "shape": tensors.shape(name),
      "data_offsets": [start, stop],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  data = (tensors.make(name).view(np.uint8).data for name in names)
  _write(path, itertools.chain([len(text).to_bytes(8, "little"), text], data))


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
  with path.open("wb") as file:
    for piece in pieces:
      file.write(piece)
    file.flush()
    os.fsync(file.fileno())
