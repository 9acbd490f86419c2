"""The ConfigDict edge: conversion, types, overrides, arguments of experiments."""

import dataclasses

import pytest

from gptjax.config import (
  CORPUS_DEFAULTS,
  apply_overrides,
  from_config_dict,
  from_json,
  from_mapping,
  load_experiment,
  parse_arg,
  parse_literal,
  to_config_dict,
  to_json,
)
from gptjax.data.config import DataConfig
from gptjax.errors import ConfigError
from gptjax.train.config import PretrainConfig


def test_dataclass_to_config_dict_and_back():
  config = PretrainConfig()
  assert from_config_dict(PretrainConfig, to_config_dict(config)) == config
  assert from_json(PretrainConfig, to_json(config)) == config


def test_a_mixture_freezes_to_corpus_configs():
  config = to_config_dict(PretrainConfig())
  config.data.mixture = {"en": {"files": ["a.txt"], "weight": 2}, "ja": {"files": ["b.txt"]}}
  frozen = from_config_dict(PretrainConfig, config)
  assert frozen.data.mixture["en"].weight == 2.0
  assert frozen.data.mixture["ja"].files == ("b.txt",)
  assert from_json(PretrainConfig, to_json(frozen)) == frozen


@pytest.mark.parametrize(
  "dotted, text, value",
  [
    ("model.num_layers", "3", 3),
    ("optimizer.learning_rate", "3e-4", 3e-4),
    ("optimizer.learning_rate", "1", 1.0),
    ("data.files", '["a.txt", "b/*.jsonl.gz"]', ("a.txt", "b/*.jsonl.gz")),
    ("model.scan_layers", "false", False),
    ("train.num_steps", "None", None),
    ("model.compute_dtype", "bfloat16", "bfloat16"),
    ("data.tokenizer", "123", "123"),
    ("train.trackers", "['tensorboard']", ("tensorboard",)),
  ],
)
def test_overrides_take_the_type_of_the_key(dotted, text, value):
  config = to_config_dict(PretrainConfig())
  apply_overrides(config, {dotted: text})
  frozen = dataclasses.asdict(from_config_dict(PretrainConfig, config))
  group, key = dotted.split(".")
  assert frozen[group][key] == value
  assert type(frozen[group][key]) is type(value)


@pytest.mark.parametrize(
  "dotted, text, expected",
  [
    ("model.num_layer", "3", 'did you mean "model.num_layers"?'),
    ("modle.num_layers", "3", "model"),
    ("model", "3", "is a group"),
    ("model", "{'num_layers': 3}", "is a group"),
    ("data.mixture", "3", "is a group"),
    ("model.num_layers", "three", "whole number"),
    ("model.num_layers", "1.5", "whole number"),
    ("model.scan_layers", "1", "True or False"),
    ("data.files", "a.txt", "a list"),
    ("optimizer.name", "sgd", "adamw"),
  ],
)
def test_what_does_not_fit_is_refused(dotted, text, expected):
  config = to_config_dict(PretrainConfig())
  with pytest.raises(ConfigError) as error:
    apply_overrides(config, {dotted: text})
    from_config_dict(PretrainConfig, config)
  assert expected in str(error.value)


def test_a_mapping_is_overridden_whole_or_by_key():
  config = to_config_dict(PretrainConfig())
  config.data.mixture = {"en": {"files": ("a.txt",)}}
  apply_overrides(config, {"data.mixture.en.files": "['b.txt']", "tags": "{'of': 'me'}"})
  frozen = from_config_dict(PretrainConfig, config)
  assert frozen.data.mixture["en"].files == ("b.txt",)
  assert frozen.tags == {"of": "me"}
  apply_overrides(config, {"data.mixture": '{"ja": {"hub": "x"}, "de": {"hub": "y"}}'})
  assert set(config.data.mixture) == {"ja", "de"}


def test_the_corpus_keys_have_the_defaults_of_the_dataclass():
  defaults = to_config_dict(DataConfig()).to_dict()
  assert {key: defaults[key] for key in CORPUS_DEFAULTS} == CORPUS_DEFAULTS
  assert defaults["valid_fraction"] == 0.1


def make_hub_config():
  config = to_config_dict(PretrainConfig())
  config.data.update(hub="a/b", hub_valid_split="test", text_column="Text", end_token="")
  config.data.valid_fraction = 0.001
  return config


@pytest.mark.parametrize(
  "overrides, left",
  [
    ({"data.files": "['a.txt']"}, {"files": ("a.txt",), "valid_fraction": 0.001}),
    (
      {"data.text_column": "body", "data.files": "['a.csv']"},
      {"files": ("a.csv",), "text_column": "body", "valid_fraction": 0.001},
    ),
    ({"data.hub": "c/d"}, {"hub": "c/d", "valid_fraction": 0.001}),
    ({"data.mixture": "{'en': {'hub': 'c/d'}}"}, {"mixture": {"en": {"hub": "c/d"}}}),
    # Naming no text takes none away.
    (
      {"data.files": "[]", "seed": "1"},
      {
        "hub": "a/b",
        "hub_valid_split": "test",
        "text_column": "Text",
        "files": (),
        "valid_fraction": 0.001,
      },
    ),
  ],
)
def test_a_text_of_ones_own_takes_the_place_of_the_whole_corpus(overrides, left):
  config = make_hub_config()
  apply_overrides(config, overrides)
  expected = to_config_dict(DataConfig(end_token="")).to_dict() | left
  assert config.data.to_dict() == expected


