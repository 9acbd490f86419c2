"""Memory and time of the loss of GPT-2 124M, at once and over chunks of tokens.

Twice: the head and the loss with their gradient alone, and the whole training step. Memory is
XLA's own account of the compiled program (`compiled.memory_analysis()`): temporary arrays, which
is where logits live, and the peak with arguments and results.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import Figure, machine, milliseconds, print_result, ratio, summarize
from benchmarks.train_step import gpt2_config, random_batch, start_step
from gptjax.parallel import make_parallel
from gptjax.report import format_bytes
from gptjax.train.config import PretrainConfig
from gptjax.train.loss import chunked_next_token_loss
from gptjax.train.setup import start_devices


@dataclasses.dataclass(frozen=True)
class Measured:
  """One program: bytes of temporaries and at the peak, seconds."""

  temporary_bytes: int
  peak_bytes: int
  seconds: Figure


def measure(
  compiled: dict[int, Any], run: Callable[[int], None], rounds: int
) -> dict[int, Measured]:
  """Runs programs in turn.

  Args:
    compiled: by chunk size.
    run: runs one of them to its end.
  """
  seconds = {chunk: [] for chunk in compiled}
  for _ in range(rounds + 1):
    for chunk in compiled:
      started = time.perf_counter()
      run(chunk)
      seconds[chunk].append(time.perf_counter() - started)
  # The first round warms up.
  return {
    chunk: Measured(*account(program), summarize(seconds[chunk][1:]))
    for chunk, program in compiled.items()
  }


def account(compiled: Any) -> tuple[int, int]:
  """Returns bytes of temporaries, and of everything; donated arguments count once."""
  used = compiled.memory_analysis()
  total = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
  return used.temp_size_in_bytes, total + used.temp_size_in_bytes


def measure_loss(
  config: PretrainConfig, tokens: int, chunks: Sequence[int], rounds: int
) -> dict[int, Measured]:
  """Measures head, loss and their gradient alone."""
  model = config.model
  hidden_TD = jax.random.normal(jax.random.key(0), (tokens, model.model_dim))
  kernel_VD = 0.02 * jax.random.normal(
    jax.random.key(1), (model.padded_vocab_size, model.model_dim)
  )
  targets_T = jax.random.randint(jax.random.key(2), (tokens,), 0, model.vocab_size)

  def loss(chunk, hidden_TD, kernel_VD):
    return chunked_next_token_loss(
      hidden_TD,
      kernel_VD,
      None,
      targets_T,
      jnp.ones(tokens),
      vocab_size=model.vocab_size,
      chunk_tokens=chunk,
    )[0]

  compiled = {}
  for chunk in chunks:
    gradient = jax.jit(jax.grad(functools.partial(loss, chunk), argnums=(0, 1)))
    compiled[chunk] = gradient.lower(hidden_TD, kernel_VD).compile()
  return measure(
    compiled, lambda chunk: jax.block_until_ready(compiled[chunk](hidden_TD, kernel_VD)), rounds
  )


def measure_step(
  config: PretrainConfig, row_tokens: int, chunks: Sequence[int], rounds: int
) -> dict[int, Measured]:
  """Measures the whole training step."""
  parallel = make_parallel("pmap")
  batch = parallel.shard_batch(random_batch(config.train.batch_rows, row_tokens, config.model), 1)
  states, compiled = {}, {}
  for chunk in chunks:
    train = dataclasses.replace(config.train, loss_chunk_tokens=chunk)
    states[chunk], program = start_step(dataclasses.replace(config, train=train), parallel)
    compiled[chunk] = program.lower(states[chunk], batch).compile()

  def run(chunk):
    states[chunk], _ = jax.block_until_ready(compiled[chunk](states[chunk], batch))

  return measure(compiled, run, rounds)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
  """Measures, prints, and returns the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chunk-tokens", type=int, default=256)
  parser.add_argument("--loss-tokens", type=int, default=4096, help="T of the loss alone")
  parser.add_argument("--row-tokens", type=int, default=256, help="of the step's 4 rows")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--quick", action="store_true", help="tiny sizes: shows it runs")
  options = parser.parse_args(arguments)
  overrides = {"model.scan_layers": "True"}
  if options.quick:
    options.loss_tokens, options.row_tokens, options.chunk_tokens, options.rounds = 256, 64, 64, 1
    tiny = {"num_layers": 1, "num_heads": 2, "model_dim": 32, "vocab_size": 1024}
    overrides |= {f"model.{key}": str(value) for key, value in tiny.items()}
  config = gpt2_config(overrides)
  start_devices(config)
  here, chunks = machine(), (0, options.chunk_tokens)
  measured = {
    "loss": measure_loss(config, options.loss_tokens, chunks, options.rounds),
    "step": measure_step(config, options.row_tokens, chunks, options.rounds),
  }
  result = {"benchmark": "loss_memory", "machine": here, "quick": options.quick}
  rows = []
  for name, by_chunk in measured.items():
    whole, chunked = (by_chunk[chunk] for chunk in chunks)
    result[name] = {"whole": whole, "chunked": chunked} | compare(chunked, whole)
    rows += [table_row(name, chunk, by_chunk[chunk]) for chunk in chunks]
  notes = [
    f"loss: head, loss and gradient of {options.loss_tokens} tokens; step: 4 x"
    f" {options.row_tokens} tokens, layers scanned; chunk 0: all tokens at once."
  ]
  print_result("loss_memory", COLUMNS, rows, result, notes)
  return result


COLUMNS = ("", "chunk, tokens", "temporaries", "peak", "median, ms", "min", "rounds")


def compare(chunked: Measured, whole: Measured) -> dict[str, float]:
  """Returns the ratios chunked / whole."""
  return {
    "temporary_ratio": chunked.temporary_bytes / whole.temporary_bytes,
    "peak_ratio": chunked.peak_bytes / whole.peak_bytes,
    "seconds_ratio": ratio(chunked.seconds, whole.seconds),
  }


def table_row(name: str, chunk: int, measured: Measured) -> tuple:
  """Writes one program as a row of the table."""
  memory = (format_bytes(measured.temporary_bytes), format_bytes(measured.peak_bytes))
  return name, chunk, *memory, *milliseconds(measured.seconds)


if __name__ == "__main__":
  main()
