"""One update: nanoGPT's CPU recipe beside its PyTorch twin, and GPT-2 124M beside the roof.

Ours is what `gptjax pretrain` runs: the loop, batches read ahead, the experiment's host devices,
the real step with clipping, metrics and the guard against bad steps. Each side has a process, and
they take turns (common.Contestant says why). A round's figure is the wall time of a block of
updates divided by their number. The roof is the fastest float32 matrix product seen in any round,
of jax and of PyTorch; the step is set against it with its median, so noise counts against us.
"""

import argparse
import dataclasses
import itertools
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from benchmarks.common import (
  Contestant,
  Figure,
  alternate,
  is_installed,
  machine,
  milliseconds,
  print_result,
  ratio,
  summarize,
)
from gptjax.batch import Batch
from gptjax.config import apply_overrides, from_config_dict, load_experiment, to_config_dict
from gptjax.data.batches import BatchSource
from gptjax.data.prefetch import prefetch
from gptjax.data.prepare import prepare_data
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import init_parameters
from gptjax.parallel import Parallel, Program
from gptjax.train import hardware, setup
from gptjax.train.config import PretrainConfig, TrainConfig
from gptjax.train.loop import Loop
from gptjax.train.optimizer import hyperparameters
from gptjax.train.schedule import resolve_durations
from gptjax.train.step import LanguageModelObjective, TrainState, init_state, make_train_step

EXPERIMENT = str(Path(__file__).parent.parent / "experiments" / "shakespeare_char.py")
# As many as tiny Shakespeare has.
NUM_CHARACTERS, NUM_KINDS = 1_115_394, 65
GPT2_ROWS, GPT2_ROW_TOKENS = 4, 256
GPT2_TWIN = {
  "vocab_size": 50_304,
  "context_length": 1024,
  "num_layers": 12,
  "num_heads": 12,
  "model_dim": 768,
  "bias": True,
  "batch_rows": GPT2_ROWS,
  "row_tokens": GPT2_ROW_TOKENS,
}
MATMUL_SIZES = (1024, 2048, 4096)
LARGEST_RATIO, SMALLEST_FRACTION = 1.05, 0.75


def make_ours(config: PretrainConfig, row_tokens: int | None = None):
  """Contestant: returns `run(count)` -> seconds of `count` updates through the loop.

  Args:
    config: without data, random rows of `row_tokens` are trained on.
  """
  setup.start_devices(config)
  parallel = setup.make_parallel(config)
  if config.data.is_empty:
    rows = itertools.repeat(random_batch(config.train.batch_rows, row_tokens, config.model))
  else:
    prepared = prepare_data(config.data, report=lambda line: None)
    config = setup.resolve_model(config, prepared)
    schedule = setup.batch_schedule(config)
    rows = BatchSource(prepared, config.model.context_length, config.seed, schedule).batches()
  batches = prefetch((parallel.shard_batch(batch, config.train.accumulation) for batch in rows), 2)
  state, train_step = start_step(config, parallel)
  loop = make_loop(config, train_step)
  step = 0

  def run(count: int) -> float:
    nonlocal state, step
    started = time.perf_counter()
    state, step = dataclasses.replace(loop, num_steps=step + count).run(state, batches, step)
    jax.block_until_ready(state)
    return time.perf_counter() - started

  run(2)
  return run


def start_step(config: PretrainConfig, parallel: Parallel) -> tuple[TrainState, Program]:
  """Returns the first state and the compiled-on-demand train step."""
  train = config.train
  durations = resolve_durations(config.optimizer, train.num_steps, lambda step: 0)
  hyper = hyperparameters(config.optimizer, durations, z_loss=train.z_loss)

  def init(key):
    return init_state(init_parameters(config.model, key), config.optimizer, hyper, key)

  step = make_train_step(
    LanguageModelObjective(config.model, train.loss_chunk_tokens),
    config.optimizer,
    skip_nonfinite=train.skip_nonfinite,
    spike_sigmas=train.spike_sigmas,
  )
  return parallel.init_state(init, jax.random.key(config.seed)), parallel.compile_step(step)


def make_loop(config: PretrainConfig, train_step: Program) -> Loop:
  """Makes the loop of a run without events; its num_steps is left to the caller."""
  train = config.train
  return Loop(
    train_step=train_step,
    num_steps=0,
    events=(),
    save=lambda *_: None,
    save_every_steps=train.num_steps,
    write=lambda *_: None,
    show=lambda *_: None,
    status=lambda _: None,
    log_every_steps=train.log_every_steps,
    flops_per_token=0.0,
    peak_flops_per_second=None,
    max_bad_steps=train.max_bad_steps,
    diagnose=lambda *_: "",
    should_stop=lambda step: False,
  )


