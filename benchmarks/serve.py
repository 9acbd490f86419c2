"""Continuous batching: 64 streaming clients at once, beside the same requests one by one.

The server is a process of its own, `gptjax serve` with a model of random weights; the clients are
another. Every request is greedy, with a prompt and a length of its own, and is sent to both sides:
each text must be the same. Memory is that of the server's process, after the first round and at the
end.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax

from benchmarks.common import machine, print_result
from gptjax.api import Model
from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import init_parameters

GOAL = 3.0
_START_SECONDS = 600
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a client got.

  Attributes:
    text: all of it, joined.
    first_seconds, seconds: until the first piece, and the last.
    tokens: as the server counted them.
  """

  text: str
  first_seconds: float
  seconds: float
  tokens: int


def save_model(folder: str, is_quick: bool) -> None:
  """Writes a model of random weights, with a tokenizer of ASCII characters."""
  sizes = {"num_layers": 4, "num_heads": 4, "model_dim": 128, "context_length": 256}
  if is_quick:
    sizes |= {"num_layers": 1, "num_heads": 2, "model_dim": 16, "context_length": 64}
  config = ModelConfig(vocab_size=len(CHARACTERS), **sizes)
  tokenizer = make_char_tokenizer([CHARACTERS])
  Model(config, init_parameters(config, jax.random.key(0)), tokenizer).save(folder)


