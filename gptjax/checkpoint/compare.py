"""Our decoder against the NumPy reference, one piece at a time."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batch import Batch
from gptjax.checkpoint.reference import Activations
from gptjax.model import block, positions
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import embed, hidden_states, row_mixer
from gptjax.model.heads import lm_logits

PyTree = Any

# Relative; float32 sums stay below, and even another form of gelu does not.
TOLERANCE = 1e-5
# Of what has passed all layers, where rounding adds up.
WHOLE_TOLERANCE = 1e-4
_MAKERS = {
  "embedding": "decoder/token_embedding, decoder/position_embedding",
  "attention_norm": "decoder/layers/attention_norm",
  "query": "decoder/layers/attention/query",
  "key": "decoder/layers/attention/key",
  "value": "decoder/layers/attention/value",
  "rotated_query": "rotary positions",
  "rotated_key": "rotary positions",
  "mixed": "attention: its scale, mask and softmax",
  "attention": "decoder/layers/attention/output",
  "mlp_norm": "decoder/layers/mlp_norm",
  "mlp_up": "decoder/layers/mlp/up and the activation function",
  "mlp": "decoder/layers/mlp/down",
  "output": "the sums of the block",
  "final_norm": "decoder/final_norm, or how the layers are chained",
  "logits": "the head",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One activation of our decoder against the reference's.

  Attributes:
    name: as `reference_activations` names it.
    error: norm of the difference over the norm of the reference's.
  """

  name: str
  error: float

  @property
  def agrees(self) -> bool:
    is_whole = self.name in ("final_norm", "logits")
    return self.error <= (WHOLE_TOLERANCE if is_whole else TOLERANCE)  # not so for NaN

  def describe(self) -> str:
    """Names the place in words, with the parameter that computes it."""
    *layer, piece = self.name.split("/")
    where = f"layer {layer[1]}, {piece}" if layer else piece
    maker = _MAKERS.get(piece)
    return f"{where} ({maker})" if maker else where


def compare(
  params: PyTree, config: ModelConfig, expected: Activations, tokens_BL: np.ndarray
) -> list[Comparison]:
  """Runs each piece of our decoder on what the reference fed it, so that errors do not spread.

  Args:
    params, config: what our decoder runs.
    expected: what the reference computed on the same tokens.
    tokens_BL: int tokens.

  Returns:
    One comparison for each activation, in the order of computation; the last ones, after the
    layers, are of a whole pass as a model is used.
  """
  found = {}
  batch = _batch(tokens_BL)
  with jax.default_matmul_precision("highest"):
    found["embedding"] = embed(params["decoder"], batch.tokens_BL, None, config)
    x_TD = _flat(expected["embedding"])
    for index in range(config.num_layers):
      prefix = f"layers/{index}/"
      layer = jax.tree.map(lambda leaf, i=index: leaf[i], params["decoder"]["layers"])
      theirs = {n.removeprefix(prefix): a for n, a in expected.items() if n.startswith(prefix)}
      pieces = _layer_pieces(layer, x_TD, theirs, batch, config, index)
      found |= {prefix + name: array for name, array in pieces.items()}
      x_TD = _flat(theirs["output"])
    found["final_norm"], found["logits"] = _whole_pass(params, batch, config)
  return [
    Comparison(name, relative_error(found[name], array))
    for name, array in expected.items()
    if name in found
  ]


def decoder_logits(params: PyTree, config: ModelConfig, tokens_BL: np.ndarray) -> np.ndarray:
  """Returns the logits of our decoder, float32 [B, L, V], in true float32."""
  with jax.default_matmul_precision("highest"):
    return np.asarray(_whole_pass(params, _batch(tokens_BL), config)[1])


def _batch(tokens_BL: np.ndarray) -> Batch:
  tokens_BL = jnp.asarray(tokens_BL)
  return Batch(tokens_BL, tokens_BL, jnp.ones(tokens_BL.shape))


# Compiled once: run as it stands, the scan over the layers would be compiled at every call.
@functools.partial(jax.jit, static_argnames="config")
def _whole_pass(params: PyTree, batch: Batch, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
  """Returns what the head reads [B, L, D], and the logits [B, L, V]."""
  hidden_BLD = hidden_states(params["decoder"], batch, config)
  return hidden_BLD, lm_logits(params, hidden_BLD, config)


def relative_error(found: Any, expected: np.ndarray) -> float:
  """Returns the norm of the difference over the norm of `expected`."""
  difference = np.asarray(found, np.float64).reshape(expected.shape) - expected
  return float(np.linalg.norm(difference) / (np.linalg.norm(expected) or 1.0))


def _layer_pieces(
  layer: PyTree, x_TD, theirs: Activations, batch: Batch, config: ModelConfig, index: int
) -> dict[str, jax.Array]:
  """Computes each piece of a block from the reference's inputs to it, and the block as a whole."""
  kind = config.attention_pattern[index % len(config.attention_pattern)]
  place = block.Layer(kind, index)
  inputs = {name: _flat(array) for name, array in theirs.items()}
  is_post = config.norm_position == "post"
  to_attention = x_TD if is_post else inputs["attention_norm"]
  to_mlp = inputs["attention_norm" if is_post or config.shared_norm else "mlp_norm"]
  norms = {"attention_norm": inputs["residual"] if is_post else x_TD}
  if not config.shared_norm:
    before_mlp = x_TD if config.parallel_residual else inputs.get("residual")
    norms["mlp_norm"] = inputs["attention_norm"] + inputs["mlp"] if is_post else before_mlp
  mix = row_mixer(batch, config, None)
  projections = (inputs[name] for name in ("query", "key", "value"))
  activate = block.ACTIVATIONS[config.activation]
  pieces = {
    name: block.layer_norm(layer[name], x, config.norm_epsilon) for name, x in norms.items()
  }
  for name in ("query", "key", "value"):
    pieces[name] = block.linear(layer["attention"][name], to_attention)
  return (
    pieces
    | _rotated(theirs, config)
    | {
      "mixed": mix(*projections, place)[0],
      "attention": block.linear(layer["attention"]["output"], inputs["mixed"]),
      "mlp_up": activate(block.linear(layer["mlp"]["up"], to_mlp)),
      "mlp": block.linear(layer["mlp"]["down"], inputs["mlp_up"]),
      "output": block.block(layer, x_TD, config, mix, place)[0],
    }
  )


def _rotated(theirs: Activations, config: ModelConfig) -> dict[str, jax.Array]:
  if config.positions != "rotary":
    return {}
  angles = positions.rotary_angles(jnp.arange(theirs["query"].shape[1])[None, :], config)
  return {
    f"rotated_{name}": positions.rotate(jnp.asarray(theirs[name], jnp.float32), angles, config)
    for name in ("query", "key")
  }


def _flat(array: np.ndarray) -> jax.Array:
  """Returns [T, everything else], float32, as blocks take it."""
  return jnp.asarray(array.reshape(array.shape[0] * array.shape[1], -1), jnp.float32)
