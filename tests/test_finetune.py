"""`gptjax finetune` as a user meets it: from a saved model to results, and what is refused."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rendezvous import free_port

from gptjax.batch import Batch
from gptjax.checkpoint.models import load_model, save_run
from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.cli.main import main
from gptjax.data.tokenizer import train_bpe
from gptjax.model.config import ModelConfig
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_logits
from gptjax.model.parameters import init_parameters
from gptjax.train.variants import compare, summarize
from gptjax.tree import named_leaves

NUM_STEPS = 8
GOOD = ["fine", "lovely", "warm", "kind", "bright", "sweet", "clean", "calm"]
BAD_WORDS = ["poor", "stale", "cold", "rude", "dull", "sour", "dirty", "loud"]
MODEL = {
  "context_length": 32,
  "num_layers": 2,
  "model_dim": 16,
  "num_heads": 2,
  "vocab_multiple": 8,
}


def sentences(words, label):
  return [f"the {thing} was {w}\t{label}" for w in words for thing in ("tea", "room", "day")]


@pytest.fixture(scope="module", autouse=True)
def without_cache():
  """Nothing is left in the user's cache of programs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("GPTJAX_CACHE", "off")
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("finetune")
  rows = [*sentences(GOOD, "good"), *sentences(BAD_WORDS, "bad")]

  def write(name, header, lines):
    folder.joinpath(name).write_text("\n".join([header, *lines]) + "\n")

  write("train.tsv", "text\tlabel", rows)
  write("pairs.tsv", "text\ttext2\tlabel", [f"{w} tea\twarm tea\t{i}" for i, w in enumerate(GOOD)])
  write("other_label.tsv", "text\tlabel", [*rows[:4], "the cup was blue\tneither"])
  write("empty.tsv", "text\tlabel", [rows[0], rows[-1], "\tgood"])
  write("unequal.tsv", "text\tlabel", [rows[0], rows[-1], "only a text"])
  choices = [{"text": "a", "choices": ["b", "c"], "label": 0}]
  lone = [{"text": "d", "choices": ["e"], "label": 0}]
  for name, examples in (("choices.jsonl", choices * 4), ("lone.jsonl", choices + lone)):
    folder.joinpath(name).write_text("".join(json.dumps(e) + "\n" for e in examples))
  tokenizer = train_bpe(rows, 300)
  config = ModelConfig(vocab_size=tokenizer.vocab_size, **MODEL)
  save_run(folder / "model", config, init_parameters(config, jax.random.key(7)), tokenizer)
  save_run(folder / "mute", config, init_parameters(config, jax.random.key(7)))
  other = train_bpe(["quite another text, about whales"], 290)
  other.save(folder / "other.json")
  folder.joinpath("experiment.py").write_text(
    f"""
from gptjax.config import to_config_dict
from gptjax.train.finetune_config import FinetuneConfig

def get_config(arg=None):
  config = to_config_dict(FinetuneConfig())
  config.init_from = "{folder}/model"
  config.data.family = "classification"
  config.data.files = ("{folder}/train.tsv",)
  config.data.valid_files = ("{folder}/train.tsv",)
  config.data.num_buckets = 1
  config.optimizer.learning_rate = 1e-2
  config.train.update(num_steps={NUM_STEPS}, num_epochs=None, batch_rows=12)
  config.train.update(host_devices=8, log_every_steps=1, save_every_steps=4)
  config.eval.update(every_steps=4, batch_rows=20)
  return config
"""
  )
  return folder


def finetune(folder, workdir, *overrides):
  arguments = ["finetune", "--config", f"{folder}/experiment.py", "--workdir", str(workdir)]
  return main(arguments + [f"--config.{override}" for override in overrides])


@pytest.fixture(scope="module")
def run(folder):
  assert finetune(folder, folder / "run") == 0
  return RunDirectory(folder / "run")


