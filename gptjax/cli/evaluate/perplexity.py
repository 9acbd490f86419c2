"""`gptjax evaluate perplexity`: what a text costs a model, by tokens, words, bytes, characters."""

import argparse

from gptjax.cli.evaluate.arguments import (
  add_data,
  add_fields,
  add_model,
  add_text_protocol,
  add_windows,
  load_scorer,
  print_receipt,
  read_protocol,
)
from gptjax.evaluate.perplexity import measure_perplexity
from gptjax.evaluate.protocol import PROTOCOLS, SCORES, WORDS, protocol


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_model(parser)
  add_data(parser)
  parser.add_argument(
    "--protocol", default="plain", choices=PROTOCOLS, help="a benchmark's; flags change it"
  )
  add_windows(parser)
  add_fields(
    parser,
    {"words": ("what counts as a word", WORDS), "score": ("the figure to quote", SCORES)},
  )
  add_text_protocol(parser)


def run(options: argparse.Namespace) -> None:
  asked = read_protocol(options, protocol(options.protocol))
  model, scorer = load_scorer(options, asked.dtype)
  print_receipt(measure_perplexity(options.data, model, scorer, asked), options)
