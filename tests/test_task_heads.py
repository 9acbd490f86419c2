"""Classifiers in transformers' files and back: the same logits, labels and marks, or a refusal."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from task_models import make_examples, make_model

from gptjax.checkpoint.export import save_hf
from gptjax.checkpoint.models import load_model
from gptjax.cli.main import main
from gptjax.data.examples import Example
from gptjax.errors import CheckpointError
from gptjax.evaluate.classify import Classifier


def save(model, folder, **changes):
  save_hf(folder, model.config, model.params, model.tokenizer, task=model.task)
  config = json.loads((folder / "config.json").read_text()) | changes
  (folder / "config.json").write_text(json.dumps(config))
  return config


@pytest.mark.parametrize(
  ("family", "architecture", "changes"),
  [
    ("classification", "gpt2", {"max_length": 8}),
    pytest.param("entailment", "gpt1", {"max_length": 20}, marks=pytest.mark.slow),
    pytest.param(
      "entailment",
      "gptj",
      {"target": "score", "labels": (), "score_range": (0.0, 5.0)},
      marks=pytest.mark.slow,
    ),
    pytest.param("multiple_choice", "gpt1", {}, marks=pytest.mark.slow),
  ],
)
def test_what_is_written_is_read_back(tmp_path, family, architecture, changes):
  model = make_model(tmp_path, family, architecture, **changes)
  save(model, tmp_path / "hf")
  lines = []
  loaded = load_model(tmp_path / "hf", report=lines.append)
  assert lines == []
  assert loaded.task == model.task
  assert loaded.tokenizer.encode("abc") == model.tokenizer.encode("abc")
  examples = make_examples(family, 3)
  outputs_NC = Classifier(model).outputs(examples)
  np.testing.assert_allclose(Classifier(loaded).outputs(examples), outputs_NC, rtol=1e-4, atol=1e-4)


def test_a_bias_becomes_that_of_the_last_norm(tmp_path):
  model = make_model(tmp_path, "classification")
  config = save(model, tmp_path / "hf")
  tensors = load_file(tmp_path / "hf/model.safetensors")
  assert config["architectures"] == ["GPT2ForSequenceClassification"]
  assert config["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
  assert config["problem_type"] == "single_label_classification"
  shift_D = tensors["transformer.ln_f.bias"] - model.params["decoder"]["final_norm"]["bias"]
  head = model.params["task_head"]
  np.testing.assert_array_equal(tensors["score.weight"], head["kernel"].T)
  np.testing.assert_allclose(shift_D @ head["kernel"], head["bias"], rtol=1e-4, atol=1e-5)
  # No other tensor is touched, and without a bias none is.
  model.params["task_head"]["bias"] = np.zeros_like(head["bias"])
  save(model, tmp_path / "plain")
  plain = load_file(tmp_path / "plain/model.safetensors")
  differs = [name for name in plain if not np.array_equal(plain[name], tensors[name])]
  assert differs == ["transformer.ln_f.bias"]
  np.testing.assert_array_equal(
    plain["transformer.ln_f.bias"], model.params["decoder"]["final_norm"]["bias"]
  )


def test_a_classifier_of_others_reads_the_bare_text(tmp_path):
  model = make_model(tmp_path, "classification", marks=(), max_length=8)
  names = {"0": "bad", "1": "so so", "2": "good"}
  config = save(model, tmp_path / "hf", id2label=names)
  del config["gptjax_task"]
  (tmp_path / "hf/config.json").write_text(json.dumps(config))
  loaded = load_model(tmp_path / "hf")
  assert loaded.task.labels == ("bad", "so so", "good") and loaded.task.marks == ()
  examples = [Example("", ("abc",)), Example("", ("hgfedcba",))]
  np.testing.assert_allclose(
    Classifier(loaded).outputs(examples), Classifier(model).outputs(examples), rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize(
  ("family", "changes", "line"),
  [
    ("classification", {"problem_type": "multi_label_classification"}, "several labels"),
    ("multiple_choice", {"summary_type": "last"}, "summary_type is 'last'"),
    ("multiple_choice", {"summary_activation": "tanh"}, "summary_activation is 'tanh'"),
  ],
)
def test_a_head_of_another_kind_is_left_out_and_said(tmp_path, family, changes, line):
  save(make_model(tmp_path, family), tmp_path / "hf", **changes)
  lines = []
  loaded = load_model(tmp_path / "hf", report=lines.append)
  assert loaded.task is None and "task_head" not in loaded.params
  assert any(line in said and "left out" in said for said in lines)


def test_what_transformers_has_no_class_for_is_refused(tmp_path):
  model = make_model(tmp_path, "similarity")
  with pytest.raises(CheckpointError, match="a pair in both orders"):
    save(model, tmp_path / "hf")
  model = make_model(tmp_path, "multiple_choice", "gptj")
  with pytest.raises(CheckpointError, match="multiple choice on a gptj"):
    save(model, tmp_path / "hf")
  model = make_model(tmp_path, "classification")
  model.params["task_head"]["kernel"][:, 1] = 0
  with pytest.raises(CheckpointError, match="a bias that its kernel"):
    save(model, tmp_path / "hf")
  model.tokenizer = None
  with pytest.raises(CheckpointError, match="no tokenizer"):
    save(model, tmp_path / "hf")
  assert not (tmp_path / "hf").exists()


def test_a_head_that_contradicts_its_config_is_refused(tmp_path):
  model = make_model(tmp_path, "classification")
  config = save(model, tmp_path / "hf")
  config["gptjax_task"]["labels"] = ["no", "yes"]
  (tmp_path / "hf/config.json").write_text(json.dumps(config))
  with pytest.raises(CheckpointError, match=r"3 outputs, and its config.json says 2"):
    load_model(tmp_path / "hf")


def test_convert_writes_the_task_or_the_language_model(tmp_path, capsys):
  model = make_model(tmp_path, "classification")
  save(model, tmp_path / "hf")
  run, lm = str(tmp_path / "run"), str(tmp_path / "lm")
  assert main(["convert", str(tmp_path / "hf"), run, "--to", "gptjax"]) == 0
  assert load_model(run).task == model.task
  assert main(["convert", run, lm, "--to", "hf", "--head", "lm"]) == 0
  assert load_model(lm).task is None
  assert "score.weight" not in load_file(tmp_path / "lm/model.safetensors")
  assert main(["convert", lm, str(tmp_path / "x"), "--to", "hf", "--head", "task"]) == 2
  assert "was not fine-tuned" in capsys.readouterr().err
