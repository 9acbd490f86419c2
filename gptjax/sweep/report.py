"""The report of a sweep, one offline HTML file, and its best config as an experiment file.

Both are rebuilt at any time from the storage and the run directories.
"""

from collections.abc import Sequence
from typing import Any

from gptjax import report
from gptjax.chart import Series, line_chart
from gptjax.checkpoint.run_directory import RunDirectory, write_whole
from gptjax.config import to_json
from gptjax.evaluate.statistics import CONFIDENCE
from gptjax.sweep.charts import Column, bars, parallel_coordinates
from gptjax.sweep.config import Plan
from gptjax.sweep.results import Group, as_good_as_best, group_by_setting
from gptjax.sweep.space import Setting, short_names, spell, spell_setting
from gptjax.sweep.study import Record, Study
from gptjax.sweep.worker import LOG_NAME
from gptjax.train.config import PretrainConfig

NAMED_CURVES = 5  # of the best settings; those of the others are grey
REPORT_NAME, BEST_NAME = "report.html", "best.py"


def write_results(plan: Plan, study: Study, records: Sequence[Record]) -> str:
  """Writes report.html and best.py into the folder of the sweep; returns their summary."""
  groups = group_by_setting(records, plan.sweep.direction)
  best = groups[0] if groups and groups[0].values else None
  if best:
    write_whole(study.workdir / BEST_NAME, best_experiment(plan, best, study))
  write_whole(study.workdir / REPORT_NAME, sweep_report(plan, study, records, groups))
  counts = ", ".join(f"{count} {state}" for state, count in count_states(records).items())
  found = ""
  if best:
    found = (
      f"; best: {plan.sweep.objective} {spell(best.mean)} ({spell_setting(best.setting)}),"
      f" {study.workdir / BEST_NAME}"
    )
  return f"{len(records)} trials: {counts}{found}; report: {study.workdir / REPORT_NAME}"


def count_states(records: Sequence[Record]) -> dict[str, int]:
  """Counts the trials in each state that occurs."""
  states = ("complete", "pruned", "failed", "running", "waiting")
  counts = {state: sum(record.state == state for record in records) for state in states}
  return {state: count for state, count in counts.items() if count}


def best_experiment(plan: Plan, best: Group, study: Study) -> str:
  """Returns an experiment file that runs the best setting."""
  seed = next(iter(best.values))
  config = plan.config(best.setting, seed)
  name = type(config).__name__
  verb = "pretrain" if isinstance(config, PretrainConfig) else "finetune"
  path = study.workdir / BEST_NAME
  found = f"{plan.sweep.objective} {spell(best.mean)}, mean of {len(best.values)} run(s)"
  return f'''r"""The best of a sweep: {found}.

Source: {plan.spec}, with {spell_setting(best.setting)}
Command: gptjax {verb} --config {path} --workdir DIR
Hardware, time, metric: measured; see {REPORT_NAME} beside this file.
"""

from gptjax.config import from_json, to_config_dict
from {type(config).__module__} import {name}

CONFIG = r"""
{to_json(config)}"""


def get_config(arg=None):
  """Takes no argument."""
  return to_config_dict(from_json({name}, CONFIG))
'''


def sweep_report(
  plan: Plan, study: Study, records: Sequence[Record], groups: Sequence[Group]
) -> str:
  """Builds the page.

  Args:
    plan, study: the sweep.
    records: its trials.
    groups: them by setting, the best first.
  """
  sections = [report.headline(_headline(plan, records, groups))]
  sections += [report.text(sentence) for sentence in _findings(plan, groups)]
  if plots := _plots(plan, groups):
    sections.append(report.section("Objective", report.grid(*plots)))
  if len(plan.space) > 1 and (chart := _coordinates(plan, records)):
    sections.append(report.section("Every trial", chart))
  if importances := study.importances():
    note = "Shares of the objective's variance (fANOVA); keys under a condition are left out."
    shares = {short_names(plan.space)[key]: share for key, share in importances.items()}
    sections.append(report.section("Which key mattered", report.text(note), bars("", shares)))
  sections.append(report.section("Curves", report.grid(_curves(plan, study, groups))))
  sections.append(report.section("Settings", _settings_table(plan, groups)))
  sections.append(report.section("Trials", _trials_table(plan, study, records)))
  sections.append(report.section("Processes", _processes_table(records, study.compilations())))
  sections.append(report.section("How it was made", *_origin(plan, groups)))
  return report.render_report(study.workdir.name, sections)


