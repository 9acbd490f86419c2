"""`gptjax pretrain` and `gptjax data show` as a user meets them, in process and with real files."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from test_rendezvous import free_port

from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.checkpoint.store import CheckpointStore
from gptjax.cli.main import main

NUM_STEPS = 12
SENTENCES = "the cat sat on the mat. a dog ran to the door! who is it? it is the cat.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pretrain")
  folder.joinpath("text.txt").write_text(SENTENCES * 60)
  folder.joinpath("one_line.txt").write_text(SENTENCES.strip() * 60)
  folder.joinpath("one_token.txt").write_text("t")
  folder.joinpath("empty.txt").write_text("")
  folder.joinpath("short.txt").write_text("too short")
  folder.joinpath("experiment.py").write_text(
    f"""
from gptjax.config import shrink, to_config_dict
from gptjax.train.config import PretrainConfig

def get_config(arg=None):
  config = to_config_dict(PretrainConfig())
  shrink(config)
  config.data.files = ("{folder}/text.txt",)
  config.data.cache_dir = "{folder}/tokens"
  config.data.update(tokenizer="char", vocab_size=4096)
  config.data.end_token = ""
  config.model.context_length = 16
  config.model.model_dim = 16
  config.model.vocab_multiple = 8
  config.optimizer.learning_rate = 1e-2
  config.train.num_steps = {NUM_STEPS}
  config.train.host_devices = 8
  config.train.log_every_steps = 1
  config.train.save_every_steps = 4
  config.eval.every_steps = 6
  config.eval.sample_prompts = ("the ", "")
  config.eval.sample_tokens = 20
  return config
"""
  )
  return folder


def pretrain(folder, workdir, *overrides):
  arguments = ["pretrain", "--config", f"{folder}/experiment.py", "--workdir", str(workdir)]
  return main(arguments + [f"--config.{override}" for override in overrides])


@pytest.fixture(scope="module")
def run(folder):
  assert pretrain(folder, folder / "run") == 0
  return RunDirectory(folder / "run")


def test_exactly_n_updates_and_the_last_is_saved(run):
  lines = run.read_metrics()
  assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
  assert run.latest_step() == NUM_STEPS
  losses = [line["train_loss"] for line in lines]
  assert losses[-1] < losses[0]
  assert all({"learning_rate", "grad_norm", "seconds"} <= line.keys() for line in lines)


def test_validation_is_in_nats_and_bits(run):
  evaluated = [line for line in run.read_metrics() if "valid_loss" in line]
  assert [line["step"] for line in evaluated] == [6, 12]
  # Characters of ASCII are one byte each.
  for line in evaluated:
    assert line["valid_bits_per_byte"] == pytest.approx(line["valid_loss"] / math.log(2), rel=1e-12)


def test_samples_continue_the_prompts(run):
  samples = run.read_samples()
  assert [step for step, _ in samples] == [6, 6, 12, 12]
  assert samples[0][1].startswith("the ")
  assert all(len(text) > 4 for _, text in samples)


def test_the_report_is_one_offline_file(run):
  page = run.report_path.read_text()
  assert "valid" in page
  assert "<svg" in page
  assert not re.search(r"""(src|href)\s*=\s*["']https?:""", page)


def test_a_finished_run_says_so_and_does_nothing(run, folder, capsys):
  before = run.metrics_path.read_bytes()
  assert pretrain(folder, run.path) == 0
  assert "nothing to do" in capsys.readouterr().err
  assert run.metrics_path.read_bytes() == before


def losses_of(run):
  return [(line["step"], line["train_loss"], line["grad_norm"]) for line in run.read_metrics()]


def test_a_resumed_run_repeats_the_undisturbed_one_to_the_bit(run, folder, capsys):
  copy = folder / "resumed"
  shutil.copytree(run.path, copy)
  shutil.rmtree(copy / "checkpoints" / "12")
  assert pretrain(folder, copy) == 0
  assert "resuming after step 8" in capsys.readouterr().err
  assert losses_of(RunDirectory(copy)) == losses_of(run)
  assert RunDirectory(copy).read_samples() == run.read_samples()
  # The time of the steps that were kept goes on; that of the lost ones is not counted twice.
  kept, after = (run.read_metrics()[7]["seconds"], RunDirectory(copy).read_metrics()[8]["seconds"])
  assert kept < after < kept + sum(line["seconds"] for line in run.read_metrics())


def test_a_run_killed_before_its_first_save_leaves_no_lines_behind(run, folder):
  copy = folder / "killed"
  shutil.copytree(run.path, copy)
  shutil.rmtree(copy / "checkpoints")
  assert pretrain(folder, copy) == 0
  assert losses_of(RunDirectory(copy)) == losses_of(run)
  assert RunDirectory(copy).read_samples() == run.read_samples()


