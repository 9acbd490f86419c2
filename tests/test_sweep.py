"""`gptjax sweep` with real runs: trials, their failures, kills, and the report."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from benchmarks import sweep as sweep_benchmark
from gptjax.checkpoint.models import save_run
from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.cli.main import main
from gptjax.config import from_config_dict, load_experiment, load_experiment_module
from gptjax.data.tokenizer import train_bpe
from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import init_parameters
from gptjax.sweep.charts import Column, bars, parallel_coordinates
from gptjax.sweep.config import make_plan
from gptjax.sweep.display import SweepDisplay, last_metrics, seconds_left
from gptjax.sweep.report import write_results
from gptjax.sweep.results import as_good_as_best, group_by_setting, p_value
from gptjax.sweep.run import check_inputs
from gptjax.sweep.study import Record, Study
from gptjax.sweep.worker import work
from gptjax.train import run as training_run
from gptjax.train.config import PretrainConfig
from gptjax.train.finetune_config import FinetuneConfig

NUM_STEPS = 12
ENVIRONMENT = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}  # of processes that tests start
EXPERIMENT = """
from gptjax.config import shrink, to_config_dict
from gptjax.train.config import PretrainConfig

def get_config(arg=None):
  config = to_config_dict(PretrainConfig())
  shrink(config)
  config.data.files = ("{folder}/text.txt",)
  config.data.valid_files = ()
  config.data.cache_dir = "{folder}/tokens"
  config.data.update(tokenizer="char", vocab_size=4096)
  config.data.end_token = ""
  config.model.context_length = 16
  config.model.model_dim = 16
  config.model.vocab_multiple = 8
  config.optimizer.learning_rate = 1e-2
  config.train.num_steps = {num_steps}
  config.train.host_devices = {devices}
  config.train.log_every_steps = 1
  config.eval.every_steps = {num_steps} // 3
  config.eval.sample_tokens = 0
  return config

def get_sweep():
  return {written}
"""


FINETUNE = """
from gptjax.config import to_config_dict
from gptjax.train.finetune_config import FinetuneConfig

def get_config(arg=None):
  config = to_config_dict(FinetuneConfig())
  config.init_from = "{folder}/model"
  config.data.family = "classification"
  config.data.files = ("{folder}/train.tsv",)
  config.data.valid_files = ("{folder}/train.tsv",)
  config.data.text_columns = ("text",)
  config.data.label_column = "label"
  config.train.update(num_steps=4, num_epochs=None, batch_rows=8, host_devices=8)
  config.eval.every_steps = 2
  return config

def get_sweep():
  return {
    "space": {"optimizer.learning_rate": [1e-4, 1e-2]},
    "seeds": [0, 1],
    "objective": "valid_accuracy",
    "direction": "maximize",
    "objective_of": "best",
  }
"""


def write_experiment(folder, written, num_steps=NUM_STEPS, devices=8):
  """Writes an experiment with a corpus of its own; returns its path."""
  folder.mkdir(parents=True, exist_ok=True)
  folder.joinpath("text.txt").write_text("the cat sat on the mat. a dog ran to the door!\n" * 60)
  text = EXPERIMENT.replace("{folder}", str(folder)).replace("{written}", repr(written))
  path = folder / "experiment.py"
  path.write_text(text.replace("{num_steps}", str(num_steps)).replace("{devices}", str(devices)))
  load_experiment_module.cache_clear()
  return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """A sweep in this process: two rates by two seeds, and a rate that diverges."""
  folder = tmp_path_factory.mktemp("sweep")
  path = write_experiment(
    folder,
    {
      "settings": [{"optimizer.learning_rate": rate} for rate in (1e-3, 1e-2, 1e38)]
      + [{"model.context_length": 10**6}],
      "seeds": [0, 1],
      "trials": 7,
    },
  )
  plan = make_plan(str(path), {})
  study = Study(plan, folder / "run")
  study.enqueue()
  work(plan, str(folder / "run"), "")
  return plan, study


def test_trials_are_run_directories_and_the_compiled_step_is_shared(swept):
  _, study = swept
  records = study.records()
  assert [record.state for record in records] == ["complete"] * 4 + ["failed"] * 3
  for record in records[:4]:
    run = RunDirectory(study.run_path(record.index))
    assert run.latest_step() == NUM_STEPS
    assert run.read_metrics()[-1]["valid_loss"] == record.value
    assert run.read_config()["seed"] == record.seed
    assert run.report_path.exists()
  assert len({record.value for record in records[:4]}) == 4
  # Other seeds and rates compile nothing.
  assert [*study.compilations().values()] == [1]


def test_a_trial_that_fails_is_recorded_with_its_reason_and_the_sweep_goes_on(swept):
  _, study = swept
  diverged, _, too_long = (record.reason for record in study.records()[4:])
  assert re.search("diverged|skipped", diverged)
  assert "1000001" in too_long
  assert "DataError" in (study.run_path(6) / "log.txt").read_text()


def test_the_report_is_one_offline_file_with_all_of_it(swept):
  plan, study = swept
  summary = write_results(plan, study, study.records())
  assert "4 complete, 3 failed" in summary
  page = (study.workdir / "report.html").read_text()
  assert not re.search(r"""(src|href)\s*=\s*["']https?:""", page)
  for words in ("Which key mattered", "Every trial", "Compilations of the training step", "±"):
    assert words in page