def _headline(plan: Plan, records: Sequence[Record], groups: Sequence[Group]) -> dict[str, str]:
  values = {}
  if groups and groups[0].values:
    values[f"Best {plan.sweep.objective}"] = _spell_mean(groups[0])
  values["Trials"] = f"{sum(record.is_finished for record in records)} of {plan.trials}"
  values |= {
    state.capitalize(): str(count)
    for state, count in count_states(records).items()
    if state in ("pruned", "failed")
  }
  values["Time of all runs"] = report.format_seconds(sum(r.seconds or 0 for r in records))
  return values


def _findings(plan: Plan, groups: Sequence[Group]) -> list[str]:
  """Says which setting is best, and which cannot be told from it."""
  complete = [group for group in groups if group.values]
  if not complete:
    return ["No trial is complete yet."]
  best = complete[0]
  sentences = [f"Best setting: {spell_setting(best.setting)}."]
  if best.half_width is None:
    sentences.append(
      "Each setting ran once: a difference may be the seed's alone. Several seeds per setting"
      ' ("seeds") give intervals.'
    )
    return sentences
  equals = as_good_as_best(complete)
  test = f"a paired t-test over the seeds, at {1 - CONFIDENCE:.0%}"
  if equals:
    names = "; ".join(spell_setting(group.setting) for group in equals)
    sentences.append(f"It cannot be told apart from {len(equals)} other(s) by {test}: {names}.")
  elif len(complete) > 1:
    sentences.append(f"It differs from every other setting by {test}.")
  return sentences


def _plots(plan: Plan, groups: Sequence[Group]) -> list[str]:
  """Draws the plot that the sweep asks for: a chart a panel, a line a series."""
  sweep = plan.sweep
  points = [
    (group.setting.get(sweep.plot_panels), group.setting.get(sweep.plot_series), group)
    for group in groups
    if group.values and group.setting.get(sweep.plot_x) is not None
  ]
  if not points:
    return []
  low, high = min(g.mean for _, _, g in points), max(g.mean for _, _, g in points)
  xs = [group.setting[sweep.plot_x] for _, _, group in points]
  is_log = min(xs) > 0 and max(xs) / min(xs) > 10
  names = short_names(plan.space)
  charts = []
  for panel in _ordered(panel for panel, _, _ in points):
    lines = [
      _line(f"{names.get(sweep.plot_series, '')} {spell(series)}", sweep.plot_x, members)
      for series in _ordered(series for p, series, _ in points if p == panel)
      if (members := [g for p, s, g in points if (p, s) == (panel, series)])
    ]
    title = f"{names[sweep.plot_panels]} {spell(panel)}" if sweep.plot_panels else sweep.objective
    charts.append(
      line_chart(
        title,
        lines,
        x_label=sweep.plot_x,
        y_label=sweep.objective,
        is_log_x=is_log,
        y_range=(low, high),
      )
    )
  return charts


def _line(name: str, key: str, groups: Sequence[Group]) -> Series:
  ordered = sorted(groups, key=lambda group: group.setting[key])
  xs, ys = [group.setting[key] for group in ordered], [group.mean for group in ordered]
  return Series(name, xs, ys, has_markers=True)


def _ordered(values) -> list[Any]:
  """Returns distinct values in order, None first."""
  return sorted(dict.fromkeys(values), key=lambda v: (v is not None, v if v is not None else 0))


