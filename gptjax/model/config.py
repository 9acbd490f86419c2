"""ModelConfig: what one decoder needs to be GPT-1, GPT-2, GPT-3, GPT-J, GPT-Neo or GPT-NeoX.

Imports no jax, so that experiments and the command line start fast.
"""

import dataclasses

from gptjax.errors import ConfigError, check_choice


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The decoder's architecture and how it computes. Defaults are GPT-2 124M.

  Attributes:
    family: the published recipe this follows, for `info` and conversion.
    vocab_size: true vocabulary; None takes the tokenizer's.
    context_length: longest row in tokens, and the number of learned positions.
    num_layers, model_dim, num_heads: sizes.
    head_dim: width of one head; None is model_dim / num_heads.
    ffw_dim: width of the MLP; None is 4 * model_dim.
    activation: "gelu_tanh" (GPT-1 to GPT-J), "gelu" (exact), "relu", or "silu".
    norm_position: "pre" (GPT-2 on) or "post" (GPT-1: after each residual sum).
    final_norm: a norm after the last block (GPT-2 on).
    norm_epsilon: LayerNorm epsilon.
    positions: "learned" or "rotary".
    rotary_dim: rotated entries of each head; None is all of them.
    rotary_style: "interleaved" pairs (GPT-J) or "halves" (GPT-NeoX).
    rotary_base: base of the rotary wavelengths.
    parallel_residual: attention and MLP read the same stream (GPT-J, GPT-NeoX).
    shared_norm: with parallel_residual, one norm feeds both (GPT-J).
    norm_bias, qkv_bias, attention_output_bias, mlp_bias: biases of norms and projections.
    attention_pattern: kind of each layer, repeated over the depth: "global" or "local".
    window_size: a local layer attends to itself and the window_size - 1 tokens before.
    attention_scale: divide scores by "sqrt_head_dim", by "one" (GPT-Neo), or by "head_dim" (muP).
    scale_attention_by_layer: also divide the scores of layer i by i + 1 (mistral GPT-2).
    tie_embeddings: the head reuses the token embedding.
    head_bias: the untied head has a bias (GPT-J).
    embedding_dropout, attention_dropout, residual_dropout: rates in [0, 1).
    init_std: standard deviation of weights; position embeddings use position_init_std.
    residual_init_scale: multiply the std of residual projections by 1/sqrt(2 * num_layers).
    mup_base_dim: parametrise for any width as the standard one of this model_dim, so that one
      learning rate suits all widths (muP; see `width_multiplier`); None is standard. Where heads
      widen with the model, set attention_scale to "head_dim".
    vocab_multiple: the embedding is padded to a multiple of this; padding is never predicted.
    compute_dtype: "float32" or "bfloat16" of activations and products; parameters stay float32.
    attention_implementation: "auto" (cuDNN on GPU, Pallas on TPU, XLA elsewhere), "xla",
      "cudnn", or "pallas".
    scan_layers: compile one block and scan it (short compilation) or unroll (fast steps on CPU).
    remat: what the backward pass recomputes: "none", "dots" (keeps matrix products), "full".
  """

  family: str = "gpt2"
  vocab_size: int | None = None
  context_length: int = 1024
  num_layers: int = 12
  model_dim: int = 768
  num_heads: int = 12
  head_dim: int | None = None
  ffw_dim: int | None = None
  activation: str = "gelu_tanh"
  norm_position: str = "pre"
  final_norm: bool = True
  norm_epsilon: float = 1e-5
  positions: str = "learned"
  rotary_dim: int | None = None
  rotary_style: str = "interleaved"
  rotary_base: float = 10_000.0
  parallel_residual: bool = False
  shared_norm: bool = False
  norm_bias: bool = True
  qkv_bias: bool = True
  attention_output_bias: bool = True
  mlp_bias: bool = True
  attention_pattern: tuple[str, ...] = ("global",)
  window_size: int = 256
  attention_scale: str = "sqrt_head_dim"
  scale_attention_by_layer: bool = False
  tie_embeddings: bool = True
  head_bias: bool = False
  embedding_dropout: float = 0.0
  attention_dropout: float = 0.0
  residual_dropout: float = 0.0
  init_std: float = 0.02
  position_init_std: float = 0.02
  residual_init_scale: bool = True
  mup_base_dim: int | None = None
  vocab_multiple: int = 128
  compute_dtype: str = "float32"
  attention_implementation: str = "auto"
  scan_layers: bool = True
  remat: str = "none"

  def __post_init__(self):
    check_choice("model.activation", self.activation, ("gelu_tanh", "gelu", "relu", "silu"))
    check_choice("model.norm_position", self.norm_position, ("pre", "post"))
    check_choice("model.positions", self.positions, ("learned", "rotary"))
    check_choice("model.rotary_style", self.rotary_style, ("interleaved", "halves"))
    scales = ("sqrt_head_dim", "one", "head_dim")
    check_choice("model.attention_scale", self.attention_scale, scales)
    check_choice("model.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
    check_choice("model.remat", self.remat, ("none", "dots", "full"))
    check_choice(
      "model.attention_implementation",
      self.attention_implementation,
      ("auto", "xla", "cudnn", "pallas"),
    )
    for kind in self.attention_pattern:
      check_choice("model.attention_pattern", kind, ("global", "local"))
    if not self.attention_pattern:
      raise ConfigError('model.attention_pattern is empty; it must name "global" or "local" layers')
    sizes = ("context_length", "num_layers", "model_dim", "num_heads", "window_size")
    optional_sizes = ("vocab_size", "head_dim", "ffw_dim", "rotary_dim", "mup_base_dim")
    for key in (*sizes, *optional_sizes, "vocab_multiple"):
      if getattr(self, key) is not None and not 1 <= getattr(self, key) < 2**31:
        raise ConfigError(
          f"model.{key} is {getattr(self, key)}; it must be at least 1 and below 2^31"
        )
    for key in ("init_std", "position_init_std", "norm_epsilon"):
      if not getattr(self, key) >= 0:
        raise ConfigError(f"model.{key} is {getattr(self, key)}; it must be at least 0")
    if not self.rotary_base > 0:
      raise ConfigError(f"model.rotary_base is {self.rotary_base}; it must be above 0")
    for key in ("embedding_dropout", "attention_dropout", "residual_dropout"):
      if not 0 <= getattr(self, key) < 1:
        raise ConfigError(f"model.{key} is {getattr(self, key)}; it must be in [0, 1)")
    if self.head_dim is None and self.model_dim % self.num_heads:
      raise ConfigError(
        f"model.model_dim {self.model_dim} is not a multiple of model.num_heads {self.num_heads};"
        " change one of them or set model.head_dim"
      )
    if self.num_layers % len(self.attention_pattern):
      raise ConfigError(
        f"model.num_layers {self.num_layers} is not a multiple of the"
        f" {len(self.attention_pattern)} kinds in model.attention_pattern"
      )
    if self.positions == "rotary" and (self.rotated_dim % 2 or self.rotated_dim > self.head_width):
      raise ConfigError(
        f"model.rotary_dim is {self.rotated_dim}; it must be even and at most the head's width"
        f" {self.head_width}"
      )
    if self.shared_norm and not self.parallel_residual:
      raise ConfigError("model.shared_norm needs model.parallel_residual=True")
    if self.parallel_residual and self.norm_position == "post":
      raise ConfigError('model.parallel_residual needs model.norm_position="pre"')
    if self.head_bias and self.tie_embeddings:
      raise ConfigError("model.head_bias needs model.tie_embeddings=False")

  @property
  def head_width(self) -> int:
    """Width K of one head."""
    return self.head_dim or self.model_dim // self.num_heads

  @property
  def attention_dim(self) -> int:
    """Width of all heads together, H * K."""
    return self.num_heads * self.head_width

  @property
  def ffw_width(self) -> int:
    """Width F of the MLP."""
    return self.ffw_dim or 4 * self.model_dim

  @property
  def width_multiplier(self) -> float:
    """How much wider the model is than its base, 1 without one.

    muP (Yang et al. 2022, "Tensor Programs V", table 8) divides by it the variance of hidden
    matrices at the start, the states that heads read, and Adam's rate for hidden matrices. The
    widths of all heads together and of the MLP are taken to grow with the model's.
    """
    return self.model_dim / self.mup_base_dim if self.mup_base_dim else 1.0

  @property
  def rotated_dim(self) -> int:
    """Number of entries of each head that rotary positions rotate."""
    return self.rotary_dim or self.head_width

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the embedding: vocab_size rounded up to vocab_multiple."""
    if self.vocab_size is None:
      raise ConfigError("model.vocab_size is not known yet; set it or give a tokenizer")
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