def test_the_best_config_is_an_experiment(swept):
  plan, study = swept
  write_results(plan, study, study.records())
  config = from_config_dict(PretrainConfig, load_experiment(str(study.workdir / "best.py")))
  assert config == plan.config({"optimizer.learning_rate": 1e-2}, 0)


def test_progress_has_a_line_for_each_running_trial(swept):
  plan, study = swept
  records = study.records()
  running = [
    Record(**{**vars(record), "state": "running", "value": None}) if record.index < 2 else record
    for record in records
  ]
  lines = SweepDisplay(plan, study.run_path, 2).lines(running)
  assert len(lines) == 3
  assert lines[0].startswith(f"trial 0  step {NUM_STEPS}/{NUM_STEPS}  train_loss ")
  assert lines[2].startswith("5 of 7 trials finished, 3 failed, 2 running; ")
  assert last_metrics(study.run_path(99)) == {}


def record(index, state, setting, value=None, seed=None, seconds=None):
  return Record(index, state, setting, seed, value, seconds, "", "", ())


def test_the_time_left_comes_from_the_trials_that_ended():
  records = [record(0, "complete", {}, seconds=10), record(1, "pruned", {}, seconds=4)]
  records += [record(i, "waiting", {}) for i in range(2, 5)]
  assert seconds_left(records, [], workers=2) == pytest.approx(7 * 3 / 2)
  assert seconds_left(records, [5.0], workers=2) == pytest.approx((2 + 7 * 2) / 2)
  assert seconds_left(records[2:], [], 1) is None
  assert seconds_left(records[:2], [], 1) == 0


def test_settings_that_cannot_be_told_apart_are_said_so():
  values = {"a": (1.0, 1.1, 1.2), "b": (1.01, 1.09, 1.22), "c": (2.0, 2.1, 2.21)}
  records = [
    record(3 * i + seed, "complete", {"optimizer.name": name}, value, seed)
    for i, (name, row) in enumerate(values.items())
    for seed, value in enumerate(row)
  ]
  groups = group_by_setting(records, "minimize")
  assert [group.setting["optimizer.name"] for group in groups] == ["a", "b", "c"]
  assert [group.setting["optimizer.name"] for group in as_good_as_best(groups)] == ["b"]
  # Student's t of two degrees of freedom: 4.303 standard errors of 0.1 / sqrt(3).
  assert groups[0].half_width == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
  assert p_value(groups[0], groups[2]) < 0.01
  assert group_by_setting(records, "maximize")[0].setting["optimizer.name"] == "c"
  alone = group_by_setting(records[::3], "minimize")
  assert alone[0].half_width is None and p_value(*alone[:2]) is None


def start_sweep(path, workdir, *arguments):
  command = [sys.executable, "-m", "gptjax", "sweep", "--config", str(path)]
  command += ["--workdir", str(workdir), *arguments]
  return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def open_records(path, workdir):
  study = Study(make_plan(str(path), {}), workdir)
  return study, study.records()


def wait_for(condition, seconds=240):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if (found := condition()) is not None:
      return found
    time.sleep(0.1)
  raise AssertionError("it did not happen in time")


