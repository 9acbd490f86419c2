"""Every experiment, size and sweep point builds, freezes and traces; `tiny` trains."""

from pathlib import Path

import jax
import pytest

from gptjax.config import (
  from_config_dict,
  from_json,
  load_experiment,
  load_experiment_module,
  load_variants,
  to_json,
)
from gptjax.data.task_format import FAMILIES
from gptjax.data.tasks import load_task
from gptjax.errors import ConfigError
from gptjax.model.parameters import init_parameters
from gptjax.sweep.config import make_plan
from gptjax.train.config import PretrainConfig
from gptjax.train.finetune_config import FinetuneConfig

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SIZES = {
  "gpt2": ["small", "medium", "large", "xl"],
  "gpt3": ["small", "medium", "large", "xl", "2.7b", "6.7b", "13b", "175b"],
  "shakespeare_char": ["fast"],
  "ablation": ["similarity,small", "multiple_choice,tiny"],
  "finetune_layers": ["entailment,small", "similarity,tiny"],
  **{f"finetune_{family}": ["small"] for family in FAMILIES},
}
PATHS = sorted(EXPERIMENTS.glob("*.py"))
SPECS = [
  f"{path}:{arg}" if arg else str(path)
  for path in PATHS
  for arg in ["", "tiny", *SIZES.get(path.stem, [])]
]


def load(spec):
  config = load_experiment(str(spec))
  return from_config_dict(FinetuneConfig if "finetune" in config else PretrainConfig, config)


PRETRAINING = [path for path in PATHS if isinstance(load(path), PretrainConfig)]
FINETUNING = [path for path in PATHS if path not in PRETRAINING]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: Path(spec).name)
def test_it_builds_and_comes_back_from_json(spec):
  config = load(spec)
  assert from_json(type(config), to_json(config)) == config
  model = config.model
  if isinstance(config, FinetuneConfig) or model.vocab_size is None:
    return
  shapes = jax.eval_shape(lambda key: init_parameters(model, key), jax.random.key(0))
  assert shapes["decoder"]["token_embedding"]["embedding"].shape[1] == model.model_dim


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_tiny_reads_the_text_of_make_data_and_nothing_else(path):
  data = load(f"{path}:tiny").data
  shakespeare = load(EXPERIMENTS / "shakespeare.py").data
  assert (data.files, data.valid_files) == (shakespeare.files, shakespeare.valid_files)
  assert not (data.hub or data.token_files or data.mixture)
  assert (data.tokenizer, data.vocab_size) == ("bpe", 512)


@pytest.mark.parametrize("path", FINETUNING, ids=lambda path: path.stem)
def test_tiny_reads_the_examples_beside_it(path):
  data = load(f"{path}:tiny").data
  assert Path(data.files[0]).parent == EXPERIMENTS / "examples"
  task = load_task(data)
  assert len(task.train) >= 12 and task.valid
  assert data.family == load(path).data.family


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_a_text_of_ones_own_needs_one_key(path):
  config = load_experiment(str(path), {"data.files": "['a.txt']"})
  data = from_config_dict(PretrainConfig, config).data
  assert data.files == ("a.txt",)
  assert not (data.valid_files or data.hub or data.hub_valid_split)


@pytest.mark.parametrize("path", FINETUNING, ids=lambda path: path.stem)
def test_examples_of_ones_own_need_their_columns_and_no_more(path):
  keys = {"data.files": "['a.tsv']", "data.adapter": "", "data.text_columns": "['review']"}
  data = from_config_dict(FinetuneConfig, load_experiment(str(path), keys)).data
  assert (data.files, data.valid_files) == (("a.tsv",), ())
  assert data.format.text_columns == ("review",)
  assert data.format.label_column == "label"


def test_variants_change_what_they_say_and_keep_what_the_user_says():
  variants = load_variants(f"{EXPERIMENTS / 'ablation.py'}:tiny", {"train.batch_rows": "4"})
  assert {config.train.batch_rows for config, _ in variants.values()} == {4}
  scratch, settings = variants["from scratch, with LM loss"]
  assert settings == {"finetune.pretrained": False}
  assert not scratch.finetune.pretrained and scratch.finetune.lm_coefficient == 0.5
  without_loss, _ = variants["pretrained, without LM loss"]
  assert without_loss.finetune.pretrained and without_loss.finetune.lm_coefficient == 0.0


SWEEPS = [path for path in PATHS if hasattr(load_experiment_module(str(path)), "get_sweep")]


@pytest.mark.parametrize("arg", ["", "tiny"])
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_point_of_a_sweep_is_a_config(path, arg):
  plan = make_plan(f"{path}:{arg}", {})
  assert plan.trials >= (4 if arg else 12)
  assert len({to_json(plan.config(setting, 0)) for setting in plan.settings}) == len(plan.settings)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_says_where_it_comes_from_and_how_to_run_it(path):
  header = path.read_text().split('"""')[1]
  assert "Source:" in header
  assert "Command:" in header
  assert "not yet run" in header or "measured" in header


def test_a_leftover_argument_is_refused_with_the_nearest():
  with pytest.raises(ConfigError, match=r'"meduim" is unknown|"meduim"; did you mean "medium"'):
    load_experiment(f"{EXPERIMENTS / 'gpt2.py'}:meduim")
