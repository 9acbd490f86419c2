"""`gptjax evaluate heatmap`: a text coloured by surprise, in the terminal and as one HTML file."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from gptjax.cli.evaluate.arguments import (
  add_data,
  add_model,
  add_text_protocol,
  add_windows,
  load_scorer,
  read_protocol,
  write_page,
)
from gptjax.errors import ConfigError, DataError
from gptjax.evaluate.detokenizers import detokenize
from gptjax.evaluate.heatmap import Cell, make_heatmap
from gptjax.evaluate.heatmap_view import most_surprising, render_page, terminal_text
from gptjax.evaluate.protocol import PROTOCOLS
from gptjax.evaluate.texts import read_texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_model(parser)
  add_data(parser, is_required=False)
  parser.add_argument("--text", help="the text itself, instead of --data")
  parser.add_argument("--out", help="HTML file to write")
  parser.add_argument("--tokens", type=int, default=1000, help="stop after so many; default 1000")
  parser.add_argument("--alternatives", type=int, default=5, help="likeliest tokens to show")
  add_windows(parser)
  add_text_protocol(parser)


def run(options: argparse.Namespace) -> None:
  if (options.data is None) == (options.text is None):
    raise ConfigError("give one of --data and --text")
  if options.tokens < 1:
    raise ConfigError(f"--tokens is {options.tokens}; it must be at least 1")
  protocol = read_protocol(options, PROTOCOLS["plain"])
  texts = [options.text]
  if options.data:
    texts = read_texts(options.data, protocol.documents, protocol.text_column)
  if not texts[0]:
    raise DataError("--text is empty; there is nothing to score")
  model, scorer = load_scorer(options, protocol.dtype)
  cells = make_heatmap(
    detokenize(texts[0], protocol.detokenizer),
    model,
    scorer,
    protocol,
    options.alternatives,
    options.tokens,
  )
  if len(texts) > 1:
    print(f"the first of {len(texts):,} documents", file=sys.stderr)
  if options.out:
    write_page(options.out, render_page(f"{options.model}: surprise", cells))
  if options.json:
    facts = [dataclasses.asdict(cell) for cell in cells]
    print(json.dumps({"task": "heatmap", "cells": facts}, ensure_ascii=False))
  else:
    _print(cells)


def _print(cells: Sequence[Cell]) -> None:
  console = Console(highlight=False, soft_wrap=True)
  console.print(terminal_text(cells))
  console.print()
  for before, token, bits, alternatives in most_surprising(cells, 8):
    line = f"{bits:5.1f} bits  {before[-30:]!r} {token!r}  rather: {alternatives}"
    console.print(line, markup=False)
