"""`load`, `set_seed`, and the thin `Model`."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batch import Batch
from gptjax.checkpoint.export import save_hf
from gptjax.checkpoint.models import load_model, save_run
from gptjax.data.special_tokens import LISTS, ROLES
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import ConfigError, DataError, UserError, check_choice, did_you_mean
from gptjax.generate.answer import Generation
from gptjax.generate.generator import Generator, Piece
from gptjax.generate.options import DecodingOptions, is_sampled, parse_options
from gptjax.model import decoder
from gptjax.model.config import ModelConfig
from gptjax.model.heads import lm_logits
from gptjax.model.parameters import SHARDING_RULES
from gptjax.parallel import Parallel, make_parallel

PyTree = Any

_MESH_AXES = ("data", "fsdp", "tensor")
LOAD_OPTIONS = ("dtype", "mesh", "tokenizer", *ROLES, *LISTS)


def load(
  path_or_name: str | os.PathLike,
  *,
  dtype: str | None = "float32",
  mesh: Any = None,
  tokenizer: str | os.PathLike | None = None,
  **special_tokens: Any,
) -> "Model":
  """Loads a run directory, a model of another library, or a name on the Hugging Face hub.

  Args:
    path_or_name: a run directory, a folder in the Hugging Face layout, OpenAI's GPT-1, a nanoGPT
      ckpt.pt, a minGPT file, or a hub name such as "gpt2".
    dtype: "float32", "bfloat16" (which also computes in it), "float16" (kept so, computed in
      float32), or None: that of the files.
    mesh: splits the parameters over devices: sizes such as {"fsdp": 2, "tensor": 2}, or a jax mesh
      with these axes.
    tokenizer: a file or folder of one to take instead of the model's own; or how it handles
      GPT-1's text, "gpt1-paper" (as it was trained) or "gpt1-hf" (as transformers does).
    special_tokens: bos_token="[BOS]", pad_token="[PAD]" and the like, for the tokenizer. A token
      that the vocabulary lacks is added to it, and the embedding grows by its row.

  Raises:
    UserError: no such model, one that is not supported, damaged files, or a misspelt option.
  """
  for name in special_tokens:
    if name not in ROLES + LISTS:
      raise ConfigError(f"load has no option {name!r}{did_you_mean(name, LOAD_OPTIONS)}")
  parallel = _make_parallel(mesh)
  loaded = load_model(path_or_name, dtype, parallel, special_tokens, tokenizer=tokenizer)
  return Model(loaded.config, loaded.params, loaded.tokenizer, loaded.token_ids, loaded.task)


class Model:
  """A language model: its config, its parameters, and its tokenizer.

  Attributes:
    config: the architecture.
    params: the whole tree; the functions of `gptjax.model` take it.
    tokenizer: text to ids and back; None where the model came without one of a known kind.
    token_ids: {"eos": ids that end a text, "pad": ids that fill rows, ...}, as the files say.
    task: what a fine-tuned model was taught, and how its input is made; None of others.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: PyTree,
    tokenizer: Tokenizer | None = None,
    token_ids: Mapping[str, tuple[int, ...]] | None = None,
    task: TaskDataConfig | None = None,
  ):
    self.config = config
    self.params = params
    self.tokenizer = tokenizer
    self.token_ids = {"bos": (), "eos": (), "pad": ()} | dict(token_ids or {})
    self.task = task
    self._generators: dict[str, Generator] = {}

  def __call__(self, tokens_BL: Any) -> jax.Array:
    """Returns the logits of the next token.

    Args:
      tokens_BL: int ids, anything NumPy takes; or one text, which is one row.

    Returns:
      float32 [B, L, V] over the true vocabulary.

    Raises:
      UserError: ids that are not in the vocabulary, rows longer than the context, another rank,
        or text without a tokenizer.
    """
    return self._run(_logits, tokens_BL)

  def hidden_states(self, tokens_BL: Any, all_layers: bool = False) -> jax.Array:
    """Returns the features of each token, what the head reads.

    Args:
      tokens_BL: as for the call.
      all_layers: also the embeddings, first, and the output of every layer.

    Returns:
      float32 [B, L, D] after the final norm; or [N+1, B, L, D], of which the last is that.

    Raises:
      UserError: as the call.
    """
    return self._run(_all_hidden_states if all_layers else _hidden_states, tokens_BL)

  def generate(self, prompts: Any, *, weights: str = "float32", **options: Any) -> Generation:
    """Continues prompts; greedy with 20 new tokens unless told otherwise.

    Args:
      prompts: a text, texts, or token ids, [B, L] or rows of any lengths.
      weights: "int8" keeps the matrices of the layers in a quarter of the bytes.
      options: every field of `gptjax.generate.options.DecodingOptions`; draft_model is a Model.

    Raises:
      UserError: an unknown option, one without effect, or input that does not fit the model.
    """
    return self.generator(weights).generate(prompts, _parse(options))

  def stream(self, prompt: Any, *, weights: str = "float32", **options: Any) -> Iterator[Piece]:
    """Continues one prompt, a token at a time; the joined texts are that of `generate`."""
    return self.generator(weights).stream(prompt, _parse(options))

  def generator(self, weights: str = "float32") -> Generator:
    """Returns what generates; its copy of the weights is made at the first call."""
    if weights not in self._generators:
      self._generators[weights] = Generator(
        self.params,
        self.config,
        self.tokenizer,
        end_ids=self.token_ids["eos"],
        pad_id=next(iter(self.token_ids["pad"]), None),
        weights=weights,
      )
    return self._generators[weights]

  def save(self, path: str | os.PathLike, format: str = "hf", head: str | None = None) -> None:
    """Writes the model to a new folder.

    Args:
      path: a folder that does not exist or is empty.
      format: "hf" (what transformers reads), or "gptjax" (a run directory).
      head: "task" writes what a fine-tuned model was taught, as transformers' classifier; "lm"
        the language model alone; None is the task where there is one.

    Raises:
      UserError: the folder is not empty or cannot be written, or transformers has no such model.
    """
    check_choice("format", format, ("hf", "gptjax"))
    check_choice("head", head or "lm", ("lm", "task"))
    if head == "task" and self.task is None:
      raise ConfigError('head is "task", and the model was not fine-tuned on one; leave it out')
    params, task = self.params, self.task
    if head == "lm":
      params, task = {name: params[name] for name in params if name != "task_head"}, None
    save = save_hf if format == "hf" else save_run
    save(path, self.config, params, self.tokenizer, task=task)

  def _run(self, function: Any, tokens: Any) -> jax.Array:
    tokens_BL = jnp.asarray(self._check(tokens))
    # True float32 on every device; products of bfloat16 are exact in any case.
    with jax.default_matmul_precision("highest"):
      return function(self.params, tokens_BL, self.config)

  def _check(self, tokens: Any) -> np.ndarray:
    """Returns int32 [B, L], or raises a UserError that says what is wrong with the input."""
    tokens_BL = self.encode(tokens) if isinstance(tokens, str) else _to_array(tokens)
    if tokens_BL.ndim != 2 or not tokens_BL.size:
      raise DataError(f"tokens have shape {list(tokens_BL.shape)}; they must be [rows, length]")
    if not np.issubdtype(tokens_BL.dtype, np.integer):
      raise DataError(f"tokens are {tokens_BL.dtype}; they must be integers")
    length, vocab_size = tokens_BL.shape[1], self.config.vocab_size
    if length > self.config.context_length:
      raise DataError(
        f"a row has {length} tokens, and the context of the model is {self.config.context_length};"
        " cut it"
      )
    outside = tokens_BL[(tokens_BL < 0) | (tokens_BL >= vocab_size)]
    if outside.size:
      raise DataError(
        f"token id {outside[0]} is not in the vocabulary; ids are 0 to {vocab_size - 1}"
      )
    return tokens_BL.astype(np.int32)

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a text as one row, int32 [1, L]; a UserError without a tokenizer."""
    if self.tokenizer is None:
      raise UserError("the model has no tokenizer; give token ids instead of text")
    return np.array([self.tokenizer.encode(text)], np.int32)


_seeds: np.random.Generator | None = None


def set_seed(seed: int | None) -> None:
  """Makes the calls of `generate` that follow, and give no seed, repeat; None undoes it."""
  global _seeds
  if seed is not None and (not isinstance(seed, int | np.integer) or seed < 0):
    raise ConfigError(f"seed is {seed!r}; it must be a whole number, at least 0")
  _seeds = None if seed is None else np.random.default_rng(seed)


def _parse(options: dict[str, Any]) -> DecodingOptions:
  parsed = parse_options(options)
  if parsed.seed is None and _seeds is not None and is_sampled(parsed):
    parsed = dataclasses.replace(parsed, seed=int(_seeds.integers(2**32)))
  if isinstance(parsed.draft_model, Model):
    parsed = dataclasses.replace(parsed, draft_model=parsed.draft_model.generator())
  return parsed


def _to_array(tokens: Any) -> np.ndarray:
  try:
    return np.asarray(tokens)
  except ValueError as error:
    raise DataError(f"tokens are no array, {error}; rows must have one length") from error


def _make_parallel(mesh: Any) -> Parallel | None:
  """Makes the driver of a mesh: of a mapping of sizes, or of jax's own, which has devices."""
  if mesh is None:
    return None
  sizes: Mapping[str, int] = dict(getattr(mesh, "shape", mesh))
  for axis in sizes:
    if axis not in _MESH_AXES:
      raise ConfigError(f'mesh has the axis "{axis}"{did_you_mean(axis, _MESH_AXES)}')
  devices = getattr(mesh, "devices", None)
  if devices is None:
    devices = np.array(jax.devices()[: max(1, math.prod(sizes.values()))])
  filled = {f"mesh_{axis}": sizes.get(axis, 1) for axis in _MESH_AXES}
  return make_parallel("mesh", **filled, sharding_rules=SHARDING_RULES, devices=list(devices.flat))


def _batch(tokens_BL: jax.Array) -> Batch:
  return Batch(tokens_BL, tokens_BL, jnp.ones(tokens_BL.shape, jnp.float32))


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: PyTree, tokens_BL: jax.Array, config: ModelConfig) -> jax.Array:
  hidden_BLD = decoder.hidden_states(params["decoder"], _batch(tokens_BL), config)
  return lm_logits(params, hidden_BLD, config)


@functools.partial(jax.jit, static_argnames="config")
def _hidden_states(params: PyTree, tokens_BL: jax.Array, config: ModelConfig) -> jax.Array:
  hidden_BLD = decoder.hidden_states(params["decoder"], _batch(tokens_BL), config)
  return hidden_BLD.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def _all_hidden_states(params: PyTree, tokens_BL: jax.Array, config: ModelConfig) -> jax.Array:
  hidden_NBLD = decoder.all_hidden_states(params["decoder"], _batch(tokens_BL), config)
  return hidden_NBLD.astype(jnp.float32)
