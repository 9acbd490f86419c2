"""`gptjax evaluate lambada`: last words of passages."""

import argparse

from gptjax.cli.evaluate.arguments import (
  add_data,
  add_model,
  add_text_protocol,
  load_scorer,
  print_receipt,
  read_protocol,
)
from gptjax.evaluate.lambada import PROTOCOL, measure_lambada


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_model(parser)
  add_data(parser)
  add_text_protocol(parser)


def run(options: argparse.Namespace) -> None:
  protocol = read_protocol(options, PROTOCOL)
  model, scorer = load_scorer(options, protocol.dtype)
  print_receipt(measure_lambada(options.data, model, scorer, protocol), options)
