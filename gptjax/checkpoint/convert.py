"""Loads other people's checkpoints: every tensor accounted for, streamed to where it will live.

Arrays are filled layer by layer from the mapped files, in the dtype asked for, on the mesh if one
is given, so that loading takes little more memory than the parameters themselves.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gptjax.checkpoint.config_fields import spell
from gptjax.checkpoint.foreign_config import Report, make_model_config, read_foreign_config
from gptjax.checkpoint.key_tables import (
  BUFFERS,
  LAYOUTS,
  TASK_HEADS,
  Index,
  Layout,
  Source,
  find_sources,
  full_index,
  is_head,
  layer_number,
)
from gptjax.checkpoint.task_heads import READ_HEADS
from gptjax.checkpoint.tensors import open_tensors
from gptjax.errors import CheckpointError, did_you_mean
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import model_specs
from gptjax.parallel import Parallel
from gptjax.tree import map_named

PyTree = Any

_DTYPES = {
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# A few rows at a time: transposing is fastest so, and parts of files that cannot be mapped are
# copied on their way.
_PIECE_BYTES = 1 << 18
_ALIGNMENT_BYTES = 64  # of host arrays that jax on CPU takes as they are


def load_foreign(
  path: str | os.PathLike,
  dtype: str | None = "float32",
  parallel: Parallel | None = None,
  report: Report = print,
) -> tuple[ModelConfig, PyTree]:
  """Loads a language model that another library saved.

  Args:
    path: a folder in the Hugging Face layout or with OpenAI's GPT-1, a nanoGPT ckpt.pt, or a
      minGPT JSON file.
    dtype: "float32", "bfloat16" or "float16"; None keeps that of each tensor.
    parallel: places each parameter where a state of its path lives; None is jax's default device.
    report: takes a line about each thing that is passed over.

  Returns:
    (config, parameters). Rows that pad the vocabulary are zero.

  Raises:
    CheckpointError: an unknown kind of model or field, a tensor that is unknown, missing or of the
      wrong shape, or files that cannot be read.
  """
  if dtype is not None and dtype not in _DTYPES:
    raise CheckpointError(f'dtype is "{dtype}"{did_you_mean(dtype, _DTYPES)}')
  found = open_tensors(path)
  config, layout = _describe(Path(path), found, report)
  tensors = _plain_names(found, layout)
  if config.num_layers > len(tensors):
    raise CheckpointError(
      f'"{path}" has {len(tensors)} tensors, and its config says {config.num_layers} layers'
    )
  sources = find_sources(config, layout)
  if config.tie_embeddings:
    _drop_tied_head(tensors, sources, layout, str(path))
  _check(tensors, sources, config, str(path), report)
  wanted = None if dtype is None else _DTYPES[dtype]
  return config, _place(tensors, sources, config, wanted, parallel)


def _describe(path: Path, found: Any, report: Report) -> tuple[ModelConfig, Layout]:
  """Returns the config and the layout of what was opened."""
  source = f'"{path}"'
  folder = path if path.is_dir() else path.parent
  if found.format == "openai-gpt1" and not (folder / "config.json").is_file():
    return _openai_config(found, source, report), LAYOUTS["openai-gpt"]
  for kind, key in (("mingpt", "config"), ("nanogpt", "model_args")):
    fields = found.metadata.get(key)
    if isinstance(fields, dict) and (found.format == "mingpt") == (kind == "mingpt"):
      if kind == "nanogpt":
        report(
          f"{source} does not say which gelu it has; taken as the exact one of today's nanoGPT, and"
          ' the oldest had the tanh form: for those, convert it to a run and write "gelu_tanh" into'
          " its config.json"
        )
      return make_model_config(kind, fields, source, report), LAYOUTS[kind]
  config = read_foreign_config(folder, report)
  return config, LAYOUTS[{"gpt1": "openai-gpt"}.get(config.family, config.family)]


@dataclasses.dataclass(frozen=True)
class _View:
  """A tensor of a file as PyTorch would have saved it.

  Attributes:
    tensor: the lazy tensor.
    shape: PyTorch's.
    to_theirs: makes an index of the tensor from one of the view.
    to_ours: makes the part of the view from what is read.
  """

  tensor: Any
  shape: tuple[int, ...]
  to_theirs: Callable[[Index], tuple]
  to_ours: Callable[[np.ndarray], np.ndarray]

  @property
  def dtype(self) -> np.dtype:
    return self.tensor.dtype

  @property
  def where(self) -> str:
    return self.tensor.where

  def read(self, index: Index) -> np.ndarray:
    return self.to_ours(self.tensor.read(self.to_theirs(index)))


def _plain_names(found: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
  """Returns the tensors by PyTorch's names, without prefixes, in PyTorch's shapes."""
  translate = {"flax": _from_flax, "openai-gpt1": _from_openai}.get(found.format)
  tensors = {}
  for name, tensor in found.items():
    plain, tensor = translate(name, tensor) if translate else (name, tensor)
    plain = plain.removeprefix(layout.prefix)
    plain = layout.renamed.get(plain, plain)
    if plain in tensors:
      raise CheckpointError(f'"{found.where}" has {spell(plain)} twice, with and without a prefix')
    tensors[plain] = tensor
  return tensors


def _from_flax(name: str, tensor: Any) -> tuple[str, Any]:
  """Flax has the transpose of PyTorch's matrices, be they of nn.Linear or of Conv1D."""
  module, _, leaf = name.replace("/", ".").rpartition(".")
  if leaf == "kernel":
    tensor = _View(tensor, tensor.shape[::-1], lambda index: index[::-1], np.transpose)
  leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
  return f"{module}.{leaf}", tensor


