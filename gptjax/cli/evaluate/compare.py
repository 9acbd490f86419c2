"""`gptjax evaluate compare`: two models on the same text, with an interval and a verdict."""

import argparse
import json

from gptjax.cli.arguments import MODEL_HELP
from gptjax.cli.evaluate.arguments import (
  add_data,
  add_model,
  add_text_protocol,
  add_windows,
  load_scorer,
  read_protocol,
  write_page,
)
from gptjax.data.building import show_progress
from gptjax.evaluate.comparison import compare
from gptjax.evaluate.comparison_view import render_page, to_text
from gptjax.evaluate.protocol import PROTOCOLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_model(parser)
  parser.add_argument("--against", required=True, help=f"the second model: {MODEL_HELP}")
  parser.add_argument("--against-tokenizer", help="as --tokenizer, for the second model")
  add_data(parser)
  parser.add_argument("--out", help="HTML file to write")
  add_windows(parser)
  add_text_protocol(parser)


def run(options: argparse.Namespace) -> None:
  protocol = read_protocol(options, PROTOCOLS["plain"])
  first = (options.model, *load_scorer(options, protocol.dtype))
  second = load_scorer(options, protocol.dtype, options.against, options.against_tokenizer)
  models = [first, (options.against, *second)]
  with show_progress("scoring", unit="windows") as advance:
    comparison = compare(options.data, models, protocol, advance)
  if options.out:
    write_page(options.out, render_page(comparison))
  receipt = comparison.receipt
  print(json.dumps(receipt, ensure_ascii=False) if options.json else to_text(receipt))
