"""Trials in a storage: each is taken once, interrupted ones are gone on with, draws repeat."""

import multiprocessing
import shutil

import optuna
import pytest

from gptjax.config import load_experiment_module
from gptjax.errors import ConfigError, UserError
from gptjax.sweep.config import make_plan
from gptjax.sweep.study import MOST_STARTS, Study

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
SPACE = {
  "optimizer.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
  "optimizer.name": ["adamw", "muon"],
  "optimizer.muon_learning_rate": {"low": 0.01, "high": 0.1, "when": {"optimizer.name": "muon"}},
  "eval.sample_prompts": [["a"], ["a", "b"]],
}
RANDOM = {"space": SPACE, "method": "random", "trials": 6}
GRID = {"space": {"optimizer.learning_rate": [1e-3, 1e-2], "optimizer.name": ["adamw", "muon"]}}


def make(folder, written, **options):
  path = folder / "experiment.py"
  path.write_text(EXPERIMENT.replace("{written}", repr(written)))
  load_experiment_module.cache_clear()
  return make_plan(str(path), {}, **options)


def open_study(folder, plan, workdir="sweep", url=""):
  study = Study(plan, folder / workdir, url)
  study.enqueue()
  return study


def run_all(study, value=lambda trial: float(trial.index)):
  """Completes every trial that can be taken; returns (index, setting, seed) in order."""
  done = []
  while True:
    with study.take() as trial:
      if trial is None:
        return done
      trial.start()
      trial.complete(value(trial))
      done.append((trial.index, trial.setting, trial.seed))


def test_a_grid_visits_each_setting_once_in_order(tmp_path):
  plan = make(tmp_path, GRID | {"seeds": [7, 8]})
  done = run_all(open_study(tmp_path, plan))
  assert [index for index, _, _ in done] == list(range(8))
  assert [setting for _, setting, _ in done] == [s for s in plan.settings for _ in range(2)]
  assert [seed for _, _, seed in done] == [7, 8] * 4


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_a_seed_repeats_what_is_drawn(method, tmp_path):
  written = RANDOM | {"method": method}
  first, again = (
    run_all(open_study(tmp_path, make(tmp_path, written), name)) for name in ("first", "again")
  )
  assert first == again
  assert len({setting["optimizer.learning_rate"] for _, setting, _ in first}) == 6
  for _, setting, _ in first:
    assert ("optimizer.muon_learning_rate" in setting) == (setting["optimizer.name"] == "muon")
    assert setting["eval.sample_prompts"] in (["a"], ["a", "b"])
  other = run_all(open_study(tmp_path, make(tmp_path, written | {"sampler_seed": 1}), "other"))
  assert other != first


def test_what_is_drawn_does_not_depend_on_who_draws_it(tmp_path):
  """Restarts and more workers draw the settings that one process would have drawn."""
  plan = make(tmp_path, RANDOM)
  together = run_all(open_study(tmp_path, plan, "together"))
  one_by_one = []
  for _ in range(plan.trials):
    study = open_study(tmp_path, plan, "apart")
    with study.take() as trial:
      trial.complete(0.0)
      one_by_one.append((trial.index, trial.setting, trial.seed))
  assert one_by_one == together


def test_seeds_of_a_drawn_setting_share_it(tmp_path):
  done = run_all(open_study(tmp_path, make(tmp_path, RANDOM | {"seeds": [1, 2, 3]})))
  settings = [setting for _, setting, _ in done]
  assert settings[0] == settings[1] == settings[2] != settings[3]


def test_the_number_wanted_is_the_total_after_a_restart_too(tmp_path):
  assert len(run_all(open_study(tmp_path, make(tmp_path, RANDOM, trials=2)))) == 2
  more = run_all(open_study(tmp_path, make(tmp_path, RANDOM, trials=5)))
  assert [index for index, _, _ in more] == [2, 3, 4]
  assert run_all(open_study(tmp_path, make(tmp_path, RANDOM, trials=5))) == []
  fewer = open_study(tmp_path, make(tmp_path, RANDOM, trials=3))
  assert len(fewer.records()) == 3 and run_all(fewer) == []


def test_an_interrupted_trial_is_gone_on_with_first(tmp_path):
  plan = make(tmp_path, RANDOM)
  study = open_study(tmp_path, plan)
  with study.take() as trial:  # and never ended: the worker has died
    trial.start()
    setting = trial.setting
  with open_study(tmp_path, plan).take() as trial:
    assert (trial.index, trial.setting) == (0, setting)
    trial.start()
    trial.complete(1.0)
  record = study.records()[0]
  assert (record.state, record.starts) == ("complete", (0, 0))


def test_a_trial_whose_worker_lives_is_left_to_it(tmp_path):
  study = open_study(tmp_path, make(tmp_path, RANDOM))
  with study.take() as mine, open_study(tmp_path, make(tmp_path, RANDOM)).take() as other:
    assert (mine.index, other.index) == (0, 1)