RATES = {"space": {"optimizer.learning_rate": [1e-3, 2e-3, 4e-3, 8e-3]}}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_workers_trial_is_continued_and_each_is_done_once(tmp_path):
  """kill -9 of one of two workers in the middle of a run."""
  path, workdir = write_experiment(tmp_path, RATES, 150, devices=1), tmp_path / "run"
  process = start_sweep(path, workdir, "--workers", "2")
  killed = wait_for(lambda: find_running(path, workdir, process, past_step=50))
  os.kill(int(killed.worker.split(":")[1]), signal.SIGKILL)
  _, messages = process.communicate(timeout=600)
  assert process.returncode == 0, messages
  study, records = open_records(path, workdir)
  assert [record.state for record in records] == ["complete"] * 4
  for record in records:
    lines = RunDirectory(study.run_path(record.index)).read_metrics()
    assert [line["step"] for line in lines] == list(range(1, 151))
  starts = {record.index: record.starts for record in records}
  assert starts.pop(killed.index)[0] == 0 and records[killed.index].starts[1] >= 50
  assert list(starts.values()) == [(0,)] * 3
  assert records[killed.index].setting == killed.setting
  # It learned what it would have learned undisturbed.
  rate = killed.setting["optimizer.learning_rate"]
  start_alone = [sys.executable, "-m", "gptjax", "pretrain", "--config", str(path)]
  start_alone += ["--workdir", f"{tmp_path}/alone", f"--config.optimizer.learning_rate={rate}"]
  subprocess.run(start_alone, env=ENVIRONMENT, check=True, capture_output=True)
  expected = RunDirectory(tmp_path / "alone").read_metrics()[-1]["valid_loss"]
  assert records[killed.index].value == pytest.approx(expected, rel=1e-6)


def find_running(path, workdir, process, past_step):
  """Returns a running trial with a checkpoint past a step, or None yet."""
  assert process.poll() is None, process.stderr.read()
  if not (workdir / "journal.log").exists():
    return None
  study, records = open_records(path, workdir)
  for record in records:
    latest = RunDirectory(study.run_path(record.index)).latest_step() or 0
    if record.state == "running" and latest >= past_step:
      return record
  return None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_that_is_asked_to_stop_saves_and_the_same_command_goes_on(tmp_path):
  path, workdir = write_experiment(tmp_path, RATES, 150, devices=1), tmp_path / "run"
  process = start_sweep(path, workdir)
  wait_for(lambda: find_running(path, workdir, process, past_step=50))
  process.send_signal(signal.SIGTERM)
  _, messages = process.communicate(timeout=120)
  assert process.returncode == 0, messages
  _, records = open_records(path, workdir)
  assert "running" in [record.state for record in records]
  process = start_sweep(path, workdir)
  _, messages = process.communicate(timeout=600)
  assert process.returncode == 0, messages
  study, records = open_records(path, workdir)
  assert [record.state for record in records] == ["complete"] * 4
  assert max(len(record.starts) for record in records) == 2
  assert sum(study.compilations().values()) == 2
  # And once more there is nothing to do.
  assert main(["sweep", "--config", str(path), "--workdir", str(workdir)]) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twelve_trials_compile_once_a_process(tmp_path):
  written = {
    "space": {"optimizer.learning_rate": [1e-3, 2e-3, 4e-3, 8e-3], "optimizer.warmup_steps": [2]},
    "seeds": [0, 1, 2],
  }
  path, workdir = write_experiment(tmp_path, written, devices=1), tmp_path / "run"
  process = start_sweep(path, workdir, "--workers", "2")
  _, messages = process.communicate(timeout=600)
  assert process.returncode == 0, messages
  study, records = open_records(path, workdir)
  assert [record.state for record in records] == ["complete"] * 12
  assert [*study.compilations().values()] == [1, 1]
  page = (workdir / "report.html").read_text()
  assert page.count('<td class="number">1</td></tr>') >= 2


@pytest.mark.slow
def test_a_trial_without_memory_fails_and_the_next_one_runs(tmp_path, monkeypatch):
  """Nothing is too small for 70 TB, though the estimate would have refused them."""
  monkeypatch.setattr(training_run, "HOPELESS_MEMORY", math.inf)
  settings = [{"model.model_dim": 2**20}, {"model.model_dim": 16}]
  plan = make_plan(str(write_experiment(tmp_path, {"settings": settings})), {})
  study = Study(plan, tmp_path / "run")
  study.enqueue()
  work(plan, str(tmp_path / "run"), "")
  failed, complete = study.records()
  assert (failed.state, complete.state) == ("failed", "complete")
  assert failed.reason.startswith("out of memory: ")


