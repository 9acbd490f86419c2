"""Run directories: whose run it is, who writes it, and what a crash may tear."""

import errno
import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import run_directory as run_directory_lib
from gptjax.checkpoint.run_directory import RunDirectory, is_run_directory, write_whole
from gptjax.errors import CheckpointError

CONFIG = {"model": {"num_layers": 2, "rope": None}, "train": {"num_steps": 9, "log": 1}, "seed": 0}


def to_json(config):
  return json.dumps(config, indent=2) + "\n"


class FakeTokenizer:
  def __init__(self, text):
    self.text = text

  def save(self, path):
    with open(path, "w", encoding="utf-8") as file:
      file.write(self.text)


@pytest.fixture
def run(tmp_path):
  run = RunDirectory(tmp_path / "deep" / "run")
  run.create_or_check(to_json(CONFIG), FakeTokenizer("{}"))
  (run.checkpoints_path / "1").mkdir(parents=True)
  return run


# Whose run it is


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "metrics.jsonl", "report.html"])
def test_a_folder_of_other_files_is_left_alone(tmp_path, name):
  (tmp_path / name).write_text('{"architectures": ["GPTJForCausalLM"]}')
  with pytest.raises(CheckpointError, match=f"is no run and has {name}.*choose another --workdir"):
    RunDirectory(tmp_path).create_or_check(to_json(CONFIG), FakeTokenizer("{}"))
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_bucket_without_its_package_names_it(monkeypatch):
  monkeypatch.setattr(run_directory_lib, "find_spec", lambda name: None)
  with pytest.raises(CheckpointError, match=r"gcsfs; run .*\[cloud\]"):
    RunDirectory("gs://bucket/run")


def test_creates_then_recognises_the_same_run(tmp_path):
  run = RunDirectory(tmp_path / "run")
  assert not run.create_or_check(to_json(CONFIG), FakeTokenizer('{"é": "語"}'))
  assert run.create_or_check(to_json(CONFIG), FakeTokenizer('{"é": "語"}'))
  assert run.read_config() == CONFIG
  assert run.tokenizer_path.read_text() == '{"é": "語"}'
  assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "tokenizer.json"]


def test_another_config_is_refused_with_keys_and_values(run):
  other = {"model": {"num_layers": 3, "new": [1, "x"]}, "train": {"num_steps": 10}, "seed": 0}
  with pytest.raises(CheckpointError) as error:
    run.create_or_check(to_json(other))
  message = str(error.value)
  assert "model.num_layers is 2 there and 3 here" in message
  assert 'model.new is absent there and [1, "x"] here' in message
  assert "train.num_steps is 9 there and 10 here; and 2 more" in message
  assert "\n" not in message
  assert run.read_config() == CONFIG


def test_a_run_without_a_checkpoint_starts_anew(tmp_path):
  """It was ended before it saved anything; its lines would come a second time."""
  run = RunDirectory(tmp_path / "run")
  run.create_or_check(to_json(CONFIG), FakeTokenizer("{}"), data={"tokens": 1})
  run.append_metrics({"step": 1, "train_loss": 3.0})
  run.append_samples(1, "text")
  other = CONFIG | {"seed": 1}
  assert run.create_or_check(to_json(other), FakeTokenizer("[]"), data={"tokens": 2})
  assert run.read_config() == other
  assert run.tokenizer_path.read_text() == "[]"
  assert json.loads(run.data_path.read_text()) == {"tokens": 2}
  assert not run.read_metrics() and not run.read_samples()


def test_other_data_are_refused(run):
  run.create_or_check(to_json(CONFIG), data={"tokens": 1})
  run.create_or_check(to_json(CONFIG), data={"tokens": 1})
  with pytest.raises(CheckpointError, match=r"data.json.*this config's data"):
    run.create_or_check(to_json(CONFIG), data={"tokens": 2})
  assert json.loads(run.data_path.read_text()) == {"tokens": 1}


