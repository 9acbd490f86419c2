"""The editor's TAB key on GPT-2 124M: seconds until continuations are there.

The server is `gptjax serve` with random weights and one token a character; a document is 300 of
them. The page reads a document while it is written, so the first press finds all but the last
character read; the second press asks for the same continuations, longer. "unread" is a press in a
document that was just opened.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import jax

from benchmarks.common import machine, print_result
from benchmarks.serve import CHARACTERS, Server
from gptjax.api import Model
from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import init_parameters
from gptjax.model.presets import preset

GOAL_SECONDS = 1.0
NUM_CHARACTERS = 300
PAUSE_SECONDS = 1.0  # from the last letter to TAB; what was asked for before is computed meanwhile
COUNT, NUM_TOKENS = 5, 6  # the page's own, at first


def save_model(folder: str, is_quick: bool) -> None:
  """Writes GPT-2 124M, or a tiny model, with a tokenizer of ASCII characters."""
  config = preset("gpt2")
  if is_quick:
    config = ModelConfig(
      vocab_size=len(CHARACTERS), num_layers=1, num_heads=2, model_dim=16, context_length=512
    )
  params = init_parameters(config, jax.random.key(0))
  Model(config, params, make_char_tokenizer([CHARACTERS])).save(folder)


def ask(port: int, path: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
  """Asks the server as the page does; returns (seconds, answer)."""
  request = urllib.request.Request(
    f"http://127.0.0.1:{port}/editor/{path}",
    json.dumps(body).encode(),
    {"Content-Type": "application/json"},
  )
  started = time.perf_counter()
  with urllib.request.urlopen(request) as answer:
    found = json.load(answer)
  return time.perf_counter() - started, found


def press_twice(port: int, document: int) -> dict[str, float]:
  """Writes a document of its own and presses TAB twice; {press: seconds}."""
  characters = random.Random(document).choices(CHARACTERS[1:], k=2 * NUM_CHARACTERS)
  text, unread = "".join(characters[:NUM_CHARACTERS]), "".join(characters[NUM_CHARACTERS:])
  place = {"session": f"written-{document}", "text": text, "count": COUNT}
  ask(port, "read", {"session": place["session"], "text": text[:-1]})
  time.sleep(PAUSE_SECONDS)
  first, short = ask(port, "continuations", place | {"num_tokens": NUM_TOKENS})
  second, long = ask(port, "continuations", place | {"num_tokens": 2 * NUM_TOKENS})
  for one, other in zip(short["choices"], long["choices"], strict=True):
    if other["pieces"][: len(one["pieces"])] != one["pieces"]:
      raise RuntimeError("the second press gave other continuations")
  opened = {"session": f"opened-{document}", "text": unread, "count": COUNT}
  seconds, _ = ask(port, "continuations", opened | {"num_tokens": NUM_TOKENS})
  return {"first": first, "second": second, "unread": seconds}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
  """Measures, prints, and returns the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--documents", type=int, default=7)
  parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs")
  options = parser.parse_args(arguments)
  here = machine()
  with tempfile.TemporaryDirectory() as folder:
    model = str(Path(folder, "model"))
    save_model(model, options.quick)
    with Server(model, num_slots=4) as server:
      press_twice(server.port, options.documents)  # warms up
      presses = [press_twice(server.port, document) for document in range(options.documents)]
  seconds = {name: [press[name] for press in presses] for name in presses[0]}
  median = {name: statistics.median(values) for name, values in seconds.items()}
  result = {
    "benchmark": "editor",
    "machine": here,
    "quick": options.quick,
    "goal_seconds": GOAL_SECONDS,
    "median_seconds": median,
    "longest_seconds": {name: max(values) for name, values in seconds.items()},
    "is_met": median["first"] <= GOAL_SECONDS,
  }
  rows = [
    (f"{name} press", f"{median[name]:.2f}", f"{max(values):.2f}")
    for name, values in seconds.items()
  ]
  notes = [f"{COUNT} continuations after {NUM_CHARACTERS} tokens; goal {GOAL_SECONDS:g} s"]
  title = "editor (--quick: not a measurement)" if options.quick else "editor"
  print_result(title, ("GPT-2 124M", "median, s", "longest, s"), rows, result, notes)
  return result


if __name__ == "__main__":
  main()