def test_a_fraction_beside_held_out_text_is_refused():
  config = make_hub_config()
  with pytest.raises(ConfigError, match=r"valid_fraction has no effect beside data\.hub_valid"):
    apply_overrides(config, {"data.valid_fraction": "0.2"})
  apply_overrides(config, {"data.valid_fraction": "0.2", "data.hub_valid_split": ""})
  assert config.data.valid_fraction == 0.2


def test_a_text_of_ones_own_ends_a_mixture():
  config = to_config_dict(PretrainConfig())
  config.data.mixture = {"en": {"hub": "c/d"}}
  apply_overrides(config, {"data.files": "['a.txt']", "data.valid_files": "['b.txt']"})
  frozen = from_config_dict(PretrainConfig, config).data
  assert (frozen.files, frozen.valid_files, frozen.mixture) == (("a.txt",), ("b.txt",), {})


def test_options_without_effect_beside_a_mixture_are_refused():
  mixture = {"en": {"files": ["a.txt"]}}
  for key, value in (("valid_files", ["b.txt"]), ("valid_fraction", 0.2), ("weight", 2.0)):
    with pytest.raises(ConfigError, match=f"data.{key} has no effect beside data.mixture"):
      from_mapping(DataConfig, {"mixture": mixture, key: value}, "data.")
  with pytest.raises(ConfigError, match=r"data\.weight is 2\.0, which has no effect without"):
    from_mapping(DataConfig, {"files": ["a.txt"], "weight": 2.0}, "data.")


def test_an_unknown_key_of_a_file_is_refused():
  with pytest.raises(ConfigError, match='"trian"; did you mean "train"'):
    from_mapping(PretrainConfig, {"trian": {}})


def test_a_typo_in_an_experiment_is_refused():
  config = to_config_dict(PretrainConfig())
  with pytest.raises(AttributeError, match="num_layers"):
    config.model.num_layer = 3


def test_parse_arg():
  defaults = {"size": "small", "steps": 10, "tiny": False}
  assert vars(parse_arg(None, **defaults)) == defaults
  assert vars(parse_arg("medium,tiny", **defaults)) == {"size": "medium", "steps": 10, "tiny": True}
  assert vars(parse_arg("tiny,steps=3", **defaults)) == {"size": "small", "steps": 3, "tiny": True}
  for leftover in ("medium,large", "stps=3", "steps=x"):
    with pytest.raises(ConfigError):
      parse_arg(leftover, **defaults)


def test_literals():
  assert parse_literal("true") is True
  assert parse_literal("[1, null]") == [1, None]
  assert parse_literal("a/b.txt") == "a/b.txt"
  assert parse_literal("12", wants_text=True) == "12"
  assert parse_literal("'12'", wants_text=True) == "12"


def test_a_missing_experiment_names_the_nearest(tmp_path):
  tmp_path.joinpath("shakespeare.py").write_text("")
  with pytest.raises(ConfigError, match=r"shakespeare\.py"):
    load_experiment(f"{tmp_path}/shakspeare.py")
  with pytest.raises(ConfigError, match="get_config"):
    load_experiment(f"{tmp_path}/shakespeare.py")


@pytest.mark.parametrize(
  "override, expected",
  [
    ({"optimizer.learning_rate": "1e999"}, "optimizer.learning_rate is inf; it must be finite"),
    ({"optimizer.learning_rate": "true"}, "learning_rate.* is True; it must be a number"),
    ({"train.num_steps": "1e30"}, "train.num_steps is .*below 1e"),
    ({"data.mixture": "{'c4.en': {'hub': 'a/b'}}"}, "data.mixture.*dots"),
    ({"data.mixture": "{'c4/en': {'hub': 'a/b'}}"}, "data.mixture has the name"),
  ],
)
def test_what_no_run_can_use_is_one_line(override, expected):
  config = to_config_dict(PretrainConfig())
  with pytest.raises(ConfigError, match=expected) as error:
    apply_overrides(config, override)
    from_config_dict(PretrainConfig, config)
  assert "\n" not in str(error.value)


IMPORTS = """from gptjax.config import to_config_dict
from gptjax.train.config import PretrainConfig
def get_config(arg=None):
  config = to_config_dict(PretrainConfig())
"""


@pytest.mark.parametrize(
  "text, expected",
  [
    (IMPORTS + "  config.modle = 1\n", 'line 5: unknown config key "modle"; did you mean "model"'),
    (IMPORTS + "  config.train.num_steps = 1 / 0\n", "line 5: ZeroDivisionError: division by zero"),
    (IMPORTS + "  return {}\n", "returned a dict; it must be a ConfigDict"),
    (IMPORTS + "  return (\n", "line 5: SyntaxError"),
    ("import nowhere\n", "line 1: ModuleNotFoundError: No module named 'nowhere'"),
    ("def get_config():\n  pass\n", "TypeError: get_config"),
  ],
)
def test_mistakes_in_an_experiment_are_one_line_that_says_where(tmp_path, text, expected):
  file = tmp_path / "experiment.py"
  file.write_text(text)
  with pytest.raises(ConfigError) as error:
    load_experiment(str(file))
  assert str(file) in str(error.value) and expected in str(error.value)
  assert "\n" not in str(error.value)


def test_only_python_files_are_experiments(tmp_path):
  (tmp_path / "n.bin").write_bytes(b"")
  with pytest.raises(ConfigError, match="no experiment file"):
    load_experiment(f"{tmp_path}/n.bin")