def _coordinates(plan: Plan, records: Sequence[Record]) -> str:
  shown = [record for record in records if record.value is not None]
  if not shown:
    return ""
  names = short_names(plan.space)
  columns = [
    Column(
      names[key],
      [_value(record.setting, key) for record in shown],
      is_log=domain.is_log or None,
    )
    for key, domain in plan.space.items()
  ]
  columns.append(Column(plan.sweep.objective, [record.value for record in shown]))
  labels = [
    f"trial {r.index} {r.state}: {spell(r.value)} ({spell_setting(r.setting)})" for r in shown
  ]
  return parallel_coordinates("Good ones are blue", columns, labels, plan.sweep.direction)


def _value(setting: Setting, key: str) -> Any:
  """Returns the value of a key, "none" included; None where the setting does not have it."""
  value = setting.get(key)
  return spell(value) if key in setting and value is None else value


def _curves(plan: Plan, study: Study, groups: Sequence[Group]) -> str:
  """Draws the objective over steps: the best settings by name, all the others grey."""
  series = []
  for rank, group in enumerate(groups):
    for record in group.records:
      lines = RunDirectory(study.run_path(record.index)).read_metrics()
      lines = [line for line in lines if plan.sweep.objective in line]
      is_first = record is group.records[0]
      series.append(
        Series(
          spell_setting(group.setting),
          [line["step"] for line in lines],
          [line[plan.sweep.objective] for line in lines],
          has_markers=rank < NAMED_CURVES and is_first,
          is_faint=rank >= NAMED_CURVES or not is_first,
        )
      )
  return line_chart(plan.sweep.objective, series, y_label=plan.sweep.objective)


def _settings_table(plan: Plan, groups: Sequence[Group]) -> str:
  keys = [key for key in plan.space if key != "seed"]
  names = short_names(keys)
  interval = f"{CONFIDENCE:.0%} interval, ±"
  rows = [
    [
      *(spell(group.setting[key]) if key in group.setting else None for key in keys),
      group.mean,
      group.half_width,
      len(group.values),
      len(group.records),
    ]
    for group in groups
  ]
  header = [*(names[key] for key in keys), plan.sweep.objective, interval, "complete", "trials"]
  best = {len(keys): "min" if plan.sweep.direction == "minimize" else "max"}
  return report.table(header, rows, best=best)


def _trials_table(plan: Plan, study: Study, records: Sequence[Record]) -> str:
  rows = [
    [
      record.index,
      record.state,
      spell_setting(record.setting),
      record.seed,
      record.value,
      report.format_seconds(record.seconds),
      record.worker,
      ", ".join(map(str, record.starts[1:])) or None,
      record.reason or None,
    ]
    for record in records
  ]
  header = ["Trial", "State", "Setting", "Seed", plan.sweep.objective, "Time", "Process",
            "Continued after step", "Failed because"]  # fmt: skip
  where = f"Run directories: {study.run_path(0).parent}; each has its {LOG_NAME}."
  return report.text(where) + report.table(header, rows)


def _processes_table(records: Sequence[Record], compilations: dict[str, int]) -> str:
  workers = dict.fromkeys([*compilations, *(r.worker for r in records if r.worker)])
  rows = [
    [worker, sum(record.worker == worker for record in records), compilations.get(worker)]
    for worker in workers
  ]
  note = "Runs that differ in traced values alone (rates, decay, warm-up, seed) share a program."
  return report.text(note) + report.table(
    ["Process", "Trials ended in it", "Compilations of the training step"], rows
  )


def _origin(plan: Plan, groups: Sequence[Group]) -> list[str]:
  parts = [report.collapsible("Sweep", report.preformatted(to_json(plan.sweep)))]
  if groups and groups[0].values:
    best = plan.config(groups[0].setting, next(iter(groups[0].values)))
    parts.append(report.collapsible("Best config", report.preformatted(to_json(best))))
  parts.append(report.collapsible("Environment", report.key_values(report.environment())))
  return parts


def _spell_mean(group: Group) -> str:
  interval = "" if group.half_width is None else f" ± {group.half_width:.2g}"
  return f"{group.mean:.4f}{interval}"
