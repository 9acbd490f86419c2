"""Shows that killed runs and other layouts of devices give the same losses (`make prove-resume`).

Killed: `gptjax pretrain` on a tiny model with dropout, killed by SIGKILL at random updates and
started again until it ends, against an undisturbed run: every loss and the last checkpoint, bit
for bit. Layouts: five updates without dropout on 1, 2, 4 and 8 host devices, by pmap and on every
mesh data x fsdp x tensor; the rows do not divide among 8 devices. Elastic: a run stopped by SIGTERM
goes on with 2 devices, and again with 4 on a mesh. The text is generated here.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.common import machine, print_result
from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.config import from_config_dict, load_experiment
from gptjax.data.batches import BatchSource
from gptjax.data.prepare import prepare_data
from gptjax.train import pretrain as pretrain_lib
from gptjax.train import setup
from gptjax.train.config import PretrainConfig
from gptjax.tree import named_leaves

ROOT = Path(__file__).parent.parent
EXPERIMENT = str(ROOT / "experiments" / "shakespeare.py:tiny")
DEVICE_COUNTS = (1, 2, 4, 8)
LAYOUT_STEPS = 5
# Sums of float32 in another order; five updates are too few for the differences to grow.
LARGEST_DIFFERENCE = 1e-6
POLL_SECONDS = 0.002

Overrides = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """One line of the table."""

  name: str
  measured: str
  limit: str
  is_passed: bool


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a run is laid out; the mesh counts in mode "mesh" only."""

  mode: str
  mesh: tuple[int, int, int]

  def __str__(self) -> str:
    return self.mode if self.mode == "pmap" else "x".join(map(str, self.mesh))

  def overrides(self) -> Overrides:
    """Returns the config keys."""
    keys = ("train.mesh_data", "train.mesh_fsdp", "train.mesh_tensor")
    return {"train.mode": self.mode, **dict(zip(keys, map(str, self.mesh), strict=True))}


def layouts(num_devices: int) -> list[Layout]:
  """Returns pmap and every mesh of so many devices."""
  sizes = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
  meshes = [mesh for mesh in itertools.product(sizes, repeat=3) if math.prod(mesh) == num_devices]
  return [Layout("pmap", (num_devices, 1, 1)), *(Layout("mesh", mesh) for mesh in meshes)]


def tiny_run(folder: Path) -> Overrides:
  """Returns the keys that all runs share: the generated text, and a model that 8 devices divide."""
  return {
    "data.files": json.dumps([str(folder / "text.txt")]),
    "data.valid_files": "[]",
    "data.valid_fraction": "0",
    "data.tokenizer": "char",
    "data.cache_dir": str(folder / "tokens"),
    "model.num_heads": "8",
    "model.model_dim": "64",
    "train.batch_rows": "12",
    "train.log_every_steps": "1",
    # No measuring of the roof, and full rates within the first five updates.
    "train.peak_flops_per_second": "1e11",
    "optimizer.warmup_steps": "2",
    "eval.sample_prompts": "[]",
    "seed": "7",
  }


def write_text(path: Path) -> None:
  """Writes 20,000 words in an order that has something to learn."""
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(300)]
  path.write_text(" ".join(words[int(300 * rng.random() ** 2)] for _ in range(20_000)))


def start(run: RunDirectory, overrides: Overrides) -> subprocess.Popen:
  """Starts `gptjax pretrain` in a process of its own; it writes log.txt beside the run."""
  command = [sys.executable, "-m", "gptjax", "pretrain", "--config", EXPERIMENT]
  command += [f"--workdir={run.path}", *(f"--config.{k}={v}" for k, v in overrides.items())]
  with open(f"{run.path}.log.txt", "a") as log:
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def finish(run: RunDirectory, process: subprocess.Popen) -> None:
  """Waits for a process to end well. Raises RuntimeError with the end of its log."""
  if process.wait():
    raise RuntimeError(f"gptjax pretrain failed: {Path(f'{run.path}.log.txt').read_text()[-2000:]}")


