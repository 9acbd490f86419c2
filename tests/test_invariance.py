"""The certificate passes sound models of every family and fails what depends on its company."""

import dataclasses

import numpy as np
import pytest
from families import FAMILIES, make_config, make_params

from gptjax.api import Model
from gptjax.cli.main import main
from gptjax.errors import DataError
from gptjax.generate.generator import Generator
from gptjax.generate.invariance import certify

PROMPTS = [[5, 3], [7, 1, 8, 2, 8]]


class Careless(Generator):
  """Answers with other log-probabilities in company."""

  def generate(self, prompts, options):
    out = super().generate(prompts, options)
    return dataclasses.replace(out, logprobs=out.logprobs * (1 + 0.01 * len(out.prompts)))


@pytest.mark.parametrize(
  "family",
  # Local attention every day; the other families' programs are compiled with the slow tests.
  [
    family if family == "gpt3" else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES
  ],
)
def test_sound_models_pass(family):
  checks = certify(Generator(make_params(FAMILIES[family]), FAMILIES[family]), PROMPTS)
  assert len(checks) == 5
  assert all(check.is_passed and check.num_places >= 8 for check in checks), checks


def test_what_depends_on_its_company_fails():
  careless = Careless(make_params(FAMILIES["gpt3"]), FAMILIES["gpt3"])
  failed = {check.name for check in certify(careless, PROMPTS) if not check.is_passed}
  assert {"batch size", "no cache: the whole text read at once"} <= failed


def test_too_little_room_is_one_line():
  with pytest.raises(DataError, match="two prompts"):
    certify(Generator(make_params(FAMILIES["gpt2"]), FAMILIES["gpt2"]), PROMPTS[:1])


def test_the_command_line(tmp_path, capsys):
  config = make_config("gptj", num_layers=1)
  Model(config, make_params(config)).save(tmp_path / "model", format="gptjax")
  assert main(["doctor", str(tmp_path / "model"), "--invariance"]) == 0
  out = capsys.readouterr().out
  assert "verdict: generated text does not depend" in out
  assert np.sum(["equal" in line for line in out.splitlines()]) == 5
  assert main(["doctor", str(tmp_path / "model"), "--invariance", "--text", "x"]) == 2
