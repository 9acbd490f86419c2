"""`gptjax evaluate receipt`: measures again what a receipt says, and names what differs."""

import argparse
import json

from gptjax.cli.evaluate.arguments import add_data, add_model, load_scorer
from gptjax.evaluate.receipt import differences, read_receipt
from gptjax.evaluate.tasks import TASKS, protocol_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_model(parser)
  add_data(parser)
  parser.add_argument("--receipt", required=True, help="file of what --json printed")


def run(options: argparse.Namespace) -> int:
  old = read_receipt(options.receipt, TASKS)
  protocol = protocol_of(old)
  model, scorer = load_scorer(options, protocol.dtype)
  new = TASKS[old["task"]].measure(options.data, model, scorer, protocol)
  found = differences(old, new)
  if options.json:
    print(json.dumps({"is_equal": not found, "differences": found, "receipt": new}))
  elif found:
    print("\n".join(["not equal:", *found]))
  else:
    print("equal")
  return int(bool(found))
