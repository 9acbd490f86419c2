"""What a sweep may write, what is refused before the first trial, and which settings there are."""

import pytest

from gptjax.cli.main import main
from gptjax.config import load_experiment_module
from gptjax.errors import ConfigError
from gptjax.sweep.config import make_plan
from gptjax.sweep.space import grid, parse_space, product, spell, spell_setting
from gptjax.train.config import PretrainConfig

EXPERIMENT = """
from gptjax.config import to_config_dict
from gptjax.train.config import PretrainConfig

def get_config(arg=None):
  config = to_config_dict(PretrainConfig())
  config.train.num_steps = 40
  config.eval.every_steps = 10
  return config

def get_sweep():
  return {written}
"""
RATES = {"optimizer.learning_rate": [1e-3, 1e-2]}


@pytest.fixture
def plan_of(tmp_path):
  """Returns `make(written, ...)`, the plan of what get_sweep returns."""

  def make(written, overrides=None, trials=None, experiment=EXPERIMENT):
    path = tmp_path / "experiment.py"
    path.write_text(experiment.replace("{written}", repr(written)))
    load_experiment_module.cache_clear()
    return make_plan(str(path), overrides or {}, trials)

  return make


def test_a_grid_visits_each_setting_once_and_conditions_hold(plan_of):
  plan = plan_of({
    "space": {
      "optimizer.muon_learning_rate": {"choices": [0.02, 0.05], "when": {"optimizer.name": "muon"}},
      "optimizer.name": ["adamw", "muon"],
      "model.num_layers": {"low": 2, "high": 6, "step": 2},
    },
    "seeds": [3, 5],
  })  # fmt: skip
  settings = [tuple(sorted(setting.items())) for setting in plan.settings]
  assert len(set(settings)) == len(settings) == 9
  assert plan.trials == 18
  assert [plan.seed(index) for index in range(4)] == [3, 5, 3, 5]
  for setting in plan.settings:
    assert ("optimizer.muon_learning_rate" in setting) == (setting["optimizer.name"] == "muon")


def test_a_setting_becomes_a_config_and_takes_the_details_of_the_old_choice_with_it(plan_of):
  plan = plan_of(
    {"space": {"optimizer.name": ["adamw", "muon"]}},
    {"optimizer.name": "muon", "optimizer.muon_steps": "7"},
  )
  assert plan.config({"optimizer.name": "adamw"}, seed=4).seed == 4
  assert plan.config({"optimizer.name": "adamw"}).optimizer.muon_steps == 5
  assert plan.config({}).optimizer.muon_steps == 7


def test_the_type_of_the_key_tells_whole_numbers_from_others():
  space = parse_space(
    {
      "model.num_layers": {"low": 1, "high": 8},
      "optimizer.learning_rate": {"low": 1, "high": 10, "log": True},
      "optimizer.warmup_steps": {"low": 1, "high": 100},
    },
    PretrainConfig,
  )
  assert [domain.is_int for domain in space.values()] == [True, False, True]
  assert isinstance(space["optimizer.learning_rate"].low, float)


def test_products_are_lists_that_add():
  settings = [*product({"a": [1, 2], "b": ["x"]}), {"c": 3}]
  assert settings == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}, {"c": 3}]
  assert grid({}) == [{}]


def test_explicit_settings_are_trials_in_order(plan_of):
  settings = [{"model.model_dim": 64, "model.num_heads": 4}, {"optimizer.learning_rate": 1e-3}]
  plan = plan_of({"settings": settings})
  assert list(plan.settings) == settings and plan.trials == 2
  assert plan.space["model.model_dim"].choices == (64,)


def test_values_are_spelled_as_a_reader_wants_them():
  assert [spell(v) for v in (1e-05, 0.003, None, "x", [1, 2])] == [
    "1e-05", "0.003", "none", "x", "[1, 2]"
  ]  # fmt: skip
  assert spell_setting({"a.b": 1, "c.b": 2, "c.d": 3}) == "a.b 1, c.b 2, d 3"


def ranged(**domain):
  return {"space": {"optimizer.learning_rate": domain}, "method": "random", "trials": 3}


