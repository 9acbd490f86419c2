"""The process that serves: a socket, uvicorn, and how it ends."""

import socket
import sys

import uvicorn
from fastapi import FastAPI

from gptjax.errors import ConfigError
from gptjax.serve.engine import Engine


def run(app: FastAPI, engine: Engine, host: str, port: int, stop_seconds: float) -> int:
  """Serves until it is told to stop: SIGTERM or Ctrl-C finish what runs, once more ends at once.

  Args:
    app: with the engine's life in it.
    engine: to see whether it failed.
    host, port: 0 finds a free port.
    stop_seconds: that running requests may take to finish.

  Returns:
    The exit status.

  Raises:
    ConfigError: an address that cannot be had.
  """
  with _bind(host, port) as listener:
    shown, port = listener.getsockname()[:2]
    address = f"[{shown}]" if ":" in shown else shown
    print(f"serving {engine.model_name} at http://{address}:{port}", file=sys.stderr, flush=True)
    config = uvicorn.Config(
      app,
      log_level="warning",
      lifespan="on",
      timeout_graceful_shutdown=round(stop_seconds),
      server_header=False,
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
  return 1 if engine.status == "failed" else 0


def _bind(host: str, port: int) -> socket.socket:
  if not 0 <= port < 1 << 16:
    raise ConfigError(f"--port is {port}; it must be 0 to 65535")
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
  except OSError as error:
    raise ConfigError(
      f"cannot listen at {host}, port {port}: {error}; choose another --host or --port"
    ) from error
  return listener