def last_step(run: RunDirectory) -> int:
  """Returns the last update that metrics.jsonl has."""
  lines = run.read_metrics()
  return lines[-1]["step"] if lines else 0


def signal_at(run: RunDirectory, process: subprocess.Popen, step: int, number: int) -> int | None:
  """Signals a process when it has logged update `step`; returns the update that was reached.

  Returns:
    None if the process ended before.
  """
  while process.poll() is None:
    reached = last_step(run)
    if reached >= step:
      process.send_signal(number)
      process.wait()
      return reached
    time.sleep(POLL_SECONDS)
  finish(run, process)
  return None


def train_losses(run: RunDirectory) -> list[tuple[int, float]]:
  """Returns (update, loss) of every line of metrics.jsonl, in order."""
  return [(line["step"], line["train_loss"]) for line in run.read_metrics()]


def read_state(run: RunDirectory) -> dict[str, np.ndarray]:
  """Reads every array of the last checkpoint, PRNG key included, as they are on disk."""
  absl.logging.set_verbosity(absl.logging.ERROR)
  path = run.checkpoints_path / str(run.latest_step()) / "state"
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    metadata = reader.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
    return named_leaves(reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy)))


def prove_killed(folder: Path, num_steps: int, num_kills: int, rng: random.Random) -> list[Verdict]:
  """Compares a run that was killed with one that was not."""
  overrides = tiny_run(folder) | {
    "train.num_steps": str(num_steps),
    "train.save_every_steps": str(max(num_steps // 12, 1)),
    "model.residual_dropout": "0.1",
    "model.attention_dropout": "0.1",
  }
  calm, killed = RunDirectory(folder / "calm"), RunDirectory(folder / "killed")
  finish(calm, start(calm, overrides))
  reached = []
  for target in sorted(rng.randint(1, num_steps - 1) for _ in range(num_kills)):
    step = signal_at(killed, start(killed, overrides), target, signal.SIGKILL)
    reached += [] if step is None else [step]
  finish(killed, start(killed, overrides))

  ours, theirs = train_losses(killed), train_losses(calm)
  equal = sum(a == b for a, b in zip(ours, theirs, strict=False))
  is_whole = [step for step, _ in ours] == list(range(1, num_steps + 1))
  state, expected = read_state(killed), read_state(calm)
  same = [name for name in expected if np.array_equal(state[name], expected[name])]
  steps = ", ".join(map(str, reached))
  return [
    Verdict("runs killed (SIGKILL) after updates", steps, "at least 1", bool(reached)),
    Verdict(
      "losses equal bit for bit",
      f"{equal} of {num_steps}",
      "all",
      is_whole and ours == theirs,
    ),
    Verdict(
      "arrays of the last checkpoint equal bit for bit",
      f"{len(same)} of {len(expected)}",
      "all",
      len(same) == len(expected) == len(state),
    ),
  ]


def run_layouts(
  folder: Path, num_devices: int, chosen: Sequence[Layout], optimizer: str
) -> dict[str, Any]:
  """Trains five updates in each layout, in this process, with so many host devices.

  Returns:
    {"digest": of the data of those updates, "runs": {layout: (losses, parameters)}}.
  """
  with open(folder / f"{num_devices}.log.txt", "w") as log:
    os.dup2(log.fileno(), sys.stderr.fileno())
  runs = {}
  for layout in chosen:
    config = layout_config(folder, num_devices, layout, optimizer)
    run = RunDirectory(folder / f"{num_devices} {layout}")
    pretrain_lib.pretrain(config, str(run.path))
    losses = [loss for _, loss in train_losses(run)]
    parameters = {k: v for k, v in read_state(run).items() if k.startswith("params")}
    runs[str(layout)] = losses, parameters
  return {"digest": data_digest(config), "runs": runs}


def layout_config(folder: Path, num_devices: int, layout: Layout, optimizer: str) -> PretrainConfig:
  """Returns the run of five updates without dropout in a layout."""
  overrides = layout_run(folder, num_devices, layout, optimizer)
  return from_config_dict(PretrainConfig, load_experiment(EXPERIMENT, overrides))


def layout_run(folder: Path, num_devices: int, layout: Layout, optimizer: str) -> Overrides:
  """Returns its keys."""
  return tiny_run(folder) | {
    "train.num_steps": str(LAYOUT_STEPS),
    "train.save_every_steps": str(LAYOUT_STEPS),
    "train.host_devices": str(num_devices),
    "optimizer.name": optimizer,
    **layout.overrides(),
  }


def data_digest(config: PretrainConfig) -> str:
  """Hashes the rows of all batches, in order."""
  prepared = prepare_data(config.data, report=lambda line: None)
  schedule = setup.batch_schedule(config)
  source = BatchSource(prepared, config.model.context_length, config.seed, schedule)
  digest = hashlib.sha256()
  for step in range(LAYOUT_STEPS):
    digest.update(source.batch(step).tokens_BL.tobytes())
  return digest.hexdigest()


def in_fresh_process(function, *arguments) -> Any:
  """Calls a function in a new process, since a process has one number of host devices."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    return pool.submit(function, *arguments).result()


def compare_layouts(
  results: Mapping[int, Mapping[str, Any]],
) -> tuple[list[Verdict], list[float], dict[str, Any]]:
  """Compares the losses of all layouts.

  Args:
    results: of `run_layouts`, by number of devices, 1 first.

  Returns:
    (verdicts, losses of one device, each layout's differences from one device).
  """
  runs = {
    f"{count} {layout}": run
    for count, result in results.items()
    for layout, run in result["runs"].items()
  }
  expected, parameters = runs["1 pmap"]
  differences = {
    name: {
      "train_loss": relative_difference(losses, expected),
      "parameters": relative_distance(found, parameters),
    }
    for name, (losses, found) in runs.items()
  }
  verdicts = [
    verdict_of_layouts(f"{len(names)} layouts of {count} devices", names, runs)
    for count in results
    if (names := [name for name in runs if name.split()[0] == str(count)])
  ]
  verdicts.append(verdict_of_layouts(f"all {len(runs)} layouts", list(runs), runs))
  digests = {result["digest"] for result in results.values()}
  verdicts.append(
    Verdict("orders of data over device counts", str(len(digests)), "1", len(digests) == 1)
  )
  return verdicts, expected, differences


def verdict_of_layouts(title: str, names: Iterable[str], runs: Mapping[str, Any]) -> Verdict:
  """Compares the losses of some layouts, each update's largest with its smallest."""
  losses = np.array([runs[name][0] for name in names])
  spread = float(np.max((losses.max(0) - losses.min(0)) / losses.min(0)))
  return difference_verdict(f"{title}: losses of {LAYOUT_STEPS} updates", spread)


def difference_verdict(name: str, difference: float) -> Verdict:
  """Judges a relative difference of losses."""
  is_passed = difference <= LARGEST_DIFFERENCE
  return Verdict(name, f"{difference:.1e} relative", f"{LARGEST_DIFFERENCE:.0e}", is_passed)


def relative_difference(values: Sequence[float], expected: Sequence[float]) -> float:
  """Returns the largest |value - expected| / |expected|; infinite if the lengths differ."""
  if len(values) != len(expected):
    return math.inf
  return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


def relative_distance(
  arrays: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> float:
  """Returns the norm of the difference of two trees, divided by the norm of the second."""
  difference = sum(float(np.sum(np.square(arrays[name] - expected[name]))) for name in expected)
  return math.sqrt(difference / sum(float(np.sum(np.square(x))) for x in expected.values()))


def run_elastic(folder: Path, optimizer: str) -> tuple[list[int | None], list[float]]:
  """Stops a run of one device, goes on with two, stops it, goes on with four on a mesh.

  Returns:
    (updates after which it was stopped, losses).
  """
  run = RunDirectory(folder / "elastic")
  stopped = []
  # Saving at every update makes updates slow enough to be stopped between two of them.
  saving = {"train.save_every_steps": "1"}
  for step, count in ((1, 1), (3, 2)):
    overrides = layout_run(folder, count, Layout("pmap", (count, 1, 1)), optimizer) | saving
    process = start(run, overrides)
    stopped.append(signal_at(run, process, step, signal.SIGTERM))
    finish(run, process)
  finish(run, start(run, layout_run(folder, 4, Layout("mesh", (2, 1, 2)), optimizer) | saving))
  return stopped, [loss for _, loss in train_losses(run)]


def compare_elastic(
  stopped: Sequence[int | None], losses: Sequence[float], expected: Sequence[float]
) -> list[Verdict]:
  """Compares the losses of the elastic run with those of one device."""
  steps = ", ".join(map(str, stopped))
  difference = relative_difference(losses, expected)
  return [
    Verdict("elastic: stopped (SIGTERM) after updates", steps, "twice", None not in stopped),
    difference_verdict("elastic: 1, 2, then 4 (2x1x2) devices: losses", difference),
  ]


def prove(folder: Path, options: argparse.Namespace, seed: int) -> tuple[list[Verdict], dict]:
  """Runs everything, two processes at a time; returns verdicts and each layout's differences."""
  kills, counts = (1, (1, 2)) if options.quick else (options.kills, DEVICE_COUNTS)
  name = options.optimizer
  write_text(folder / "text.txt")
  # Once, before processes would do it at the same time.
  config = layout_config(folder, 1, Layout("pmap", (1, 1, 1)), name)
  prepare_data(config.data, report=lambda line: None)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    killed = pool.submit(prove_killed, folder, options.steps, kills, random.Random(seed))
    of_layouts = {
      count: pool.submit(in_fresh_process, run_layouts, folder, count, layouts(count), name)
      for count in counts
    }
    elastic = pool.submit(run_elastic, folder, name)
  results = {count: future.result() for count, future in of_layouts.items()}
  verdicts, expected, differences = compare_layouts(results)
  return [
    *killed.result(),
    *verdicts,
    *compare_elastic(*elastic.result(), expected),
  ], differences


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs all proofs, prints the verdicts, and returns the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=300, help="updates of the killed run")
  parser.add_argument("--kills", type=int, default=3)
  parser.add_argument("--optimizer", default="adamw", help="of the layouts: adamw or muon")
  parser.add_argument("--seed", type=int, help="of the moments of killing; default: drawn")
  parser.add_argument("--quick", action="store_true", help="one kill, 1 and 2 devices only")
  options = parser.parse_args(arguments)
  seed = random.randrange(2**32) if options.seed is None else options.seed
  here, started = machine(), time.perf_counter()
  with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):
    verdicts, differences = prove(Path(folder), options, seed)
  result = {
    "benchmark": "prove_resume",
    "machine": here,
    "passed": all(verdict.is_passed for verdict in verdicts),
    "seed": seed,
    "seconds": time.perf_counter() - started,
    "largest_difference": LARGEST_DIFFERENCE,
    "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
    "layouts": differences,
  }
  rows = [
    (verdict.name, verdict.measured, verdict.limit, "PASS" if verdict.is_passed else "FAIL")
    for verdict in verdicts
  ]
  farthest = max(differences.values(), key=lambda difference: difference["parameters"])
  notes = [
    f"Parameters after {LAYOUT_STEPS} updates differ by up to {farthest['parameters']:.1e} relative"
    " (norms) from those of one device.",
    f"Seed {seed}, {result['seconds']:.0f} seconds.",
  ]
  print_result("prove_resume", ("", "measured", "limit", "verdict"), rows, result, notes)
  return result


if __name__ == "__main__":
  sys.exit(not main()["passed"])
