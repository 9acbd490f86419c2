"""Numbers of transformers without PyTorch, and of our own train step, stay what they were."""

import json

import golden
import numpy as np
import pytest

# Theirs is float64, ours float32 with sums of a hundred terms: 1e-6 is usual, and 1e-5 leaves
# room for another CPU's or another XLA's order of sums.
TOLERANCE = 1e-5


def assert_close(got, expected):
  """Compares dicts of numbers and lists of numbers; a list by its norm."""
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    difference = np.linalg.norm(np.subtract(got[name], value))
    assert difference <= TOLERANCE * np.linalg.norm(value), name


@pytest.mark.parametrize("family", golden.HF_FAMILIES)
def test_each_family_gives_transformers_numbers(family):
  assert_close(golden.our_numbers(family), json.loads(golden.FAMILIES_FILE.read_text())[family])


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
