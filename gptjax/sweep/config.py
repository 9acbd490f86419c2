"""What a sweep is: get_sweep's plain data, checked against the experiment before the first trial.

Imports neither jax nor Optuna.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from gptjax.config import (
  apply_values,
  from_config_dict,
  from_mapping,
  load_experiment,
  load_sweep,
  to_json,
)
from gptjax.data.task_format import CLASS_METRICS, SCORE_METRICS
from gptjax.errors import ConfigError, check_choice
from gptjax.sweep.space import (
  Domain,
  Setting,
  Space,
  grid,
  parse_space,
  settings_with_each_value,
  spell_setting,
)
from gptjax.train.config import PretrainConfig, RunConfig
from gptjax.train.finetune_config import FinetuneConfig

# They belong to a process, which runs one trial after another.
PROCESS_KEYS = (
  "train.host_devices",
  "train.matmul_precision",
  "train.coordinator",
  "train.num_processes",
  "train.process_id",
  "train.distributed_timeout_seconds",
)


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """A sweep, as get_sweep writes it in plain data.

  Attributes:
    space: {dotted config key: domain}; see `gptjax.sweep.space`.
    settings: in place of a space: settings, {dotted config key: value}, each of which is run.
    method: "grid" visits every setting once; "random"; "tpe" looks where good ones were (Bergstra
      et al. 2011).
    trials: runs wanted in all; None is all of a grid.
    seeds: each setting is run with each of these seeds; () is the experiment's own.
    objective: key of metrics.jsonl.
    direction: "minimize" or "maximize" it.
    objective_of: the "last" evaluation of a run, or its "best".
    pruner: what ends hopeless runs after an evaluation: "none"; "median" (worse than the median of
      the complete ones at the same step), "halving" (Li et al. 2020: at steps that grow by
      pruner_factor only the best of pruner_factor go on).
    pruner_start_steps: no run ends before; for halving, the first of those steps. None: the first
      evaluation.
    pruner_start_trials: complete trials that "median" waits for.
    pruner_factor: of halving.
    sampler_seed: of "random" and "tpe".
    plot_x, plot_series, plot_panels: keys for a plot of the objective in the report: along x, a
      line for each value of plot_series, a chart for each of plot_panels; "" is none.
  """

  space: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  settings: tuple[Mapping[str, Any], ...] = ()
  method: str = "grid"
  trials: int | None = None
  seeds: tuple[int, ...] = ()
  objective: str = "valid_loss"
  direction: str = "minimize"
  objective_of: str = "last"
  pruner: str = "none"
  pruner_start_steps: int | None = None
  pruner_start_trials: int = 5
  pruner_factor: int = 3
  sampler_seed: int = 0
  plot_x: str = ""
  plot_series: str = ""
  plot_panels: str = ""

  def __post_init__(self):
    check_choice("method", self.method, ("grid", "random", "tpe"))
    check_choice("direction", self.direction, ("minimize", "maximize"))
    check_choice("objective_of", self.objective_of, ("last", "best"))
    check_choice("pruner", self.pruner, ("none", "median", "halving"))
    if bool(self.space) == bool(self.settings):
      raise ConfigError('a sweep needs either a "space" or "settings"')
    if self.settings and self.method != "grid":
      raise ConfigError(f'method is "{self.method}", but "settings" are visited in order; leave it')
    if self.trials is None and self.method != "grid":
      raise ConfigError(f'method "{self.method}" has no end; set "trials", or give --trials')
    least = {"trials": 1, "pruner_start_steps": 1, "pruner_start_trials": 1, "pruner_factor": 2}
    for key, bound in least.items():
      value = getattr(self, key)
      if value is not None and value < bound:
        raise ConfigError(f"{key} is {value}; it must be at least {bound}")
    if len(set(self.seeds)) < len(self.seeds):
      raise ConfigError(f"seeds are {list(self.seeds)}, one of them twice")
    self._check_pruner_options()

  def _check_pruner_options(self) -> None:
    users = {
      "pruner_start_steps": ("median", "halving"),
      "pruner_start_trials": ("median",),
      "pruner_factor": ("halving",),
    }
    defaults = {field.name: field.default for field in dataclasses.fields(self)}
    for key, pruners in users.items():
      if self.pruner not in pruners and getattr(self, key) != defaults[key]:
        raise ConfigError(f'{key} has no effect with pruner "{self.pruner}"; leave it out')


@dataclasses.dataclass(frozen=True)
class Plan:
  """A sweep of an experiment, checked: which trials there are and what each runs.

  Attributes:
    spec, overrides: of the experiment, as on the command line.
    config_class: PretrainConfig or FinetuneConfig.
    sweep: what get_sweep wrote.
    space: what varies; of explicit settings, all values that occur.
    settings: those of a grid, in order; None where they are drawn.
    trials: runs wanted in all.
  """

  spec: str
  overrides: Mapping[str, str]
  config_class: type[RunConfig]
  sweep: SweepConfig
  space: Space
  settings: tuple[Setting, ...] | None
  trials: int

  @property
  def num_seeds(self) -> int:
    """Runs of each setting."""
    return len(self.sweep.seeds) or 1

  def seed(self, index: int) -> int | None:
    """Returns the seed of a trial; None is the experiment's own."""
    return self.sweep.seeds[index % self.num_seeds] if self.sweep.seeds else None

  def config(self, setting: Setting, seed: int | None = None) -> RunConfig:
    """Returns the config of a run. Raises ConfigError if the experiment refuses the values."""
    config = load_experiment(self.spec, self.overrides)
    values = dict(setting)
    if seed is not None:
      values["seed"] = seed
    apply_values(config, values)
    return from_config_dict(self.config_class, config)

  def identity(self) -> str:
    """Returns what a sweep that is gone on with must share: all but the number of trials."""
    sweep = dataclasses.replace(self.sweep, trials=1)
    return json.dumps({"config": json.loads(to_json(self.config({}))), "sweep": to_json(sweep)})