def test_the_run_directory_is_complete(run):
  lines = run.read_metrics()
  assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
  assert all({"train_lm_loss", "learning_rate", "grad_norm"} <= line.keys() for line in lines)
  evaluated = {line["step"]: line for line in lines if "valid_accuracy" in line}
  assert [*evaluated] == [4, 8]
  assert evaluated[8]["valid_loss"] < math.log(2)  # that of a guess
  results = run.read_results()
  assert results["step"] == results["steps_trained"] == NUM_STEPS
  assert results["metrics"]["accuracy"] == evaluated[8]["valid_accuracy"]
  assert results["metrics"]["loss"] == pytest.approx(evaluated[8]["valid_loss"], rel=1e-6)
  assert run.read_config()["data"]["labels"] == ["bad", "good"]


def test_predictions_have_probabilities_and_give_the_metrics(run):
  predictions = [json.loads(line) for line in run.predictions_path.read_text().splitlines()]
  assert len(predictions) == run.read_results()["examples"] == 48
  for line in predictions:
    assert sum(line["probabilities"].values()) == pytest.approx(1, rel=1e-9)
    assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
  metrics = run.read_results()["metrics"]
  hits = [line["label"] == line["gold"] for line in predictions]
  assert metrics["accuracy"] == np.mean(hits)
  losses = [-math.log(line["probabilities"][line["gold"]]) for line in predictions]
  assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.slow
def test_predict_tells_what_training_wrote(run, folder, capsys):
  arguments = ["predict", "--model", str(run.path), "--data", f"{folder}/train.tsv", "--json"]
  assert main(arguments) == 0
  found = json.loads(capsys.readouterr().out)
  written = [json.loads(line) for line in run.predictions_path.read_text().splitlines()]
  for here, there in zip(found, written, strict=True):
    assert (here["id"], here["label"]) == (there["id"], there["label"])
    assert here["probabilities"] == pytest.approx(there["probabilities"], rel=1e-4)


def test_the_report_shows_classes_and_mistakes_offline(run):
  page = run.report_path.read_text()
  for words in ("Accuracy", "Classes", "Precision", "nats per example", "Language model"):
    assert words in page
  assert not re.search(r"""(src|href)\s*=\s*["']https?:""", page)


def test_a_complete_run_says_so_and_does_nothing(run, folder, capsys):
  before = run.metrics_path.read_bytes()
  assert finetune(folder, run.path) == 0
  assert "nothing to do" in capsys.readouterr().err
  assert run.metrics_path.read_bytes() == before


def numbers_of(run):
  return [(line["step"], line["train_loss"], line["grad_norm"]) for line in run.read_metrics()]


def test_a_resumed_run_repeats_the_undisturbed_one_to_the_bit(run, folder, capsys):
  """Results of a checkpoint that is lost are not those of the run."""
  copy = folder / "resumed"
  shutil.copytree(run.path, copy)
  shutil.rmtree(copy / "checkpoints" / "8")
  assert finetune(folder, copy) == 0
  assert "resuming after step 4" in capsys.readouterr().err
  assert numbers_of(RunDirectory(copy)) == numbers_of(run)
  assert RunDirectory(copy).predictions_path.read_text() == run.predictions_path.read_text()


def test_the_language_model_is_still_there(run, folder):
  """Its head, its tokenizer with three tokens more, and embedding rows for them."""
  before, after = load_model(folder / "model"), load_model(run.path)
  assert after.params.keys() == {"decoder", "task_head"}
  assert after.config.vocab_size == before.config.vocab_size + 3
  assert [*after.tokenizer.encode("the tea")] == [*before.tokenizer.encode("the tea")]
  tokens_BL = jnp.array([after.tokenizer.encode("the tea was")])
  batch = Batch(tokens_BL, tokens_BL, None)
  hidden = hidden_states(after.params["decoder"], batch, after.config)
  logits = lm_logits(after.params, hidden, after.config)
  assert logits.shape == (1, tokens_BL.shape[1], after.config.vocab_size)
  assert np.isfinite(logits).all()


