"""`gptjax evaluate cbt`: the Children's Book Test."""

import argparse

from gptjax.cli.evaluate.arguments import (
  add_data,
  add_model,
  add_text_protocol,
  load_scorer,
  print_receipt,
  read_protocol,
)
from gptjax.evaluate.childrens_book import KINDS, PROTOCOLS, measure_childrens_book


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_model(parser)
  add_data(parser)
  parser.add_argument(
    "--kind", required=True, choices=KINDS, help="CN: common nouns, NE: named entities"
  )
  add_text_protocol(parser)


def run(options: argparse.Namespace) -> None:
  protocol = read_protocol(options, PROTOCOLS[KINDS[options.kind]])
  model, scorer = load_scorer(options, protocol.dtype)
  print_receipt(measure_childrens_book(options.data, model, scorer, protocol), options)