def random_batch(rows: int, row_tokens: int, model: ModelConfig) -> Batch:
  """Draws rows of random tokens."""
  shape = (rows, row_tokens + 1)
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)
  weights = np.ones((rows, row_tokens), np.float32)
  return Batch(np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:]), weights)


def make_matmul(size: int):
  """Contestant: returns `run(count)` -> FLOP/s of the fastest of `count` square products."""
  matrix = jax.numpy.ones((size, size), "float32")
  product = jax.jit(jax.numpy.dot)
  product(matrix, matrix).block_until_ready()

  def run(count: int) -> float:
    best = 0.0
    for _ in range(count):
      started = time.perf_counter()
      product(matrix, matrix).block_until_ready()
      best = max(best, 2.0 * size**3 / (time.perf_counter() - started))
    return best

  return run


def write_text(path: Path) -> None:
  """Writes as many characters of as many kinds as tiny Shakespeare has."""
  kinds = np.array([chr(ord("0") + i) for i in range(NUM_KINDS)])
  ids = np.random.default_rng(0).integers(0, NUM_KINDS, NUM_CHARACTERS)
  path.write_text("".join(kinds[ids]))


def nanogpt_config(text: Path, cache: Path) -> PretrainConfig:
  """Returns nanoGPT's recipe on a text."""
  config = load_experiment(
    EXPERIMENT, {"data.hub": "", "data.files": f'["{text}"]', "data.cache_dir": str(cache)}
  )
  return from_config_dict(PretrainConfig, config)


def gpt2_config(overrides: dict[str, str]) -> PretrainConfig:
  """Returns GPT-2 124M on one host device, unrolled: the fastest on a CPU."""
  config = to_config_dict(
    PretrainConfig(
      model=ModelConfig(vocab_size=50_257, scan_layers=False),
      train=TrainConfig(num_steps=1_000_000, batch_rows=GPT2_ROWS, host_devices=1),
    )
  )
  apply_overrides(config, overrides)
  return from_config_dict(PretrainConfig, config)


def measure_nanogpt(rounds: int, steps: int) -> dict[str, Figure | None]:
  """Returns seconds of one update: {"ours", "twin"}."""
  with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
    text = Path(folder, "text.txt")
    write_text(text)
    config = nanogpt_config(text, Path(folder, "tokens"))
    sides = {"ours": Contestant("benchmarks.train_step:make_ours", config=config)}
    if is_installed("torch"):
      sides["twin"] = Contestant("benchmarks.torch_twin:make_stepper", text=str(text))
    for side in sides.values():
      stack.enter_context(side)
    seconds = alternate(sides, dict.fromkeys(sides, steps), rounds)
  figures = {name: summarize([s / steps for s in values]) for name, values in seconds.items()}
  return {"twin": None, **figures}


def measure_gpt2(
  config: PretrainConfig, twin: dict | None, sizes: tuple[int, ...], rounds: int
) -> dict:
  """Returns {"ours", "twin": seconds of one update, "roof", "roof_source", "flops"}."""
  with ExitStack() as stack:
    sides = {
      "ours": Contestant(
        "benchmarks.train_step:make_ours", config=config, row_tokens=GPT2_ROW_TOKENS
      )
    }
    for size in sizes:
      sides[f"jax {size}"] = Contestant("benchmarks.train_step:make_matmul", size=size)
      if is_installed("torch"):
        sides[f"torch {size}"] = Contestant("benchmarks.torch_twin:make_matmul", size=size)
    if twin is not None and is_installed("torch"):
      sides["twin"] = Contestant("benchmarks.torch_twin:make_stepper", **twin)
    for side in sides.values():
      stack.enter_context(side)
    counts = {name: 1 if name in ("ours", "twin") else 5 for name in sides}
    results = alternate(sides, counts, rounds)
  steps = {name: summarize(results.pop(name)) for name in ("ours", "twin") if name in results}
  roof, source = max((max(values), name) for name, values in results.items())
  tokens = config.train.batch_rows * GPT2_ROW_TOKENS
  flops = tokens * hardware.flops_per_token(config.model, GPT2_ROW_TOKENS)
  return {"twin": None, **steps, "roof": roof, "roof_source": source, "flops": flops}


