"""How good predictions of a task are, as GLUE and the sets themselves define it.

What a head gives for an example are its outputs: a logit for each class or each answer, of which
one that an example lacks is about minus a billion, or the score. What is decided from them is the
index of the class or answer, or the score.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
import sklearn.metrics

from gptjax.data.examples import Example
from gptjax.data.task_format import Task


def decide(task: Task, outputs_NC: np.ndarray) -> np.ndarray:
  """Returns [N]: the class or answer of the largest logit (the first of equals), or the score."""
  return outputs_NC[:, 0] if task.target == "score" else np.argmax(outputs_NC, axis=1)


def task_metrics(task: Task, labels_N: np.ndarray, decided_N: np.ndarray) -> dict[str, float]:
  """Returns {name: value} of the task's metrics, in their order.

  F1 is that of the second of two classes, as in GLUE. Where all predictions are equal there is
  nothing to correlate, and Matthews, Pearson and Spearman are 0.

  Args:
    task: what was asked.
    labels_N: int32 or float32, as in `EncodedTask`.
    decided_N: from `decide`.
  """
  return {name: float(_METRICS[name](labels_N, decided_N)) for name in task.metrics}


def confusion_table(task: Task, labels_N: np.ndarray, decided_N: np.ndarray) -> np.ndarray:
  """Returns int64 [C, C]: how many examples of each class (row) were taken for each (column)."""
  classes = range(len(task.labels))
  return sklearn.metrics.confusion_matrix(labels_N, decided_N, labels=classes)


def class_metrics(task: Task, labels_N: np.ndarray, decided_N: np.ndarray) -> list[dict[str, Any]]:
  """Returns for each class its label, precision, recall, f1, and examples."""
  columns = sklearn.metrics.precision_recall_fscore_support(
    labels_N, decided_N, labels=range(len(task.labels)), zero_division=0.0
  )
  names = ("precision", "recall", "f1", "examples")
  return [
    {"label": label} | {name: value.item() for name, value in zip(names, values)}
    for label, *values in zip(task.labels, *columns)
  ]


def describe_predictions(
  task: Task, examples: Sequence[Example], outputs_NC: np.ndarray
) -> list[dict[str, Any]]:
  """Returns what was predicted of each example, for JSON.

  Returns:
    id, and `score`; or `label` and `probabilities`: {label: probability} of classes, and of
    answers the index of the likeliest and a list with the probability of each.
  """
  decided_N = decide(task, outputs_NC)
  if task.target == "score":
    return [{"id": e.id, "score": score} for e, score in zip(examples, decided_N.tolist())]
  probabilities_NC = scipy.special.softmax(outputs_NC.astype(np.float64), axis=1).tolist()
  described = []
  for example, index, row in zip(examples, decided_N.tolist(), probabilities_NC):
    label, probabilities = index, row[: len(example.choices)]
    if not task.is_choice:
      label, probabilities = task.labels[index], dict(zip(task.labels, row))
    described.append({"id": example.id, "label": label, "probabilities": probabilities})
  return described


def _f1(labels_N, decided_N):
  return sklearn.metrics.f1_score(labels_N, decided_N, zero_division=0.0)


def _macro_f1(labels_N, decided_N):
  return sklearn.metrics.f1_score(labels_N, decided_N, average="macro", zero_division=0.0)


def _pearson(labels_N, decided_N):
  return _correlation(scipy.stats.pearsonr, labels_N, decided_N)


def _spearman(labels_N, decided_N):
  return _correlation(scipy.stats.spearmanr, labels_N, decided_N)


def _correlation(function, labels_N, decided_N):
  if min(np.ptp(labels_N), np.ptp(decided_N)) == 0:
    return 0.0
  # In float64: a mean of many float32 scores would lose digits.
  return function(labels_N.astype(np.float64), decided_N.astype(np.float64)).statistic


_METRICS = {
  "accuracy": sklearn.metrics.accuracy_score,
  "f1": _f1,
  "macro_f1": _macro_f1,
  "matthews": sklearn.metrics.matthews_corrcoef,
  "pearson": _pearson,
  "spearman": _spearman,
}
