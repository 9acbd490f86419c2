"""What the tasks of `gptjax evaluate` share: flags, the model, and how figures are printed."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from gptjax.checkpoint.models import DTYPES, Loaded, load_model, to_stderr
from gptjax.cli.arguments import MODEL_HELP, add_json
from gptjax.cli.compilation import enable_compilation_cache
from gptjax.errors import ConfigError
from gptjax.evaluate.detokenizers import DETOKENIZERS
from gptjax.evaluate.protocol import DOCUMENTS, STARTS, TextProtocol
from gptjax.evaluate.scoring import Scorer
from gptjax.generate.kernels import WEIGHTS, round_to_int8
from gptjax.parallel import make_parallel

# Ids that a model may have beside those of its tokenizer, for the sake of even shapes.
_MOST_PADDING = 1024
_TEXT_FLAGS = {
  "start": ("token before each document", STARTS),
  "documents": ("what is a document: whole files and records, or lines of text files", DOCUMENTS),
  "text_column": ("field of jsonl, csv, parquet and hub records", None),
  "detokenizer": ("puts parted text together first", tuple(DETOKENIZERS)),
  "dtype": ("of parameters and products", DTYPES),
}


def add_model(parser: argparse.ArgumentParser, is_required: bool = True) -> None:
  """Adds --model, --weights, --tokenizer, --batch-size and --json."""
  parser.add_argument("--model", required=is_required, help=MODEL_HELP)
  parser.add_argument(
    "--weights",
    default="float32",
    choices=WEIGHTS,
    help="int8 scores the model as generation with --weights int8 has it",
  )
  parser.add_argument("--tokenizer", help="file or folder to take instead of the model's own")
  parser.add_argument(
    "--batch-size", type=int, help="rows of a whole context in a batch; changes speed only"
  )
  add_json(parser)


def add_data(parser: argparse.ArgumentParser, is_required: bool = True) -> None:
  """Adds --data."""
  parser.add_argument(
    "--data",
    nargs="+",
    action="extend",
    required=is_required,
    help="text, jsonl, csv, parquet or token (.bin) files, globs, or hub:NAME@SPLIT",
  )


def add_text_protocol(parser: argparse.ArgumentParser) -> None:
  """Adds a flag for each field of a TextProtocol but its name."""
  add_fields(parser, _TEXT_FLAGS)


def add_windows(parser: argparse.ArgumentParser) -> None:
  """Adds --context and --stride."""
  parser.add_argument("--context", type=int, dest="field_context", help="tokens of a window")
  parser.add_argument(
    "--stride",
    type=int,
    dest="field_stride",
    help="tokens between windows; negative from the context; default: half of it",
  )


def add_fields(parser: argparse.ArgumentParser, flags: Mapping[str, tuple]) -> None:
  """Adds flags, {name of the field: (help, choices)}."""
  for name, (help, choices) in flags.items():
    flag = f"--{name.replace('_', '-')}"
    parser.add_argument(flag, help=help, choices=choices, dest=f"field_{name}")


def read_protocol(options: argparse.Namespace, base: TextProtocol) -> Any:
  """Returns a protocol with the fields that flags give."""
  given = {
    name.removeprefix("field_"): value
    for name, value in vars(options).items()
    if name.startswith("field_") and value is not None
  }
  return dataclasses.replace(base, **given)


def load_scorer(
  options: argparse.Namespace, dtype: str, name: str | None = None, tokenizer: str | None = None
) -> tuple[Loaded, Scorer]:
  """Loads --model as its flags say, or another by name, onto every local device."""
  if options.batch_size is not None and options.batch_size < 1:
    raise ConfigError(f"--batch-size is {options.batch_size}; it must be at least 1")
  enable_compilation_cache()
  parallel = make_parallel("pmap", devices=jax.local_devices())
  if name is None:
    model = load_model(options.model, dtype, parallel, tokenizer=options.tokenizer)
    model = round_weights(model, options.weights)
  else:
    model = load_model(name, dtype, parallel, tokenizer=tokenizer)
  doubt_tokenizer(model)
  return model, Scorer(model, options.batch_size, parallel)


def doubt_tokenizer(model: Loaded) -> None:
  """Says so where a tokenizer has far fewer ids than its model; too many are refused in scoring."""
  known = model.config.vocab_size if model.tokenizer is None else model.tokenizer.vocab_size
  if model.config.vocab_size - known > _MOST_PADDING:
    to_stderr(
      f"the tokenizer has {known:,} ids, and the model {model.config.vocab_size:,}; if it is not"
      " the one that the model was trained with, the figures mean nothing"
    )


def round_weights(model: Loaded, weights: str) -> Loaded:
  """Returns a model as --weights says."""
  if weights == "float32":
    return model
  return dataclasses.replace(model, params=round_to_int8(model.params))


def told(options: argparse.Namespace) -> dict[str, Any]:
  """Returns what a receipt tells of the model beside its hashes."""
  given = {} if options.tokenizer is None else {"tokenizer": options.tokenizer}
  return {"model": options.model, **given, "weights": options.weights}


def print_receipt(receipt: dict[str, Any], options: argparse.Namespace) -> None:
  """Prints a receipt, as JSON or as a table."""
  receipt = {**told(options), "data": options.data, **receipt}
  if options.json:
    print(json.dumps(receipt, ensure_ascii=False))
    return
  for name, value in _rows(receipt):
    print(f"{name.replace('_', ' '):<30}{value}")


def write_page(path: str, page: str) -> None:
  """Writes the HTML that --out asks for."""
  try:
    Path(path).write_text(page, encoding="utf-8")
  except OSError as error:
    raise ConfigError(f'--out "{path}" cannot be written: {error.strerror}') from error
  print(f"written: {path}", file=sys.stderr)


def _rows(receipt: dict[str, Any]) -> list[tuple[str, str]]:
  """Spells out a receipt, a row for each figure with its standard error."""
  skipped = ("task", "versions", "counts", "protocol", "published", "standard_error_over")
  rows = []
  for name, value in receipt.items():
    if name in skipped or name.endswith("standard_error"):
      continue
    rows.append((name, _format(value) + _error_of(name, receipt)))
  rows += [("published", _published(entry)) for entry in receipt.get("published", [])]
  for name in ("counts", "protocol", "versions"):
    words = [
      f"{key.replace('_', ' ')} {_format(value)}" for key, value in receipt.get(name, {}).items()
    ]
    rows.append((name, ", ".join(words)))
  return rows


def _error_of(name: str, receipt: dict[str, Any]) -> str:
  plain = name in ("nats_per_token", "nats_per_word")
  error = receipt.get("standard_error" if plain else f"{name}_standard_error")
  if error is None:
    return ""
  over = f" (over {receipt['standard_error_over']})" if "standard_error_over" in receipt else ""
  return f" ± {error:.2g}{over if plain else ''}"


def _published(entry: dict[str, Any]) -> str:
  sizes = "" if entry["is_same_size"] else ", which has other sizes"
  return (
    f"{entry['figure'].replace('_', ' ')} {entry['published']:g} for {entry['model']}{sizes};"
    f" difference {entry['difference']:+.4g}"
  )


def _format(value: Any) -> str:
  if isinstance(value, dict):
    if value.keys() == {"name", "value"}:
      return f"{value['name'].replace('_', ' ')} {_format(value['value'])}"
    said = {key: item for key, item in value.items() if item not in (None, "", (), [], {})}
    return ", ".join(f"{key.replace('_', ' ')} {_format(item)}" for key, item in said.items())
  if isinstance(value, list | tuple):
    return " ".join(map(_format, value))
  if isinstance(value, float):
    return f"{value:.6g}"
  if isinstance(value, int):
    return f"{value:,}"
  if isinstance(value, str) and len(value) == 64:
    return value[:12]
  if isinstance(value, str) and (value != value.strip() or "\n" in value):
    return repr(value)
  return "-" if value is None else str(value)
