"""`gptjax data show`: a row of any batch, and the bytes it was made from."""

import argparse
import json

from gptjax.cli.arguments import add_config, add_json, read_config
from gptjax.errors import ConfigError
from gptjax.train.config import PretrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("action", choices=["show"], help="show: a row's text, file and byte range")
  add_config(parser)
  parser.add_argument("--step", type=int, required=True, help="the update, counted from 1")
  parser.add_argument("--row", type=int, default=0, help="row of its batch, counted from 0")
  add_json(parser)


def run(options: argparse.Namespace) -> None:
  config = read_config(options, PretrainConfig)
  if options.step < 1:
    raise ConfigError(f"--step is {options.step}; updates are counted from 1")
  from gptjax.train.setup import show_row

  spans = show_row(config, options.step - 1, options.row)
  if options.json:
    print(json.dumps({"spans": [vars(span) for span in spans]}, ensure_ascii=False))
    return
  for span in spans:
    print(f"--- {span.path} bytes {span.start_byte}-{span.end_byte} of {span.bytes_of}")
    print(span.text)
