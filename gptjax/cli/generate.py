"""`gptjax generate`: continues prompts given as flags, in a file, or typed."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from gptjax.api import Model, load
from gptjax.cli.arguments import MODEL_HELP, add_json
from gptjax.cli.compilation import enable_compilation_cache
from gptjax.errors import ConfigError, UserError
from gptjax.generate import programs
from gptjax.generate.generator import draw_seed
from gptjax.generate.options import DecodingOptions, is_sampled, parse_options

# Not for a command line: Python objects.
_NOT_FLAGS = ("allowed_tokens", "attention_mask")
# A text by itself, or a JSON list of them; "5" is a text too. The flag may be repeated.
_TEXTS = ("stop", "bad_words")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--model", required=True, help=MODEL_HELP)
  parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
  parser.add_argument("--prompt-file", help="file of prompts, one a line")
  parser.add_argument("--stream", action="store_true", help="print the text as it comes")
  parser.add_argument("--weights", default="float32", choices=["float32", "int8"])
  add_json(parser)
  add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds a flag for every decoding option: the name with dashes; lists and mappings in JSON."""
  group = parser.add_argument_group("decoding options", "lists and mappings are given in JSON")
  for field in dataclasses.fields(DecodingOptions):
    if field.name in _NOT_FLAGS:
      continue
    flag = "--" + field.name.replace("_", "-")
    is_switch, is_repeated = field.default is False, field.name in _TEXTS
    group.add_argument(
      flag,
      dest=f"option_{field.name}",
      action="append" if is_repeated else "store",
      nargs="?" if is_switch else None,
      const="true" if is_switch else None,
      metavar="VALUE",
      help=field.metadata["help"].replace("%", "%%") + "; may be repeated" * is_repeated,
    )


def read_options(options: argparse.Namespace) -> dict[str, Any]:
  """Returns the decoding options that were given: JSON where it is, else text."""
  given = {}
  for flag, value in vars(options).items():
    if flag.startswith("option_") and value is not None:
      name = flag.removeprefix("option_")
      if name in _TEXTS:
        given[name] = [text for given_once in value for text in _parse_texts(given_once)]
      else:
        given[name] = value if name == "draft_model" else _parse_value(value)
  return given


def _parse_texts(value: str) -> list[Any]:
  parsed = _parse_value(value) if value.startswith("[") else value
  return parsed if isinstance(parsed, list) else [value]


def _parse_value(value: str) -> Any:
  try:
    return json.loads(value)
  except json.JSONDecodeError:
    return value


def run(options: argparse.Namespace) -> None:
  prompts = list(options.prompt or [])
  if options.prompt_file:
    prompts += _read_lines(options.prompt_file)
  decoding = read_options(options)
  if options.stream and (options.json or len(prompts) > 1):
    raise ConfigError("--stream prints the text of one prompt; leave out --json and other prompts")
  if not prompts and options.json:
    raise ConfigError("--json needs a --prompt or a --prompt-file")
  parsed = parse_options(decoding)
  if is_sampled(parsed):
    decoding["seed"] = int(draw_seed(parsed))
    print(f"seed {decoding['seed']}", file=sys.stderr)
  enable_compilation_cache()
  model = load(options.model)
  if parsed.draft_model is not None:
    decoding["draft_model"] = load(parsed.draft_model)
  stop_listening = programs.on_compile(lambda line: print(line, file=sys.stderr, flush=True))
  try:
    if not prompts:
      _interact(model, decoding, options.weights)
    elif options.stream:
      _stream(model, prompts[0], decoding, options.weights)
    else:
      _print(model, prompts, decoding, options)
  finally:
    stop_listening()


def _read_lines(path: str) -> list[str]:
  try:
    text = Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"--prompt-file {path} cannot be read: {error}") from error
  lines = [line for line in text.splitlines() if line]
  if not lines:
    raise ConfigError(f"--prompt-file {path} has no prompts; write one a line")
  return lines


def _print(model: Model, prompts: list[str], decoding: dict, options: argparse.Namespace) -> None:
  out = model.generate(prompts, weights=options.weights, **decoding)
  copies = len(out.finish_reasons) // len(prompts)
  if options.json:
    print(json.dumps(_as_json(out, prompts)))
    return
  for index, reason in enumerate(out.finish_reasons):
    text = "" if out.texts is None else out.texts[index]
    print(prompts[index // copies] + text)
    if index + 1 < len(out.finish_reasons):
      print("---", f"({reason})", file=sys.stderr)


def _as_json(out: Any, prompts: list[str]) -> dict[str, Any]:
  lengths = [
    len(out.prompts[row * len(out.prompts) // len(out.num_new)]) + int(new)
    for row, new in enumerate(out.num_new)
  ]
  result = {
    "prompts": prompts,
    "texts": out.texts,
    "tokens": [row[:length].tolist() for row, length in zip(out.tokens, lengths)],
    "logprobs": [row[:new].tolist() for row, new in zip(out.logprobs, out.num_new)],
    "finish_reasons": out.finish_reasons,
    "seed": out.seed,
  }
  if out.scores is not None:
    result["scores"] = out.scores.tolist()
  if out.top_tokens is not None:
    result["top_tokens"] = [row[:new].tolist() for row, new in zip(out.top_tokens, out.num_new)]
    result["top_logprobs"] = [row[:new].tolist() for row, new in zip(out.top_logprobs, out.num_new)]
  return result


def _stream(model: Model, prompt: str, decoding: dict, weights: str) -> None:
  pieces = model.stream(prompt, weights=weights, **decoding)
  print(prompt, end="", flush=True)
  for piece in pieces:
    print(piece.text, end="", flush=True)
  print()


def _interact(model: Model, decoding: dict, weights: str) -> None:
  """Reads prompts from standard input, a line each, until it ends."""
  is_terminal = sys.stdin.isatty()
  while True:
    if is_terminal:
      print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    if not line.strip():
      continue
    try:
      _stream(model, line.rstrip("\n"), decoding, weights)
    except UserError as error:
      if not is_terminal:
        raise
      print(f"gptjax: {error}", file=sys.stderr)
