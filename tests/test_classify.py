"""A fine-tuned model's predictions: equal to a slow reading of each example by itself."""

import numpy as np
import pytest
from families import relative_error
from task_models import TASKS, make_examples, make_model

from gptjax.checkpoint.reference import reference_activations
from gptjax.data.examples import Example
from gptjax.data.task_inputs import encode_examples, find_task_tokens
from gptjax.errors import CheckpointError, DataError
from gptjax.evaluate.classify import Classifier


def slow_outputs(model, example):
  """Reads the sequences of one example one at a time, in float64 NumPy."""
  tokens = find_task_tokens(model.tokenizer, model.task)
  encoded = encode_examples([example], model.task.task, model.tokenizer, tokens, 24)
  states_SD = []
  for pieces in encoded.sequences[0]:
    row = np.concatenate(pieces)
    states = reference_activations(model.params, model.config, row[None])["final_norm"]
    states_SD.append(states[0, -1])
  head = model.params["task_head"]
  if not model.task.task.is_choice:
    states_SD = [sum(states_SD)]
  return (np.stack(states_SD) @ head["kernel"] + head["bias"]).reshape(-1)


# A pair is summed as one text is, and read as a premise is.
_DAILY = ("similarity", "multiple_choice")


@pytest.mark.parametrize(
  "family", [pytest.param(f, marks=[] if f in _DAILY else pytest.mark.slow) for f in TASKS]
)
def test_predictions_are_those_of_each_example_alone(tmp_path, family):
  model, examples = make_model(tmp_path, family), make_examples(family)
  outputs_NC = Classifier(model).outputs(examples)
  assert outputs_NC.dtype == np.float32
  for example, outputs in zip(examples, outputs_NC):
    expected = slow_outputs(model, example)
    assert relative_error(outputs[: len(expected)], expected) < 2e-5
    assert (outputs[len(expected) :] == -1e9).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", TASKS)
def test_company_and_order_change_no_prediction(tmp_path, family):
  model, examples = make_model(tmp_path, family), make_examples(family)
  classifier = Classifier(model)
  together = classifier.outputs(examples)
  order = np.random.default_rng(0).permutation(len(examples))
  shuffled = classifier.outputs([examples[index] for index in order])
  np.testing.assert_allclose(shuffled, together[order], rtol=1e-5, atol=1e-5)
  for index in (0, 7):
    (alone,) = classifier.outputs([examples[index]])
    np.testing.assert_allclose(alone, together[index, : len(alone)], rtol=1e-5, atol=1e-5)
  changed = [
    Example("", ("habe",), e.text2, e.choices) if i == 7 else e for i, e in enumerate(examples)
  ]
  differs = np.abs(classifier.outputs(changed) - together).max(axis=1) > 1e-3
  assert differs.nonzero()[0].tolist() == [7]


def test_a_pair_is_alike_in_both_orders_to_the_bit(tmp_path):
  model = make_model(tmp_path, "similarity")
  pairs = make_examples("similarity")
  turned = [Example(e.id, e.text2, e.text) for e in pairs]
  classifier = Classifier(model)
  assert np.array_equal(classifier.outputs(pairs), classifier.outputs(turned))


def test_texts_that_are_cut_are_told(tmp_path):
  model, lines = make_model(tmp_path, "classification", max_length=9), []
  classifier = Classifier(model, report=lines.append)
  long, cut = (Example("", (text,)) for text in ("abcdefgh", "abcdefg"))
  outputs_NC = classifier.outputs([long, cut])
  assert lines == ["1 of 2 examples were cut to fit"]
  assert np.array_equal(outputs_NC[0], outputs_NC[1])


def test_a_model_without_a_task_is_refused(tmp_path):
  model = make_model(tmp_path, "classification")
  with pytest.raises(DataError, match="no examples"):
    Classifier(model).outputs([])
  del model.params["task_head"]
  with pytest.raises(CheckpointError, match='"it" was not fine-tuned on a task'):
    Classifier(model, "it")