@pytest.mark.parametrize("changeable", [["train"], ["train.log", "train.num_steps"]])
def test_allowed_keys_may_change_and_are_kept(run, changeable):
  other = CONFIG | {"train": {"num_steps": 10, "log": 5}}
  assert run.create_or_check(to_json(other), changeable=changeable)
  assert run.read_config() == other


@pytest.mark.parametrize("changeable", [["train.l"], ["trai"], ["train.num_steps"], ["seed"]])
def test_a_prefix_of_a_name_allows_nothing(run, changeable):
  other = CONFIG | {"train": {"num_steps": 9, "log": 5}}
  with pytest.raises(CheckpointError, match=r"train\.log is 1 there and 5 here"):
    run.create_or_check(to_json(other), changeable=changeable)


def test_another_tokenizer_is_refused(run):
  with pytest.raises(CheckpointError, match=r"tokenizer\.json\" is not the tokenizer"):
    run.create_or_check(to_json(CONFIG), FakeTokenizer('{"other": 1}'))


def test_a_start_killed_before_the_tokenizer_was_written_goes_on(run):
  run.tokenizer_path.unlink()
  run.create_or_check(to_json(CONFIG), FakeTokenizer("{}"))
  assert run.tokenizer_path.read_text() == "{}"


@pytest.mark.parametrize("text", ["", '{"model": ', "[]"])
def test_a_damaged_config_is_one_clear_line(run, text):
  run.config_path.write_text(text)
  with pytest.raises(CheckpointError, match=r"config\.json") as error:
    run.create_or_check(to_json(CONFIG))
  assert "\n" not in str(error.value)


def test_checkpoints_without_a_config_are_refused(tmp_path):
  (tmp_path / "checkpoints" / "5").mkdir(parents=True)
  with pytest.raises(CheckpointError, match=r"checkpoints but no config\.json"):
    RunDirectory(tmp_path).create_or_check(to_json(CONFIG))


def test_a_run_is_told_from_other_folders(run, tmp_path):
  assert is_run_directory(run.path)
  assert not is_run_directory(tmp_path)
  assert not is_run_directory(tmp_path / "missing")
  run.config_path.write_text('{"model_type": "gpt2", "n_layer": 2}')
  assert not is_run_directory(run.path)


def test_finished_means_the_last_step_is_saved(run):
  assert run.latest_step() == 1 and not run.is_finished(9)
  for name in ("3", "8", "9.damaged", "9.orbax-checkpoint-tmp", "notes"):
    (run.checkpoints_path / name).mkdir(parents=True)
  assert run.latest_step() == 8 and not run.is_finished(9)
  (run.checkpoints_path / "9").mkdir()
  assert run.latest_step() == 9 and run.is_finished(9)


# Metrics and samples


def test_metrics_come_back_exactly_and_are_strict_json(run):
  third = np.float32(1) / 3
  run.append_metrics({"step": 1, "train_loss": 1 / 3, "grad_norm": third, "valid_loss": None})
  run.append_metrics(
    {"step": np.int64(2), "a": math.nan, "b": jnp.inf, "c": jnp.float32(-math.inf)}
  )
  first, second = run.read_metrics()
  assert first == {"step": 1, "train_loss": 1 / 3, "grad_norm": float(third), "valid_loss": None}
  assert second["step"] == 2 and math.isnan(second["a"])
  assert (second["b"], second["c"]) == (math.inf, -math.inf)

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  for line in run.metrics_path.read_text().splitlines():
    assert json.loads(line, parse_constant=refuse)["step"] in (1, 2)


def test_a_torn_line_is_passed_over_and_not_continued(run):
  run.append_metrics({"step": 1})
  with open(run.metrics_path, "ab") as file:
    file.write(b'{"step": 2, "train_loss": "caf\xc3')
  resumed = RunDirectory(run.path)
  assert resumed.read_metrics() == [{"step": 1}]
  resumed.append_metrics({"step": 3})
  assert resumed.read_metrics() == [{"step": 1}, {"step": 3}]


