"""Numbers that must not move: transformers' for every family, and our own train steps'.

`python -m tests.golden` (`make golden`) computes them again, rewrites tests/golden/*.json and
prints what changed. Transformers' need PyTorch; without it their file is left alone.
"""

import difflib
import functools
import importlib.util
import json
import sys
from pathlib import Path

# Pytest puts this folder on the path, `python -m` does not.
sys.path.insert(0, str(Path(__file__).parent))

import jax
import numpy as np
import optax
from families import FAMILIES, HF_CASES, make_batch, make_params, make_tokens

from gptjax.checkpoint.export import foreign_tensors
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_logits
from gptjax.train.config import OptimizerConfig
from gptjax.train.optimizer import hyperparameters
from gptjax.train.schedule import Durations
from gptjax.train.step import LanguageModelObjective, init_state, make_train_step

FOLDER = Path(__file__).parent / "golden"
FAMILIES_FILE, STEPS_FILE = FOLDER / "families.json", FOLDER / "train_step.json"
OPTIMIZERS = ("adamw", "muon")
NUM_STEPS = 2
NUM_LOGITS = 6


def make_inputs(config):
  """Returns (config, params, tokens [B, L + 1]) from NumPy seeds, the same everywhere."""
  return config, make_params(config, seed=11), make_tokens(config, length=14, seed=12)


def summarize(logits_BLV, loss, gradients):
  """Returns what is kept: the first logits of the last place, loss, norm of each gradient."""
  norms = {name: np.linalg.norm(np.asarray(g, np.float64)) for name, g in gradients.items()}
  return {
    "loss": float(loss),
    "logits": [float(x) for x in logits_BLV[-1, -1, :NUM_LOGITS]],
    "gradient_norms": {name: float(norm) for name, norm in norms.items()},
  }


def hf_numbers():
  """Computes every case's numbers with transformers, in float64."""
  # PyTorch may be absent.
  from hf_models import hf_results, make_hf_model, to_file_names

  numbers = {}
  for name, case in HF_CASES.items():
    config, params, tokens = make_inputs(case)
    logits, loss, gradients = hf_results(make_hf_model(params, config), tokens)
    numbers[name] = summarize(logits, loss, to_file_names(gradients))
  return numbers


def our_numbers(config, params, tokens):
  """Computes the same numbers with gptjax; gradients by transformers' names."""
  batch = make_batch(tokens).replace(weights_BL=np.ones_like(tokens[:, 1:], np.float32))
  logits, loss, gradients = _compute(params, batch, config)
  return summarize(logits, loss, foreign_tensors(config, gradients))


@functools.partial(jax.jit, static_argnames="config")
def _compute(params, batch, config):
  no_z_loss = make_hyper("adamw").replace(z_loss=0.0)

  def loss(params):
    terms, sums = LanguageModelObjective(config)(params, batch, no_z_loss, None)
    return terms["loss"] / sums["loss"][1]

  hidden = hidden_states(params["decoder"], batch, config)
  return lm_logits(params, hidden, config), *jax.value_and_grad(loss)(params)


def make_optimizer_config(name):
  """Returns a config with every term at work from the first step on."""
  # The large epsilon keeps gradients that are mere rounding from being scaled to full updates.
  return OptimizerConfig(
    name=name, learning_rate=1e-2, warmup_steps=1, epsilon=1e-4, clip_norm=0.5, ema_decay=0.9
  )


def make_hyper(name):
  """Returns the traced values of a run of ten steps."""
  durations = Durations(total_steps=10, warmup_steps=1, decay_steps=9)
  return hyperparameters(make_optimizer_config(name), durations, z_loss=1e-3)


def train_numbers(name):
  """Runs the step of an optimiser on two micro-batches of uneven weights."""
  config, params, tokens = make_inputs(FAMILIES["gpt2"])
  batch = make_batch(tokens).map(lambda x: x[:, None])
  optimizer, hyper = make_optimizer_config(name), make_hyper(name)
  step = make_train_step(LanguageModelObjective(config), optimizer)
  init = jax.jit(lambda params, key: init_state(params, optimizer, hyper, key))
  state = init(params, jax.random.key(0))

  @jax.jit
  def run(state, batch):
    new_state, metrics = step(state, batch, axis_name=None)
    difference = jax.tree.map(lambda new, old: new - old, new_state.params, state.params)
    names = ("train_loss", "train_z_loss", "grad_norm", "learning_rate")
    kept = {name: metrics[name] for name in names}
    return new_state, kept | {"update_norm": optax.tree.norm(difference)}

  steps = []
  for _ in range(NUM_STEPS):
    state, kept = run(state, batch)
    steps.append({key: float(value) for key, value in kept.items()})
  return steps


def rewrite(path, numbers):
  """Writes a file of numbers and prints its difference from the old one."""
  old = path.read_text() if path.exists() else ""
  new = json.dumps(numbers, indent=2) + "\n"
  path.parent.mkdir(exist_ok=True)
  path.write_text(new)
  lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "before", "after", lineterm="")
  print("\n".join(lines) or "unchanged", end="\n\n")


def main():
  print(FAMILIES_FILE.relative_to(Path.cwd()))
  if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
    rewrite(FAMILIES_FILE, hf_numbers())
  else:
    print("left alone: it needs PyTorch and transformers (make test-hf installs them)\n")
  print(STEPS_FILE.relative_to(Path.cwd()))
  rewrite(STEPS_FILE, {name: train_numbers(name) for name in OPTIMIZERS})


if __name__ == "__main__":
  main()
