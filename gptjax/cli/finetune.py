"""`gptjax finetune`: fine-tunes a pretrained model on a labelled task, or resumes."""

import argparse

from gptjax.cli.arguments import add_config, add_workdir, check_workdir
from gptjax.config import from_config_dict, load_variants
from gptjax.train.finetune_config import FinetuneConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_config(parser)
  add_workdir(parser)


def run(options: argparse.Namespace) -> None:
  check_workdir(options)
  configs = {
    name: (from_config_dict(FinetuneConfig, config), settings)
    for name, (config, settings) in load_variants(options.config, options.overrides).items()
  }
  # A wrong config is said before jax is imported.
  from gptjax.cli.compilation import enable_compilation_cache
  from gptjax.train.finetune import finetune
  from gptjax.train.variants import Variant, finetune_variants

  enable_compilation_cache()
  if list(configs) == [""] and configs[""][0].num_seeds == 1:
    finetune(configs[""][0], options.workdir)
    return
  finetune_variants(
    [Variant(name, config, settings) for name, (config, settings) in configs.items()],
    options.workdir,
  )