def _from_openai(name: str, tensor: Any) -> tuple[str, Any]:
  """OpenAI's kernels are convolutions of width 1, [1, in, out]."""
  embeddings = {"model/pe": "positions_embed.weight", "model/we": "tokens_embed.weight"}
  if name in embeddings:
    return embeddings[name], tensor
  module, _, leaf = name.removeprefix("model/h").replace("/", ".").rpartition(".")
  if len(tensor.shape) == 3 and tensor.shape[0] == 1:
    tensor = _View(tensor, tensor.shape[1:], lambda index: (0, *index), np.asarray)
  return f"h.{module}.{'bias' if leaf == 'b' else 'weight'}", tensor


def _openai_config(found: Any, source: str, report: Report) -> ModelConfig:
  """Reads the sizes off the tensors, which is all there is."""
  if len(found["model/pe"].shape) != 2:
    raise CheckpointError(f"{source} has embeddings of shape {found['model/pe'].shape}, not [L, D]")
  context_length, model_dim = found["model/pe"].shape
  if model_dim != 768:
    report(
      f"{source} is no published GPT-1 and does not say how wide its heads are; taken as 64 (a"
      " config.json beside it is read)"
    )
  fields = {
    "vocab_size": found["model/we"].shape[0],
    "n_positions": context_length,
    "n_embd": model_dim,
    "n_layer": sum(name.endswith("/ln_1/g") for name in found),
    "n_head": max(1, model_dim // 64),
  }
  return make_model_config("openai-gpt", fields, source, report)


def _check(
  tensors: dict[str, Any],
  sources: dict[str, list[Source]],
  config: ModelConfig,
  path: str,
  report: Report,
) -> None:
  """Accounts for every tensor, here and there. Raises CheckpointError for what is left."""
  expected = {source.name: source for layers in sources.values() for source in layers}
  spare = [name for name in tensors if name not in expected]
  heads = [name for name in spare if TASK_HEADS.match(name)]
  if others := [name for name in heads if name not in READ_HEADS]:
    report(f'"{path}": heads that are not the language model\'s are left out: {_list(others)}')
  unknown = [name for name in spare if name not in heads and not BUFFERS.search(name)]
  if unknown:
    _refuse_unknown(unknown, expected, config, path)
  missing = [name for name in expected if name not in tensors]
  if missing:
    is_untied = is_head(missing[0]) and not config.head_bias
    hint = '; config.json may lack "tie_word_embeddings": true' if is_untied else ""
    raise CheckpointError(
      f'"{path}" lacks the tensor {_list(missing)}, which its config asks for{hint}'
    )
  for name, source in expected.items():
    _check_tensor(name, tensors[name], source, path)


def _check_tensor(name: str, tensor: Any, source: Source, path: str) -> None:
  if tuple(tensor.shape) != source.shape:
    raise CheckpointError(
      f'"{path}" has "{name}" of shape {list(tensor.shape)}, and its config makes it'
      f" {list(source.shape)}; one of them is of another model"
    )
  if tensor.dtype not in (*_DTYPES.values(), np.float64):
    raise CheckpointError(
      f'"{path}" has "{name}" of dtype {tensor.dtype}; only floating point is supported'
    )


def _refuse_unknown(unknown: list[str], expected: Any, config: ModelConfig, path: str) -> None:
  layers = [layer_number(name) for name in unknown]
  if None not in layers and min(layers) >= config.num_layers:
    raise CheckpointError(
      f'"{path}" has the layers {min(layers)} to {max(layers)}, and its config says'
      f" {config.num_layers} layers"
    )
  raise CheckpointError(
    f'"{path}" has the tensor {_list(unknown)}, which a {config.family} of its config does not have'
    + (did_you_mean(unknown[0], expected) if len(unknown) == 1 else "")
  )


def _drop_tied_head(tensors: dict[str, Any], sources: Any, layout: Layout, path: str) -> None:
  """Takes out the head of a tied model, which is the embedding or, in some files, stands for it."""
  embedding = sources["decoder/token_embedding/embedding"][0].name
  head = f"{layout.modules['lm_head']}.weight"
  if head not in tensors:
    return
  if embedding in tensors and not _is_equal(tensors[embedding], tensors[head]):
    raise CheckpointError(
      f'"{path}" has a "{head}" that differs from "{embedding}", and its config ties them;'
      ' write "tie_word_embeddings": false into config.json if they are meant to differ'
    )
  tensors[embedding] = tensors.pop(head)


def _is_equal(a: Any, b: Any) -> bool:
  if a.shape != b.shape:
    return False
  rows = _rows_at_once(a.shape, 8)
  blocks = [full_index(a.shape, (slice(i, i + rows),)) for i in range(0, a.shape[0], rows)]
  return all(np.array_equal(a.read(block), b.read(block)) for block in blocks)


def _list(names: list[str]) -> str:
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(spell(name) for name in names[:3]) + more


def _place(tensors, sources, config: ModelConfig, dtype, parallel: Parallel | None) -> PyTree:
  """Reads every array of the tree to its place."""
  specs = model_specs(config)

  def read(name, shape, index):
    dtypes = {tensors[source.name].dtype for source in sources[name]}
    own = np.result_type(*dtypes) if dtype is None else dtype
    return _read(tensors, sources[name], own, full_index(shape, index))

  if parallel is None:
    return map_named(lambda name, spec: jax.device_put(read(name, spec.shape, ())), specs)

  def zeros(key):  # for its shapes
    return jax.tree.map(lambda spec: jnp.zeros(spec.shape), specs)

  params = map_named(
    lambda name, leaf: jax.make_array_from_callback(
      leaf.shape, leaf.sharding, lambda index: read(name, leaf.shape, index)
    ),
    parallel.abstract_state(zeros, jax.random.key(0)),
  )
  return parallel.from_saved(params)


def _read(
  tensors: dict[str, Any], sources: list[Source], dtype: np.dtype, index: Index
) -> np.ndarray:
  """Reads a part of one of our arrays into new memory; what the files do not have stays zero."""
  block = _aligned_zeros(tuple(s.stop - s.start for s in index), dtype)
  if sources[0].layer is not None:
    first, *rest = index
    for layer in range(first.start, first.stop):
      source = sources[layer]
      _fill(block[layer - first.start], tensors[source.name], source, tuple(rest))
    return block
  (source,) = sources
  present = tuple(slice(s.start, min(s.stop, size)) for s, size in zip(index, source.shape))
  if all(s.start < s.stop for s in present):
    target = block[tuple(slice(0, s.stop - s.start) for s in present)]
    _fill(target, tensors[source.name], source, present)
  return block


def _fill(block: np.ndarray, tensor: Any, source: Source, index: Index) -> None:
  """Copies a part of one layer of ours, a few rows of theirs at a time."""
  for ours, theirs in source.pieces(index):
    target = block[ours].T if source.is_transposed else block[ours]
    first, *rest = theirs
    rows = _rows_at_once(target.shape, tensor.dtype.itemsize)
    for start in range(first.start, first.stop, rows):
      stop = min(start + rows, first.stop)
      target[start - first.start : stop - first.start] = tensor.read((slice(start, stop), *rest))


def _rows_at_once(shape: tuple[int, ...], itemsize: int) -> int:
  return max(1, _PIECE_BYTES // max(1, math.prod(shape[1:]) * itemsize))


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns zeros that jax on CPU takes over without a copy."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.zeros(size + _ALIGNMENT_BYTES, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT_BYTES
  return memory[start : start + size].view(dtype).reshape(shape)
