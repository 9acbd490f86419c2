"""`gptjax evaluate fewshot`: a task that is put as text, after some solved examples."""

import argparse
import secrets

from gptjax.checkpoint.models import to_stderr
from gptjax.cli.evaluate.choice import add_prompts, measure
from gptjax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_prompts(parser, default=None)
  parser.add_argument("--shots", type=int, required=True, help="solved examples before each")
  parser.add_argument(
    "--train",
    nargs="+",
    action="extend",
    help="examples to draw shots from; default the others of --data",
  )
  parser.add_argument("--orders", type=int, default=1, help="orders of the shots that are tried")
  parser.add_argument("--seed", type=int, help="of the draws; default a fresh one, which is told")


def run(options: argparse.Namespace) -> None:
  if options.shots < 1:
    raise ConfigError(
      f"--shots is {options.shots}; it must be at least 1, or use gptjax evaluate choice"
    )
  seed = options.seed
  if seed is None:
    seed = secrets.randbits(32)
    to_stderr(f"seed {seed}")
  measure(options, shots=options.shots, orders=options.orders, seed=seed)
