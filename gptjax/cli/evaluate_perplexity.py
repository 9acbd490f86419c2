"""`gptjax evaluate perplexity`: what a text costs a model, by tokens, words, bytes, characters."""

import argparse

from gptjax.cli.evaluate_arguments import (
  add_data,
  add_fields,
  add_model,
  add_text_protocol,
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
  parser.add_argument("--context", type=int, dest="field_context", help="tokens of a window")
  parser.add_argument(
    "--stride",
    type=int,
    dest="field_stride",
    help="tokens between windows; negative from the context; default: half of it",
  )
  add_fields(
    parser,
    {"words": ("what counts as a word", WORDS), "score": ("the figure to quote", SCORES)},
  )
  add_text_protocol(parser)


def run(options: argparse.Namespace) -> None:
  asked = read_protocol(options, protocol(options.protocol))
  model, scorer = load_scorer(options, asked.dtype)
  print_receipt(measure_perplexity(options.data, model, scorer, asked), options)
