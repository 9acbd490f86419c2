"""The decoder: embeddings, a stack of blocks, the final norm. Tokens in, hidden states out.

Pure functions over the parameter tree; `Decoder` is their linen face. One stacked tree serves the
scan and the unrolled loop.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.batch import Batch
from gptjax.model import positions
from gptjax.model.attention import dropout, self_attention
from gptjax.model.block import Layer, Mixer, attention_scale, block, layer_norm
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import decoder_specs, init_specs


class Decoder(nn.Module):
  """The decoder as a linen module: `Decoder(config).apply({"params": params["decoder"]}, batch)`.

  Attributes:
    config: the architecture.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, batch: Batch, deterministic: bool = True) -> jax.Array:
    """Returns hidden states [B, L, D] after the final norm; dropout needs rngs={"dropout": key}."""
    specs = decoder_specs(self.config)
    params = {
      name: self.param(name, lambda key, name=name: init_specs(specs[name], key)) for name in specs
    }
    return hidden_states(
      params, batch, self.config, None if deterministic else self.make_rng("dropout")
    )


def hidden_states(
  params: Any, batch: Batch, config: ModelConfig, key: jax.Array | None = None
) -> jax.Array:
  """Runs the decoder over whole rows.

  Args:
    params: the "decoder" subtree.
    batch: tokens_BL, and positions and segment ids where rows are packed or padded.
    config: the architecture.
    key: dropout key; None is deterministic.

  Returns:
    Hidden states [B, L, D] in the compute dtype, after the final norm.
  """
  num_rows, length = batch.tokens_BL.shape
  embedding_key, layers_key = (None, None) if key is None else jax.random.split(key)
  x_TD = embed(params, batch.tokens_BL, batch.positions_BL, config)
  x_TD = dropout(x_TD, config.embedding_dropout, embedding_key)
  x_TD = run_layers(
    params["layers"], x_TD, config, row_mixer(batch, config, layers_key), layers_key
  )
  return final_norm(params, x_TD, config).reshape(num_rows, length, config.model_dim)


def all_hidden_states(params: Any, batch: Batch, config: ModelConfig) -> jax.Array:
  """Returns [N+1, B, L, D]: the embeddings, then every layer, the last after the final norm."""
  x_TD = embed(params, batch.tokens_BL, batch.positions_BL, config)
  mix = row_mixer(batch, config, None)
  states = [x_TD]
  for layer, layer_params in enumerate(unstack_layers(params["layers"], config)):
    kind = config.attention_pattern[layer % len(config.attention_pattern)]
    x_TD, _ = block(layer_params, x_TD, config, mix, Layer(kind, layer))
    states.append(x_TD)
  states[-1] = final_norm(params, x_TD, config)
  return jnp.stack(states).reshape(len(states), *batch.tokens_BL.shape, config.model_dim)


def embed(
  params: Any, tokens_BL: jax.Array, positions_BL: jax.Array | None, config: ModelConfig
) -> jax.Array:
  """Looks up tokens and adds learned positions; returns [T, D] in the compute dtype."""
  x_BLD = params["token_embedding"]["embedding"][tokens_BL]
  if config.positions == "learned":
    table = params["position_embedding"]["embedding"]
    length = tokens_BL.shape[1]
    x_BLD += table[None, :length] if positions_BL is None else table[positions_BL]
  return x_BLD.reshape(-1, config.model_dim).astype(config.compute_dtype)


def final_norm(params: Any, x_TD: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns what heads read: the stream after the last norm, where there is one, in muP's scale."""
  if config.final_norm:
    x_TD = layer_norm(params["final_norm"], x_TD, config.norm_epsilon)
  return x_TD if config.mup_base_dim is None else x_TD / config.width_multiplier


def row_mixer(batch: Batch, config: ModelConfig, key: jax.Array | None) -> Mixer:
  """Returns the causal self-attention over the rows of a batch, for `block`."""
  num_rows, length = batch.tokens_BL.shape
  shape = (num_rows, length, config.num_heads, config.head_width)
  angles = None
  if config.positions == "rotary":
    positions_BL = batch.positions_BL
    if positions_BL is None:
      positions_BL = jnp.arange(length)[None, :]
    angles = positions.rotary_angles(positions_BL, config)

  def mix(query_TA, key_TA, value_TA, layer: Layer):
    query, key_, value = (x.reshape(shape) for x in (query_TA, key_TA, value_TA))
    if angles is not None:
      query, key_ = (positions.rotate(x, angles, config) for x in (query, key_))
    mixed_BLHK = self_attention(
      query,
      key_,
      value,
      config,
      scale=attention_scale(config, layer),
      window=config.window_size if layer.kind == "local" else None,
      segment_ids_BL=batch.segment_ids_BL,
      # A stream of its own: the block's two keys come from split, this one from fold_in.
      key=None if key is None else jax.random.fold_in(key, layer.index + config.num_layers),
    )
    return mixed_BLHK.reshape(-1, config.attention_dim), None

  return mix


def run_layers(
  layers: Any, x_TD: jax.Array, config: ModelConfig, mix: Mixer, key: jax.Array | None
) -> jax.Array:
  """Runs the stack, scanned or unrolled, recomputing in the backward pass what config.remat says.

  The scan runs over the period of the attention pattern, so that windows stay static.
  """
  period = len(config.attention_pattern)

  def run_period(x_TD, period_params, first_index):
    for offset, kind in enumerate(config.attention_pattern):
      layer = Layer(kind, first_index + offset)
      layer_key = None if key is None else jax.random.fold_in(key, layer.index)
      x_TD, _ = block(period_params[offset], x_TD, config, mix, layer, layer_key)
    return x_TD

  if not config.scan_layers:
    run_period = _remat(run_period, config, prevent_cse=True)
    unstacked = unstack_layers(layers, config)
    for first in range(0, config.num_layers, period):
      x_TD = run_period(x_TD, unstacked[first : first + period], first)
    return x_TD

  run_period = _remat(run_period, config, prevent_cse=False)
  grouped = jax.tree.map(lambda a: a.reshape(-1, period, *a.shape[1:]), layers)

  def body(x_TD, scanned):
    group, first_index = scanned
    period_params = [jax.tree.map(lambda a, i=i: a[i], group) for i in range(period)]
    return run_period(x_TD, period_params, first_index), None

  first_indices = jnp.arange(0, config.num_layers, period)
  x_TD, _ = jax.lax.scan(body, x_TD, (grouped, first_indices))
  return x_TD


def unstack_layers(layers: Any, config: ModelConfig) -> list[Any]:
  """Splits stacked parameters into one tree a layer; its transpose is one concatenation."""
  N = config.num_layers
  pieces = jax.tree.map(lambda a: [p[0] for p in jax.lax.split(a, [1] * N)], layers)
  outer, inner = jax.tree.structure(layers), jax.tree.structure([0] * N)
  return jax.tree.transpose(outer, inner, pieces)


def _remat(function, config: ModelConfig, prevent_cse: bool):
  if config.remat == "none":
    return function
  policies = jax.checkpoint_policies
  policy = {"dots": policies.dots_with_no_batch_dims_saveable, "full": None}[config.remat]
  return jax.checkpoint(function, policy=policy, prevent_cse=prevent_cse)
