"""`gptjax predict` and the text-classification pipeline: predictions as users ask for them."""

import json

import numpy as np
import pytest
from task_models import make_examples, make_model, slow_outputs

import gptjax
from gptjax.checkpoint.models import load_model, save_run
from gptjax.cli.main import main
from gptjax.data.examples import Example
from gptjax.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def without_cache(monkeypatch):
  """Nothing is left in the user's cache of programs."""
  monkeypatch.setenv("GPTJAX_CACHE", "off")


def save_model(folder, family, **changes):
  model = make_model(folder, family, **changes)
  save_run(folder / "run", model.config, model.params, model.tokenizer, model.task)
  return str(folder / "run")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
  # One length and so one program.
  return save_model(tmp_path_factory.mktemp("classes"), "classification", max_length=12)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("pairs"), "similarity", max_length=24)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("answers"), "multiple_choice", max_length=24)


def predict(capsys, *arguments, status=0):
  assert main(["predict", *arguments]) == status
  return capsys.readouterr()


def test_a_saved_model_is_the_same(classes, tmp_path):
  saved = load_model(classes)
  fresh = make_model(tmp_path, "classification", max_length=12)
  assert saved.task == fresh.task
  np.testing.assert_array_equal(
    saved.params["task_head"]["kernel"], fresh.params["task_head"]["kernel"]
  )


@pytest.mark.slow
def test_a_fine_tuned_model_still_writes(classes):
  out = gptjax.load(classes).generate("abc", max_new_tokens=2)
  assert out.tokens.shape == (1, 5)


def test_one_text_from_the_command_line(classes, capsys):
  out = predict(capsys, "--model", classes, "--text", "abc", "--json").out
  (prediction,) = json.loads(out)
  assert prediction["probabilities"].keys() == {"no", "perhaps", "yes"}
  assert prediction["label"] == max(
    prediction["probabilities"], key=prediction["probabilities"].get
  )
  assert sum(prediction["probabilities"].values()) == pytest.approx(1)


def test_a_file_is_predicted_in_its_order_and_scored(classes, tmp_path, capsys):
  examples = make_examples("classification", 9)
  file = tmp_path / "a.tsv"
  rows = [f"{example.text[0].strip() or 'a'}\tyes\n" for example in examples]
  file.write_text("text\tlabel\n" + "".join(rows))
  found = predict(capsys, "--model", classes, "--data", str(file), "--json")
  predictions = json.loads(found.out)
  assert [prediction["id"] for prediction in predictions] == [str(n) for n in range(9)]
  share = sum(prediction["label"] == "yes" for prediction in predictions) / 9
  assert f"accuracy {share:.4f} on 9 labelled examples" in found.err


def test_pairs_and_answers_from_the_command_line(pairs, answers, capsys):
  arguments = ("--model", pairs, "--text", "ab", "--text2", "cde", "--json")
  (prediction,) = json.loads(predict(capsys, *arguments).out)
  assert prediction.keys() == {"id", "score"}
  arguments = ("--model", answers, "--text", "ab", "--choice", "c", "--choice", "d")
  _, index, probability = predict(capsys, *arguments).out.split("\t")
  assert index in ("0", "1") and 0.5 <= float(probability) <= 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "either by --data FILE or by --text TEXT"),
    (("--text", "a", "--data", "b"), "either by --data FILE or by --text TEXT"),
    (("--text", "a", "--text2", "b"), "--text2 has no effect on a task of classification"),
    (("--text", "a", "--choice", "b"), "--choice has no effect"),
    (("--data", "a.tsv", "--text2", "b"), "--text2 has no effect beside --data"),
    (("--text", " "), "a text is empty"),
    (("--text", "xyz"), "character 'x'"),
    (("--data", "no.tsv"), "no file matches"),
  ],
)
def test_what_does_not_fit_is_one_line(classes, capsys, arguments, message):
  found = predict(capsys, "--model", classes, *arguments, status=2)
  assert message in found.err and found.err.count("\n") == 1 and found.out == ""


def test_a_task_of_pairs_needs_pairs(pairs, answers, tmp_path, capsys):
  found = predict(capsys, "--model", pairs, "--text", "a", status=2)
  assert "the model's task is similarity; give --text2 too" in found.err
  found = predict(capsys, "--model", answers, "--text", "a", "--choice", "b", status=2)
  assert "at least two answers" in found.err
  model = make_model(tmp_path, "classification")
  save_run(tmp_path / "lm", model.config, {"decoder": model.params["decoder"]}, model.tokenizer)
  found = predict(capsys, "--model", str(tmp_path / "lm"), "--text", "a", status=2)
  assert "was not fine-tuned on a task; run gptjax finetune" in found.err


def test_the_pipeline_has_the_shapes_of_transformers(classes):
  classify = gptjax.pipeline("text-classification", model=classes)
  (best,) = classify("abc")
  assert best.keys() == {"label", "score"} and 1 / 3 < best["score"] <= 1
  assert classify(["abc", "d"])[0]["label"] == best["label"]
  every = classify("abc", top_k=None)
  assert every[0] == {"label": best["label"], "score": pytest.approx(best["score"])}
  assert sorted(e["label"] for e in every) == ["no", "perhaps", "yes"]
  assert [e["score"] for e in every] == sorted((e["score"] for e in every), reverse=True)
  assert [len(labels) for labels in classify(["abc", "d"], top_k=2)] == [2, 2]
  assert classify({"text": "abc"})["label"] == best["label"]
  raw = classify("abc", top_k=None, function_to_apply="none")
  spread = np.exp([e["score"] for e in raw])
  np.testing.assert_allclose(spread / spread.sum(), [e["score"] for e in every], rtol=1e-5)


def test_the_pipeline_of_scores_takes_pairs(pairs):
  classify = gptjax.pipeline("text-classification", model=gptjax.load(pairs))
  found = classify({"text": "ab", "text_pair": "cde"})
  expected = slow_outputs(load_model(pairs), Example("", ("ab",), ("cde",)))
  assert found == {"label": "LABEL_0", "score": pytest.approx(float(expected[0]), rel=1e-4)}
  with pytest.raises(DataError, match=r"needs \['text', 'text_pair'\]"):
    classify("ab")


def test_the_pipeline_refuses_what_has_no_effect(classes, answers):
  classify = gptjax.pipeline("text-classification", model=classes)
  with pytest.raises(ConfigError, match='did you mean "top_k"'):
    classify("abc", top_p=1)
  with pytest.raises(ConfigError, match='did you mean "softmax"'):
    classify("abc", function_to_apply="softmx")
  with pytest.raises(ConfigError, match="top_k is 0"):
    classify("abc", top_k=0)
  with pytest.raises(DataError, match="must not be empty"):
    classify(["abc", " "])
  with pytest.raises(ConfigError, match="chooses among answers"):
    gptjax.pipeline("text-classification", model=answers)
  with pytest.raises(ConfigError, match='did you mean "text-classification"'):
    gptjax.pipeline("text-clasification", model=classes)
