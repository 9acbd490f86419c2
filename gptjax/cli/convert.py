"""`gptjax convert`: a model of any kind, written as a Hugging Face folder or a run directory."""

import argparse
import sys

import gptjax
from gptjax.cli.arguments import MODEL_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("source", help=MODEL_HELP)
  parser.add_argument("destination", help="a folder that does not exist or is empty")
  parser.add_argument("--to", required=True, choices=["hf", "gptjax"], help="the format")
  parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as it is")
  parser.add_argument(
    "--head", choices=["task", "lm"], help="of a fine-tuned model; default: its task"
  )


def run(options: argparse.Namespace) -> None:
  source, destination = options.source, options.destination
  gptjax.load(source, dtype=options.dtype).save(destination, format=options.to, head=options.head)
  print(f"{source} is now also {destination} ({options.to})", file=sys.stderr)
