"""Classifiers exchanged with transformers: equal logits, from our files and from theirs."""

import numpy as np
import pytest
from families import relative_error
from task_models import make_examples, make_model, make_tokenizer

from gptjax import pipeline
from gptjax.checkpoint.export import save_hf
from gptjax.checkpoint.models import load_model
from gptjax.data.examples import Example
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.task_inputs import encode_examples, find_task_tokens
from gptjax.evaluate.classify import Classifier

pytestmark = pytest.mark.hf

TOLERANCE = 1e-5  # both sides are float32
SIZES = {"n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 3}


def export(model, folder):
  save_hf(folder, model.config, model.params, model.tokenizer, task=model.task)
  return folder


def filled_rows(model, examples, fill):
  """Returns int64 [rows, length], and the last place of each row, int64 [rows]."""
  import torch

  tokens = find_task_tokens(model.tokenizer, model.task)
  encoded = encode_examples(examples, model.task.task, model.tokenizer, tokens, 24)
  rows = [np.concatenate(pieces) for sequences in encoded.sequences for pieces in sequences]
  filled = np.full((len(rows), max(map(len, rows))), fill, np.int64)
  for index, row in enumerate(rows):
    filled[index, : len(row)] = row
  lasts = np.array([len(row) - 1 for row in rows], np.int64)
  return torch.from_numpy(filled), torch.from_numpy(lasts)


@pytest.mark.parametrize("architecture", ["gpt1", "gpt2", "gptj", "gptneo", "gptneox"])
@pytest.mark.parametrize("family", ["classification", "entailment"])
def test_sequence_classifiers_have_our_logits(tmp_path, family, architecture):
  import torch
  import transformers

  model = make_model(tmp_path, family, architecture)
  export(model, tmp_path / "hf")
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
  assert list(theirs.config.id2label.values()) == list(model.task.task.labels)
  examples = make_examples(family)
  rows, _ = filled_rows(model, examples, theirs.config.pad_token_id)
  with torch.no_grad():
    expected = theirs.eval()(rows).logits.numpy()
  assert relative_error(Classifier(model).outputs(examples), expected) < TOLERANCE


@pytest.mark.parametrize("architecture", ["gpt1", "gpt2"])
def test_double_heads_have_our_logits(tmp_path, architecture):
  import torch
  import transformers

  model = make_model(tmp_path, "multiple_choice", architecture)
  export(model, tmp_path / "hf")
  name = {"gpt1": "OpenAIGPTDoubleHeadsModel", "gpt2": "GPT2DoubleHeadsModel"}[architecture]
  theirs = getattr(transformers, name).from_pretrained(tmp_path / "hf").eval()
  examples = [e for e in make_examples("multiple_choice") if len(e.choices) == 3]
  rows, lasts = filled_rows(model, examples, 0)
  with torch.no_grad():
    out = theirs(rows.reshape(-1, 3, rows.shape[1]), mc_token_ids=lasts.reshape(-1, 3))
  expected = out.mc_logits.numpy().reshape(-1, 3)
  assert relative_error(Classifier(model).outputs(examples), expected) < TOLERANCE


def test_their_pipeline_reads_text_as_ours_does(tmp_path):
  import transformers

  for family, inputs in {
    "classification": ["abc", "hgfe dcba"],
    "entailment": [{"text": "ab", "text_pair": "cde"}, {"text": "f", "text_pair": "gh gh"}],
  }.items():
    (tmp_path / family).mkdir()
    folder = str(export(make_model(tmp_path / family, family), tmp_path / family / "hf"))
    theirs = transformers.pipeline("text-classification", model=folder)
    ours = pipeline("text-classification", model=folder)
    for options in ({}, {"top_k": None}, {"top_k": 2}, {"function_to_apply": "none"}):
      for given in (inputs, inputs[0]):
        assert _flat(ours(given, **options)) == _flat(theirs(given, **options))


def _flat(result):
  if isinstance(result, list):
    return [_flat(entry) for entry in result]
  return {"label": result["label"], "score": pytest.approx(result["score"], rel=1e-4, abs=1e-6)}


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_classifier_that_transformers_saved(tmp_path, num_labels):
  import torch
  import transformers

  tokenizer = make_tokenizer(tmp_path, TaskDataConfig(family="classification", marks=()))
  config = transformers.GPT2Config(
    vocab_size=tokenizer.vocab_size, pad_token_id=0, num_labels=num_labels, **SIZES
  )
  theirs = transformers.GPT2ForSequenceClassification(config).eval()
  theirs.save_pretrained(tmp_path / "hf")
  tokenizer.save(tmp_path / "hf/tokenizer.json")
  loaded = load_model(tmp_path / "hf")
  assert loaded.task.task.target == ("score" if num_labels == 1 else "class")
  assert len(loaded.task.task.labels) == (0 if num_labels == 1 else 3)
  texts = ["abc", "hgfe dcba"]
  with torch.no_grad():
    expected = [theirs(torch.tensor([tokenizer.encode(text)])).logits.numpy()[0] for text in texts]
  outputs_NC = Classifier(loaded).outputs([Example("", (text,)) for text in texts])
  assert relative_error(outputs_NC, np.stack(expected)) < TOLERANCE


def test_double_heads_that_transformers_saved(tmp_path):
  import torch
  import transformers

  tokenizer = make_tokenizer(tmp_path, TaskDataConfig(family="multiple_choice", marks=()))
  config = transformers.OpenAIGPTConfig(vocab_size=tokenizer.vocab_size, **SIZES)
  theirs = transformers.OpenAIGPTDoubleHeadsModel(config).eval()
  theirs.save_pretrained(tmp_path / "hf")
  tokenizer.save(tmp_path / "hf/tokenizer.json")
  example = Example("", ("ab",), choices=("cde", "fgh"))
  rows = torch.tensor([[tokenizer.encode("abcde"), tokenizer.encode("abfgh")]])
  with torch.no_grad():
    expected = theirs(rows).mc_logits.numpy().reshape(1, 2)
  found = Classifier(load_model(tmp_path / "hf")).outputs([example])
  assert relative_error(found, expected) < TOLERANCE
