"""`gptjax serve`: an OpenAI-compatible API of a model, and the editor page."""

import argparse
import os
from pathlib import Path

from gptjax.checkpoint.models import to_stderr
from gptjax.cli.arguments import MODEL_HELP
from gptjax.cli.compilation import enable_compilation_cache
from gptjax.errors import ConfigError

API_KEY_VARIABLE = "GPTJAX_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--model", required=True, help=MODEL_HELP)
  parser.add_argument("--model-name", help="what clients call it; default the last part of MODEL")
  parser.add_argument("--weights", default="float32", choices=["float32", "int8"])
  parser.add_argument("--host", default="127.0.0.1", help="default this machine only")
  parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 finds a free one")
  parser.add_argument(
    "--api-key-file", help=f"file of the key that requests must send; or set {API_KEY_VARIABLE}"
  )
  parser.add_argument(
    "--cors-origin", action="append", help="pages of this origin may call; may be repeated"
  )
  parser.add_argument("--num-slots", type=int, default=16, help="texts made at a time; default 16")
  parser.add_argument(
    "--num-positions", type=int, default=0, help="tokens of prompt and text; default the context"
  )
  parser.add_argument("--max-queue", type=int, default=128, help="requests that wait; default 128")
  parser.add_argument(
    "--time-limit", type=float, default=600.0, help="seconds that a request may take; default 600"
  )


def run(options: argparse.Namespace) -> int:
  try:
    from gptjax.serve import app, engine, server
  except ImportError as error:
    raise ConfigError(
      f"{error}; serving needs more packages: run `.venv/bin/pip install -e '.[serve]'`"
    ) from None
  limits = engine.Limits(
    options.num_slots, options.num_positions, options.max_queue, options.time_limit
  )
  access = app.Access(_read_key(options.api_key_file), tuple(options.cors_origin or ()))
  # An address that cannot be had is known before a model is loaded.
  server.bind(options.host, options.port).close()
  enable_compilation_cache()
  name, weights = options.model_name or "", options.weights
  served = server.load_served(options.model, name, weights, limits, to_stderr)
  return server.run(served, access, options.host, options.port, to_stderr)


def _read_key(path: str | None) -> str | None:
  if path is None:
    return os.environ.get(API_KEY_VARIABLE) or None
  try:
    key = Path(path).read_text(encoding="utf-8").strip()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"--api-key-file {path} cannot be read: {error}") from error
  if not key:
    raise ConfigError(f"--api-key-file {path} is empty; write the key into it")
  return key
