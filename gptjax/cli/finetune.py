"""`gptjax finetune`: fine-tunes a pretrained model on a labelled task, or resumes."""

import argparse

from gptjax.cli.arguments import add_config, add_workdir, check_workdir, read_config
from gptjax.train.finetune_config import FinetuneConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_config(parser)
  add_workdir(parser)


def run(options: argparse.Namespace) -> None:
  check_workdir(options)
  config = read_config(options, FinetuneConfig)
  from gptjax.train.finetune import finetune  # a wrong config is said before jax is imported

  finetune(config, options.workdir)