REFUSED = {
  "misspelt option": ({"space": RATES, "metod": "grid"}, "method"),
  "neither": ({}, "settings"),
  "both": ({"space": RATES, "settings": [{"seed": 1}]}, "settings"),
  "misspelt key": ({"space": {"optimizer.learning_rat": [1e-3]}}, "optimizer.learning_rate"),
  "misspelt key of a setting": ({"settings": [{"modle.num_layers": 2}]}, "modle.num_layers"),
  "a group": ({"space": {"optimizer": [1]}}, "is a group"),
  "wrong type": ({"space": {"model.num_layers": [2, "three"]}}, "whole number"),
  "out of the domain": ({"space": {"model.embedding_dropout": [0.1, 1.5]}}, "embedding_dropout"),
  "out of the domain, late": ({"settings": [{"seed": 1}, {"seed": -1}]}, "setting 1"),
  "no choices": ({"space": {"seed": []}}, "at least one"),
  "a choice twice": ({"space": {"seed": [1, 1]}}, "twice"),
  "no domain": ({"space": {"seed": 3}}, "list of choices"),
  "a misspelt domain": (ranged(low=1e-3, hihg=1e-2), "high"),
  "no high": (ranged(low=1e-3), '"high"'),
  "choices with a range": (ranged(choices=[1], low=1), "either"),
  "low above high": (ranged(low=2, high=1), "low must not be above"),
  "log from 0": (ranged(low=0, high=1, log=True), "above 0"),
  "log and step": (ranged(low=1, high=2, log=True, step=1), "without log"),
  "no number": (ranged(low="a", high=1), "finite number"),
  "no whole number": (
    {"space": {"model.num_layers": {"low": 1.5, "high": 3}}, "method": "random", "trials": 1},
    "whole number",
  ),
  "a range of words": (
    {"space": {"optimizer.name": {"low": 1, "high": 3}}, "method": "random", "trials": 1},
    "no numbers",
  ),
  "an end out of the domain": (
    {"space": {"optimizer.beta1": {"low": 0.5, "high": 1.5}}, "method": "tpe", "trials": 1},
    "beta1",
  ),
  "a grid of a range": ({"space": {"optimizer.learning_rate": {"low": 1, "high": 2}}}, "step"),
  "an unknown condition": (
    {"space": {"seed": {"choices": [1], "when": {"optimizer.nam": "muon"}},
               "optimizer.name": ["muon"]}}, "optimizer.name",
  ),
  "a condition that nothing meets": (
    {"space": {"seed": {"choices": [1], "when": {"optimizer.name": "adamv"}},
               "optimizer.name": ["muon"]}}, "adamv",
  ),
  "a circle": (
    {"space": {"seed": {"choices": [1], "when": {"optimizer.name": "muon"}},
               "optimizer.name": {"choices": ["muon"], "when": {"seed": 1}}}}, "circle",
  ),
  "no end": ({"space": RATES, "method": "random"}, "trials"),
  "too many": ({"space": RATES, "trials": 3}, "2 settings"),
  "no trials": ({"space": RATES, "trials": 0}, "at least 1"),
  "method of settings": ({"settings": [{"seed": 1}], "method": "tpe", "trials": 1}, "in order"),
  "wrong method": ({"space": RATES, "method": "gird"}, "grid"),
  "wrong direction": ({"space": RATES, "direction": "minimise"}, "minimize"),
  "wrong objective": ({"space": RATES, "objective": "valid_los"}, "valid_loss"),
  "seed and seeds": ({"space": {"seed": [1, 2]}, "seeds": [1]}, "keep one"),
  "seeds twice": ({"space": RATES, "seeds": [1, 1]}, "twice"),
  "seeds of another type": ({"space": RATES, "seeds": ["a"]}, "whole number"),
  "a key of the process": ({"space": {"train.host_devices": [1, 2]}}, "belongs to a process"),
  "an option of no pruner": ({"space": RATES, "pruner_factor": 4}, "no effect"),
  "an option of another pruner": (
    {"space": RATES, "pruner": "halving", "pruner_start_trials": 9}, "no effect"
  ),
  "plot of a key that does not vary": ({"space": RATES, "plot_x": "seed"}, "learning_rate"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name(case, plan_of):
  written, words = REFUSED[case]
  with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
    plan_of(written)


def test_pruning_needs_evaluations(plan_of):
  with pytest.raises(ConfigError, match=r"eval\.every_steps"):
    plan_of({"space": RATES, "pruner": "median"}, {"eval.every_steps": "0"})


def test_values_that_fit_some_settings_are_no_error_of_a_space(plan_of):
  """Which heads divide which width is found out by the trial."""
  written = {"model.model_dim": [48, 64], "model.num_heads": [3, 64]}
  plan = plan_of({"space": written, "method": "random", "trials": 2})
  assert plan.trials == 2
  with pytest.raises(ConfigError, match=r"setting 1 .*model_dim 48"):
    plan_of({"space": written})


def test_the_objective_of_a_task_is_one_of_its_metrics(plan_of):
  of_task = EXPERIMENT.replace("train.config", "train.finetune_config")
  of_task = of_task.replace("PretrainConfig", "FinetuneConfig").replace("num_steps", "num_epochs")
  written = {"space": RATES, "objective": "valid_matthews", "direction": "maximize"}
  with pytest.raises(ConfigError, match="valid_matthews"):
    plan_of(written, {"data.adapter": "sst2"}, experiment=of_task)
  assert plan_of(written, {"data.adapter": "cola"}, experiment=of_task).trials == 2


def test_an_experiment_without_a_sweep_says_what_to_write(tmp_path, capsys):
  path = tmp_path / "plain.py"
  path.write_text("def get_config(arg=None): ...")
  assert main(["sweep", "--config", str(path), "--workdir", str(tmp_path / "x")]) == 2
  assert "get_sweep" in capsys.readouterr().err
  assert main(["sweep", "--config", str(path), "--workdir", "x", "--workers", "0"]) == 2
  assert "--workers" in capsys.readouterr().err
