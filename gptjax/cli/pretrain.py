"""`gptjax pretrain`: trains a language model into a run directory, or resumes."""

import argparse

from gptjax.cli.arguments import add_config, add_workdir, check_workdir, read_config
from gptjax.train.config import PretrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_config(parser)
  add_workdir(parser)


def run(options: argparse.Namespace) -> None:
  check_workdir(options)
  config = read_config(options, PretrainConfig)
  from gptjax.train.pretrain import pretrain  # a wrong config is said before jax is imported

  pretrain(config, options.workdir)