# test_store.py harms every file in every way.
@pytest.mark.parametrize("damage", ["flipped", pytest.param("lost", marks=pytest.mark.slow)])
def test_a_finished_run_with_a_damaged_last_checkpoint_is_finished_again(
  damage, run, folder, capsys
):
  copy = folder / f"damaged {damage}"
  shutil.copytree(run.path, copy)
  files = (copy / "checkpoints" / "12" / "state").rglob("*")
  largest = max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  if damage == "lost":
    largest.unlink()
  else:
    largest.write_bytes(content)
  assert pretrain(folder, copy) == 0
  messages = capsys.readouterr().err
  assert "checkpoint 12 skipped" in messages and "resuming after step 8" in messages
  assert losses_of(RunDirectory(copy)) == losses_of(run)


def test_a_signal_is_a_polite_request_until_the_last_save_is_on_disk(folder, monkeypatch):
  default, save, wait = signal.getsignal(signal.SIGTERM), CheckpointStore.save, CheckpointStore.wait
  waits = []  # since the last save began: what a signal would do

  def watched_save(*arguments, **options):
    save(*arguments, **options)
    waits.clear()

  def watched_wait(store):
    waits.append(signal.getsignal(signal.SIGTERM))
    wait(store)

  monkeypatch.setattr(CheckpointStore, "save", watched_save)
  monkeypatch.setattr(CheckpointStore, "wait", watched_wait)
  overrides = ("train.num_steps=1", "eval.sample_tokens=0", "data.valid_fraction=0")
  assert pretrain(folder, folder / "polite", *overrides) == 0
  assert waits and waits[0] is not default


@pytest.mark.slow
def test_another_seed_is_another_run(run, folder):
  assert pretrain(folder, folder / "other", "seed=1", "train.num_steps=2") == 0
  assert losses_of(RunDirectory(folder / "other"))[:2] != losses_of(run)[:2]


def test_init_from_starts_with_the_trained_parameters(run, folder, capsys):
  overrides = (f"init_from={run.path}", "train.num_steps=1", "seed=3", "eval.sample_tokens=0")
  assert pretrain(folder, folder / "started", *overrides) == 0
  first = losses_of(RunDirectory(folder / "started"))[0][1]
  assert first < losses_of(run)[0][1] - 0.2
  # The same model as another library has it.
  assert main(["convert", str(run.path), f"{folder}/hf", "--to", "hf"]) == 0
  capsys.readouterr()
  overrides = (f"init_from={folder}/hf", *overrides[1:])
  assert pretrain(folder, folder / "started from hf", *overrides) == 2
  assert capsys.readouterr().err.strip().endswith("set model.vocab_multiple=128")
  assert pretrain(folder, folder / "started from hf", *overrides, "model.vocab_multiple=128") == 0
  assert "all 20 parameters match" in capsys.readouterr().err
  # Padding of another width may change the order of sums in float32.
  again = losses_of(RunDirectory(folder / "started from hf"))[0][1]
  assert again == pytest.approx(first, rel=1e-6)


def test_a_diverging_run_stops_and_names_what_went_bad(folder, capsys):
  overrides = ("optimizer.learning_rate=1e38", "optimizer.schedule=constant",
               "optimizer.warmup_steps=0", "train.max_bad_steps=3")  # fmt: skip
  assert pretrain(folder, folder / "diverged", *overrides) == 2
  message = capsys.readouterr().err.strip().splitlines()[-1]
  assert "3 updates in a row were skipped" in message
  assert "decoder/" in message


def start_process(folder, workdir, port, process_id, *overrides):
  settings = ("train.mode=mesh", "train.mesh_data=1", "train.mesh_fsdp=4", "train.host_devices=2",
              f"train.coordinator=127.0.0.1:{port}", "train.num_processes=2",
              f"train.process_id={process_id}", "train.num_steps=2", *overrides)  # fmt: skip
  command = [sys.executable, "-m", "gptjax", "pretrain", "--config", f"{folder}/experiment.py"]
  command += ["--workdir", str(workdir), *(f"--config.{setting}" for setting in settings)]
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
  return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def run_two_processes(folder, workdir, *overrides):
  """Returns [(status, last line of standard error)]."""
  port = free_port()
  processes = [start_process(folder, workdir, port, i, *overrides) for i in range(2)]
  messages = [process.communicate(timeout=300)[1] for process in processes]
  return [(p.returncode, text.splitlines()[-1]) for p, text in zip(processes, messages)]


@pytest.mark.slow
def test_two_processes_share_one_model_and_end_together(folder):
  """They train, evaluate and sample parameters split over both; what one refuses ends both."""
  workdir = folder / "two"
  results = run_two_processes(folder, workdir)
  assert [status for status, _ in results] == [0, 0], results
  done = RunDirectory(workdir)
  assert done.latest_step() == 2 and len(done.read_samples()) == 2
  assert math.isfinite(done.read_metrics()[-1]["valid_loss"])
  (status, message), (other_status, other_message) = run_two_processes(
    folder, workdir, "optimizer.learning_rate=0.5"
  )
  assert (status, other_status) == (2, 2)
  assert "optimizer.learning_rate" in message and "another process" in other_message


