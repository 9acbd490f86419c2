"""Processes, played by threads, meet or learn who is missing."""

import socket
import threading

import pytest

from gptjax.errors import ConfigError, UserError
from gptjax.rendezvous import meet


def free_port():
  with socket.create_server(("", 0)) as listener:
    return listener.getsockname()[1]


def meet_all(callers, timeout_seconds, port=None):
  """Runs meet(num_processes, process_id) for every caller; returns each one's error or None."""
  address = f"127.0.0.1:{port or free_port()}"
  errors = [None] * len(callers)

  def call(index, num_processes, process_id):
    try:
      meet(address, num_processes, process_id, timeout_seconds)
    except UserError as error:
      errors[index] = error

  threads = [threading.Thread(target=call, args=(i, *caller)) for i, caller in enumerate(callers)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return errors


def test_all_processes_meet():
  assert meet_all([(4, 0), (4, 1), (4, 2), (4, 3)], timeout_seconds=20) == [None] * 4


def test_everyone_present_names_everyone_missing():
  errors = meet_all([(5, 0), (5, 2), (5, 3)], timeout_seconds=1)
  assert all(str(error).startswith("processes 1, 4 of 5 did not reach") for error in errors)
  assert "within 1 s (this is process 3)" in str(errors[2])


def test_a_missing_process_0_is_named():
  (error,) = meet_all([(2, 1)], timeout_seconds=0.5)
  assert str(error).startswith("process 0 of 2 did not reach")


def test_a_process_of_another_number_is_told():
  errors = meet_all([(2, 0), (3, 2)], timeout_seconds=1)
  assert "process 1 of 2 did not reach" in str(errors[0])
  assert isinstance(errors[1], ConfigError)
  assert "refused: process 0 was started with num_processes 2" in str(errors[1])


def test_a_process_id_given_twice_is_told():
  errors = meet_all([(3, 0), (3, 1), (3, 1)], timeout_seconds=1)
  messages = sorted(str(error) for error in errors)
  assert messages[0] == "process 1 was refused: process_id 1 is taken"
  assert all("process 2 of 3 did not reach" in message for message in messages[1:])


def test_strangers_at_the_port_do_no_harm():
  port = free_port()
  stop = threading.Event()

  def knock():
    while not stop.is_set():
      try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.1) as connection:
          connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
      except OSError:
        stop.wait(0.01)

  thread = threading.Thread(target=knock)
  thread.start()
  try:
    assert meet_all([(2, 0), (2, 1)], timeout_seconds=20, port=port) == [None, None]
  finally:
    stop.set()
    thread.join()


@pytest.mark.parametrize("says", [b"", b"\x00\xff\nHTTP/2\n"])
def test_another_server_at_the_port_is_not_taken_for_process_0(says):
  with socket.create_server(("", 0)) as listener:

    def serve():
      while True:
        try:
          connection, _ = listener.accept()
        except OSError:
          return
        connection.sendall(says)
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    (error,) = meet_all([(2, 1)], timeout_seconds=0.5, port=listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
  assert str(error).startswith("process 0 of 2 did not reach")


@pytest.mark.parametrize("address", ["host", ":1234", "host:", "host:x", "host:70000"])
def test_an_address_without_host_or_port_is_refused(address):
  with pytest.raises(ConfigError, match='must be "host:port"'):
    meet(address, 2, 1, 1)


def test_a_taken_port_is_named():
  with socket.create_server(("", 0)) as listener:
    port = listener.getsockname()[1]
    with pytest.raises(ConfigError, match=f"cannot listen on port {port}"):
      meet(f"127.0.0.1:{port}", 2, 0, 1)
