"""`gptjax VERB ...`: finds the verb, hands over, and turns a UserError into one line and status 2.

Each verb is a module with `add_arguments(parser)` and `run(options)`, imported when it is asked
for, so that `gptjax --version` does not wait for jax.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from gptjax import __version__
from gptjax.cli.arguments import CONFIG_PREFIX, Parser, split_overrides
from gptjax.errors import ConfigError, UserError, did_you_mean

VERBS = {
  "pretrain": "Train a language model from text, or resume.",
  "finetune": "Train a pretrained model on a labelled task, or resume.",
  "sweep": "Run many trials of an experiment, or go on with them.",
  "predict": "Tell of texts what a fine-tuned model was taught to.",
  "data": "Look at training data: `gptjax data show`.",
  "evaluate": "Score a model: perplexity, benchmarks, comparisons, with a receipt.",
  "generate": "Continue prompts; without one, those typed.",
  "serve": "Serve an OpenAI-compatible API of a model, and an editor.",
  "info": "Describe a model and what differs from its published recipe.",
  "convert": "Write a model as a Hugging Face folder or a run.",
  "doctor": "Find what is wrong with a checkpoint; then status 1.",
}


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one verb and returns the exit status: 0, the verb's own, or 2 for what users can mend."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  try:
    arguments, overrides = split_overrides(arguments)
    options = _parse(arguments)
    if overrides and "config" not in options:
      raise ConfigError(f"{CONFIG_PREFIX}{next(iter(overrides))} has no effect without --config")
    options.overrides = overrides
    return options.run(options) or 0
  except UserError as error:
    print(f"gptjax: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("gptjax: interrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:  # of `| head`, which has seen enough; Python flushes again as it ends
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  asked = arguments[0] if arguments and arguments[0] in VERBS else None
  parser, verb_parser = _make_parsers(asked)
  words = [argument for argument in arguments if not argument.startswith("-")]
  if asked is None and words[:1] == list(arguments[:1]) and words:
    raise ConfigError(f'unknown verb "{words[0]}"{did_you_mean(words[0], VERBS)}')
  options, unknown = parser.parse_known_args(arguments)
  if unknown:
    if not unknown[0].startswith("-"):
      raise ConfigError(f'"{unknown[0]}" belongs to no flag; put text with spaces in quotes')
    # A verb that has its own verbs says which of its parsers it was.
    known = getattr(options, "parser", verb_parser or parser)._option_string_actions
    raise ConfigError(f'unknown argument "{unknown[0]}"{did_you_mean(unknown[0], known)}')
  if "run" not in options:
    parser.print_help(sys.stderr)
    raise ConfigError(f"give a verb: {', '.join(VERBS)}")
  return options


def _make_parsers(asked: str | None) -> tuple[Parser, Parser | None]:
  """Makes the parser of the program, and that of the verb that is asked for."""
  parser = Parser(prog="gptjax", description="The GPT family in JAX/Flax.", allow_abbrev=False)
  parser.add_argument("--version", action="version", version=f"gptjax {__version__}")
  subparsers = parser.add_subparsers(dest="verb", metavar="VERB")
  for name, help in VERBS.items():
    subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
  if asked is None:
    return parser, None
  verb_parser = subparsers.choices[asked]
  module = importlib.import_module(f"gptjax.cli.{asked}")
  module.add_arguments(verb_parser)
  verb_parser.set_defaults(run=module.run)
  return parser, verb_parser
