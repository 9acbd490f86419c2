"""How good what was decided is, as GLUE and the sets themselves define it."""

from typing import Any

import numpy as np
import scipy.stats
import sklearn.metrics

from gptjax.data.task_format import Task


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
