"""`gptjax evaluate receipt`: measures again what a receipt says, and names what differs."""

import argparse
import json
from typing import Any

from gptjax.cli.evaluate.arguments import add_data, add_model, load_scorer
from gptjax.errors import ConfigError, check_choice
from gptjax.evaluate.receipt import differences, read_receipt
from gptjax.evaluate.tasks import TASKS, protocol_of
from gptjax.generate.kernels import WEIGHTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_model(parser, is_required=False)
  add_data(parser, is_required=False)
  parser.set_defaults(weights=None)
  parser.add_argument("--receipt", required=True, help="file of what --json printed")


def run(options: argparse.Namespace) -> int:
  old = read_receipt(options.receipt, TASKS)
  protocol = protocol_of(old)
  for name in ("model", "tokenizer", "weights", "data"):
    if getattr(options, name) is None:
      setattr(options, name, _told(old, name))
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


def _told(receipt: dict[str, Any], name: str) -> Any:
  """Returns what a receipt tells of where to find something. Raises ConfigError if it does not."""
  value = receipt.get(name, {"tokenizer": None, "weights": "float32"}.get(name, ""))
  is_names = isinstance(value, list) and all(isinstance(each, str) for each in value)
  is_right = is_names if name == "data" else value is None or isinstance(value, str)
  if (not value and name in ("model", "data")) or not is_right:
    raise ConfigError(f"the receipt has no {name}; give --{name}")
  if name == "weights":
    check_choice(name, value, WEIGHTS)
  return value
