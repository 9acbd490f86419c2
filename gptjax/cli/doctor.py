"""`gptjax doctor`: what is wrong with a checkpoint, as a table and a verdict."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checkpoint.doctor import TEXT, Diagnosis, examine
from gptjax.checkpoint.models import Loaded, load_model
from gptjax.cli.arguments import MODEL_HELP, add_json
from gptjax.errors import ConfigError, DataError
from gptjax.generate.generator import Generator
from gptjax.generate.invariance import TOLERANCE, certify

_TEXT_CHARACTERS = 100_000  # more than the doctor reads


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("model", help=MODEL_HELP)
  parser.add_argument("--text", help="file the model should find likely; default: plain English")
  parser.add_argument("--against", help="the same model from elsewhere, for the reference to run")
  parser.add_argument(
    "--invariance", action="store_true", help="instead, what must not change a generated text"
  )
  add_json(parser)


def run(options: argparse.Namespace) -> int:
  if options.invariance:
    for flag in ("text", "against"):
      if getattr(options, flag):
        raise ConfigError(f"--{flag} has no effect with --invariance; leave one of them out")
    return certify_invariance(options.model, options.json)
  return doctor(options.model, options.text, options.against, options.json)


def doctor(name: str, text_file: str | None, against: str | None, as_json: bool) -> int:
  """Examines a model, prints what was found, and returns 1 if it is a fault, else 0.

  Args:
    name: model argument.
    text_file: a text the model should find likely; of a model without a tokenizer, token ids with
      spaces between them. None is a paragraph of English, where there is a tokenizer.
    against: another model argument, which the reference runs instead.
    as_json: one object instead of a table.
  """
  model = load_model(name)
  other = load_model(against) if against else None
  ids = _text_ids(model, text_file)
  reference = (other.params, other.config) if other else None
  diagnosis = examine(model.params, model.config, ids, reference)
  if as_json:
    facts = json.dumps(_to_facts(diagnosis))
    # JSON has no NaN; what is not a number is null.
    print(json.dumps(json.loads(facts, parse_constant=lambda word: None)))
  else:
    print(_to_table(diagnosis))
  return int(diagnosis.is_faulty)


def certify_invariance(name: str, as_json: bool) -> int:
  """Prints the certificate of invariance of a model, and returns 1 where a check fails, else 0."""
  model = load_model(name)
  generator = Generator(model.params, model.config, model.tokenizer)
  draw, longest = np.random.default_rng(0), max(2, model.config.context_length // 4)
  sizes = sorted({2, longest // 2 + 1, min(longest, 100)})
  prompts = [draw.integers(0, model.config.vocab_size, size).tolist() for size in sizes]
  checks = certify(generator, prompts if len(prompts) > 1 else prompts * 2)
  is_passed = all(check.is_passed for check in checks)
  if as_json:
    facts = {"is_invariant": is_passed, "tolerance": TOLERANCE}
    print(json.dumps(facts | {"checks": [dataclasses.asdict(check) for check in checks]}))
    return int(not is_passed)
  for check in checks:
    parted = f", {check.num_parted} texts part at a toss-up" if check.num_parted else ""
    verdict = "equal" if check.is_passed else "NOT EQUAL"
    print(
      f"{check.name:<40}{verdict:<11}{check.num_places} tokens, largest difference"
      f" {check.difference:.1e} nats{parted}"
    )
  verdict = "does not depend on any of these" if is_passed else "depends on what it must not"
  print(f"\nverdict: generated text {verdict} (float32, to {TOLERANCE:.0e} nats)")
  return int(not is_passed)


def _text_ids(model: Loaded, text_file: str | None) -> list[int] | None:
  if text_file is None:
    return _builtin_ids(model)
  try:
    with Path(text_file).open(encoding="utf-8") as file:
      text = file.read(_TEXT_CHARACTERS)
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f'--text "{text_file}" cannot be read: {error}') from error
  if model.tokenizer is not None:
    return model.tokenizer.encode(text)
  try:
    return [int(word) for word in text.split()]
  except ValueError as error:
    raise DataError(
      f'the model has no tokenizer, so --text "{text_file}" must be token ids with spaces between:'
      f" {error}"
    ) from error


def _builtin_ids(model: Loaded) -> list[int] | None:
  """Encodes the paragraph of English, if the model's tokenizer can and fits the model."""
  if model.tokenizer is None:
    return None
  try:
    ids = model.tokenizer.encode(TEXT)
  except DataError as error:
    print(f"the built-in English text is of no use: {error}; give --text", file=sys.stderr)
    return None
  return ids if max(ids, default=0) < model.config.vocab_size else None


def _to_facts(diagnosis: Diagnosis) -> dict[str, Any]:
  place, culprit = diagnosis.disagreement, diagnosis.culprit
  return {
    "verdict": diagnosis.verdict,
    "is_healthy": diagnosis.is_healthy,
    "disagreement": place and {"activation": place.name, "error": place.error},
    "culprit": culprit and dataclasses.asdict(culprit),
    "suspicions": [dataclasses.asdict(trial) for trial in diagnosis.suspicions],
    "loss": diagnosis.loss,
    "chance": diagnosis.chance,
    "not_finite": diagnosis.not_finite,
    "trials": [dataclasses.asdict(trial) for trial in diagnosis.trials],
  }


def _to_table(diagnosis: Diagnosis) -> str:
  worst = max(diagnosis.comparisons, key=lambda found: found.error)
  lines = [
    f"decoder against reference: {len(diagnosis.comparisons)} activations, the largest relative"
    f" difference {worst.error:.1e} at {worst.describe()}"
  ]
  if diagnosis.loss is not None:
    lines.append(f"text: {diagnosis.loss:.4f} nats a token; chance is {diagnosis.chance:.4f}")
  if diagnosis.loss is not None or diagnosis.disagreement is not None:
    lines += ["", *_trial_rows(diagnosis)]
  return "\n".join([*lines, "", f"verdict: {diagnosis.verdict}"])


def _trial_rows(diagnosis: Diagnosis) -> list[str]:
  rows = [f"{'if it were':<16}{'undone by':<56}{'loss':>9}{'gain':>18}{'difference':>12}"]
  for trial in diagnosis.trials:
    loss = "" if trial.loss is None else f"{trial.loss:.4f}"
    gain = "" if trial.gain is None else f"{trial.gain:+.4f} ± {trial.gain_error:.4f}"
    error = "" if trial.error is None else f"{trial.error:.1e}"
    mark = "  <--" if trial is diagnosis.culprit else ""
    rows.append(f"{trial.kind:<16}{trial.change:<56}{loss:>9}{gain:>18}{error:>12}{mark}")
  return rows