def test_drop_after_removes_later_metrics_samples_and_torn_lines(run):
  for step in range(5):
    run.append_metrics({"step": step, "loss": step / 3})
    run.append_samples(step, f"O Romeo {step}\n")
  with open(run.metrics_path, "a") as file:
    file.write('{"step": 5')
  resumed = RunDirectory(run.path)
  assert resumed.drop_after(2) == 2
  expected = "".join(json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(3))
  assert run.metrics_path.read_text() == expected
  samples = run.samples_path.read_text()
  assert samples == "".join(f"=== step {step} ===\nO Romeo {step}\n\n" for step in range(3))
  resumed.append_metrics({"step": 3})
  assert [line["step"] for line in resumed.read_metrics()] == [0, 1, 2, 3]
  assert resumed.drop_after(-1) == 4 and resumed.read_metrics() == []


def test_drop_after_on_a_new_run_writes_nothing(run):
  assert run.drop_after(0) == 0
  assert not run.metrics_path.exists() and not run.samples_path.exists()


def test_without_appending_files_are_uploaded_whole_on_flush(run, monkeypatch):
  """How gs:// behaves, shown on a disk."""
  run.append_metrics({"step": 1})
  monkeypatch.setattr(run_directory_lib, "is_remote", lambda path: True)
  remote = RunDirectory(run.path)
  with remote.lock():
    for step in (2, 3):
      remote.append_metrics({"step": step})
  assert [line["step"] for line in remote.read_metrics()] == [1, 2, 3]
  assert run.read_metrics() == [{"step": 1}]
  remote.flush()
  assert [line["step"] for line in run.read_metrics()] == [1, 2, 3]
  assert remote.drop_after(1) == 2
  assert run.read_metrics() == remote.read_metrics() == [{"step": 1}]


def test_object_stores_are_recognised(monkeypatch):
  monkeypatch.setattr(run_directory_lib, "find_spec", lambda name: name)  # gcsfs
  for path in ("gs://bucket/run", "s3://bucket/run"):
    assert run_directory_lib.is_remote(path)
    assert str(RunDirectory(path).metrics_path) == f"{path}/metrics.jsonl"
  assert not run_directory_lib.is_remote("/tmp/run")


# Who writes it


HOLD = """
import sys, time
from gptjax.checkpoint.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).lock():
  print("locked", flush=True)
  time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
  )
  try:
    assert process.stdout.readline() == "locked\n"
    with (
      pytest.raises(CheckpointError, match=f"being written by process {process.pid};"),
      RunDirectory(tmp_path).lock(),
    ):
      pass
  finally:
    process.send_signal(signal.SIGKILL)
    process.communicate()
  with RunDirectory(tmp_path).lock():
    assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_the_lock_ends_with_its_context(tmp_path):
  run = RunDirectory(tmp_path / "new")
  for _ in range(2):
    with run.lock():
      assert run.path.is_dir()
      with pytest.raises(CheckpointError, match="being written"), run.lock():
        pass


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
  def no_locks(*args):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(run_directory_lib.fcntl, "flock", no_locks)
  with RunDirectory(tmp_path).lock():
    assert (tmp_path / ".lock").exists()


# Disks that cannot be written


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
  (tmp_path / "file").write_text("")
  run = RunDirectory(tmp_path / "file" / "run")
  for action in (lambda: run.create_or_check(to_json(CONFIG)), lambda: run.lock().__enter__()):
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory") as error:
      action()
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_old_file_and_no_debris(run, monkeypatch):
  def no_space(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  before = sorted(run.path.iterdir())
  monkeypatch.setattr(run_directory_lib.os, "fsync", no_space)
  with pytest.raises(CheckpointError, match="No space left on device; free space"):
    write_whole(run.config_path, "new")
  assert run.read_config() == CONFIG
  assert sorted(run.path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_clear_line(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(CheckpointError, match="Permission denied"):
    RunDirectory(tmp_path / "run").create_or_check(to_json(CONFIG))
  tmp_path.chmod(0o700)


def test_a_report_is_replaced_whole(run):
  run.write_report("<html>old, long</html>")
  run.write_report("<html>é</html>")
  assert run.report_path.read_text() == "<html>é</html>"
