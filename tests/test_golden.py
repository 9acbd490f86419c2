"""Numbers of transformers without PyTorch, and of our own train step, stay what they were."""

import json

import golden
import numpy as np
import pytest
from families import HF_CASES

from gptjax.tree import named_leaves

# Theirs is float64, ours float32 with sums of a hundred terms: 1e-6 is usual, and 1e-5 leaves
# room for another CPU's or another XLA's order of sums.
TOLERANCE = 1e-5


FAMILIES = json.loads(golden.FAMILIES_FILE.read_text())


def assert_close(got, expected):
  """Compares dicts of numbers and lists of numbers; a list by its norm."""
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    if isinstance(value, dict):
      assert_close(got[name], value)
      continue
    difference = np.linalg.norm(np.subtract(got[name], value))
    # A gradient of exactly zero is noise in float32.
    assert difference <= TOLERANCE * (np.linalg.norm(value) + 0.01), name


@pytest.mark.parametrize("name", HF_CASES)
def test_each_family_gives_transformers_numbers(name):
  assert_close(golden.our_numbers(*golden.make_inputs(HF_CASES[name])), FAMILIES[name])


@pytest.mark.parametrize("name", HF_CASES)
def test_each_family_notices_a_perturbed_weight(name):
  """Each tensor, moved in one entry, moves some number by more than the tolerance."""
  config, params, tokens = golden.make_inputs(HF_CASES[name])
  for path, leaf in named_leaves(params).items():
    # Without rotary positions a key's bias shifts all scores of a query alike.
    if path.endswith("key/bias") and config.positions == "learned":
      continue
    row = tokens[0, 0] if path.endswith("token_embedding/embedding") else 0
    entry = (row, *[0] * (leaf.ndim - 1))
    before = leaf[entry]
    leaf[entry] += 0.01
    with pytest.raises(AssertionError):
      assert_close(golden.our_numbers(config, params, tokens), FAMILIES[name])
    leaf[entry] = before


@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_the_train_step_has_not_moved(name):
  steps = golden.train_numbers(name)
  expected = json.loads(golden.STEPS_FILE.read_text())[name]
  assert len(steps) == len(expected) == golden.NUM_STEPS
  for step, wanted in zip(steps, expected):
    assert_close(step, wanted)


def test_the_comparison_can_fail():
  expected = {"loss": 4.0, "logits": [1.0, -2.0, 3.0]}
  assert_close(expected, expected)
  for moved in ({"loss": 4.0001}, {"logits": [1.0, -2.0001, 3.0]}):
    with pytest.raises(AssertionError):
      assert_close(expected | moved, expected)


def test_rewriting_prints_what_changed(tmp_path, capsys):
  path = tmp_path / "golden" / "numbers.json"
  golden.rewrite(path, {"loss": 1.5})
  golden.rewrite(path, {"loss": 1.5})
  assert capsys.readouterr().out.endswith("unchanged\n\n")
  golden.rewrite(path, {"loss": 2.5})
  assert '-  "loss": 1.5\n+  "loss": 2.5' in capsys.readouterr().out
  assert json.loads(path.read_text()) == {"loss": 2.5}
