"""A fine-tuned model's predictions: equal to a slow reading of each example by itself."""

import numpy as np
import pytest
from families import relative_error
from task_models import TASKS, make_examples, make_model, slow_outputs

from gptjax.data.examples import Example
from gptjax.errors import CheckpointError, DataError
from gptjax.evaluate.classify import Classifier


def check_alone(model, examples, outputs_NC):
  assert outputs_NC.dtype == np.float32
  for example, outputs in zip(examples, outputs_NC, strict=True):
    expected = slow_outputs(model, example)
    assert relative_error(outputs[: len(expected)], expected) < 2e-5
    assert (outputs[len(expected) :] == -1e9).all()


def test_predictions_are_those_of_each_example_alone(tmp_path):
  model = make_model(tmp_path, "multiple_choice", max_length=12)
  examples = make_examples("multiple_choice")
  check_alone(model, examples, Classifier(model).outputs(examples))


def test_a_pair_is_alike_in_both_orders_to_the_bit(tmp_path):
  model, pairs = make_model(tmp_path, "similarity", max_length=12), make_examples("similarity")
  classifier = Classifier(model)
  outputs_NC = classifier.outputs(pairs)
  check_alone(model, pairs, outputs_NC)
  turned = [Example(e.id, e.text2, e.text) for e in pairs]
  assert np.array_equal(outputs_NC, classifier.outputs(turned))


@pytest.mark.slow
@pytest.mark.parametrize("family", TASKS)
def test_predictions_of_every_family_and_length(tmp_path, family):
  model, examples = make_model(tmp_path, family), make_examples(family)
  check_alone(model, examples, Classifier(model).outputs(examples))


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
