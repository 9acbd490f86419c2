"""`gptjax predict`: what a fine-tuned model tells of a text, or of the examples of a file."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.checkpoint.models import load_model, to_stderr
from gptjax.cli.arguments import add_json
from gptjax.cli.compilation import enable_compilation_cache
from gptjax.data.examples import Example
from gptjax.data.task_format import Task
from gptjax.data.tasks import read_examples
from gptjax.errors import ConfigError
from gptjax.evaluate.classify import Classifier
from gptjax.evaluate.predictions import decide, describe_predictions
from gptjax.evaluate.task_metrics import task_metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--model", required=True, help="run directory of gptjax finetune")
  parser.add_argument("--data", action="append", help="file of examples; may be repeated")
  parser.add_argument("--text", help="one text: also the premise, the first text, or the context")
  parser.add_argument("--text2", help="the hypothesis or second text")
  parser.add_argument("--choice", action="append", help="an answer to choose from; once for each")
  add_json(parser)


def run(options: argparse.Namespace) -> None:
  if bool(options.data) == (options.text is not None):
    raise ConfigError("give the examples either by --data FILE or by --text TEXT")
  enable_compilation_cache()
  classifier = Classifier(load_model(options.model), options.model, to_stderr)
  if options.data:
    _refuse(options, ("text2", "choice"), "beside --data")
    examples, notes = read_examples(classifier.config, options.data)
    for note in notes:
      to_stderr(note)
  else:
    examples = [_example_of(options, classifier.task)]
  outputs_NC = classifier.outputs(examples)
  predictions = describe_predictions(classifier.task, examples, outputs_NC)
  _report_metrics(classifier.task, examples, outputs_NC)
  if options.json:
    print(json.dumps(predictions, ensure_ascii=False))
  else:
    for prediction in predictions:
      print(_to_text(prediction))


def _example_of(options: argparse.Namespace, task: Task) -> Example:
  """Makes the example that was given by flags."""
  needed = {"classification": (), "multiple_choice": ("choice",)}.get(task.family, ("text2",))
  for flag in needed:
    if not getattr(options, flag):
      raise ConfigError(f"the model's task is {task.family.replace('_', ' ')}; give --{flag} too")
  _refuse(options, {"text2", "choice"} - set(needed), f"on a task of {task.family}")
  if task.is_choice and len(options.choice) < 2:
    raise ConfigError("--choice is given once; there must be at least two answers to choose from")
  for text in (options.text, options.text2, *(options.choice or ())):
    if text is not None and not text.strip():
      raise ConfigError("a text is empty; give it words")
  text2 = (options.text2.strip(),) if options.text2 else ()
  choices = tuple(choice.strip() for choice in options.choice or ())
  return Example("0", (options.text.strip(),), text2, choices)


def _refuse(options: argparse.Namespace, flags: Sequence[str], why: str) -> None:
  for flag in flags:
    if getattr(options, flag) is not None:
      raise ConfigError(f"--{flag} has no effect {why}; leave it out")


def _report_metrics(task: Task, examples: Sequence[Example], outputs_NC: np.ndarray) -> None:
  """Says how good the predictions are, where labels are known."""
  known = [index for index, example in enumerate(examples) if example.label is not None]
  if known:
    labels_N = np.array([examples[index].label for index in known])
    metrics = task_metrics(task, labels_N, decide(task, outputs_NC[known]))
    said = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    to_stderr(f"{said} on {len(known):,} labelled examples")


def _to_text(prediction: dict[str, Any]) -> str:
  if "score" in prediction:
    return f"{prediction['id']}\t{prediction['score']:.4f}"
  label = prediction["label"]
  return f"{prediction['id']}\t{label}\t{prediction['probabilities'][label]:.4f}"
