"""The report of a pretraining run, rebuilt at any time from what the run directory holds.

Owns what is shown and in which order; `gptjax.report` and `gptjax.chart` own how it looks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax import report
from gptjax.chart import Series, line_chart

SMOOTHED_POINTS = 20  # train loss, gradient norm and speed are noisy


def training_report(
  title: str,
  metrics: Sequence[Mapping[str, Any]],
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
    samples: (step, prompt, continuation), in order.
    facts: what else belongs at the top: {"Parameters": "10.7M", "Tokens": "33M"}.
    config_json: the resolved config.
    environment: as `gptjax.report.environment` collects it.
    notes: sentences under the headline: how MFU is counted, steps skipped, ...

  Returns:
    One self-contained HTML file.
  """
  sections = [report.headline({**_headline(metrics), **(facts or {})})]
  sections += [report.text(note) for note in notes]
  sections.append(report.section("Curves", report.grid(*_charts(metrics))))
  sections += samples_section(samples)
  evaluations = _evaluations(metrics)
  if evaluations:
    sections.append(report.section("Evaluations", evaluations))
  sections += origin_section(config_json, environment)
  return report.render_report(title, sections)


def samples_section(samples: Sequence[tuple[int, str, str]]) -> list[str]:
  """Returns the section of (step, prompt, continuation), or nothing without any."""
  items = [(f"step {step:,}", prompt, continuation) for step, prompt, continuation in samples]
  return [report.section("Samples", report.samples(items))] if items else []


def origin_section(config_json: str, environment: Mapping[str, str] | None) -> list[str]:
  """Returns the section that says how a run was made, or nothing where nothing is known."""
  details = []
  if config_json:
    details.append(report.collapsible("Configuration", report.preformatted(config_json)))
  if environment:
    details.append(report.collapsible("Environment", report.key_values(environment)))
  return [report.section("How it was made", *details)] if details else []


def best_evaluation(metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
  """Returns the line with the lowest finite valid_loss, or None."""
  lines = [line for line in metrics if _is_finite(line, "valid_loss")]
  return min(lines, key=lambda line: line["valid_loss"], default=None)


def _headline(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  best = best_evaluation(metrics)
  values = {}
  if best:
    values["Best valid loss"] = f"{best['valid_loss']:.4f}"
    if _is_finite(best, "valid_bits_per_byte"):
      values["Bits per byte"] = f"{best['valid_bits_per_byte']:.4f}"
    values["At step"] = f"{best['step']:,}"
  return values | steps_and_time(metrics)


def steps_and_time(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """Returns how far a run has come, for the headline."""
  values = {"Steps": f"{metrics[-1]['step'] if metrics else 0:,}"}
  seconds = [line["seconds"] for line in metrics if _is_finite(line, "seconds")]
  if seconds:
    values["Time"] = report.format_seconds(seconds[-1])
  return values


def _charts(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
  bits = evaluated(metrics, "validation", "valid_bits_per_byte")
  return [
    loss_chart(metrics, "nats per token"),
    line_chart("Validation, bits per byte", [bits], y_label="bits per byte"),
    *progress_charts(metrics),
  ]


def loss_chart(metrics: Sequence[Mapping[str, Any]], unit: str) -> str:
  """Draws the loss in training and validation."""
  lines = [
    noisy(metrics, "training", "train_loss"),
    evaluated(metrics, "validation", "valid_loss"),
  ]
  return line_chart("Loss", lines, y_label=unit)


def progress_charts(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
  """Draws learning rate, gradient norm, and speed."""
  rate = _series(metrics, "learning rate", "learning_rate")
  norm = noisy(metrics, "gradient norm", "grad_norm")
  speed = noisy(metrics, "tokens per second", "tokens_per_second")
  charts = [
    line_chart("Learning rate", [rate], y_range=(0, None)),
    line_chart("Gradient norm", [norm], y_label="before clipping", is_log=True),
    line_chart("Throughput", [speed], y_label="tokens per second", y_range=(0, None)),
  ]
  if any(_is_finite(line, "mfu") for line in metrics):
    mfu = noisy(metrics, "MFU", "mfu")
    title = "Model FLOPs utilisation"
    charts.append(line_chart(title, [mfu], y_label="fraction of the peak", y_range=(0, None)))
  return charts


def evaluated(metrics: Sequence[Mapping[str, Any]], name: str, key: str) -> Series:
  """Returns the line of a value that evaluations measure."""
  return _series(metrics, name, key, has_markers=True)


def noisy(metrics: Sequence[Mapping[str, Any]], name: str, key: str) -> Series:
  """Returns the smoothed line of a value of every update."""
  return _series(metrics, name, key, smoothing=SMOOTHED_POINTS)


def _series(metrics: Sequence[Mapping[str, Any]], name: str, key: str, **options: Any) -> Series:
  lines = [line for line in metrics if _is_finite(line, key)]
  return Series(name, [line["step"] for line in lines], [line[key] for line in lines], **options)


def _evaluations(metrics: Sequence[Mapping[str, Any]]) -> str:
  lines = [line for line in metrics if _is_finite(line, "valid_loss")]
  if not lines:
    return ""
  rows = [
    [line["step"], line["valid_loss"], line.get("valid_bits_per_byte"), _time(line)]
    for line in lines
  ]
  header = ["Step", "Validation loss (nats per token)", "Bits per byte", "Time"]
  table = report.table(header, rows, best={1: "min", 2: "min"})
  return table if len(rows) <= 12 else report.collapsible(f"All {len(rows)} evaluations", table)


def _time(line: Mapping[str, Any]) -> str | None:
  return report.format_seconds(line["seconds"]) if _is_finite(line, "seconds") else None


def _is_finite(line: Mapping[str, Any], key: str) -> bool:
  value = line.get(key)
  return value is not None and math.isfinite(value)