def test_a_worker_that_died_as_it_took_a_trial_is_noticed(tmp_path):
  plan = make(tmp_path, GRID)
  study = open_study(tmp_path, plan)
  frozen = study._trials()[0]
  study._storage.set_trial_state_values(frozen._trial_id, optuna.trial.TrialState.RUNNING)
  with open_study(tmp_path, plan).take() as trial:
    assert trial.index == 0


def test_a_trial_that_always_ends_its_process_is_given_up(tmp_path):
  plan = make(tmp_path, RANDOM)
  for _ in range(MOST_STARTS):
    with open_study(tmp_path, plan).take() as trial:
      trial.start()
  with open_study(tmp_path, plan).take() as trial:
    assert trial.index == 0
    with pytest.raises(UserError, match="after step 0"):
      trial.start()
    (trial.path / "checkpoints" / "10").mkdir(parents=True)  # had it come further, it would go on
    trial.start()


def test_two_folders_on_one_storage_share_the_work_and_not_the_interrupted_trials(tmp_path):
  """As two machines without a common disk: the run directory is on the one that began it."""
  plan, url = make(tmp_path, RANDOM), str(tmp_path / "trials.log")
  here = open_study(tmp_path, plan, "here", url)
  there = open_study(tmp_path, plan, "there", url)
  with here.take() as trial:
    assert trial.index == 0
  taken = [index for index, _, _ in run_all(there)]
  assert taken == [1, 2, 3, 4, 5]
  assert [index for index, _, _ in run_all(open_study(tmp_path, plan, "here", url))] == [0]


def take_all(plan, workdir, url, queue):
  study = Study(plan, workdir, url)
  study.enqueue()
  queue.put(run_all(study))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "database"])
def test_processes_never_take_the_same_trial(kind, tmp_path):
  plan = make(tmp_path, RANDOM | {"trials": 40})
  url = f"sqlite:///{tmp_path}/trials.db" if kind == "database" else ""
  context = multiprocessing.get_context("spawn")
  queue = context.Queue()
  Study(plan, tmp_path / "sweep", url)
  processes = [
    context.Process(target=take_all, args=(plan, str(tmp_path / "sweep"), url, queue))
    for _ in range(3)
  ]
  for process in processes:
    process.start()
  taken = [index for _ in processes for index, _, _ in queue.get(timeout=120)]
  assert sorted(taken) == list(range(40))


def test_a_storage_of_another_sweep_is_refused(tmp_path):
  open_study(tmp_path, make(tmp_path, RANDOM))
  with pytest.raises(ConfigError, match="another space"):
    open_study(tmp_path, make(tmp_path, RANDOM | {"sampler_seed": 3}))
  with pytest.raises(ConfigError, match="another space"):
    open_study(tmp_path, make(tmp_path, GRID))
  changed = make(tmp_path, RANDOM)
  changed = make_plan(changed.spec, {"model.num_layers": "3"})
  with pytest.raises(ConfigError, match=r"model\.num_layers is 12 there and 3 here"):
    open_study(tmp_path, changed)


def test_pruned_and_failed_trials_are_recorded(tmp_path):
  written = GRID | {"pruner": "median", "pruner_start_trials": 1}
  study = open_study(tmp_path, make(tmp_path, written))
  with study.take() as trial:
    assert not trial.report(10, 1.0)
    assert not trial.report(10, 1.0)  # measured again after an interruption
    trial.complete(1.0)
  with study.take() as trial:
    assert trial.report(10, 2.0)
    trial.prune()
  with study.take() as trial:
    trial.fail("no reason")
  states = [(record.state, record.value, record.reason) for record in study.records()]
  assert states[:3] == [("complete", 1.0, ""), ("pruned", 2.0, ""), ("failed", None, "no reason")]


def test_halving_keeps_the_best_third(tmp_path):
  written = RANDOM | {"pruner": "halving", "trials": 9}
  study = open_study(tmp_path, make(tmp_path, written))
  pruned = []
  for value in (5.0, 6.0, 4.0, 7.0, 3.0, 9.0, 2.0, 8.0, 1.0):
    with study.take() as trial:
      pruned.append(trial.report(10, value))
      trial.complete(value)
  assert pruned == [False, True, False, True, False, True, False, True, False]


def test_an_object_store_has_no_locks(tmp_path):
  with pytest.raises(ConfigError, match="no locks"):
    Study(make(tmp_path, RANDOM), "gs://bucket/sweep")


def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path):
  with pytest.raises(ConfigError, match="sqlite:///FILE"):
    open_study(tmp_path, make(tmp_path, RANDOM), url="nosuch://host/name")


def test_a_lost_folder_is_begun_again(tmp_path):
  """Trials that ran in a folder that is gone are another folder's: they are not taken over."""
  plan, url = make(tmp_path, RANDOM), str(tmp_path / "trials.log")
  with open_study(tmp_path, plan, "sweep", url).take() as trial:
    assert trial.index == 0
  shutil.rmtree(tmp_path / "sweep")
  assert next(index for index, _, _ in run_all(open_study(tmp_path, plan, "sweep", url))) == 1
