"""A model argument, loaded or described: the one door for runs and for other people's models."""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.checkpoint.convert import load_foreign
from gptjax.checkpoint.foreign_config import Report, read_foreign_config
from gptjax.checkpoint.resolve import Model, resolve_model
from gptjax.checkpoint.run_directory import RunDirectory, is_remote
from gptjax.checkpoint.store import CheckpointStore
from gptjax.config import from_mapping
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.errors import CheckpointError, DataError, UnknownTokenizerError, check_choice
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import model_specs
from gptjax.parallel import Parallel
from gptjax.tree import map_named, named_leaves

PyTree = Any

DTYPES = ("float32", "bfloat16", "float16")


def to_stderr(line: str) -> None:
  """Tells the user something, beside what a program prints."""
  print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model in memory.

  Attributes:
    config: the architecture, set up to compute on any device.
    params: the whole tree.
    tokenizer: None where its files are missing or of an unknown kind.
  """

  config: ModelConfig
  params: PyTree
  tokenizer: Tokenizer | None


def load_model(
  name: str | os.PathLike,
  dtype: str | None = "float32",
  parallel: Parallel | None = None,
  special_tokens: dict[str, Any] | None = None,
  report: Report = to_stderr,
) -> Loaded:
  """Loads a run directory, a model of another library, or a name on the hub.

  Args:
    name: see `resolve_model`.
    dtype: "float32", "bfloat16" (computed in bfloat16 too), or "float16" (kept so, computed in
      float32); None keeps that of the files.
    parallel: places each parameter; None is jax's default device.
    special_tokens: as `load_tokenizer` takes them.
    report: takes a line about each thing that is passed over.

  Raises:
    UserError: nothing there, nothing that is supported, or damaged files.
  """
  if dtype is not None:
    check_choice("dtype", dtype, DTYPES)
  model = resolve_model(name, report)
  tokenizer = load_model_tokenizer(model, special_tokens or {})
  load = load_run if model.kind == "run" else load_foreign
  config, params = load(model.path, dtype, parallel, report)
  config = dataclasses.replace(
    config,
    compute_dtype="bfloat16" if dtype == "bfloat16" else "float32",
    attention_implementation="auto",
  )
  if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
    report(
      f'"{name}": the tokenizer has {tokenizer.vocab_size} ids and the model {config.vocab_size};'
      " the model refuses the others"
    )
  return Loaded(config, params, tokenizer)


def describe_model(name: str | os.PathLike, report: Report = to_stderr) -> ModelConfig:
  """Returns the architecture of a model argument; weights are read only where nothing else says.

  Raises:
    UserError: nothing there, or nothing that is supported.
  """
  model = resolve_model(name, report)
  if model.kind == "run":
    return read_run_config(RunDirectory(model.path))
  if (Path(model.path) / "config.json").is_file():
    return read_foreign_config(model.path, report)
  return load_foreign(model.path, None, None, report)[0]


def load_model_tokenizer(model: Model, special_tokens: dict[str, Any]) -> Tokenizer | None:
  """Loads the tokenizer beside a model; None where there is none of a known kind.

  Raises:
    DataError: it is damaged, or special tokens are given and there is none.
  """
  path = Path(model.path)
  try:
    if model.kind != "run":
      return load_tokenizer(path if path.is_dir() else path.parent, **special_tokens)
    file = RunDirectory(model.path).tokenizer_path
    if not is_remote(file) or not file.exists():
      return load_tokenizer(Path(file), **special_tokens)
    with tempfile.TemporaryDirectory() as folder:
      copy = Path(folder) / "tokenizer.json"
      copy.write_text(file.read_text(), encoding="utf-8")
      return load_tokenizer(copy, **special_tokens)
  except UnknownTokenizerError as error:
    if special_tokens:
      raise DataError(
        f"{next(iter(special_tokens))} is given, but the model has no tokenizer: {error}"
      ) from error
    return None


def load_run(
  path: str | os.PathLike,
  dtype: str | None = "float32",
  parallel: Parallel | None = None,
  report: Report = to_stderr,
) -> tuple[ModelConfig, PyTree]:
  """Loads the newest whole checkpoint of a run: the average of the parameters where it kept one.

  Args and Raises: as `load_foreign`.
  """
  run = RunDirectory(path)
  config = read_run_config(run)
  with CheckpointStore(run.checkpoints_path) as store:
    abstract = _abstract_params(config, dtype, parallel, store)
    restored = store.restore_params(abstract, item="ema" if _keeps_average(run) else "params")
  for line in restored.skipped:
    report(line)
  params = restored.state if parallel is None else parallel.from_saved(restored.state)
  return config, params


def save_run(
  path: str | os.PathLike, config: ModelConfig, params: PyTree, tokenizer: Tokenizer | None = None
) -> None:
  """Writes a run directory of no steps, which every verb accepts as a model.

  Raises:
    CheckpointError: the folder is not empty or cannot be written.
  """
  run = RunDirectory(path)
  if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
    raise CheckpointError(f'"{path}" exists and is not empty; choose another folder or remove it')
  # What reads a run asks whether it kept an average.
  fields = {"model": dataclasses.asdict(config), "optimizer": {"ema_decay": 0.0}}
  with run.lock():
    run.create_or_check(json.dumps(fields, indent=2) + "\n", tokenizer)
    with CheckpointStore(run.checkpoints_path) as store:
      store.save(0, {"params": jax.tree.map(jnp.asarray, params)})


def read_run_config(run: RunDirectory) -> ModelConfig:
  """Returns the architecture of a run."""
  return from_mapping(ModelConfig, run.read_config()["model"], "model.")


def _keeps_average(run: RunDirectory) -> bool:
  return run.read_config()["optimizer"]["ema_decay"] > 0


def _abstract_params(
  config: ModelConfig, dtype: str | None, parallel: Parallel | None, store: CheckpointStore
) -> PyTree:
  """Describes the parameters to restore, with their places."""
  saved = store.saved_params()
  specs = model_specs(config)
  missing = [name for name in named_leaves(specs) if name not in saved]
  if missing:
    raise CheckpointError(f'"{store.path}" lacks {missing[0]}, which its config.json asks for')

  def zeros(key):
    del key
    return map_named(lambda name, spec: jnp.zeros(spec.shape, dtype or saved[name].dtype), specs)

  key = jax.random.key(0)
  if parallel is not None:
    return parallel.abstract_state(zeros, key)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    jax.eval_shape(zeros, key),
  )
