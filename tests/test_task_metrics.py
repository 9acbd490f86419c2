"""Metrics of tasks against their formulas, and what is said of each prediction."""

import numpy as np
import pytest

from gptjax.data.examples import Example
from gptjax.data.task_format import CLASS_METRICS, SCORE_METRICS, Task
from gptjax.evaluate.predictions import decide, describe_predictions
from gptjax.evaluate.task_metrics import class_metrics, confusion_table, task_metrics

RNG = np.random.default_rng(0)


def task_of(labels=(), target="class", family="classification", metrics=()):
  return Task(family, target, labels, (), metrics)


def test_class_metrics_are_their_formulas():
  labels_N, decided_N = RNG.integers(0, 2, (2, 50))
  found = task_metrics(task_of(("n", "p"), metrics=CLASS_METRICS), labels_N, decided_N)
  tp, fp, fn, tn = (
    np.sum((labels_N == gold) & (decided_N == said))
    for gold, said in ((1, 1), (0, 1), (1, 0), (0, 0))
  )
  root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
  f1, f1_of_other = 2 * tp / (2 * tp + fp + fn), 2 * tn / (2 * tn + fp + fn)
  assert found == {
    "accuracy": pytest.approx((tp + tn) / 50),
    "f1": pytest.approx(f1),
    "macro_f1": pytest.approx((f1 + f1_of_other) / 2),
    "matthews": pytest.approx((tp * tn - fp * fn) / root),
  }
  table = confusion_table(task_of(("n", "p")), labels_N, decided_N)
  assert table.tolist() == [[tn, fp], [fn, tp]]
  negative, positive = class_metrics(task_of(("n", "p")), labels_N, decided_N)
  assert positive == {
    "label": "p",
    "precision": pytest.approx(tp / (tp + fp)),
    "recall": pytest.approx(tp / (tp + fn)),
    "f1": pytest.approx(f1),
    "examples": tp + fn,
  }
  assert negative["f1"] == pytest.approx(f1_of_other)


def test_score_metrics_are_correlations():
  labels_N, decided_N = RNG.normal(size=(2, 40)).astype(np.float32)
  decided_N += labels_N
  task = task_of(target="score", metrics=SCORE_METRICS)
  ranks = [np.argsort(np.argsort(values)) for values in (labels_N, decided_N)]
  assert task_metrics(task, labels_N, decided_N) == {
    "pearson": pytest.approx(np.corrcoef(labels_N, decided_N)[0, 1], rel=1e-5),
    "spearman": pytest.approx(np.corrcoef(*ranks)[0, 1]),
  }


def test_equal_predictions_correlate_with_nothing():
  labels_N, same_N = np.arange(5, dtype=np.float32), np.ones(5, np.float32)
  task = task_of(target="score", metrics=SCORE_METRICS)
  assert task_metrics(task, labels_N, same_N) == {"pearson": 0, "spearman": 0}
  classes = task_of(("a", "b"), metrics=CLASS_METRICS)
  found = task_metrics(classes, np.array([0, 1, 0]), np.zeros(3, int))
  assert found["matthews"] == found["f1"] == 0 and found["accuracy"] == pytest.approx(2 / 3)
  never = class_metrics(task_of(("a", "b", "c")), np.array([0, 1]), np.array([0, 0]))[2]
  assert never == {"label": "c", "precision": 0, "recall": 0, "f1": 0, "examples": 0}


def test_predictions_of_classes_scores_and_answers():
  outputs_NC = np.array([[0.0, np.log(3), -40]], np.float32)
  examples = [Example("7", ("x",), choices=("y", "z"))]
  (found,) = describe_predictions(task_of(("a", "b", "c")), examples, outputs_NC)
  assert found["id"] == "7" and found["label"] == "b"
  wanted = {"a": 0.25, "b": 0.75, "c": 0}
  assert found["probabilities"] == pytest.approx(wanted, rel=1e-6, abs=1e-12)
  choice = task_of(family="multiple_choice")
  outputs_NC[0, 2] = -1e9  # an answer that this example lacks
  (found,) = describe_predictions(choice, examples, outputs_NC)
  assert found == {"id": "7", "label": 1, "probabilities": pytest.approx([0.25, 0.75])}
  score = task_of(target="score")
  outputs_N1 = np.array([[2.5]], np.float32)
  assert describe_predictions(score, examples, outputs_N1) == [{"id": "7", "score": 2.5}]
  assert decide(score, outputs_N1).tolist() == [2.5]
  assert decide(choice, np.array([[1.0, 1, 0]])).tolist() == [0]
