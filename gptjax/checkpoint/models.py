"""A model argument, loaded or described: the one door for runs and for other people's models."""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.checkpoint.convert import load_foreign
from gptjax.checkpoint.foreign_config import Report, read_foreign_config, read_token_ids
from gptjax.checkpoint.resolve import Model, resolve_model
from gptjax.checkpoint.run_directory import RunDirectory, is_remote
from gptjax.checkpoint.store import CheckpointStore
from gptjax.checkpoint.task_heads import read_head
from gptjax.config import from_mapping
from gptjax.data.gpt1_tokenizer import MODES
from gptjax.data.special_tokens import check_given
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.data.tokenizer_files import split_mode
from gptjax.errors import (
  CheckpointError,
  ConfigError,
  DataError,
  UnknownTokenizerError,
  check_choice,
  did_you_mean,
)
from gptjax.model.config import ModelConfig
from gptjax.model.lora import merge_lora
from gptjax.model.parameters import ParameterSpec, model_specs
from gptjax.model.vocabulary import grow_vocabulary
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
    token_ids: {"bos", "eos", "pad": ids} of the model's files, the tokenizer's where they say none
      or where tokens were given; each may be empty.
    task: what a fine-tuned model was taught, and how its input is made; None of a language model.
  """

  config: ModelConfig
  params: PyTree
  tokenizer: Tokenizer | None
  token_ids: dict[str, tuple[int, ...]]
  task: TaskDataConfig | None = None


def load_model(
  name: str | os.PathLike,
  dtype: str | None = "float32",
  parallel: Parallel | None = None,
  special_tokens: dict[str, Any] | None = None,
  report: Report = to_stderr,
  tokenizer: str | os.PathLike | None = None,
) -> Loaded:
  """Loads a run directory, a model of another library, or a name on the hub.

  Args:
    name: see `resolve_model`.
    dtype: "float32", "bfloat16" (computed in bfloat16 too), or "float16" (kept so, computed in
      float32); None keeps that of the files.
    parallel: places each parameter; None is jax's default device.
    special_tokens: as `load_tokenizer` takes them. Where they get ids beyond the model's, the
      model grows by their rows, which is reported.
    report: takes a line about each thing that is passed over.
    tokenizer: as `load_model_tokenizer` takes it.

  Raises:
    UserError: nothing there, nothing that is supported, or damaged files.
  """
  if dtype is not None:
    check_choice("dtype", dtype, DTYPES)
  roles, others = check_given(special_tokens or {})
  model = resolve_model(name, report)
  words = load_model_tokenizer(model, special_tokens or {}, tokenizer)
  load = load_run if model.kind == "run" else load_foreign
  config, params = load(model.path, dtype, parallel, report)
  task = _task_of_run(RunDirectory(model.path)) if model.kind == "run" else None
  if model.kind != "run" and (found := read_head(model.path, report)):
    task, head = found
    head = jax.tree.map(lambda array: jnp.asarray(array, dtype), head)
    params["task_head"] = head if parallel is None else parallel.adopt(head)
  if words is not None and words.vocab_size > config.vocab_size:
    given = dict.fromkeys([*roles.values(), *others])
    new = [t for t in given if words.added_tokens.get(t, 0) >= config.vocab_size]
    report(f'"{name}": {_describe_growth(new, words, config)}')
    if new:
      params, config = _grow(params, config, words.vocab_size, parallel)
  config = dataclasses.replace(
    config,
    compute_dtype="bfloat16" if dtype == "bfloat16" else "float32",
    attention_implementation="auto",
  )
  token_ids = _token_ids(model, config, words, roles, report)
  return Loaded(config, params, words, token_ids, task)


def _describe_growth(new: list[str], tokenizer: Tokenizer, config: ModelConfig) -> str:
  """Says what becomes of the ids beyond a model's: rows for tokens that were given, or nothing."""
  if not new:
    return (
      f"the tokenizer has {tokenizer.vocab_size} ids and the model {config.vocab_size}; the model"
      " refuses the others"
    )
  more = f" and {len(new) - 3} more" if len(new) > 3 else ""
  return (
    f"the model has {config.vocab_size} ids, and {', '.join(new[:3])}{more} come after them; its"
    f" embedding grows to {tokenizer.vocab_size} rows, the new ones drawn from"
    f" N(0, {config.init_std}) and not trained"
  )


def _grow(
  params: PyTree, config: ModelConfig, vocab_size: int, parallel: Parallel | None
) -> tuple[PyTree, ModelConfig]:
  """Grows the vocabulary; every parameter stays where a state of its path lives."""
  key = jax.random.key(0)
  params, config = grow_vocabulary(params, config, vocab_size, key)
  if parallel is not None:
    params = parallel.adopt(params)
  return params, config


