"""The decoder once more, in float64 NumPy and written for reading: what the fast model must equal.

It shares nothing with `gptjax.model` but the parameter tree and the config, keeps every activation,
and is what `gptjax doctor` and the tests find the first disagreeing tensor with.

Sources: Radford et al. 2018 (GPT-1) and 2019 (GPT-2), Brown et al. 2020 (GPT-3), Wang and
Komatsuzaki 2021 (GPT-J), Black et al. 2021 (GPT-Neo) and 2022 (GPT-NeoX).
"""

import math
from typing import Any

import numpy as np

from gptjax.model.config import ModelConfig

Activations = dict[str, np.ndarray]


def reference_activations(
  params: Any,
  config: ModelConfig,
  tokens_BL: np.ndarray,
  positions_BL: np.ndarray | None = None,
  segment_ids_BL: np.ndarray | None = None,
) -> Activations:
  """Runs a language model and keeps everything.

  Args:
    params: the whole tree, arrays of any float dtype; layers are cast one at a time.
    config: the architecture; compute_dtype and how to compile are ignored.
    tokens_BL: int token ids.
    positions_BL: int place of each token in its document; None is 0 .. L-1.
    segment_ids_BL: tokens see only their own segment; None is one segment a row.

  Returns:
    {name: float64 array} in the order of computation: "embedding" [B, L, D]; for each layer i
    "layers/i/..." attention_norm, query, key, value, rotated_query, rotated_key, mixed
    [B, L, H, K], attention, residual, mlp_norm, mlp_up (after the activation) [B, L, F], mlp,
    output; at last "final_norm" and "logits" [B, L, V], V without padding. What a family does not
    have is not there.
  """
  num_rows, length = tokens_BL.shape
  if positions_BL is None:
    positions_BL = np.tile(np.arange(length), (num_rows, 1))
  if segment_ids_BL is None:
    segment_ids_BL = np.zeros((num_rows, length), int)
  decoder = params["decoder"]
  x_BLD = _wide(decoder["token_embedding"]["embedding"])[tokens_BL]
  if config.positions == "learned":
    x_BLD = x_BLD + _wide(decoder["position_embedding"]["embedding"])[positions_BL]
  activations = {"embedding": x_BLD}
  for index in range(config.num_layers):
    layer = _take_layer(decoder["layers"], index)
    found = _layer(layer, x_BLD, config, index, (positions_BL, segment_ids_BL))
    activations |= {f"layers/{index}/{name}": array for name, array in found.items()}
    x_BLD = found["output"]
  if config.final_norm:
    x_BLD = _layer_norm(decoder["final_norm"], x_BLD, config.norm_epsilon)
    activations["final_norm"] = x_BLD
  return activations | {"logits": _logits(params, x_BLD / config.width_multiplier, config)}


def reference_loss(
  logits_BLV: np.ndarray, targets_BL: np.ndarray, weights_BL: np.ndarray | None = None
) -> float:
  """Returns the mean next-token cross-entropy in nats a token; no weights are equal weights."""
  peak_BL1 = logits_BLV.max(axis=-1, keepdims=True)
  normalizer_BL = np.log(np.exp(logits_BLV - peak_BL1).sum(axis=-1)) + peak_BL1[..., 0]
  target_BL = np.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
  return float(np.average(normalizer_BL - target_BL, weights=weights_BL))


def _layer(params, x, config: ModelConfig, index: int, places) -> Activations:
  """Runs one block: post-norm (GPT-1), pre-norm (GPT-2 on), or parallel (GPT-J, GPT-NeoX)."""
  found = {}

  def norm(name, inputs):
    found[name] = _layer_norm(params[name], inputs, config.norm_epsilon)
    return found[name]

  def attend(inputs):
    found.update(_attention(params["attention"], inputs, config, index, places))
    return found["attention"]

  def expand(inputs):
    found["mlp_up"] = _activate(_linear(params["mlp"]["up"], inputs), config.activation)
    found["mlp"] = _linear(params["mlp"]["down"], found["mlp_up"])
    return found["mlp"]

  if config.norm_position == "post":
    found["residual"] = x + attend(x)
    normed = norm("attention_norm", found["residual"])
    output = norm("mlp_norm", normed + expand(normed))
  elif config.parallel_residual:
    normed = norm("attention_norm", x)
    attended = attend(normed)
    output = x + attended + expand(normed if config.shared_norm else norm("mlp_norm", x))
  else:
    found["residual"] = x + attend(norm("attention_norm", x))
    output = found["residual"] + expand(norm("mlp_norm", found["residual"]))
  return found | {"output": output}


