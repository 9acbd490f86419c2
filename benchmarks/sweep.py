"""Successive halving beside random search: trials in the same time, and the best loss of each.

For every seed random search runs its trials in full; then halving starts trials until it has taken
as long, from the same sampler seed, so that it sees the settings of random search first. Both run
in one process in which everything is compiled. This file is the experiment too: a small model on
the characters of Shakespeare (`make data`), searched for its rates, decay and warm-up.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, print_result
from gptjax.config import parse_arg, to_config_dict
from gptjax.sweep.config import Plan, make_plan
from gptjax.sweep.study import Study
from gptjax.sweep.worker import run_trial
from gptjax.train.config import PretrainConfig
from gptjax.train.programs import count_step_compilations

NUM_STEPS = 270  # 27 evaluations; halving by 3 asks at the 1st, 3rd, 9th and last
LEAST_RATIO = 2.0
MOST_TRIALS = 1_000


def get_config(arg=None):
  """`steps` is the length of a run."""
  steps = parse_arg(arg, method="random", steps=NUM_STEPS, seed=0).steps
  config = to_config_dict(PretrainConfig())
  config.data.files = ("data/shakespeare/train/*.txt",)
  config.data.valid_files = ("data/shakespeare/valid/*.txt",)
  config.data.tokenizer = "char"
  config.model.context_length = 64
  config.model.num_layers = 2
  config.model.model_dim = 64
  config.model.num_heads = 4
  config.model.scan_layers = False
  config.optimizer.name = "muon"
  config.optimizer.schedule = "linear"
  config.optimizer.end_fraction = 0.0
  config.train.num_steps = steps
  config.train.batch_rows = 16
  config.train.save_every_steps = steps
  config.eval.every_steps = max(steps // 27, 1)
  config.eval.max_rows = 256
  config.eval.batch_rows = 256
  config.eval.sample_tokens = 0
  return config


def get_sweep(arg=None):
  """`method` is random or halving, `seed` the sampler's."""
  arg = parse_arg(arg, method="random", steps=NUM_STEPS, seed=0)
  rates = {"low": 1e-4, "high": 1.0, "log": True}
  return {
    "space": {
      "optimizer.learning_rate": rates,
      "optimizer.muon_learning_rate": rates,
      "optimizer.weight_decay": {"low": 1e-3, "high": 1.0, "log": True},
      "optimizer.warmup_steps": {"low": 0, "high": arg.steps // 3},
      "optimizer.muon_momentum": {"low": 0.5, "high": 0.99},
    },
    "method": "random",
    "trials": MOST_TRIALS,
    "pruner": "halving" if arg.method == "halving" else "none",
    "sampler_seed": arg.seed,
  }


def run_sweep(plan: Plan, folder: Path, trials: int, seconds: float = math.inf) -> dict[str, Any]:
  """Runs trials until there are enough, or no time is left to start another.

  Returns:
    trials, complete, seconds, and best: the lowest loss of a complete trial.
  """
  study = Study(plan, folder)
  study.enqueue()
  started = time.perf_counter()
  for _ in range(trials):
    if time.perf_counter() - started >= seconds:
      break
    with study.take() as trial:
      run_trial(plan, trial)
  elapsed = time.perf_counter() - started
  records = [record for record in study.records() if record.is_finished]
  values = [record.value for record in records if record.state == "complete"]
  return {
    "trials": len(records),
    "complete": len(values),
    "seconds": elapsed,
    "best": min(values, default=math.nan),
  }


def compare(trials: int, seeds: int, steps: int) -> list[dict[str, Any]]:
  """Returns for every seed what random search and halving did."""
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    plans = {
      (method, seed): make_plan(f"{__file__}:method={method},steps={steps},seed={seed}", {})
      for seed in range(seeds)
      for method in ("random", "halving")
    }
    run_sweep(plans["random", 0], Path(folder) / "warm-up", 1)
    for seed in range(seeds):
      random = run_sweep(plans["random", seed], Path(folder) / f"random-{seed}", trials)
      halving = run_sweep(
        plans["halving", seed], Path(folder) / f"halving-{seed}", MOST_TRIALS, random["seconds"]
      )
      rows.append({"seed": seed, "random": random, "halving": halving})
  return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the ratio of trials at the same time, and the difference of the best losses."""
  ratios = [
    row["halving"]["trials"] / row["halving"]["seconds"]
    * row["random"]["seconds"] / row["random"]["trials"]
    for row in rows
  ]  # fmt: skip
  differences = [row["halving"]["best"] - row["random"]["best"] for row in rows]
  mean = statistics.mean(differences)
  error = statistics.stdev(differences) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
  return {
    "trials_ratio": statistics.median(ratios),
    "least_trials_ratio": min(ratios),
    "best_loss_difference": mean,
    "standard_error": error,
    "is_met": bool(min(ratios) >= LEAST_RATIO and not mean > error),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--trials", type=int, default=9, help="of random search, for each seed")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of a run in full")
  options = parser.parse_args()
  before = machine()
  rows = compare(options.trials, options.seeds, options.steps)
  summary = summarise(rows)
  result = {"benchmark": "sweep", "machine": before, "steps": options.steps, "seeds": rows}
  result |= summary | {"step_compilations": count_step_compilations()}
  print_result(
    "Halving beside random search, in the same time",
    ("seed", "search", "trials", "complete", "seconds", "best valid_loss"),
    [
      (row["seed"], name, row[name]["trials"], row[name]["complete"],
       f"{row[name]['seconds']:.1f}", f"{row[name]['best']:.4f}")
      for row in rows
      for name in ("random", "halving")
    ],
    result,
    [
      f"trials at the same time: {summary['trials_ratio']:.1f} times random search's; best loss"
      f" {summary['best_loss_difference']:+.4f} ± {summary['standard_error']:.4f} nats (a standard"
      f" error over seeds); {'as' if summary['is_met'] else 'not as'} wanted",
    ],
  )  # fmt: skip


if __name__ == "__main__":
  main()
