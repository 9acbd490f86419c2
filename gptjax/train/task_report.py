"""The report of a fine-tuning run: what was measured, and what was taken for what."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax import report
from gptjax.chart import line_chart
from gptjax.data.tasks import TaskData
from gptjax.evaluate.predictions import decide, describe_predictions
from gptjax.evaluate.task_metrics import class_metrics, confusion_table, task_metrics
from gptjax.train.run_report import (
  evaluated,
  loss_chart,
  noisy,
  origin_section,
  progress_charts,
  samples_section,
  steps_and_time,
)

SHOWN_MISTAKES = 10


def task_report(
  title: str,
  metrics: Sequence[Mapping[str, Any]],
  data: TaskData,
  outputs_NC: np.ndarray | None,
  *,
  samples: Sequence[tuple[int, str, str]] = (),
  facts: Mapping[str, Any] | None = None,
  config_json: str = "",
  environment: Mapping[str, str] | None = None,
  notes: Sequence[str] = (),
) -> str:
  """Builds the page.

  Args:
    title: the run's name.
    metrics: lines of `metrics.jsonl`, in order.
    data: the examples.
    outputs_NC: what the head last gave for the first N validation examples; None before that.
    samples, facts, config_json, environment, notes: as of `training_report`.

  Returns:
    One self-contained HTML file.
  """
  task, headline = data.task, {}
  if outputs_NC is not None:
    labels_N, decided_N = labels_of(data, len(outputs_NC)), decide(task, outputs_NC)
    headline = {
      name.capitalize(): f"{value:.4f}"
      for name, value in task_metrics(task, labels_N, decided_N).items()
    }
    headline["Examples"] = f"{len(outputs_NC):,}"
  sections = [report.headline(headline | steps_and_time(metrics) | dict(facts or {}))]
  sections += [report.text(note) for note in notes]
  sections.append(report.section("Curves", report.grid(*_charts(metrics, data))))
  if outputs_NC is not None and task.labels:
    sections.append(_confusion_section(data, labels_N, decided_N))
  if outputs_NC is not None:
    sections += _mistakes_section(data, labels_N, outputs_NC)
  sections += samples_section(samples)
  sections += origin_section(config_json, environment)
  return report.render_report(title, sections)


def labels_of(data: TaskData, count: int) -> np.ndarray:
  """Returns the labels of the first validation examples."""
  return np.array([example.label for example in data.valid[:count]])


def _charts(metrics: Sequence[Mapping[str, Any]], data: TaskData) -> list[str]:
  unit = "squared error" if data.task.target == "score" else "nats per example"
  names = [f"valid_{name}" for name in data.task.metrics]
  charts = [
    loss_chart(metrics, unit),
    line_chart("Validation", [evaluated(metrics, name[6:], name) for name in names]),
  ]
  if any("train_lm_loss" in line for line in metrics):
    lm_loss = noisy(metrics, "training", "train_lm_loss")
    charts.append(line_chart("Language model", [lm_loss], y_label="nats per token"))
  return charts + progress_charts(metrics)


def _confusion_section(data: TaskData, labels_N: np.ndarray, decided_N: np.ndarray) -> str:
  task = data.task
  counts = confusion_table(task, labels_N, decided_N).tolist()
  rows = [[label, *row] for label, row in zip(task.labels, counts)]
  figures = [[*row.values()] for row in class_metrics(task, labels_N, decided_N)]
  return report.section(
    "Classes",
    report.text("How many validation examples of each class (row) were taken for each (column):"),
    report.table(["", *task.labels], rows),
    report.table(["Class", "Precision", "Recall", "F1", "Examples"], figures),
  )


def _mistakes_section(data: TaskData, labels_N: np.ndarray, outputs_NC: np.ndarray) -> list[str]:
  """Shows where the model was wrong: most sure of it, or furthest from the score, first."""
  task, decided_N = data.task, decide(data.task, outputs_NC)
  if task.target == "score":
    badness_N = np.abs(decided_N - labels_N)
  else:
    lost_N = np.take_along_axis(outputs_NC, labels_N[:, None], axis=1)[:, 0]
    badness_N = outputs_NC.max(axis=1) - lost_N
  worst = [index for index in np.argsort(-badness_N)[:SHOWN_MISTAKES] if badness_N[index] > 0]
  if not worst:
    return []
  examples = [data.valid[index] for index in worst]
  described = describe_predictions(task, examples, outputs_NC[worst])
  rows = [
    [example.id, _wording(example), _name(task, label), _said(task, line)]
    for example, label, line in zip(examples, labels_N[worst].tolist(), described)
  ]
  return [report.section("Mistakes", report.table(["Example", "Text", "Label", "Predicted"], rows))]


def _wording(example) -> str:
  parts = (" ".join(example.text), " ".join(example.text2), " | ".join(example.choices))
  return "\n".join(part for part in parts if part)


def _name(task, label) -> str:
  return str(task.labels[label] if task.labels else label)


def _said(task, line: Mapping[str, Any]) -> str:
  if task.target == "score":
    return f"{line['score']:.3f}"
  likeliest = max(np.ravel([*_values(line["probabilities"])]))
  return f"{line['label']} ({likeliest:.0%})"


def _values(probabilities) -> Sequence[float]:
  return probabilities.values() if isinstance(probabilities, Mapping) else probabilities
