"""What goes wrong when a checkpoint is converted, each undone: `gptjax doctor` tries them all."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from gptjax.model.config import ModelConfig

PyTree = Any

_EPSILONS = (1e-5, 1e-6, 1e-12)


@dataclasses.dataclass(frozen=True)
class Suspect:
  """A model as the reference runs it.

  Attributes:
    params: the whole tree, NumPy arrays.
    config: the architecture.
    position_offset: added to the place of every token.
  """

  params: PyTree
  config: ModelConfig
  position_offset: int = 0


@dataclasses.dataclass(frozen=True)
class Mistake:
  """A known mistake and the model without it.

  Attributes:
    kind: what it is called: "rotary", "gelu", "epsilon", ...
    change: what undoes it, in words.
    undone: the model with that change.
  """

  kind: str
  change: str
  undone: Suspect


def known_mistakes(suspect: Suspect) -> Iterator[Mistake]:
  """Yields the mistakes that a model could have, one changed copy of it at a time."""
  yield from _transposed_kernels(suspect)
  yield from _mixed_up_projections(suspect)
  yield from _config_mistakes(suspect)
  if not suspect.config.tie_embeddings:
    yield _tied(suspect)
  if suspect.config.positions == "learned":
    for offset in (1, -1):
      change = f"positions counted from {offset:+}"
      yield Mistake("position offset", change, dataclasses.replace(suspect, position_offset=offset))


def _config_mistakes(suspect: Suspect) -> Iterator[Mistake]:
  config = suspect.config

  def changed(kind: str, **change: Any) -> Mistake:
    (field, value), *_ = change.items()
    words = f"{field} {value} instead of {getattr(config, field)}"
    undone = dataclasses.replace(suspect, config=dataclasses.replace(config, **change))
    return Mistake(kind, words, undone)

  if config.positions == "rotary":
    style = "halves" if config.rotary_style == "interleaved" else "interleaved"
    yield changed("rotary", rotary_style=style)
  if config.activation in ("gelu", "gelu_tanh"):
    yield changed("gelu", activation="gelu" if config.activation == "gelu_tanh" else "gelu_tanh")
  for epsilon in _EPSILONS:
    if epsilon != config.norm_epsilon:
      yield changed("epsilon", norm_epsilon=epsilon)
  scale = "one" if config.attention_scale == "sqrt_head_dim" else "sqrt_head_dim"
  yield changed("attention scale", attention_scale=scale)
  yield changed("attention scale", scale_attention_by_layer=not config.scale_attention_by_layer)


def _tied(suspect: Suspect) -> Mistake:
  params = {name: tree for name, tree in suspect.params.items() if name != "lm_head"}
  config = dataclasses.replace(suspect.config, tie_embeddings=True, head_bias=False)
  undone = dataclasses.replace(suspect, params=params, config=config)
  return Mistake("tie", "the token embedding as head instead of its own", undone)


def _transposed_kernels(suspect: Suspect) -> Iterator[Mistake]:
  """Square kernels fit either way: nn.Linear has them [out, in], Conv1D [in, out]."""
  layers = suspect.params["decoder"]["layers"]
  places = [("attention", name) for name in ("query", "key", "value", "output")]
  places += [("mlp", "up"), ("mlp", "down")]
  square = [place for place in places if _is_square(layers[place[0]][place[1]]["kernel"])]
  projections = [place for place in square if place[1] in ("query", "key", "value")]
  outputs = [place for place in square if place[1] == "output"]
  groups = [group for group in (square, projections, outputs) if group]
  for i, group in enumerate(groups):
    if group not in groups[:i]:
      undone = dataclasses.replace(suspect, params=_transpose(suspect.params, group))
      names = ", ".join(name for _, name in group)
      yield Mistake("transposed", f"square kernels transposed: {names}", undone)


def _is_square(kernel: np.ndarray) -> bool:
  return kernel.shape[-1] == kernel.shape[-2]


def _transpose(params: PyTree, places: list[tuple[str, str]]) -> PyTree:
  layers = params["decoder"]["layers"]
  for module, name in places:
    linear = layers[module][name]
    turned = linear | {"kernel": np.swapaxes(linear["kernel"], -1, -2)}
    layers = layers | {module: layers[module] | {name: turned}}
  return params | {"decoder": params["decoder"] | {"layers": layers}}


def _mixed_up_projections(suspect: Suspect) -> Iterator[Mistake]:
  """A fused tensor has query, key and value once, or head by head (GPT-NeoX)."""
  config, layers = suspect.config, suspect.params["decoder"]["layers"]
  if config.num_heads == 1:
    return
  names = ("query", "key", "value")
  for is_by_head in (True, False):
    attention = dict(layers["attention"])
    for leaf in attention["query"]:
      parts = _deal_out([attention[name][leaf] for name in names], config.num_heads, is_by_head)
      for name, part in zip(names, parts):
        attention[name] = attention[name] | {leaf: part}
    decoder = suspect.params["decoder"] | {"layers": layers | {"attention": attention}}
    undone = dataclasses.replace(suspect, params=suspect.params | {"decoder": decoder})
    order = "head by head" if is_by_head else "one after the other"
    yield Mistake("fused order", f"query, key and value taken {order}", undone)


def _deal_out(parts: list[np.ndarray], num_heads: int, is_by_head: bool) -> np.ndarray:
  """Puts three arrays [..., H * K] together one way, and takes them apart the other."""
  heads = np.stack([part.reshape(*part.shape[:-1], num_heads, -1) for part in parts], axis=-3)
  if is_by_head:  # [..., 3, H, K] was [..., H, 3, K]
    shape = (*heads.shape[:-3], num_heads, 3, heads.shape[-1])
    apart = np.moveaxis(heads.reshape(shape), -2, 0)
  else:
    together = np.moveaxis(heads, -3, -2)
    apart = np.moveaxis(together.reshape(heads.shape), -3, 0)
  return apart.reshape(3, *parts[0].shape)
