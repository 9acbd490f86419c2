"""Processes meet over TCP before jax connects them, so that a missing one is named.

jax's own coordination client ends the whole process with a C++ abort when its wait runs out, and
says only "deadline exceeded". Here process 0 listens on the coordinator's port, the others say who
they are, and everyone knows at every moment who is missing. Knows nothing of jax.
"""

import socket
import time
from collections.abc import Callable, Iterator

from gptjax.errors import ConfigError, UserError

_RETRY_SECONDS = 0.2
_HELLO_SECONDS = 5.0


def meet(
  coordinator: str,
  num_processes: int,
  process_id: int,
  timeout_seconds: float,
  announce: Callable[[str], None] = lambda line: None,
) -> None:
  """Waits until all processes have called it with the same coordinator.

  Args:
    coordinator: "host:port" of process 0; the port is free again on return.
    num_processes: how many must come.
    process_id: of this one, in [0, num_processes).
    timeout_seconds: how long to wait, from this call.
    announce: called with a line of text when there is somebody to wait for.

  Raises:
    UserError: some did not come in time; the message has their ids.
    ConfigError: the address, the id, or the number of processes does not fit.
  """
  host, port = _parse_address(coordinator)
  deadline = time.monotonic() + timeout_seconds
  missing = (
    _receive(port, num_processes, deadline, announce)
    if process_id == 0
    else _join(host, port, num_processes, process_id, deadline, announce)
  )
  if missing:
    names = ", ".join(str(i) for i in missing)
    raise UserError(
      f"process{'es' if len(missing) > 1 else ''} {names} of {num_processes} did not reach"
      f" {coordinator} within {timeout_seconds:g} s (this is process {process_id}); start"
      " every process, check the address and the firewall, or raise"
      " train.distributed_timeout_seconds"
    )


def _parse_address(coordinator: str) -> tuple[str, int]:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ConfigError(f'train.coordinator is "{coordinator}"; it must be "host:port" of process 0')
  return host.strip("[]"), int(port)


def _receive(port: int, num_processes: int, deadline: float, announce) -> list[int]:
  """Process 0: lets the others in and tells all of them who is missing, until nobody is."""
  joined: dict[int, socket.socket] = {}
  listener = _listen(port)
  try:
    while missing := [i for i in range(1, num_processes) if i not in joined]:
      ids = ", ".join(str(i) for i in missing)
      announce(f"waiting for processes {ids} of {num_processes}")
      _tell(joined, f"missing {ids}")
      connection = _accept(listener, deadline)
      if connection is None:
        return missing
      _admit(connection, joined, num_processes)
    _tell(joined, "ready")
    return []
  finally:
    for connection in joined.values():
      connection.close()
    listener.close()


def _listen(port: int) -> socket.socket:
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  try:
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
  except OSError as error:
    raise ConfigError(
      f"process 0 cannot listen on port {port} of train.coordinator ({error.strerror}); choose"
      " a free port"
    ) from error


def _accept(listener: socket.socket, deadline: float) -> socket.socket | None:
  listener.settimeout(max(deadline - time.monotonic(), 0.001))
  try:
    return listener.accept()[0]
  except TimeoutError:
    return None


def _admit(connection: socket.socket, joined: dict[int, socket.socket], num_processes: int) -> None:
  """Reads one greeting; strangers (port scanners) are dropped, misfits told why."""
  connection.settimeout(_HELLO_SECONDS)
  try:
    word, process_id, their_number = connection.makefile("r").readline().split()
    process_id, their_number = int(process_id), int(their_number)
  except (OSError, ValueError):
    connection.close()
    return
  if word != "gptjax" or their_number != num_processes or process_id in joined or process_id < 1:
    reason = (
      f"process_id {process_id} is taken"
      if their_number == num_processes
      else f"process 0 was started with num_processes {num_processes}"
    )
    _tell({process_id: connection}, f"refused {reason}")
    connection.close()
    return
  joined[process_id] = connection


def _tell(connections: dict[int, socket.socket], line: str) -> None:
  for connection in connections.values():
    try:
      connection.sendall(f"{line}\n".encode())
    except OSError:
      continue  # it died after it came; jax's own heartbeat will say so


def _join(
  host: str, port: int, num_processes: int, process_id: int, deadline: float, announce
) -> list[int]:
  """Another process: reports to process 0 and follows who is missing."""
  announce(f"process {process_id} of {num_processes} waits for process 0 at {host}:{port}")
  greeting = f"gptjax {process_id} {num_processes}\n".encode()
  while (connection := _connect(host, port, deadline)) is not None:
    with connection:
      missing = _follow(connection, greeting, deadline)
    if missing is not None:
      return missing
    time.sleep(_RETRY_SECONDS)
  return [0]


def _follow(connection: socket.socket, greeting: bytes, deadline: float) -> list[int] | None:
  """Returns who is missing at the end, or None if the other side was not process 0.

  The coordinator of a run that is just ending, for example, still holds the port.
  """
  missing = None
  for line in _exchange(connection, greeting, deadline):
    word, _, rest = line.partition(" ")
    if word == "ready":
      return []
    if word == "refused":
      raise ConfigError(f"process {greeting.split()[1].decode()} was refused: {rest}")
    if word == "missing":
      missing = [int(i) for i in rest.split(",")]
  return missing


def _connect(host: str, port: int, deadline: float) -> socket.socket | None:
  while (seconds_left := deadline - time.monotonic()) > 0:
    try:
      return socket.create_connection((host, port), timeout=seconds_left)
    except OSError:
      time.sleep(_RETRY_SECONDS)  # process 0, or its name, is not there yet
  return None


def _exchange(connection: socket.socket, greeting: bytes, deadline: float) -> Iterator[str]:
  """Greets; yields the lines that come before the deadline or the end of the connection."""
  buffered = b""
  try:
    connection.sendall(greeting)
    while (seconds_left := deadline - time.monotonic()) > 0:
      connection.settimeout(seconds_left)
      received = connection.recv(4096)
      if not received:
        return
      *lines, buffered = (buffered + received).split(b"\n")
      yield from (line.decode(errors="replace") for line in lines)
  except OSError:
    return
