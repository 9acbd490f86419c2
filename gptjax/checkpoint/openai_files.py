"""Reads two small formats: OpenAI's GPT-1 as it was released, and minGPT's trained models in JSON.

Sources: openai/finetune-transformer-lm, train.py (shards are concatenated and cut by the shapes);
bbycroft/llm-viz, public/gpt-nano-sort-model.json.
"""

import base64
import binascii
import math
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checkpoint import lazy_tensor
from gptjax.checkpoint.lazy_tensor import LazyTensor, Malformed

SHAPES_FILE = "params_shapes.json"
# The file has no names; these are TensorFlow's, in the order in which the graph made the variables.
_EMBEDDINGS = ("model/pe", "model/we")
_OF_A_LAYER = (
  *("attn/c_attn/w", "attn/c_attn/b", "attn/c_proj/w", "attn/c_proj/b", "ln_1/g", "ln_1/b"),
  *("mlp/c_fc/w", "mlp/c_fc/b", "mlp/c_proj/w", "mlp/c_proj/b", "ln_2/g", "ln_2/b"),
)


def read_openai_gpt1(folder: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
  """Returns the tensors of `params_shapes.json` and `params_0.npy` on, of any number of layers.

  The names are "model/pe" [512, 768], "model/we" [40478, 768], "model/h0/attn/c_attn/w"
  [1, 768, 2304] and so on; the shapes are the file's, with the 1 of a convolution of one token.

  Raises:
    Malformed: a shard is missing or truncated, or the shapes are not those of a GPT-1.
  """
  shapes = lazy_tensor.read_json(folder / SHAPES_FILE)
  if not isinstance(shapes, list):
    raise Malformed(f"{SHAPES_FILE} is not a list of shapes")
  shapes = [lazy_tensor.check_shape(shape) for shape in shapes]
  num_layers, left_over = divmod(len(shapes) - len(_EMBEDDINGS), len(_OF_A_LAYER))
  if num_layers < 1 or left_over:
    raise Malformed(
      f"{SHAPES_FILE} has {len(shapes)} shapes, and a GPT-1 has {len(_EMBEDDINGS)} and"
      f" {len(_OF_A_LAYER)} a layer"
    )
  names = [*_EMBEDDINGS, *(f"model/h{i}/{name}" for i in range(num_layers) for name in _OF_A_LAYER)]
  shards = _map_shards(folder)
  total, needed = sum(part.size for part in shards), sum(map(math.prod, shapes))
  if total != needed:
    raise Malformed(
      f"its {len(shards)} shards params_*.npy hold {total} numbers and {SHAPES_FILE} asks for"
      f" {needed}; one is missing or of another model: download them again"
    )
  tensors, start = {}, 0
  for name, shape in zip(names, shapes, strict=True):
    tensors[name] = _cut(shards, start, shape)
    start += math.prod(shape)
  return tensors, {}


def _map_shards(folder: Path) -> list[np.ndarray]:
  """Maps params_0.npy, params_1.npy and on, flat."""
  count = len(list(folder.glob("params_*.npy")))
  shards = []
  for number in range(count):
    name = f"params_{number}.npy"
    try:
      shard = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
      raise Malformed(f"{name} is missing among {count} shards; download it again") from error
    except (ValueError, EOFError, SyntaxError, OverflowError) as error:
      raise Malformed(f"{name} is truncated or no array; download it again") from error
    if not isinstance(shard, np.ndarray) or shard.dtype != np.float32:
      raise Malformed(f"{name} is not an array of float32")
    shards.append(np.asarray(shard).reshape(-1))
  return shards


def _cut(shards: list[np.ndarray], start: int, shape: tuple[int, ...]) -> LazyTensor:
  """Returns the tensor that begins at number `start` of the shards in a row."""
  parts, names, stop, first = [], [], start + math.prod(shape), 0
  for number, shard in enumerate(shards):
    part = shard[max(start - first, 0) : max(stop - first, 0)]
    if part.size:
      parts.append(part)
      names.append(f"params_{number}.npy")
    first += shard.size
  if len(parts) == 1:
    return lazy_tensor.whole(shape, parts[0], names[0])
  return LazyTensor(shape, np.dtype(np.float32), ", ".join(names), tuple(parts))


def read_mingpt(
  content: dict[str, Any], where: str
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
  """Returns the tensors of a parsed minGPT JSON file, and {"config": ...}.

  Raises:
    Malformed: no tensors, or one whose base64 bytes are not its shape's.
  """
  tensors, metadata = {}, {}
  for name, value in content.items():
    if isinstance(value, dict) and {"shape", "dtype", "data"} <= set(value):
      tensors[name] = _decode(name, value, where)
    else:
      metadata[name] = value
  if not tensors:
    raise Malformed("it is JSON without tensors; give the folder or the file of the weights")
  return tensors, metadata


def _decode(name: str, value: dict[str, Any], where: str) -> LazyTensor:
  shape, dtype = lazy_tensor.check_shape(value["shape"]), value["dtype"]
  dtype = lazy_tensor.check_dtype(dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype)
  try:
    data = base64.b64decode(value["data"], validate=True)
  except (TypeError, ValueError, binascii.Error) as error:
    raise Malformed(f"the data of {lazy_tensor.spell(name)} is not base64") from error
  if len(data) != math.prod(shape) * dtype.itemsize:
    raise Malformed(
      f"{lazy_tensor.spell(name)} has {len(data)} bytes and {dtype}{list(shape)} needs"
      f" {math.prod(shape) * dtype.itemsize}"
    )
  return lazy_tensor.whole(shape, np.frombuffer(data, dtype), where)