BAD = {
  "a batch of many times the memory": (["train.batch_rows=100000000"], "a device needs"),
  "a profile after the end": (
    ["train.profile_num_steps=1", "train.profile_start_step=100"], "profile_start_step is 100"
  ),
  "a pattern of nothing": (["optimizer.decay_pattern=kernl"], "matches no parameter"),
  "all frozen": (["optimizer.frozen_pattern=."], "matches every parameter"),
  "a letter as the end": (["data.end_token=e"], "make it longer"),
  "unknown key": (["model.num_layer=3"], "num_layers"),
  "wrong type": (["train.num_steps=many"], "train.num_steps"),
  "missing file": (["data.files=['nowhere/*.txt']"], "nowhere"),
  "empty corpus": (["data.files=['{folder}/empty.txt']"], "empty"),
  "short corpus": (["data.files=['{folder}/short.txt']"], "17"),
  "no length": (["train.num_steps=None"], "num_tokens"),
  "two lengths": (["train.num_tokens=100"], "only one"),
  "wrong choice": (["optimizer.name=adamv"], "adamw"),
  "heads": (["model.num_heads=3"], "num_heads"),
  "accumulation": (["train.accumulation=3"], "train.accumulation"),
  "small vocabulary": (["model.vocab_size=3"], "model.vocab_size"),
  "no tokenizer": (["data.tokenizer={folder}/nothing"], "nothing"),
  "no such run": (["init_from={folder}/nothing"], "nothing"),
  "mesh": (["train.mode=mesh", "train.mesh_data=3"], "8"),
  "mesh without effect": (["train.mesh_fsdp=2"], "mesh"),
  "devices": (["train.host_devices=3"], "host_devices"),
  "prompt": (["eval.sample_prompts=('THE',)"], "eval.sample_prompts"),
  "empty prompt": (["data.files=['{folder}/one_line.txt']"], "eval.sample_prompts"),
  "another architecture": (["init_from={run}", "model.activation=relu"], "model.activation"),
  "another tokenizer": (
    ["init_from={run}", "data.files=['{folder}/one_line.txt']", "eval.sample_tokens=0",
     "model.vocab_size=19"],
    "tokenizer",
  ),
  "validation of a token": (
    ["data.valid_files=['{folder}/one_token.txt']"], "validation split has 1 tokens"
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case, folder, run, capsys):
  overrides, expected = BAD[case]
  overrides = [override.format(folder=folder, run=run.path) for override in overrides]
  assert pretrain(folder, folder / f"bad {case}", *overrides) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert lines[-1].startswith("gptjax: ")
  assert expected in lines[-1]
  assert not any("Traceback" in line for line in lines)


def test_a_run_of_another_config_is_left_alone(run, folder, capsys):
  before = run.metrics_path.read_bytes()
  assert pretrain(folder, run.path, "optimizer.learning_rate=0.5") == 2
  assert "optimizer.learning_rate" in capsys.readouterr().err
  assert run.metrics_path.read_bytes() == before


def test_other_data_are_refused_on_resume(run, folder, capsys):
  """The same files by name, with as many characters."""
  copy, text = folder / "other data", folder / "text.txt"
  shutil.copytree(run.path, copy)
  shutil.rmtree(copy / "checkpoints" / "12")
  content = text.read_text()
  try:
    text.write_text(content.replace("cat", "tac"))
    assert pretrain(folder, copy) == 2
  finally:
    text.write_text(content)
  assert "data.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_regular_evaluation_evaluates_and_saves_at_its_end(folder):
  overrides = ("eval.every_steps=0", "train.save_every_steps=None", "eval.sample_tokens=0",
               "train.num_steps=3")  # fmt: skip
  assert pretrain(folder, folder / "plain", *overrides) == 0
  done = RunDirectory(folder / "plain")
  assert done.latest_step() == 3 and not done.read_samples()
  assert [line["step"] for line in done.read_metrics() if "valid_loss" in line] == [3]


@pytest.mark.slow
def test_what_changes_no_number_may_change_on_resume(run, folder):
  copy = folder / "eased"
  shutil.copytree(run.path, copy)
  shutil.rmtree(copy / "checkpoints" / "12")
  overrides = ("train.log_every_steps=2", "train.keep_latest=1", "model.scan_layers=False")
  assert pretrain(folder, copy, *overrides) == 0
  assert RunDirectory(copy).latest_step() == NUM_STEPS


def show(folder, *arguments):
  return main(["data", "show", "--config", f"{folder}/experiment.py", *arguments])


def test_data_show_finds_the_bytes(run, folder, capsys):
  assert show(folder, "--step", "3", "--row", "5", "--json") == 0
  (span,) = json.loads(capsys.readouterr().out)["spans"]
  source = folder.joinpath("text.txt").read_bytes()
  assert len(span["text"]) == 17
  assert source[span["start_byte"] : span["end_byte"]].decode() == span["text"]
  assert show(folder, "--step", "3", "--row", "5") == 0
  assert span["text"] in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--step", "0"), ("--step", "1", "--row", "8")])
def test_data_show_refuses_rows_that_do_not_exist(arguments, run, folder, capsys):
  assert show(folder, *arguments) == 2
  assert capsys.readouterr().err.startswith("gptjax: ")
