"""Heads of tasks in transformers' files, both ways.

    ForSequenceClassification   score, on the last token that is not padding: classes or a score
    DoubleHeadsModel            multiple_choice_head, on a given token of each answer

`score` has no bias. Ours is added to that of the last norm, whose output the head reads: the logits
are equal, and the language model of such a folder is not quite the same. What transformers has no
field for, our config.json keeps in one of its own.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checkpoint.config_fields import TASK_FIELD, read_json
from gptjax.checkpoint.foreign_config import Report
from gptjax.checkpoint.key_tables import full_index
from gptjax.checkpoint.tensors import open_tensors
from gptjax.config import from_mapping
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.task_inputs import find_task_tokens
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import CheckpointError
from gptjax.model.config import ModelConfig
from gptjax.tree import map_named, named_leaves

PyTree = Any

SCORE = "score.weight"
CHOICE_WEIGHT = "multiple_choice_head.summary.weight"
CHOICE_BIAS = "multiple_choice_head.summary.bias"
# The tensors that `read_head` answers for.
READ_HEADS = (SCORE, CHOICE_WEIGHT, CHOICE_BIAS)
# How the choice head takes its token and what it makes of it; transformers' defaults.
_SUMMARY = {
  "summary_type": "cls_index",
  "summary_use_proj": True,
  "summary_activation": None,
  "summary_proj_to_labels": True,
}
_WITH_CHOICE = ("gpt2", "openai-gpt")


@dataclasses.dataclass(frozen=True)
class ForeignHead:
  """A task's head as transformers has it.

  Attributes:
    class_suffix: of the class of its model.
    params: the whole tree, with the head's bias in that of the last norm where it has to be.
    tensors: {name: array}, to write beside those of the language model.
    fields: of config.json.
  """

  class_suffix: str
  params: PyTree
  tensors: dict[str, np.ndarray]
  fields: dict[str, Any]


def write_head(
  params: PyTree,
  config: ModelConfig,
  task: TaskDataConfig,
  model_type: str,
  tokenizer: Tokenizer | None,
) -> ForeignHead:
  """Makes the head that gives the same logits in transformers.

  Args:
    params: the whole tree, with a "task_head".
    config: the architecture.
    task: of the head.
    model_type: transformers' name of the architecture.
    tokenizer: has the tokens that mark sequences.

  Raises:
    CheckpointError: transformers has no such head, or the model has no tokenizer.
  """
  if tokenizer is None:
    raise CheckpointError("the model has no tokenizer, and a head of a task is written with one")
  kernel_DC, bias_C = (np.asarray(params["task_head"][name]) for name in ("kernel", "bias"))
  fields = {TASK_FIELD: _portable(task)}
  if task.task.is_choice:
    if model_type not in _WITH_CHOICE:
      raise _no_class(f"a head of multiple choice on a {model_type}")
    tensors = {CHOICE_WEIGHT: kernel_DC.T, CHOICE_BIAS: bias_C}
    return ForeignHead("DoubleHeadsModel", params, tensors, fields | _SUMMARY)
  if task.task.family == "similarity":
    raise _no_class("a head on a pair in both orders")
  labels = task.task.labels or ("LABEL_0",)
  is_score = task.task.target == "score"
  fields |= {
    "id2label": {str(index): label for index, label in enumerate(labels)},
    "label2id": {label: index for index, label in enumerate(labels)},
    "problem_type": "regression" if is_score else "single_label_classification",
    # What fills rows; any token but the one that is read.
    "pad_token_id": filling_id(task, tokenizer),
  }
  if bias_C.any():
    params = _add_to_last_norm(params, config, _shift_for(kernel_DC, bias_C))
  return ForeignHead("ForSequenceClassification", params, {SCORE: kernel_DC.T}, fields)


def read_head(
  path: str | os.PathLike, report: Report
) -> tuple[TaskDataConfig, dict[str, np.ndarray]] | None:
  """Reads the task and the head of a model of transformers, if it has one that we have too.

  Args:
    path: as `load_foreign` takes it.
    report: takes a line about a head that is left out.

  Returns:
    (task, {"kernel": float32 [D, C], "bias": [C]}), or None.

  Raises:
    CheckpointError: a head that contradicts its config.
  """
  folder = Path(path) if Path(path).is_dir() else Path(path).parent
  if not (folder / "config.json").is_file():
    return None
  fields, tensors = read_json(folder / "config.json"), open_tensors(path)
  names = [name for name in (SCORE, CHOICE_WEIGHT) if name in tensors]
  if not names:
    return None
  kernel_DC = _read(tensors[names[0]]).T
  bias = _read(tensors[CHOICE_BIAS]) if CHOICE_BIAS in tensors else None
  if names[0] == SCORE:
    task, bias = _task_of_score(fields, kernel_DC.shape[1], report), None
  else:
    task = _task_of_choice(fields, kernel_DC.shape[1], report)
  if task is None:
    return None
  if TASK_FIELD in fields:
    task = from_mapping(TaskDataConfig, fields[TASK_FIELD], f"{TASK_FIELD}.")
  if kernel_DC.shape[1] != task.task.num_outputs:
    raise CheckpointError(
      f'"{folder}" has a "{names[0]}" of {kernel_DC.shape[1]} outputs, and its config.json says'
      f" {task.task.num_outputs}"
    )
  if bias is None:
    bias = np.zeros(kernel_DC.shape[1], np.float32)
  return task, {"kernel": np.ascontiguousarray(kernel_DC), "bias": bias}


def _no_class(what: str) -> CheckpointError:
  return CheckpointError(
    f"transformers has no class for {what}; keep it as a gptjax run, or write its language model"
    ' alone, with head "lm"'
  )


def _portable(task: TaskDataConfig) -> dict[str, Any]:
  """Returns what a task is, without where its examples lie and what is as usual."""
  places = {"files", "valid_files", "hub", "hub_split", "hub_valid_split"}
  usual = TaskDataConfig()
  return {
    name: value
    for name, value in dataclasses.asdict(task).items()
    if name not in places and value != getattr(usual, name)
  }


def filling_id(task: TaskDataConfig, tokenizer: Tokenizer) -> int:
  """Returns the id of a token to fill rows with: transformers reads the last that is another."""
  tokens = find_task_tokens(tokenizer, task)
  candidates = (tokenizer.pad_id, tokenizer.end_id, tokens.start, 0, 1)
  return next(i for i in candidates if i is not None and i != tokens.extract)


def _shift_for(kernel_DC: np.ndarray, bias_C: np.ndarray) -> np.ndarray:
  """Returns the smallest shift [D] of what the head reads that has the effect of its bias."""
  kernel_DC, bias_C = kernel_DC.astype(np.float64), bias_C.astype(np.float64)
  shift_D = np.linalg.lstsq(kernel_DC.T, bias_C)[0]
  if not np.allclose(shift_D @ kernel_DC, bias_C, rtol=1e-5, atol=1e-6):
    raise _no_class("a head with a bias that its kernel, of dependent columns, cannot have")
  return shift_D


def _add_to_last_norm(params: PyTree, config: ModelConfig, shift_D: np.ndarray) -> PyTree:
  """Shifts the output of the decoder; of a post-norm model the last layer has the last norm."""
  name = "decoder/final_norm/bias" if config.final_norm else "decoder/layers/mlp_norm/bias"
  if name not in named_leaves(params):
    raise _no_class("a head with a bias on a decoder whose norms have none")

  def shift(path, leaf):
    if path != name:
      return leaf
    shifted = np.array(leaf)
    shifted[... if config.final_norm else -1] += shift_D.astype(shifted.dtype)
    return shifted

  return map_named(shift, params)


def _read(tensor: Any) -> np.ndarray:
  return np.asarray(tensor.read(full_index(tensor.shape)), np.float32)


def _task_of_score(
  fields: dict[str, Any], num_outputs: int, report: Report
) -> TaskDataConfig | None:
  """Describes a classifier that says no more than transformers' fields: the text is not marked."""
  problem = fields.get("problem_type")
  if problem == "multi_label_classification":
    report(f'the head "{SCORE}" is left out: several labels for one text are not supported')
    return None
  if problem == "regression" or num_outputs == 1:
    return TaskDataConfig(family="classification", target="score", marks=())
  names = fields.get("id2label") or {}
  labels = tuple(str(names.get(str(index), f"LABEL_{index}")) for index in range(num_outputs))
  return TaskDataConfig(family="classification", labels=labels, marks=())


def _task_of_choice(
  fields: dict[str, Any], num_outputs: int, report: Report
) -> TaskDataConfig | None:
  strange = [name for name, usual in _SUMMARY.items() if fields.get(name, usual) != usual]
  if strange or num_outputs != 1:
    why = f"{strange[0]} is {fields[strange[0]]!r}" if strange else f"it has {num_outputs} outputs"
    report(f'the head "{CHOICE_WEIGHT}" is left out: {why}, which is not supported')
    return None
  return TaskDataConfig(family="multiple_choice", marks=())