def _token_ids(
  model: Model,
  config: ModelConfig,
  tokenizer: Tokenizer | None,
  given_roles: Mapping[str, str],
  report: Report,
) -> dict[str, tuple[int, ...]]:
  """Puts the ids of the model's files, and of its tokenizer, together; see `Loaded`."""
  said = dict.fromkeys(("bos", "eos", "pad"), ())
  if (Path(model.path) / "config.json").is_file() and model.kind != "run":
    said = read_token_ids(model.path, config.vocab_size, report)
  if tokenizer is not None:
    found = {"bos": tokenizer.bos_id, "eos": tokenizer.end_id, "pad": tokenizer.pad_id}
    known = {name: (index,) for name, index in found.items() if index is not None}
    said |= {
      name: ids for name, ids in known.items() if f"{name}_token" in given_roles or not said[name]
    }
  return said


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


def load_model_tokenizer(
  model: Model, special_tokens: dict[str, Any], tokenizer: str | os.PathLike | None = None
) -> Tokenizer | None:
  """Loads the tokenizer of a model; None where there is none of a known kind beside it.

  Args:
    model: what was found.
    special_tokens: as `load_tokenizer` takes them.
    tokenizer: a path to take instead of what is beside the model, or how GPT-1's text is handled:
      "gpt1-paper" or "gpt1-hf".

  Raises:
    DataError: it is damaged, or tokens or a tokenizer are asked for and there is none.
    ConfigError: no such tokenizer.
  """
  if tokenizer is not None and os.fspath(tokenizer) not in MODES:
    _check_tokenizer(os.fspath(tokenizer))
    return load_tokenizer(tokenizer, **special_tokens)
  mode = "" if tokenizer is None else f"{tokenizer}:"
  try:
    with _tokenizer_path(model) as path:
      return load_tokenizer(f"{mode}{path}", **special_tokens)
  except UnknownTokenizerError as error:
    for name in [*special_tokens, *(["tokenizer"] if mode else [])]:
      raise DataError(f"{name} is given, but the model has no tokenizer: {error}") from error
    return None


def _check_tokenizer(tokenizer: str) -> None:
  mode, path = split_mode(tokenizer)
  if not path.exists():
    hint = "" if mode else did_you_mean(tokenizer, MODES)
    raise ConfigError(f'tokenizer is "{tokenizer}", and there is no such file or folder{hint}')


@contextlib.contextmanager
def _tokenizer_path(model: Model) -> Iterator[Path]:
  """Gives the path of the tokenizer beside a model; a copy of it where that is not local."""
  path = Path(model.path)
  if model.kind != "run":
    yield path if path.is_dir() else path.parent
    return
  file = RunDirectory(model.path).tokenizer_path
  if not is_remote(file) or not file.exists():
    yield Path(file)
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / "tokenizer.json"
    copy.write_text(file.read_text(), encoding="utf-8")
    yield copy


def load_run(
  path: str | os.PathLike,
  dtype: str | None = "float32",
  parallel: Parallel | None = None,
  report: Report = to_stderr,
) -> tuple[ModelConfig, PyTree]:
  """Loads the newest whole checkpoint of a run: the average of the parameters where it kept one.

  A fine-tuned run has its "task_head" too, and LoRA's updates are added to the kernels.

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
  if "lora" in params:
    settings = run.read_config()["finetune"]
    params = merge_lora(params, settings["lora_alpha"] / settings["lora_rank"])
  return config, params


def _task_of_run(run: RunDirectory) -> TaskDataConfig | None:
  """Reads the task of a fine-tuned run; the data of pretraining has no adapter."""
  data = run.read_config().get("data", {})
  return from_mapping(TaskDataConfig, data, "data.") if "adapter" in data else None


def save_run(
  path: str | os.PathLike,
  config: ModelConfig,
  params: PyTree,
  tokenizer: Tokenizer | None = None,
  task: TaskDataConfig | None = None,
) -> None:
  """Writes a run directory of no steps, which every verb accepts as a model.

  Args:
    path: a folder that does not exist or is empty.
    config: the architecture.
    params: the whole tree, with the "task_head" of a task.
    tokenizer: to put beside it, or None.
    task: of the task head, or None.

  Raises:
    CheckpointError: the folder is not empty or cannot be written.
  """
  run = RunDirectory(path)
  if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
    raise CheckpointError(f'"{path}" exists and is not empty; choose another folder or remove it')
  # What reads a run asks whether it kept an average.
  fields = {"model": dataclasses.asdict(config), "optimizer": {"ema_decay": 0.0}}
  if task is not None:
    fields["data"] = dataclasses.asdict(task)
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
  specs = model_specs(config) | _task_specs(saved)
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


def _task_specs(saved: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, PyTree]:
  """Describes what fine-tuning put beside the language model."""
  specs = {}
  for name, leaf in saved.items():
    *groups, last = name.split("/")
    if groups[0] in ("task_head", "lora"):
      group = specs
      for part in groups:
        group = group.setdefault(part, {})
      group[last] = ParameterSpec(leaf.shape)
  return specs