def _attention(params, x, config: ModelConfig, index: int, places) -> Activations:
  """Attends causally within rows and segments, and within the window where the layer is local."""
  positions_BL, segment_ids_BL = places
  num_rows, length, _ = x.shape
  shape = (num_rows, length, config.num_heads, config.head_width)
  found = {name: _linear(params[name], x).reshape(shape) for name in ("query", "key", "value")}
  query, key, value = found.values()
  if config.positions == "rotary":
    query = found["rotated_query"] = _rotate(query, positions_BL, config)
    key = found["rotated_key"] = _rotate(key, positions_BL, config)
  K = config.head_width
  divisor = {"sqrt_head_dim": math.sqrt(K), "one": 1.0, "head_dim": K}[config.attention_scale]
  if config.scale_attention_by_layer:
    divisor *= index + 1
  is_local = config.attention_pattern[index % len(config.attention_pattern)] == "local"
  found["mixed"] = mixed = np.zeros(shape)
  for row in range(num_rows):
    for place in range(length):
      first = max(0, place - config.window_size + 1) if is_local else 0
      seen = np.arange(first, place + 1)
      seen = seen[segment_ids_BL[row, seen] == segment_ids_BL[row, place]]
      scores_HM = np.einsum("hk,mhk->hm", query[row, place], key[row, seen]) / divisor
      weights_HM = np.exp(scores_HM - scores_HM.max(axis=-1, keepdims=True))
      weights_HM /= weights_HM.sum(axis=-1, keepdims=True)
      mixed[row, place] = np.einsum("hm,mhk->hk", weights_HM, value[row, seen])
  found["attention"] = _linear(params["output"], mixed.reshape(num_rows, length, -1))
  return found


def _rotate(x_BLHK, positions_BL, config: ModelConfig):
  """Multiplies pairs of entries, as complex numbers, by exp(i * position * frequency).

  GPT-J pairs neighbours; GPT-NeoX pairs an entry with the one half of the rotated part further on.
  """
  R = config.rotated_dim
  real, imaginary = np.arange(R).reshape(-1, 2).T
  if config.rotary_style == "halves":
    real, imaginary = np.arange(R).reshape(2, -1)
  frequencies = config.rotary_base ** (-2 * np.arange(R // 2) / R)
  turns = np.exp(1j * positions_BL[..., None, None] * frequencies)
  turned = (x_BLHK[..., real] + 1j * x_BLHK[..., imaginary]) * turns
  rotated = x_BLHK.copy()
  rotated[..., real], rotated[..., imaginary] = turned.real, turned.imag
  return rotated


def _logits(params, x_BLD, config: ModelConfig):
  """Multiplies by the token embedding or the model's own head, over the true vocabulary."""
  if config.tie_embeddings:
    kernel_VD, bias_V = params["decoder"]["token_embedding"]["embedding"], 0.0
  else:
    kernel_VD = params["lm_head"]["kernel"]
    bias_V = _wide(params["lm_head"]["bias"]) if config.head_bias else 0.0
  return (x_BLD @ _wide(kernel_VD).T + bias_V)[..., : config.vocab_size]


def _layer_norm(params, x, epsilon: float):
  standard = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)
  return standard * _wide(params["scale"]) + _wide(params.get("bias", 0.0))


def _linear(params, x):
  return x @ params["kernel"] + params.get("bias", 0.0)


def _activate(x, name: str):
  if name == "relu":
    return np.maximum(x, 0)
  if name == "silu":
    return x / (1 + np.exp(-x))
  if name == "gelu_tanh":  # Hendrycks and Gimpel 2016, the approximation that GPT-1 to GPT-J use.
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
  return x / 2 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))


def _take_layer(stacked, index: int):
  """Cuts one layer out of stacked parameters, in float64."""
  if isinstance(stacked, dict):
    return {name: _take_layer(child, index) for name, child in stacked.items()}
  return _wide(stacked[index])


def _wide(array) -> np.ndarray:
  return np.asarray(array, np.float64)
