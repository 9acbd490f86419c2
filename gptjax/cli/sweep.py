"""`gptjax sweep`: runs many trials of an experiment, or goes on with them, and reports."""

import argparse

from gptjax.cli.arguments import add_config, check_workdir
from gptjax.errors import ConfigError
from gptjax.sweep.config import make_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_config(parser)
  parser.add_argument("--workdir", required=True, help="folder of the sweep and its runs")
  parser.add_argument("--trials", type=int, help="runs wanted in all, those of before included")
  parser.add_argument("--workers", type=int, default=1, help="processes of this machine; 1")
  parser.add_argument(
    "--storage", default="", help="Optuna storage URL or path; a journal in --workdir"
  )


def run(options: argparse.Namespace) -> None:
  check_workdir(options)
  if options.workers < 1:
    raise ConfigError(f"--workers is {options.workers}; it must be at least 1")
  plan = make_plan(options.config, options.overrides, options.trials)
  from gptjax.sweep.run import sweep  # a wrong config is said before jax is imported

  sweep(plan, options.workdir, options.storage, options.workers)
