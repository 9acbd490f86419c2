"""The benchmarks' helpers are right, and each program ends with the JSON line it promises."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.train.hardware import flops_per_token

ROOT = Path(__file__).parent.parent
# They are programs of the repository, not a part of the installed package.
sys.path.insert(0, str(ROOT))

from benchmarks import common, loss_memory, prove_resume, time_to_loss, train_step  # noqa: E402

needs_torch = pytest.mark.skipif(
  importlib.util.find_spec("torch") is None, reason="the twin needs PyTorch"
)


def make_counter(offset):
  """A contestant: gives back what it is told, plus an offset, and its process."""
  return lambda count: (count + offset, os.getpid())


def make_failure():
  """A contestant that cannot start."""
  raise ValueError("no such thing")


def run_benchmark(name, *arguments):
  """Runs a benchmark as a person does; returns its last line, parsed, and its exit status."""
  environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
  done = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{name}", *arguments],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout.splitlines()[-1]), done.returncode


@pytest.mark.slow
def test_decode_runs_every_case():
  result, status = run_benchmark("decode", "--quick")
  assert status == 0
  sides = [set(case) for case in result["seconds"].values()]
  assert len(sides) == 3 and all("gptjax" in case for case in sides)
  figures = [case["gptjax"]["all_tokens"]["median"] for case in result["seconds"].values()]
  assert all(figure > 0 for figure in figures)


def test_summary_and_ratio_are_of_medians():
  ours, twin = common.summarize([4.0, 1.0, 2.0]), common.summarize([4.0, 9.0])
  assert ours == common.Figure(median=2.0, minimum=1.0, rounds=3)
  assert common.ratio(ours, twin) == 2.0 / 6.5
  assert common.ratio(ours, None) is None
  assert common.ratio(None, twin) is None


def test_contestants_take_turns_in_their_own_processes():
  make = f"{__name__}:make_counter"
  with common.Contestant(make, offset=1) as one, common.Contestant(make, offset=2) as two:
    results = common.alternate({"one": one, "two": two}, {"one": 10, "two": 20}, rounds=2)
  values = {name: [value for value, _ in rounds] for name, rounds in results.items()}
  assert values == {"one": [11, 11], "two": [22, 22]}
  processes = {process for rounds in results.values() for _, process in rounds}
  assert len(processes | {os.getpid()}) == 3


def test_a_failing_contestant_is_an_error():
  with pytest.raises(RuntimeError, match="ValueError: no such thing"):
    common.Contestant(f"{__name__}:make_failure")


def test_last_line_of_a_printed_result_is_json(capsys):
  result = {"benchmark": "x", "machine": common.machine(), "figure": common.summarize([1.0])}
  common.print_result("title", ["a", "b"], [["c", None]], result, ["a note"])
  lines = capsys.readouterr().out.splitlines()
  assert any("title" in line for line in lines) and "a note" in lines
  assert json.loads(lines[-1]) == result | {"figure": {"median": 1.0, "minimum": 1.0, "rounds": 1}}


def test_fraction_of_roof():
  figure = common.Figure(median=2.0, minimum=1.0, rounds=3)
  measured = {"ours": figure, "twin": None, "flops": 3e9, "roof": 2e9, "roof_source": "jax 8"}
  result = train_step.gpt2_result(measured)
  assert result["gpt2_fraction_of_roof"] == 0.75
  assert result["gpt2_fraction_of_roof_best"] == 1.5
  assert result["gpt2_ratio"] is None
  assert len(train_step.gpt2_rows(result, has_twin=False)) == 3


def test_gpt2_is_124m_on_one_host_device():
  config = train_step.gpt2_config({"train.loss_chunk_tokens": "256"})
  assert (config.train.host_devices, config.train.loss_chunk_tokens) == (1, 256)
  # 6 * 124M for the weights and 4 % for attention; 1 % for what the rounding of 124M leaves.
  assert math.isclose(flops_per_token(config.model, 256), 6 * 124e6 * 1.04, rel_tol=0.01)
  batch = train_step.random_batch(4, 256, config.model)
  assert batch.tokens_BL.shape == (4, 256)
  assert (batch.tokens_BL[:, 1:] == batch.targets_BL[:, :-1]).all()


def test_nanogpt_recipe_is_the_experiments(tmp_path):
  config = train_step.nanogpt_config(tmp_path / "text.txt", tmp_path)
  assert config.optimizer.name == "adamw"
  assert (config.train.batch_rows, config.model.context_length) == (12, 64)
  train_step.write_text(tmp_path / "text.txt")
  text = (tmp_path / "text.txt").read_text()
  assert (len(text), len(set(text))) == (1_115_394, 65)


def test_time_to_loss_skips_without_its_text(tmp_path, capsys):
  result = time_to_loss.main(["--text", str(tmp_path / "absent.txt")])
  printed = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert printed == result
  assert "absent.txt" in printed["skipped"]


def test_first_line_that_reaches_the_target():
  lines = [{"step": 1}, {"step": 2, "valid_loss": 1.9}, {"step": 3, "valid_loss": 1.898}]
  assert time_to_loss.first_reaching(lines) == lines[2]
  assert time_to_loss.first_reaching(lines[:2]) is None


def test_a_run_that_logs_more_time_than_passed_is_refused():
  time_to_loss.check_clocks(None, None)
  time_to_loss.check_clocks(2.0, 1.0)
  with pytest.raises(RuntimeError, match=r"only 1\.0 s passed"):
    time_to_loss.check_clocks(1.0, 2.0)


def test_fresh_environment_has_no_compilation_cache(monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
  environment = time_to_loss.fresh_environment("/home/new")
  assert not any("COMPILATION_CACHE" in key for key in environment)
  assert environment["HOME"] == "/home/new" and "PATH" in environment


def test_layouts_are_pmap_and_every_mesh():
  names = [str(layout) for layout in prove_resume.layouts(8)]
  assert names[0] == "pmap"
  expected = {"8x1x1", "1x8x1", "1x1x8", "2x2x2", "2x1x4", "4x2x1"}
  assert expected < set(names)
  assert len(names) == len(set(names)) == 11


def fake_layouts(last_loss):
  run = [3.0, 2.0], {"params/x": np.ones(2, np.float32)}
  other = [3.0, last_loss], {"params/x": np.full(2, 1.5, np.float32)}
  one, two = {"pmap": run}, {"pmap": run, "2x1x1": other}
  return {1: {"digest": "a", "runs": one}, 2: {"digest": "a", "runs": two}}


def test_equal_layouts_pass_and_different_ones_fail():
  verdicts, expected, differences = prove_resume.compare_layouts(fake_layouts(2.0))
  assert all(verdict.is_passed for verdict in verdicts) and expected == [3.0, 2.0]
  assert differences["2 2x1x1"] == {"train_loss": 0.0, "parameters": 0.5}

  verdicts, _, differences = prove_resume.compare_layouts(fake_layouts(2.00001))
  passed = {verdict.name.split(":")[0]: verdict.is_passed for verdict in verdicts}
  assert passed["1 layouts of 1 devices"] and not passed["2 layouts of 2 devices"]
  assert not passed["all 3 layouts"]
  # The quotient of two differences of float64 numbers near 2.
  assert math.isclose(differences["2 2x1x1"]["train_loss"], 5e-6, rel_tol=1e-9)


def test_other_data_or_a_missing_loss_fails():
  results = fake_layouts(2.0)
  results[2]["digest"] = "b"
  verdicts, _, _ = prove_resume.compare_layouts(results)
  assert not verdicts[-1].is_passed
  assert prove_resume.relative_difference([1.0], [1.0, 2.0]) == math.inf
  stopped, same = prove_resume.compare_elastic([1, 3], [2.0], [2.0])
  assert stopped.is_passed and same.is_passed
  stopped, same = prove_resume.compare_elastic([1, None], [2.1], [2.0])
  assert not stopped.is_passed and not same.is_passed


def test_losses_of_a_run_come_in_order(tmp_path):
  run = RunDirectory(tmp_path)
  assert prove_resume.last_step(run) == 0
  for step, loss in ((1, 0.1), (2, 1 / 3)):
    run.append_metrics({"step": step, "train_loss": loss})
  assert prove_resume.train_losses(run) == [(1, 0.1), (2, 1 / 3)]
  assert prove_resume.last_step(run) == 2


def test_chunks_are_compared_with_the_whole():
  whole = loss_memory.Measured(100, 200, common.summarize([4.0]))
  chunked = loss_memory.Measured(25, 100, common.summarize([5.0]))
  assert loss_memory.compare(chunked, whole) == {
    "temporary_ratio": 0.25,
    "peak_ratio": 0.5,
    "seconds_ratio": 1.25,
  }


@needs_torch
@pytest.mark.hf
def test_twin_is_nanogpts_size_and_evaluates_every_target_once():
  import torch

  from benchmarks import torch_twin

  # Its threads wait for each other by spinning, which takes minutes on a busy machine.
  torch.set_num_threads(1)
  tokens = np.random.default_rng(0).integers(0, 65, 1_000, np.uint16)
  trainer = torch_twin.Trainer(torch_twin.Recipe(), tokens)
  # nanoGPT says 0.80M, positions not counted.
  size = sum(p.numel() for p in trainer.model.parameters())
  assert size - 64 * 128 == 4 * (12 * 128**2 + 2 * 128) + 128 + 65 * 128
  recipe = torch_twin.Recipe()
  assert torch_twin.learning_rate(recipe, 100) == recipe.learning_rate
  assert torch_twin.learning_rate(recipe, 2_000) == recipe.final_learning_rate
  # float32 means over differently sized parts.
  split = trainer.evaluate(tokens, rows=3)
  assert math.isclose(split, trainer.evaluate(tokens), rel_tol=1e-6)
  assert trainer.train(20) < split


@pytest.mark.slow
def test_loss_memory_runs():
  result, status = run_benchmark("loss_memory", "--quick")
  assert status == 0
  assert result["loss"]["temporary_ratio"] < 1 and result["step"]["peak_ratio"] < 1


@pytest.mark.slow
def test_train_step_runs():
  result, status = run_benchmark("train_step", "--quick")
  assert status == 0
  has_twin = importlib.util.find_spec("torch") is not None
  assert (result["nanogpt_ratio"] is not None) == has_twin
  assert (result["nanogpt_twin_seconds"] is not None) == has_twin
  assert 0 < result["gpt2_fraction_of_roof"] < 1


@pytest.mark.slow
def test_time_to_loss_says_when_it_missed(tmp_path):
  (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 500)
  steps = ["--set", "train.num_steps=2", "--set", "train.save_every_steps=2"]
  text = ["--text", str(tmp_path / "text.txt")]
  result, status = run_benchmark("time_to_loss", *text, "--twin-steps", "0", *steps)
  assert status == 1
  assert (result["reached"], result["ratio"], result["ours_seconds"]) == (False, None, None)
  assert result["ours"][0]["valid_loss"] > result["target_nats"]


@pytest.mark.slow
def test_prove_resume_passes():
  result, status = run_benchmark("prove_resume", "--quick", "--steps", "60", "--seed", "1")
  assert status == 0
  assert result["passed"] and all(verdict["is_passed"] for verdict in result["verdicts"])


@pytest.mark.slow
def test_serve_mixes_nothing():
  result, status = run_benchmark("serve", "--quick")
  assert status == 0
  assert result["differing_texts"] == 0 and result["requests"] >= 64


@pytest.mark.slow
def test_editor_runs():
  result, status = run_benchmark("editor", "--quick")
  assert status == 0
  assert result["quick"] and set(result["median_seconds"]) == {"first", "second", "unread"}
  assert all(0 < seconds < 60 for seconds in result["longest_seconds"].values())
