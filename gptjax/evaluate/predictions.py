"""What the outputs of a task's head say.

The outputs of an example are a logit for each class or each answer, of which one that the example
lacks is about minus a billion, or the score. What is decided from them is the index of the class or
answer, or the score.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.data.examples import Example
from gptjax.data.task_format import Task


def decide(task: Task, outputs_NC: np.ndarray) -> np.ndarray:
  """Returns [N]: the class or answer of the largest logit (the first of equals), or the score."""
  return outputs_NC[:, 0] if task.target == "score" else np.argmax(outputs_NC, axis=1)


def softmax(logits_NC: np.ndarray) -> np.ndarray:
  """Returns float64 probabilities [N, C]."""
  logits_NC = logits_NC.astype(np.float64)
  exp_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
  return exp_NC / exp_NC.sum(axis=1, keepdims=True)


def describe_predictions(
  task: Task, examples: Sequence[Example], outputs_NC: np.ndarray
) -> list[dict[str, Any]]:
  """Returns what was predicted of each example, for JSON.

  Returns:
    id, and `score`; or `label` and `probabilities`: {label: probability} of classes, and of
    answers the index of the likeliest and a list with the probability of each.
  """
  decided_N = decide(task, outputs_NC)
  if task.target == "score":
    return [{"id": e.id, "score": score} for e, score in zip(examples, decided_N.tolist())]
  probabilities_NC = softmax(outputs_NC).tolist()
  described = []
  for example, index, row in zip(examples, decided_N.tolist(), probabilities_NC):
    label, probabilities = index, row[: len(example.choices)]
    if not task.is_choice:
      label, probabilities = task.labels[index], dict(zip(task.labels, row))
    described.append({"id": example.id, "label": label, "probabilities": probabilities})
  return described
