"""Where other people's files keep our arrays: one table for each layout, and one kind of rule.

A rule says which foreign tensor holds one layer of one of our arrays, whether it is transposed
([out, in], as nn.Linear stores it), and which third of a fused query-key-value tensor it is. The
same rules read and write.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gptjax.model.config import ModelConfig
from gptjax.model.parameters import model_specs
from gptjax.tree import named_leaves

Index = tuple[slice, ...]

_THIRDS = {"query": 0, "key": 1, "value": 2}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Layout:
  """One library's names.

  Attributes:
    prefix: what names of a language model begin with, outside of its head; base models lack it.
    modules: {our module: theirs}, "{}" being the layer; "attention/qkv" is the three in one.
    is_transposed: kernels of the layers are [out, in].
    fused_by_head: query, key and value alternate head by head, not once.
    renamed: {a name some files have: the name in this table}.
  """

  prefix: str
  modules: Mapping[str, str]
  is_transposed: bool
  fused_by_head: bool = False
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Source:
  """One layer of one of our arrays as a part of a foreign tensor.

  Attributes:
    name: of the tensor, without the prefix.
    shape: of the whole tensor.
    layer: which one, or None where there is no layer.
    is_transposed: the tensor has our axes in reverse.
    third: 0, 1 or 2 of a fused query-key-value tensor; None is all of it.
    groups: the thirds alternate this often along the output axis.
  """

  name: str
  shape: tuple[int, ...]
  layer: int | None
  is_transposed: bool
  third: int | None
  groups: int

  @property
  def our_shape(self) -> tuple[int, ...]:
    """Returns the shape of one layer of our array."""
    shape = self.shape[::-1] if self.is_transposed else self.shape
    return shape if self.third is None else (*shape[:-1], shape[-1] // 3)

  def pieces(self, index: Index) -> Iterator[tuple[Index, Index]]:
    """Cuts a part of our array into parts that are in one piece in theirs.

    Args:
      index: slices with start and stop, one for each axis of one layer of ours.

    Yields:
      (our slices, relative to `index`; their slices, in the tensor's order of axes).
    """
    whole = tuple(slice(0, s.stop - s.start) for s in index)
    if self.third is None:
      yield whole, self._turn(index)
      return
    width = self.shape[0 if self.is_transposed else -1] // (3 * self.groups)
    start, stop = index[-1].start, index[-1].stop
    for group in range(start // width, -(-stop // width)):
      low, high = max(start, group * width), min(stop, (group + 1) * width)
      shift = (2 * group + self.third) * width
      ours = slice(low - start, high - start)
      yield (*whole[:-1], ours), self._turn((*index[:-1], slice(low + shift, high + shift)))

  def _turn(self, index: Index) -> Index:
    return index[::-1] if self.is_transposed else index


_GPT2_MODULES = {
  "decoder/token_embedding": "wte",
  "decoder/position_embedding": "wpe",
  "decoder/layers/attention_norm": "h.{}.ln_1",
  "decoder/layers/attention/qkv": "h.{}.attn.c_attn",
  "decoder/layers/attention/output": "h.{}.attn.c_proj",
  "decoder/layers/mlp_norm": "h.{}.ln_2",
  "decoder/layers/mlp/up": "h.{}.mlp.c_fc",
  "decoder/layers/mlp/down": "h.{}.mlp.c_proj",
  "decoder/final_norm": "ln_f",
  "lm_head": "lm_head",
}


def _separate_heads(module: str) -> dict[str, str]:
  names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
  return {f"decoder/layers/attention/{ours}": f"{module}.{name}" for ours, name in names.items()}


LAYOUTS: dict[str, Layout] = {
  # Conv1D keeps kernels [in, out].
  "gpt2": Layout("transformer.", _GPT2_MODULES, is_transposed=False),
  "openai-gpt": Layout(
    "transformer.",
    _GPT2_MODULES
    | {
      "decoder/token_embedding": "tokens_embed",
      "decoder/position_embedding": "positions_embed",
    },
    is_transposed=False,
  ),
  "gptj": Layout(
    "transformer.",
    _GPT2_MODULES
    | _separate_heads("h.{}.attn")
    | {
      "decoder/layers/mlp/up": "h.{}.mlp.fc_in",
      "decoder/layers/mlp/down": "h.{}.mlp.fc_out",
    },
    is_transposed=True,
  ),
  "gpt_neo": Layout(
    "transformer.", _GPT2_MODULES | _separate_heads("h.{}.attn.attention"), is_transposed=True
  ),
  "gpt_neox": Layout(
    "gpt_neox.",
    {
      "decoder/token_embedding": "embed_in",
      "decoder/layers/attention_norm": "layers.{}.input_layernorm",
      "decoder/layers/attention/qkv": "layers.{}.attention.query_key_value",
      "decoder/layers/attention/output": "layers.{}.attention.dense",
      "decoder/layers/mlp_norm": "layers.{}.post_attention_layernorm",
      "decoder/layers/mlp/up": "layers.{}.mlp.dense_h_to_4h",
      "decoder/layers/mlp/down": "layers.{}.mlp.dense_4h_to_h",
      "decoder/final_norm": "final_layer_norm",
      "lm_head": "embed_out",
    },
    is_transposed=True,
    fused_by_head=True,
    renamed={"lm_head.weight": "embed_out.weight"},
  ),
  "nanogpt": Layout("transformer.", _GPT2_MODULES, is_transposed=True),
  "mingpt": Layout("transformer.", _GPT2_MODULES, is_transposed=True),
}

# Masks and tables of angles that older versions saved: recomputed, not read.
BUFFERS = re.compile(
  r"(\.(attn|attention)\.(bias|masked_bias|embed_positions|rotary_emb\.(original_)?inv_freq)"
  r"|^(rotary_emb\.(original_)?inv_freq|position_ids))$"
)
# Heads beside the language model's.
TASK_HEADS = re.compile(r"^(score|classifier|qa_outputs|multiple_choice_head)\.")
_LAYER_NUMBER = re.compile(r"^(?:h|layers)\.(\d+)\.")


def layer_number(name: str) -> int | None:
  """Returns the layer that a foreign name, without its prefix, is of."""
  match = _LAYER_NUMBER.match(name)
  return int(match[1]) if match else None


def is_head(name: str) -> bool:
  """Says whether a foreign name is the language model's head, which has no prefix."""
  return name.startswith(("lm_head.", "embed_out."))


def find_sources(config: ModelConfig, layout: Layout) -> dict[str, list[Source]]:
  """Returns {our path: the source of each layer, or the only one}, in the order of our tree."""
  unpadded = dataclasses.replace(config, vocab_multiple=1)
  return {
    path: _sources_of(path, spec.shape, config, layout)
    for path, spec in named_leaves(model_specs(unpadded)).items()
  }


def _sources_of(path: str, shape: tuple[int, ...], config: ModelConfig, layout: Layout):
  module, _, leaf = path.rpartition("/")
  parent, _, last = module.rpartition("/")
  third = None
  if module not in layout.modules:
    third, module = _THIRDS[last], f"{parent}/qkv"
  is_stacked = "/layers/" in path
  shape = shape[1:] if is_stacked else shape
  is_transposed = layout.is_transposed and is_stacked and leaf == "kernel"
  if third is not None:
    shape = (*shape[:-1], 3 * shape[-1])
  name = f"{layout.modules[module]}.{_LEAVES[leaf]}"
  return [
    Source(
      name.format(layer),
      shape[::-1] if is_transposed else shape,
      layer,
      is_transposed,
      third,
      config.num_heads if layout.fused_by_head else 1,
    )
    for layer in (range(config.num_layers) if is_stacked else [None])
  ]


def full_index(shape: tuple[int, ...], index: Any = ()) -> Index:
  """Returns `index` (slices, perhaps open, perhaps fewer than axes) with every start and stop."""
  slices = (*index, *[slice(None)] * (len(shape) - len(index)))
  return tuple(slice(*s.indices(size)[:2]) for s, size in zip(slices, shape))