@pytest.mark.slow
def test_fine_tuning_is_swept_alike(tmp_path):
  rows = [
    f"the tea was {word}\t{label}"
    for label, word in zip(["good", "bad"] * 9, ["fine", "cold", "warm"] * 6)
  ]
  tokenizer = train_bpe(rows, 290)
  config = ModelConfig(
    vocab_size=tokenizer.vocab_size, context_length=16, num_layers=1, model_dim=8, num_heads=2
  )
  save_run(tmp_path / "model", config, init_parameters(config, jax.random.key(7)), tokenizer)
  tmp_path.joinpath("train.tsv").write_text("\n".join(["text\tlabel", *rows]))
  path = tmp_path / "experiment.py"
  path.write_text(FINETUNE.replace("{folder}", str(tmp_path)))
  load_experiment_module.cache_clear()
  plan = make_plan(str(path), {})
  study = Study(plan, tmp_path / "run")
  study.enqueue()
  work(plan, str(tmp_path / "run"), "")
  records = study.records()
  assert [record.state for record in records] == ["complete"] * 4, records[0].reason
  for record in records:
    lines = RunDirectory(study.run_path(record.index)).read_metrics()
    assert record.value == max(line["valid_accuracy"] for line in lines if "valid_accuracy" in line)
  assert [*study.compilations().values()] == [1]
  write_results(plan, study, records)
  best = load_experiment(str(study.workdir / "best.py"))
  assert from_config_dict(FinetuneConfig, best).init_from == str(tmp_path / "model")


def test_the_model_of_each_setting_is_looked_for_before_the_first_trial(tmp_path):
  tmp_path.joinpath("train.tsv").write_text("text\tlabel\nwarm tea\tgood\ncold tea\tbad\n")
  path = tmp_path / "experiment.py"
  written = FINETUNE.replace("{folder}", str(tmp_path))
  rates = '"space": {"optimizer.learning_rate": [1e-4, 1e-2]}'
  assert rates in written
  path.write_text(written.replace(rates, '"settings": [{"init_from": "nothing/here"}]'))
  load_experiment_module.cache_clear()
  with pytest.raises(UserError, match="nothing/here"):
    check_inputs(make_plan(str(path), {"init_from": ""}), tmp_path / "run", print)


@pytest.mark.slow
def test_a_sweep_whose_data_are_missing_ends_before_its_first_trial(tmp_path, capsys):
  path = write_experiment(tmp_path, RATES)
  arguments = ["sweep", "--config", str(path), "--workdir", str(tmp_path / "run")]
  assert main([*arguments, "--config.data.files=['nowhere.txt']"]) == 2
  assert "nowhere.txt" in capsys.readouterr().err.splitlines()[-1]
  assert not (tmp_path / "run" / "trials").exists()
  assert json.dumps(make_plan(str(path), {}).trials) == "4"


def test_the_benchmark_of_halving_judges_by_seeds():
  def row(seed, random_best, halving_best, halving_trials=30):
    random = {"trials": 10, "seconds": 100.0, "best": random_best}
    return {
      "seed": seed,
      "random": random,
      "halving": {"trials": halving_trials, "seconds": 120.0, "best": halving_best},
    }

  summary = sweep_benchmark.summarise([row(0, 2.0, 1.9), row(1, 2.0, 2.0), row(2, 2.0, 2.1)])
  assert summary["trials_ratio"] == pytest.approx(2.5)
  assert summary["best_loss_difference"] == pytest.approx(0, abs=1e-12)
  assert summary["standard_error"] == pytest.approx(0.1 / 3**0.5)
  assert summary["is_met"]
  assert not sweep_benchmark.summarise([row(0, 2.0, 2.1), row(1, 2.0, 2.1)])["is_met"]
  assert not sweep_benchmark.summarise([row(0, 2.0, 1.9, 20), row(1, 2.0, 1.9)])["is_met"]


def test_parallel_coordinates_place_every_line_on_every_axis_it_has():
  columns = [
    Column("rate", [1e-4, 1e-2, 1e-3]),
    Column("name", ["adamw", "muon", "muon"]),
    Column("momentum", [None, 0.9, 0.95]),
    Column("loss", [3.0, 1.0, 2.0]),
  ]
  page = parallel_coordinates("All", columns, ["a", "<b>", "c"], "minimize")
  lines = re.findall(r'<polyline points="([^"]*)" style="stroke:rgb\((\d+),', page)
  # The best is drawn last and blue, the worst first and grey; without a value a line passes by.
  assert [len(points.split()) for points, _ in lines] == [3, 4, 4]
  assert int(lines[0][1]) > int(lines[1][1]) > int(lines[2][1])
  heights = sorted(float(points.split()[0].split(",")[1]) for points, _ in lines)
  # Rates of 100 to 1 are spread by their logarithm: the middle one is in the middle.
  assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.2)
  assert "&lt;b&gt;" in page and "<b>" not in page


def test_bars_have_their_shares():
  page = bars("Shares", {"rate": 0.75, "decay": 0.25})
  widths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', page)]
  assert widths[0] == pytest.approx(3 * widths[1], rel=1e-3)
