"""`gptjax evaluate choice`: a task that is put as text, without examples before it."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.checkpoint.models import DTYPES
from gptjax.cli.evaluate.arguments import add_model, load_scorer, print_receipt
from gptjax.errors import ConfigError
from gptjax.evaluate.prompting import PromptProtocol, measure_prompts
from gptjax.evaluate.protocol import STARTS
from gptjax.evaluate.templates import NORMALIZATIONS, load_template, ready_templates


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_prompts(parser, default="choice")
  parser.add_argument(
    "--train",
    nargs="+",
    action="extend",
    help="examples that the threshold of a template is fitted to",
  )


def add_prompts(parser: argparse.ArgumentParser, default: str | None) -> None:
  """Adds what zero-shot and few-shot share."""
  add_model(parser)
  parser.add_argument(
    "--data",
    nargs="+",
    action="extend",
    required=True,
    help="tsv, csv, json, jsonl or parquet files of examples, globs, or hub:NAME@SPLIT",
  )
  parser.add_argument(
    "--template",
    default=default,
    required=default is None,
    help=f"a file, or one of: {', '.join(ready_templates())}",
  )
  parser.add_argument("--normalization", choices=NORMALIZATIONS, help="another than the template's")
  parser.add_argument("--limit", type=int, help="the first so many examples")
  parser.add_argument("--start", default="none", choices=STARTS, help="token before each prompt")
  parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the parameters")
  parser.add_argument("--predictions", help="file to write: a JSON object for each example")


def run(options: argparse.Namespace) -> None:
  measure(options)


def measure(options: argparse.Namespace, **protocol: Any) -> None:
  """Asks, and prints the receipt.

  Args:
    options: of `add_prompts`, with train.
    protocol: fields of the protocol that only few-shot has.
  """
  template = load_template(options.template)
  if options.normalization:
    template = dataclasses.replace(template, normalization=options.normalization)
  asked = PromptProtocol(
    options.template,
    template,
    train=tuple(options.train or ()),
    limit=options.limit,
    start=options.start,
    dtype=options.dtype,
    **protocol,
  )
  with _writing(options.predictions) as keep:
    model, scorer = load_scorer(options, asked.dtype)
    print_receipt(measure_prompts(options.data, model, scorer, asked, keep=keep), options)


@contextlib.contextmanager
def _writing(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Gives what writes a line of --predictions."""
  if path is None:
    yield lambda line: None
    return
  try:
    file = open(path, "w", encoding="utf-8")  # noqa: SIM115
  except OSError as error:
    raise ConfigError(f"--predictions {path} cannot be written: {error}") from error
  with file:
    yield lambda line: print(json.dumps(line, ensure_ascii=False), file=file)