REFUSED = {
  "no model": (["init_from="], "init_from"),
  "no such model": (["init_from={folder}/nothing"], "nothing"),
  "no tokenizer": (["init_from={folder}/mute"], "tokenizer"),
  "another tokenizer": (["tokenizer={folder}/other.json"], "other.json"),
  "a tokenizer that is too large": (
    ["init_from={folder}/mute", "tokenizer={folder}/large.json"], "another model"
  ),
  "a label outside the set": (
    ["data.labels=['good','bad']", "data.files=['{folder}/other_label.tsv']"], "neither"
  ),
  "a missing column": (["data.text_columns=['review']"], "review"),
  "an empty text": (["data.files=['{folder}/empty.tsv']"], "empty"),
  "unequal columns": (["data.files=['{folder}/unequal.tsv']"], "column"),
  "one choice": (
    ["data.family=multiple_choice", "data.files=['{folder}/lone.jsonl']"], "one"
  ),
  "missing files": (["data.files=['{folder}/nowhere.tsv']"], "nowhere"),
  "an unknown adapter": (["data.adapter=sst"], "sst2"),
  "too many layers": (["finetune.transfer_layers=3"], "2 layers"),
  "layers of nothing": (
    ["finetune.transfer_layers=1", "finetune.pretrained=False"], "transfer_layers"
  ),
  "everything frozen": (["optimizer.frozen_pattern=."], "every"),
  "nothing frozen": (["optimizer.frozen_pattern=decodr"], "decoder/"),
  "no kernel for LoRA": (["finetune.lora_pattern=querry"], "query/kernel"),
  "a rank without LoRA": (["finetune.lora_rank=4"], "without lora_pattern"),
  "a broken pattern": (["finetune.lora_pattern=(query"], "regular expression"),
  "class weights": (["finetune.class_weights=[1.0]"], "bad, good"),
  "weights of scores": (
    ["data.family=similarity", "data.target=score", "data.files=['{folder}/pairs.tsv']",
     "finetune.balance_classes=True"], "no classes"
  ),
  "two kinds of weights": (
    ["finetune.class_weights=[1.0,2.0]", "finetune.balance_classes=True"], "keep one"
  ),
  "tokens": (["train.num_steps=None", "train.num_tokens=100"], "train.num_tokens"),
  "z-loss": (["train.z_loss=0.1"], "train.z_loss"),
  "no length": (["train.num_steps=None"], "num_epochs"),
  "patience without checkpoints": (
    ["finetune.patience=2", "train.save_every_steps=6"], "train.save_every_steps"
  ),
  "longer than the context": (["data.max_length=64"], "data.max_length"),
  "an unknown mark": (["data.extract_token=<end>"], "<end>"),
  "dropout": (["model.residual_dropout=1.5"], "model.residual_dropout"),
  "a key": (["finetune.lm_coeff=0.1"], "finetune.lm_coefficient"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_in_one_line_before_any_training(case, folder, capsys):
  if case == "a tokenizer that is too large":
    train_bpe(["many words " + "".join(map(chr, range(33, 500)))] * 3, 400).save(
      folder / "large.json"
    )
  overrides, expected = REFUSED[case]
  workdir = folder / f"refused {case}"
  overrides = [override.format(folder=folder) for override in overrides]
  assert finetune(folder, workdir, *overrides) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert lines[-1].startswith("gptjax: ")
  assert expected in lines[-1]
  assert not any("Traceback" in line or "step 1" in line for line in lines)
  assert RunDirectory(workdir).latest_step() is None


def test_another_run_here_is_left_alone(run, folder, capsys):
  before = run.metrics_path.read_bytes()
  assert finetune(folder, run.path, "finetune.lm_coefficient=0.1") == 2
  assert "finetune.lm_coefficient" in capsys.readouterr().err
  copy = folder / "train.tsv.kept"
  shutil.copy(folder / "train.tsv", copy)
  try:
    text = copy.read_text()
    folder.joinpath("train.tsv").write_text(text.replace("the tea was fine", "the pie was fine"))
    assert finetune(folder, run.path) == 2
  finally:
    shutil.copy(copy, folder / "train.tsv")
  assert "data.json" in capsys.readouterr().err
  assert run.metrics_path.read_bytes() == before


def params_of(path):
  return named_leaves(load_model(path).params)


@pytest.mark.slow
def test_lora_trains_little_and_is_merged_on_loading(folder):
  overrides = ("finetune.lora_pattern=attention/(query|value)", "finetune.lora_rank=2")
  assert finetune(folder, folder / "lora", *overrides) == 0
  before, after = params_of(folder / "model"), params_of(folder / "lora")
  assert not any(name.startswith("lora") for name in after)
  changed = {
    name for name in before if not np.array_equal(before[name], after[name][: len(before[name])])
  }
  kernels = {f"decoder/layers/attention/{name}/kernel" for name in ("query", "value")}
  # Padding of the vocabulary became rows of new tokens.
  assert changed - {"decoder/token_embedding/embedding"} == kernels
  assert main(["convert", str(folder / "lora"), f"{folder}/merged", "--to", "gptjax"]) == 0
  again = params_of(folder / "merged")
  for name in kernels:
    np.testing.assert_array_equal(again[name], after[name])


@pytest.mark.slow
def test_it_stops_early_and_keeps_the_best(folder, capsys):
  overrides = ("finetune.patience=2", "eval.every_steps=1", "train.save_every_steps=1",
               "train.num_steps=60", "train.keep_latest=1",
               "optimizer.learning_rate=0.1")  # fmt: skip
  assert finetune(folder, folder / "early", *overrides) == 0
  done = RunDirectory(folder / "early")
  results = done.read_results()
  scores = {
    line["step"]: line["valid_accuracy"] for line in done.read_metrics() if "valid_loss" in line
  }
  assert results["steps_trained"] == max(scores) < 60
  best = max(scores.values())
  assert results["metrics"]["accuracy"] == best == scores[results["step"]]
  assert max([*scores.values()][-2:]) <= max([*scores.values()][:-2])
  assert done.latest_step() == results["step"]
  assert finetune(folder, folder / "early", *overrides) == 0
  assert "nothing to do" in capsys.readouterr().err


@pytest.mark.slow
def test_layers_and_new_rows_are_fresh_where_they_should_be(folder):
  overrides = ("finetune.transfer_layers=1", "train.num_steps=1", "optimizer.learning_rate=0.0")
  assert finetune(folder, folder / "one layer", *overrides) == 0
  before, after = params_of(folder / "model"), params_of(folder / "one layer")
  for name, leaf in before.items():
    if name.startswith("decoder/layers/") and name.endswith("kernel"):
      np.testing.assert_array_equal(after[name][0], leaf[0])
      assert not np.array_equal(after[name][1], leaf[1])
  rows = load_model(folder / "model").config.vocab_size
  embedding = after["decoder/token_embedding/embedding"]
  old = before["decoder/token_embedding/embedding"]
  np.testing.assert_array_equal(embedding[:rows], old[:rows])
  assert np.std(embedding[rows : rows + 3]) == pytest.approx(0.02, rel=0.5)


@pytest.mark.slow
def test_pretraining_starts_from_a_finetuned_model_without_its_head(run, folder, capsys):
  folder.joinpath("plain.txt").write_text("the tea was warm and the day was long; " * 40)
  command = ["pretrain", "--config", "experiments/shakespeare.py:tiny", "--workdir", f"{folder}/on"]
  settings = {
    "init_from": run.path,
    "data.files": f'["{folder}/plain.txt"]',
    "data.cache_dir": folder / "tokens",
    "data.tokenizer": run.path,
    "train.num_steps": 1,
    "train.host_devices": 8,
    "eval.sample_tokens": 0,
  }
  settings |= {f"model.{name}": value for name, value in MODEL.items()}
  capsys.readouterr()
  assert main(command + [f"--config.{name}={value}" for name, value in settings.items()]) == 0
  assert 'its "task_head" is left out' in capsys.readouterr().err


@pytest.mark.slow
def test_a_finetuned_model_generates(run, capsys):
  arguments = ["--prompt", "the tea", "--max-new-tokens", "4", "--json"]
  assert main(["generate", "--model", str(run.path), *arguments]) == 0
  assert len(json.loads(capsys.readouterr().out)["texts"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["similarity", "multiple_choice"])
def test_the_other_families_run(family, folder):
  files = {"similarity": "pairs.tsv", "multiple_choice": "choices.jsonl"}
  overrides = [f"data.family={family}", f"data.files=['{folder}/{files[family]}']",
               f"data.valid_files=['{folder}/{files[family]}']", "train.num_steps=2"]  # fmt: skip
  overrides += ["data.target=score"] * (family == "similarity")
  assert finetune(folder, folder / family, *overrides) == 0
  metrics = RunDirectory(folder / family).read_results()["metrics"]
  expected = {
    "similarity": {"loss", "pearson", "spearman"},
    "multiple_choice": {"loss", "accuracy"},
  }
  assert metrics.keys() == expected[family]
  if family == "similarity":
    head = load_model(folder / family).params["task_head"]
    assert float(head["bias"][0]) == pytest.approx(3.5, abs=0.05)  # the mean of 0 .. 7


@pytest.mark.slow
def test_seeds_are_runs_beside_each_other_and_go_on(folder, capsys):
  overrides = ("num_seeds=2", "train.num_steps=2", "finetune.lm_coefficient=0.0")
  assert finetune(folder, folder / "seeds", *overrides) == 0
  results = json.loads((folder / "seeds" / "results.json").read_text())
  accuracy = results["variants"][""]["accuracy"]
  values = [RunDirectory(folder / "seeds" / f"seed-{seed}").read_results() for seed in (0, 1)]
  assert accuracy["mean"] == np.mean([value["metrics"]["accuracy"] for value in values])
  assert values[0]["metrics"]["loss"] != values[1]["metrics"]["loss"]
  shutil.rmtree(folder / "seeds" / "seed-1")
  assert finetune(folder, folder / "seeds", *overrides) == 0
  assert json.loads((folder / "seeds" / "results.json").read_text()) == results
  assert "nothing to do" in capsys.readouterr().err


def start_process(folder, workdir, port, process_id, *overrides):
  settings = (f"train.coordinator=127.0.0.1:{port}", "train.num_processes=2",
              f"train.process_id={process_id}", "train.host_devices=2", *overrides)  # fmt: skip
  command = [sys.executable, "-m", "gptjax", "finetune", "--config", f"{folder}/experiment.py"]
  command += ["--workdir", str(workdir), *(f"--config.{setting}" for setting in settings)]
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
  return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "mesh"])
def test_two_processes_learn_and_predict_what_one_does(mode, folder):
  overrides = ("train.num_steps=2", "train.batch_rows=10", "finetune.classifier_dropout=0.0",
               *(f"model.{part}_dropout=0.0" for part in ("embedding", "attention", "residual")),
               f"train.mode={mode}")  # fmt: skip
  assert finetune(folder, folder / f"one {mode}", *overrides) == 0
  port = free_port()
  processes = [start_process(folder, folder / f"two {mode}", port, i, *overrides) for i in (0, 1)]
  messages = [process.communicate(timeout=600)[1] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], messages
  one, two = (RunDirectory(folder / f"{name} {mode}").read_results() for name in ("one", "two"))
  assert two["examples"] == one["examples"]
  assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-4)


def test_means_deviations_and_paired_differences():
  ours = {"accuracy": {0: 0.8, 1: 0.7, 2: 0.9}, "loss": {0: 1.0}}
  theirs = {"accuracy": {0: 0.7, 1: 0.6, 2: 0.7}}
  summary = summarize(ours)
  assert summary["accuracy"]["mean"] == pytest.approx(0.8)
  assert summary["accuracy"]["deviation"] == pytest.approx(0.1)
  assert summary["loss"]["deviation"] is None
  difference = compare(ours, theirs)
  assert difference.keys() == {"accuracy"}
  assert difference["accuracy"]["mean"] == pytest.approx(0.4 / 3)
  # t(0.975, 2) = 4.3027, of values with the deviation 0.057735.
  assert difference["accuracy"]["half_width"] == pytest.approx(
    4.3027 * 0.0577350 / 3**0.5, rel=1e-4
  )
  one = {"accuracy": {1: 0.5}}
  assert compare(one, theirs)["accuracy"] == {"mean": pytest.approx(-0.1), "half_width": None}
