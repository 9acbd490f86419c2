"""`gptjax VERB ...`: finds the verb, hands over, and turns a UserError into one line and status 2.

A verb's imports are its own, so that `gptjax --version` does not wait for jax.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from gptjax import __version__
from gptjax.config import from_config_dict, load_experiment
from gptjax.errors import ConfigError, UserError, did_you_mean

CONFIG_PREFIX = "--config."
_MODEL_HELP = "run directory, Hugging Face folder, other library's file, or hub name"


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


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of the arguments."""
  rest, overrides, pending = [], {}, None
  for argument in arguments:
    if pending is not None:
      overrides[pending], pending = argument, None
    elif argument.startswith(CONFIG_PREFIX):
      key, has_value, value = argument.removeprefix(CONFIG_PREFIX).partition("=")
      if has_value:
        overrides[key] = value
      else:
        pending = key
    else:
      rest.append(argument)
  if pending is not None:
    raise ConfigError(
      f"{CONFIG_PREFIX}{pending} has no value; write {CONFIG_PREFIX}{pending}=VALUE"
    )
  return rest, overrides


class _Parser(argparse.ArgumentParser):
  """An argument parser whose errors are UserErrors."""

  def error(self, message: str):
    raise ConfigError(f"{message} (see {self.prog} --help)")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser, verbs = _make_parser(is_generate=arguments[:1] == ["generate"])
  words = [argument for argument in arguments if not argument.startswith("-")]
  if arguments and arguments[0] not in verbs and arguments[0] in words:
    raise ConfigError(f'unknown verb "{arguments[0]}"{did_you_mean(arguments[0], verbs)}')
  options, unknown = parser.parse_known_args(arguments)
  if unknown:
    known = verbs.get(options.verb, parser)._option_string_actions
    raise ConfigError(f'unknown argument "{unknown[0]}"{did_you_mean(unknown[0], known)}')
  if "run" not in options:
    parser.print_help(sys.stderr)
    raise ConfigError(f"give a verb: {', '.join(verbs)}")
  return options


def _make_parser(
  *, is_generate: bool
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
  parser = _Parser(prog="gptjax", description="The GPT family in JAX/Flax.", allow_abbrev=False)
  parser.add_argument("--version", action="version", version=f"gptjax {__version__}")
  subparsers = parser.add_subparsers(dest="verb", metavar="VERB")

  def add_verb(name: str, run, help: str) -> argparse.ArgumentParser:
    verb = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
    verb.set_defaults(run=run)
    return verb

  pretrain = add_verb("pretrain", _pretrain, "Train a language model from text, or resume.")
  _add_config(pretrain)
  pretrain.add_argument("--workdir", required=True, help="run directory, local or gs://")

  data = add_verb("data", _data_show, "Look at training data: `gptjax data show`.")
  data.add_argument("action", choices=["show"], help="show: a row's text, file and byte range")
  _add_config(data)
  data.add_argument("--step", type=int, required=True, help="the update, counted from 1")
  data.add_argument("--row", type=int, default=0, help="row of its batch, counted from 0")
  data.add_argument("--json", action="store_true", help="print one JSON object")

  generate = add_verb("generate", _generate, "Continue prompts; without one, those typed.")
  generate.add_argument("--model", required=True, help=_MODEL_HELP)
  generate.add_argument("--prompt", action="append", help="text to continue; may be repeated")
  generate.add_argument("--prompt-file", help="file of prompts, one a line")
  generate.add_argument("--stream", action="store_true", help="print the text as it comes")
  generate.add_argument("--weights", default="float32", choices=["float32", "int8"])
  generate.add_argument("--json", action="store_true", help="print one JSON object")
  if is_generate:
    from gptjax.cli.generate import add_options

    add_options(generate)

  info = add_verb("info", _info, "Describe a model and what differs from its published recipe.")
  _add_model(info)
  info.add_argument("--json", action="store_true", help="print one JSON object")

  convert = add_verb("convert", _convert, "Write a model as a Hugging Face folder or a run.")
  convert.add_argument("source", help=_MODEL_HELP)
  convert.add_argument("destination", help="a folder that does not exist or is empty")
  convert.add_argument("--to", required=True, choices=["hf", "gptjax"], help="the format")
  convert.add_argument("--dtype", help="float32, bfloat16 or float16; default: as it is")

  doctor = add_verb("doctor", _doctor, "Find what is wrong with a checkpoint; then status 1.")
  _add_model(doctor)
  doctor.add_argument("--text", help="file the model should find likely; default: plain English")
  doctor.add_argument("--against", help="the same model from elsewhere, for the reference to run")
  doctor.add_argument(
    "--invariance", action="store_true", help="instead, what must not change a generated text"
  )
  doctor.add_argument("--json", action="store_true", help="print one JSON object")
  return parser, dict(subparsers.choices)


def _add_model(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("model", help=_MODEL_HELP)


def _add_config(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("--config", required=True, help="experiment file, FILE.py or FILE.py:arg")
  verb.add_argument_group(
    "config overrides", "--config.GROUP.KEY=VALUE sets any key of the experiment's config"
  )


def _pretrain_config(options: argparse.Namespace):
  from gptjax.train.config import PretrainConfig

  return from_config_dict(PretrainConfig, load_experiment(options.config, options.overrides))


def _pretrain(options: argparse.Namespace) -> None:
  if not options.workdir:
    raise ConfigError("--workdir is empty; give a folder for the run")
  config = _pretrain_config(options)
  from gptjax.train.pretrain import pretrain

  pretrain(config, options.workdir)


def _data_show(options: argparse.Namespace) -> None:
  config = _pretrain_config(options)
  if options.step < 1:
    raise ConfigError(f"--step is {options.step}; updates are counted from 1")
  from gptjax.train.setup import show_row

  spans = show_row(config, options.step - 1, options.row)
  if options.json:
    print(json.dumps({"spans": [vars(span) for span in spans]}, ensure_ascii=False))
    return
  for span in spans:
    print(f"--- {span.path} bytes {span.start_byte}-{span.end_byte} of {span.bytes_of}")
    print(span.text)


def _generate(options: argparse.Namespace) -> None:
  from gptjax.cli.generate import generate

  generate(options)


def _info(options: argparse.Namespace) -> None:
  from gptjax.cli.info import info

  info(options.model, options.json)


def _convert(options: argparse.Namespace) -> None:
  from gptjax.cli.convert import convert

  convert(options.source, options.destination, options.to, options.dtype)


def _doctor(options: argparse.Namespace) -> int:
  from gptjax.cli.doctor import certify_invariance, doctor

  if options.invariance:
    for flag in ("text", "against"):
      if getattr(options, flag):
        raise ConfigError(f"--{flag} has no effect with --invariance; leave one of them out")
    return certify_invariance(options.model, options.json)
  return doctor(options.model, options.text, options.against, options.json)
