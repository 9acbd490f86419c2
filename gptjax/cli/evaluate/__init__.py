"""`gptjax evaluate TASK`: scores a model; each task is a module of its own, as a verb is."""

import argparse
import importlib

from gptjax.errors import ConfigError

TASKS = {
  "perplexity": "Perplexity and bits per byte of texts, with the protocol.",
  "lambada": "Last words of passages: perplexity and accuracy.",
  "cbt": "The Children's Book Test: the word left out of a sentence.",
  "choice": "Tasks put as text: the likeliest of some answers, or a completion.",
  "fewshot": "The same after some solved examples, in several orders.",
  "harness": "Tasks of EleutherAI's lm-evaluation-harness.",
  "heatmap": "A text coloured by how much each token surprises.",
  "compare": "Two models on the same text, with an interval and a verdict.",
  "receipt": "Measure again what a receipt says; status 1 where it is not the same.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  tasks = parser.add_subparsers(dest="task", metavar="TASK")
  for name, help in TASKS.items():
    module = importlib.import_module(f"gptjax.cli.evaluate.{name}")
    task = tasks.add_parser(name, help=help, description=help, allow_abbrev=False)
    module.add_arguments(task)
    task.set_defaults(run=module.run, parser=task)


def run(options: argparse.Namespace) -> None:
  del options
  raise ConfigError(f"give a task: gptjax evaluate {'|'.join(TASKS)}")