class Server:
  """`gptjax serve` in a process, ready when the context is entered.

  Args:
    folder: the model.
    num_slots: texts made at a time.

  Attributes:
    port: at 127.0.0.1.
    process: of the server.
  """

  def __init__(self, folder: str, num_slots: int):
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      self.port = probe.getsockname()[1]
    # As the Makefile has it.
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = [sys.executable, "-m", "gptjax", "serve", "--model", folder]
    command += ["--port", str(self.port), "--num-slots", str(num_slots)]
    self._log = Path(folder, "serve.log")
    with self._log.open("w") as log:
      self.process = subprocess.Popen(command, env=environment, stderr=log)

  def __enter__(self) -> "Server":
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and self.process.poll() is None:
      try:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
          return self
      except (OSError, urllib.error.HTTPError):
        time.sleep(0.2)
    self.__exit__()
    raise RuntimeError(f"the server did not start: {self._log.read_text()[-500:]}")

  def __exit__(self, *_: object) -> None:
    self.process.terminate()
    self.process.wait()

  @property
  def resident_bytes(self) -> int:
    """Memory of the process."""
    status = Path(f"/proc/{self.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status).group(1))


def make_requests(count: int, longest: int) -> list[dict]:
  """Draws requests: prompts of 4 to 32 characters, and texts of a quarter of `longest`, or more."""
  rng = random.Random(0)
  return [
    {
      "prompt": "".join(rng.choices(CHARACTERS, k=rng.randint(4, 32))),
      "max_tokens": rng.randint(longest // 4, longest),
      "temperature": 0,
      "stream": True,
      "stream_options": {"include_usage": True},
    }
    for _ in range(count)
  ]


async def ask(port: int, request: dict) -> Answer:
  """Sends one request, over a connection of its own, and reads the stream to its end."""
  started = time.perf_counter()
  reader, writer = await asyncio.open_connection("127.0.0.1", port)
  body = json.dumps(request).encode()
  head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
  head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
  writer.write(head.encode() + body)
  status = await reader.readline()
  if b" 200 " not in status:
    raise RuntimeError(f"the server answered {status!r}: {(await reader.read())[-300:]!r}")
  first, texts, tokens, is_whole = 0.0, [], 0, False
  async for line in reader:
    if not line.startswith(b"data: "):
      continue
    first = first or time.perf_counter() - started
    if line == b"data: [DONE]\n":
      is_whole = True
      break
    event = json.loads(line[6:])
    texts += [choice["text"] for choice in event["choices"]]
    if event["usage"] is not None:
      tokens = event["usage"]["completion_tokens"]
  writer.close()
  if not is_whole or tokens != request["max_tokens"]:
    raise RuntimeError(f"a stream ended after {tokens} of {request['max_tokens']} tokens")
  return Answer("".join(texts), first, time.perf_counter() - started, tokens)


async def run_clients(port: int, requests: list[dict], clients: int, seconds: float):
  """Has clients send the requests over and over, all together, for some time.

  Returns:
    ([(number of the request, its answer)], seconds that passed).
  """
  started, answers = time.perf_counter(), []

  async def work(client: int) -> None:
    number = client
    while True:
      index = number % len(requests)
      answers.append((index, await ask(port, requests[index])))
      number += clients
      if time.perf_counter() - started > seconds:
        return

  await asyncio.gather(*(work(client) for client in range(clients)))
  return answers, time.perf_counter() - started


def measure(folder: str, clients: int, seconds: float, num_slots: int, longest: int) -> dict:
  """Runs both sides and compares every text."""
  requests = make_requests(clients, longest)
  with Server(folder, num_slots) as server:
    alone, alone_seconds = asyncio.run(run_clients(server.port, requests, 1, seconds / 4))
    # A first round lets allocators find their size.
    asyncio.run(run_clients(server.port, requests, clients, 0))
    bytes_before = server.resident_bytes
    together, together_seconds = asyncio.run(run_clients(server.port, requests, clients, seconds))
    bytes_after = server.resident_bytes
  expected = {index: answer.text for index, answer in alone}
  expected |= {index: answer.text for index, answer in reversed(together) if index not in expected}
  mixed = sum(answer.text != expected[index] for index, answer in together)
  speeds = {
    name: sum(answer.tokens for _, answer in answers) / passed
    for name, answers, passed in (
      ("alone", alone, alone_seconds),
      ("together", together, together_seconds),
    )
  }
  return {
    "requests": len(together),
    "compared_alone": len(expected.keys() & {index for index, _ in alone}),
    "differing_texts": mixed,
    "seconds": together_seconds,
    "tokens_per_second": speeds,
    "ratio": speeds["together"] / speeds["alone"],
    "first_piece_seconds": {
      name: statistics.median(answer.first_seconds for _, answer in answers)
      for name, answers in (("alone", alone), ("together", together))
    },
    "resident_megabytes": {"first": bytes_before / 1e6, "last": bytes_after / 1e6},
  }


def main(arguments: list[str] | None = None) -> dict:
  """Measures, prints, and returns the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--clients", type=int, default=64)
  parser.add_argument("--seconds", type=float, default=60)
  parser.add_argument("--num-slots", type=int, default=64)
  parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs")
  options = parser.parse_args(arguments)
  here = machine()
  with tempfile.TemporaryDirectory() as folder:
    model = str(Path(folder, "small"))
    save_model(model, options.quick)
    seconds = min(options.seconds, 2) if options.quick else options.seconds
    longest = 24 if options.quick else 128
    found = measure(model, options.clients, seconds, options.num_slots, longest)
  result = {
    "benchmark": "serve",
    "machine": here,
    "quick": options.quick,
    "clients": options.clients,
    "goal": GOAL,
  } | found
  speeds, firsts = found["tokens_per_second"], found["first_piece_seconds"]
  rows = [
    (name, f"{speeds[name]:,.0f}", f"{1e3 * firsts[name]:,.0f}") for name in ("alone", "together")
  ]
  memory = found["resident_megabytes"]
  notes = [
    f"together / alone {found['ratio']:.2f} (goal {GOAL}); {found['requests']} requests together,"
    f" {found['differing_texts']} texts differ",
    f"memory of the server {memory['first']:.0f} MB after a first round, {memory['last']:.0f} MB"
    " at the end",
  ]
  columns = (f"{options.clients} streaming clients", "tokens/s", "first piece, ms")
  title = "serve (--quick: not a measurement)" if options.quick else "serve"
  print_result(title, columns, rows, result, notes)
  return result


if __name__ == "__main__":
  main()
