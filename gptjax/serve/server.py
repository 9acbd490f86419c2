"""The process that serves: a model is loaded, a socket bound, uvicorn run, and all ended."""

import contextlib
import functools
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from gptjax.api import load
from gptjax.checkpoint.resolve import resolve_model
from gptjax.errors import ConfigError
from gptjax.evaluate.classify import Classifier
from gptjax.serve import classify, editor
from gptjax.serve.app import Access, make_app
from gptjax.serve.chat_template import read_template
from gptjax.serve.engine import Engine, Limits
from gptjax.serve.served import Served

Report = Callable[[str], None]


def load_served(name: str, alias: str, weights: str, limits: Limits, report: Report) -> Served:
  """Loads a model with all that requests to it need.

  Args:
    name: whatever `gptjax.load` takes; requests may call the model so.
    alias: what answers call it; empty is the last part of `name`.
    weights: "float32" or "int8".
    limits: how much is taken on.
    report: takes lines about the start.

  Raises:
    UserError: no such model, or limits that do not fit it.
  """
  model = load(name)
  folder = Path(resolve_model(name).path)
  folder = folder if folder.is_dir() else folder.parent
  template = read_template(folder, {} if model.tokenizer is None else model.tokenizer.roles)
  generator, classifier, warm_ups = model.generator(weights), None, []
  if model.tokenizer is not None:
    warm_ups.append(functools.partial(editor.warm_up, generator))
  if model.task is not None and model.tokenizer is not None:
    classifier = Classifier(model, name, report)
    warm_ups.append(classify.make_warm_up(classifier))
  engine = Engine(generator, alias or Path(name.rstrip("/")).name, limits, warm_ups, report)
  return Served(engine, (name,), template, classifier)


def run(served: Served, access: Access, host: str, port: int, report: Report) -> int:
  """Serves until it is told to stop: SIGTERM or Ctrl-C finish what runs, once more ends at once.

  Args:
    served: the model.
    access: who may call.
    host, port: 0 finds a free port.
    report: takes the address.

  Returns:
    The exit status.

  Raises:
    ConfigError: an address that cannot be had.
  """
  engine, app = served.engine, make_app(served, access)
  with bind(host, port) as listener:
    shown, port = listener.getsockname()[:2]
    address = f"[{shown}]" if ":" in shown else shown
    report(f"serving {engine.model_name} at http://{address}:{port}")
    # uvicorn takes these signals, stops, and raises them again: by then the stop was a success.
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, signal.SIG_IGN)
    uvicorn.Server(_config(app, engine.limits)).run(sockets=[listener])
  return 1 if engine.status == "failed" else 0


def bind(host: str, port: int) -> socket.socket:
  """Returns a socket that is bound to an address.

  Raises:
    ConfigError: the address cannot be had.
  """
  if not 0 <= port < 1 << 16:
    raise ConfigError(f"--port is {port}; it must be 0 to 65535")
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with contextlib.ExitStack() as stack:
      listener = stack.enter_context(socket.socket(family, kind, protocol))
      listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      listener.bind(address)
      stack.pop_all()
  except OSError as error:
    raise ConfigError(
      f"cannot listen at {host}, port {port}: {error}; choose another --host or --port"
    ) from error
  return listener


def _config(app: FastAPI, limits: Limits) -> uvicorn.Config:
  return uvicorn.Config(
    app,
    log_level="warning",
    lifespan="on",
    timeout_graceful_shutdown=max(1, round(limits.seconds)),
    server_header=False,
  )
