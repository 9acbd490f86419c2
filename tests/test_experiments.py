"""Every experiment, size and sweep point builds, freezes and traces; `tiny` trains."""

from pathlib import Path

import jax
import pytest

from gptjax.config import from_config_dict, from_json, load_experiment, to_json
from gptjax.errors import ConfigError
from gptjax.model.parameters import init_parameters
from gptjax.train.config import PretrainConfig

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SIZES = {
  "gpt2": ["small", "medium", "large", "xl"],
  "gpt3": ["small", "medium", "large", "xl", "2.7b", "6.7b", "13b", "175b"],
  "shakespeare_char": ["fast"],
}
SPECS = [
  f"{path}:{arg}" if arg else str(path)
  for path in sorted(EXPERIMENTS.glob("*.py"))
  for arg in ["", "tiny", *SIZES.get(path.stem, [])]
]


def load(spec):
  return from_config_dict(PretrainConfig, load_experiment(str(spec)))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: Path(spec).name)
def test_it_builds_and_comes_back_from_json(spec):
  config = load(spec)
  assert from_json(PretrainConfig, to_json(config)) == config
  model = config.model
  if model.vocab_size is None:
    return
  shapes = jax.eval_shape(lambda key: init_parameters(model, key), jax.random.key(0))
  assert shapes["decoder"]["token_embedding"]["embedding"].shape[1] == model.model_dim


PATHS = sorted(EXPERIMENTS.glob("*.py"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_tiny_reads_the_text_of_make_data_and_nothing_else(path):
  data = load(f"{path}:tiny").data
  shakespeare = load(EXPERIMENTS / "shakespeare.py").data
  assert (data.files, data.valid_files) == (shakespeare.files, shakespeare.valid_files)
  assert not (data.hub or data.token_files or data.mixture)
  assert (data.tokenizer, data.vocab_size) == ("bpe", 512)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_text_of_ones_own_needs_one_key(path):
  config = load_experiment(str(path), {"data.files": "['a.txt']"})
  data = from_config_dict(PretrainConfig, config).data
  assert data.files == ("a.txt",)
  assert not (data.valid_files or data.hub or data.hub_valid_split)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_says_where_it_comes_from_and_how_to_run_it(path):
  header = path.read_text().split('"""')[1]
  assert "Source:" in header
  assert "Command:" in header
  assert "not yet run" in header or "measured" in header


def test_a_leftover_argument_is_refused_with_the_nearest():
  with pytest.raises(ConfigError, match=r'"meduim" is unknown|"meduim"; did you mean "medium"'):
    load_experiment(f"{EXPERIMENTS / 'gpt2.py'}:meduim")