def make_plan(spec: str, overrides: Mapping[str, str], trials: int | None = None) -> Plan:
  """Reads the sweep of an experiment and checks everything that can be known before it starts.

  Args:
    spec: experiment file, FILE.py or FILE.py:arg.
    overrides: of the experiment's config.
    trials: runs wanted in all, in place of the sweep's own number.

  Raises:
    ConfigError: a key or value that the sweep or the experiment does not have.
  """
  written = load_sweep(spec)
  if not isinstance(written, Mapping):
    raise ConfigError(f"get_sweep returns {type(written).__name__}; it must be a dict")
  if trials is not None:
    written = {**written, "trials": trials}
  sweep = from_mapping(SweepConfig, written)
  experiment = load_experiment(spec, overrides)
  config_class = FinetuneConfig if "finetune" in experiment else PretrainConfig
  base = from_config_dict(config_class, experiment)
  for key in dict.fromkeys([*sweep.space, *(key for each in sweep.settings for key in each)]):
    apply_values(load_experiment(spec, overrides), {key: None})  # a misspelt key, before its domain
    _check_key(key, sweep)
  space = parse_space(sweep.space, config_class) or _space_of(sweep.settings)
  settings = None
  if sweep.method == "grid":
    settings = tuple(dict(setting) for setting in sweep.settings) or tuple(grid(space))
  plan = Plan(spec, overrides, config_class, sweep, space, settings, trials=0)
  _check_run(base, sweep)
  _check_settings(plan)
  return dataclasses.replace(plan, trials=_num_trials(plan))


def _space_of(settings: tuple[Mapping[str, Any], ...]) -> Space:
  """Returns the choices that explicit settings amount to."""
  values: dict[str, list[Any]] = {}
  for setting in settings:
    for key, value in setting.items():
      seen = values.setdefault(key, [])
      if value not in seen:
        seen.append(value)
  return {key: Domain(choices=tuple(seen)) for key, seen in values.items()}


def _check_key(key: str, sweep: SweepConfig) -> None:
  if key in PROCESS_KEYS:
    raise ConfigError(f'"{key}" belongs to a process, which runs many trials; override it instead')
  if key == "seed" and sweep.seeds:
    raise ConfigError('"seed" varies, and "seeds" are given too; keep one of the two')


def _check_run(base: RunConfig, sweep: SweepConfig) -> None:
  """Raises ConfigError for an objective that runs do not have, and pruning without evaluations."""
  keys = {*sweep.space, *(key for setting in sweep.settings for key in setting)}
  objectives = ["valid_loss", "valid_bits_per_byte", "train_loss"]
  if isinstance(base, FinetuneConfig):
    is_one_task = not any(key.startswith("data.") for key in keys)
    metrics = base.data.task.metrics if is_one_task else (*CLASS_METRICS, *SCORE_METRICS)
    objectives[1:2] = [f"valid_{metric}" for metric in metrics]
    if base.num_seeds > 1:
      raise ConfigError(
        f'num_seeds is {base.num_seeds}; in a sweep it is 1, and "seeds" are listed'
      )
  check_choice("objective", sweep.objective, objectives)
  if sweep.pruner != "none" and not base.eval.every_steps:
    raise ConfigError(f'pruner "{sweep.pruner}" needs evaluations; set eval.every_steps')
  for key in ("plot_x", "plot_series", "plot_panels"):
    if name := getattr(sweep, key):
      check_choice(key, name, keys)


def _check_settings(plan: Plan) -> None:
  """Raises ConfigError for a setting, or a value of a space, that the experiment refuses."""
  if plan.settings is not None:
    for number, setting in enumerate(plan.settings):
      _check_one(plan, [setting], f"setting {number} ({spell_setting(setting)})")
    return
  for key, value, settings in settings_with_each_value(plan.space):
    _check_one(plan, settings, f'the value {value!r} of "{key}"')


def _check_one(plan: Plan, settings: Iterable[Setting], what: str) -> None:
  """Raises ConfigError if none of the settings makes a config; the message is that of the first."""
  first_error = None
  for setting in settings:
    try:
      plan.config(setting, plan.seed(0))
      return
    except ConfigError as error:
      first_error = first_error or error
  raise ConfigError(f"{what} is refused: {first_error}") from first_error


def _num_trials(plan: Plan) -> int:
  if plan.settings is None:
    return plan.sweep.trials
  most = len(plan.settings) * plan.num_seeds
  if plan.sweep.trials is not None and plan.sweep.trials > most:
    seeds = f" with {plan.num_seeds} seeds" if plan.num_seeds > 1 else ""
    raise ConfigError(
      f"{plan.sweep.trials} trials are wanted, but the grid has {len(plan.settings)} settings"
      f"{seeds}, {most} trials; lower trials"
    )
  return plan.sweep.trials or most
