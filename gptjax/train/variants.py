"""Several fine-tuning runs as one experiment: variants, each with several seeds, side by side.

Every run is a run directory of its own, DIR/VARIANT/seed-K; the same command goes on where it was.
"""

import dataclasses
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from gptjax import report
from gptjax.chart import Series, line_chart
from gptjax.checkpoint.run_directory import RunDirectory, write_whole
from gptjax.config import to_json
from gptjax.errors import ConfigError
from gptjax.evaluate.statistics import half_width
from gptjax.train.finetune import finetune
from gptjax.train.finetune_config import FinetuneConfig
from gptjax.train.setup import say, start_devices


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to run an experiment.

  Attributes:
    name: "" where there is only one.
    config: with num_seeds.
    settings: what it sets, {dotted key: value}.
  """

  name: str
  config: FinetuneConfig
  settings: Mapping[str, Any]

  @property
  def folder(self) -> str:
    return re.sub(r"[^\w.-]+", "_", self.name)

  @property
  def seeds(self) -> range:
    return range(self.config.seed, self.config.seed + self.config.num_seeds)


def finetune_variants(variants: Sequence[Variant], workdir: str) -> None:
  """Runs each variant with each of its seeds; then, and in between, writes what was found.

  Writes report.html and results.json into `workdir`: of each variant and metric the values by
  seed, their mean and standard deviation; and of each metric by how much a variant differs from
  the first one, seed by seed.

  Raises:
    UserError: as `finetune`, or two variants with one folder.
  """
  folders = [variant.folder for variant in variants]
  if len(set(folders)) < len(folders):
    raise ConfigError(f"variants have the folders {', '.join(folders)}; name them differently")
  start_devices(variants[0].config)
  is_complete = True
  # All variants of a seed first, so that an early look compares like with like.
  for seed in sorted({seed for variant in variants for seed in variant.seeds}):
    for variant in variants:
      if seed in variant.seeds and is_complete:
        say(f"{variant.name or 'run'}, seed {seed}")
        config = dataclasses.replace(variant.config, seed=seed, num_seeds=1)
        is_complete = finetune(config, str(_path(workdir, variant, seed)))
        if jax.process_index() == 0:
          _write(variants, workdir)
  if is_complete:
    say(f"all runs are complete: {epath.Path(workdir) / 'report.html'}")


def _path(workdir: str, variant: Variant, seed: int) -> epath.Path:
  return epath.Path(workdir) / variant.folder / f"seed-{seed}"


def _write(variants: Sequence[Variant], workdir: str) -> None:
  found = {variant.name: _read(variant, workdir) for variant in variants}
  folder = epath.Path(workdir)
  summary = {name: summarize(metrics) for name, metrics in found.items()}
  first, *others = found.values()
  differences = {
    name: compare(metrics, first) for name, metrics in zip([*found][1:], others, strict=True)
  }
  results = {"variants": summary, "differences_from_first": differences}
  write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
  write_whole(folder / "report.html", _page(folder.name, variants, summary, differences))


def _read(variant: Variant, workdir: str) -> dict[str, dict[int, float]]:
  """Returns {metric: {seed: value}} of the complete runs."""
  found: dict[str, dict[int, float]] = {}
  for seed in variant.seeds:
    results = RunDirectory(_path(workdir, variant, seed)).read_results()
    for metric, value in (results["metrics"] if results else {}).items():
      found.setdefault(metric, {})[seed] = value
  return found


def summarize(metrics: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, Any]]:
  """Returns of each metric its mean, its standard deviation (None for one seed), and its values."""
  return {
    metric: {
      "mean": statistics.mean(values.values()),
      "deviation": statistics.stdev(values.values()) if len(values) > 1 else None,
      "seeds": {str(seed): value for seed, value in values.items()},
    }
    for metric, values in metrics.items()
  }


def compare(
  metrics: Mapping[str, Mapping[int, float]], others: Mapping[str, Mapping[int, float]]
) -> dict[str, dict[str, float | None]]:
  """Returns of each metric the mean difference over the seeds that both have, and its interval.

  The interval is that of Student's t for paired values, at 95 %; None for fewer than two seeds.
  """
  compared = {}
  for metric in metrics.keys() & others.keys():
    pairs = metrics[metric].keys() & others[metric].keys()
    values = [metrics[metric][seed] - others[metric][seed] for seed in sorted(pairs)]
    if values:
      compared[metric] = {"mean": statistics.mean(values), "half_width": half_width(values)}
  return compared


def _page(
  title: str,
  variants: Sequence[Variant],
  summary: Mapping[str, Any],
  differences: Mapping[str, Any],
) -> str:
  names = list(dict.fromkeys(metric for metrics in summary.values() for metric in metrics))
  header = ["Variant", "Seeds", *names]
  rows = [[name, _count(metrics), *_means(metrics, names)] for name, metrics in summary.items()]
  parts = [report.text("Mean and standard deviation over seeds, of the validation examples.")]
  parts.append(report.table(header, rows))
  if differences:
    rows = [
      [name, *(_spell_difference(metrics.get(metric)) for metric in names)]
      for name, metrics in differences.items()
    ]
    parts.append(
      report.text(
        f'Difference from "{variants[0].name}" with the same seeds, and its 95 % interval.'
      )
    )
    parts.append(report.table(["Variant", *names], rows))
  sections = [report.section("Results", *parts)]
  if charts := _charts(variants, summary, names):
    sections.append(report.section("Curves", report.grid(*charts)))
  sections.append(report.section("Runs", report.table(*_runs(variants, summary, names))))
  config = report.collapsible("Configuration", report.preformatted(to_json(variants[0].config)))
  environment = report.collapsible("Environment", report.key_values(report.environment()))
  sections.append(report.section("How it was made", config, environment))
  return report.render_report(title, sections)


def _count(metrics: Mapping[str, Any]) -> int:
  return max((len(found["seeds"]) for found in metrics.values()), default=0)


def _means(metrics: Mapping[str, Any], names: Sequence[str]) -> list[str]:
  return [_spell(metrics.get(name)) for name in names]


def _spell(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return "–"
  deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.4f}"
  return f"{found['mean']:.4f}{deviation}"


def _spell_difference(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return "–"
  width = "" if found["half_width"] is None else f" ± {found['half_width']:.4f}"
  return f"{found['mean']:+.4f}{width}"


def _charts(
  variants: Sequence[Variant], summary: Mapping[str, Any], names: Sequence[str]
) -> list[str]:
  """Draws each metric against the one number that the variants set, if that is all they set."""
  keys = {key for variant in variants for key in variant.settings}
  if len(keys) != 1 or len(variants) < 2:
    return []
  (key,) = keys
  values = [variant.settings.get(key) for variant in variants]
  if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
    return []
  charts = []
  for name in names:
    means = [summary[v.name].get(name, {}).get("mean") for v in variants]
    points = sorted((x, y) for x, y in zip(values, means) if y is not None)
    line = Series(name, [x for x, _ in points], [y for _, y in points], has_markers=True)
    charts.append(line_chart(name, [line], x_label=key, y_label="mean over seeds"))
  return charts


def _runs(
  variants: Sequence[Variant], summary: Mapping[str, Any], names: Sequence[str]
) -> tuple[list[str], list[list[Any]]]:
  rows = [
    [
      f"{variant.folder}/seed-{seed}".lstrip("/"),
      *(summary[variant.name].get(name, {}).get("seeds", {}).get(str(seed)) for name in names),
    ]
    for variant in variants
    for seed in variant.seeds
  ]
  return ["Run", *names], rows