def main(arguments: list[str] | None = None) -> dict:
  """Measures, prints, and returns the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=15, help="of nanoGPT's recipe")
  parser.add_argument("--steps", type=int, default=50, help="updates in a round of it")
  parser.add_argument("--rounds-124m", type=int, default=5, help="of GPT-2 124M; 0 leaves it out")
  parser.add_argument("--torch-124m", action="store_true", help="PyTorch's 124M too (slow)")
  parser.add_argument(
    "--set-124m", metavar="KEY=VALUE", action="append", default=[], help="a config key of our 124M"
  )
  parser.add_argument("--quick", action="store_true", help="tiny counts and sizes: shows it runs")
  options = parser.parse_args(arguments)
  overrides = dict(item.split("=", 1) for item in options.set_124m)
  twin, sizes = GPT2_TWIN, MATMUL_SIZES
  if options.quick:
    options.rounds, options.steps, options.rounds_124m = 2, 3, min(options.rounds_124m, 1)
    tiny = {"num_layers": 1, "num_heads": 2, "model_dim": 32, "vocab_size": 256}
    overrides |= {f"model.{key}": str(value) for key, value in tiny.items()}
    twin, sizes = twin | tiny, (256,)

  here = machine()
  nanogpt = measure_nanogpt(options.rounds, options.steps)
  result = {
    "benchmark": "train_step",
    "machine": here,
    "quick": options.quick,
    "nanogpt_ours_seconds": nanogpt["ours"],
    "nanogpt_twin_seconds": nanogpt["twin"],
    "nanogpt_ratio": ratio(nanogpt["ours"], nanogpt["twin"]),
    "goals": {"nanogpt_ratio": LARGEST_RATIO, "gpt2_fraction_of_roof": SMALLEST_FRACTION},
  }
  rows = [
    ("nanoGPT's recipe, gptjax", *milliseconds(nanogpt["ours"])),
    ("nanoGPT's recipe, PyTorch eager", *milliseconds(nanogpt["twin"])),
    ("  ours / twin", _share(result["nanogpt_ratio"]), None, None, f"<= {LARGEST_RATIO}"),
  ]
  if options.rounds_124m:
    gpt2 = measure_gpt2(
      gpt2_config(overrides), twin if options.torch_124m else None, sizes, options.rounds_124m
    )
    result |= gpt2_result(gpt2)
    rows += gpt2_rows(result, options.torch_124m)
  columns = ("one optimiser step, milliseconds", "median", "min", "rounds", "goal")
  title = "train_step (--quick: not a measurement)" if options.quick else "train_step"
  notes = ["Sides take turns in their own processes; a round is a block of updates."]
  print_result(title, columns, rows, result, notes)
  return result


def gpt2_result(gpt2: dict) -> dict:
  """Derives the figures of GPT-2 124M that go into the JSON line."""
  ours, twin = gpt2["ours"], gpt2["twin"]
  return {
    "gpt2_ours_seconds": ours,
    "gpt2_twin_seconds": twin,
    "gpt2_ratio": ratio(ours, twin),
    "gpt2_flops_per_step": gpt2["flops"],
    "roof_flops_per_second": gpt2["roof"],
    "roof_source": gpt2["roof_source"],
    "gpt2_fraction_of_roof": gpt2["flops"] / ours.median / gpt2["roof"],
    "gpt2_fraction_of_roof_best": gpt2["flops"] / ours.minimum / gpt2["roof"],
  }


def gpt2_rows(result: dict, has_twin: bool) -> list[tuple]:
  """Writes them as rows of the table."""
  at_roof = 1e3 * result["gpt2_flops_per_step"] / result["roof_flops_per_second"]
  roof = f"{result['roof_flops_per_second'] / 1e9:.1f} GFLOP/s, {result['roof_source']}"
  fraction = _share(result["gpt2_fraction_of_roof"])
  model = f"GPT-2 124M {GPT2_ROWS} x {GPT2_ROW_TOKENS}"
  rows = [(f"{model}, gptjax", *milliseconds(result["gpt2_ours_seconds"]))]
  if has_twin:
    rows.append((f"{model}, PyTorch eager", *milliseconds(result["gpt2_twin_seconds"])))
    rows.append(("  ours / twin", _share(result["gpt2_ratio"])))
  return [
    *rows,
    (f"  at the roof ({roof})", f"{at_roof:,.1f}"),
    ("  fraction of the roof", fraction, None, None, f">= {SMALLEST_FRACTION}"),
  ]


def _share(value: float | None) -> str | None:
  return None if value is None else f"{value:.3f}"


if __name__ == "__main__":
  main()
