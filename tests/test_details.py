"""Details of a choice: refused where they have no effect, taken away by an override."""

import dataclasses

import pytest

from gptjax.config import apply_overrides, from_config_dict, from_mapping, to_config_dict
from gptjax.details import DETAILS
from gptjax.errors import ConfigError
from gptjax.train.config import PretrainConfig

OTHERS = {
  "vocab_size": 300, "window_size": 8, "rotary_dim": 8, "rotary_style": "halves",
  "rotary_base": 500.0, "muon_learning_rate": 0.1, "muon_momentum": 0.5, "muon_steps": 3,
  "end_fraction": 0.5, "decay_steps": 10, "decay_tokens": 10,
}  # fmt: skip
NOT_USING = {
  "data.tokenizer": "char",
  "model.attention_pattern": ("global",),
  "model.positions": "learned",
  "optimizer.name": "adamw",
  "optimizer.schedule": "constant",
}
CASES = [(details, key) for details in DETAILS for key in details.defaults]


def choice_of(details):
  return f"{details.group}.{details.choice}"


def make(details, choice, **values):
  return from_mapping(PretrainConfig, {details.group: {details.choice: choice, **values}})


@pytest.mark.parametrize("details, key", CASES, ids=lambda value: str(value)[:20])
def test_a_detail_without_effect_is_refused_and_one_with_effect_is_not(details, key):
  other, value = NOT_USING[choice_of(details)], OTHERS[key]
  with pytest.raises(ConfigError, match=rf"{details.group}\.{key} is .* has no effect") as error:
    make(details, other, **{key: value})
  assert "\n" not in str(error.value) and choice_of(details) in str(error.value)
  assert make(details, other, **{key: details.defaults[key]})
  user = (details.users[0],) if isinstance(other, tuple) else details.users[0]
  assert getattr(getattr(make(details, user, **{key: value}), details.group), key) == value


def test_the_defaults_are_those_of_the_dataclasses():
  for details in DETAILS:
    group = getattr(PretrainConfig(), details.group)
    assert {key: getattr(group, key) for key in details.defaults} == details.defaults


def test_another_choice_takes_the_details_of_the_experiment_away():
  config = to_config_dict(PretrainConfig())
  config.optimizer.update(name="muon", muon_momentum=0.9, schedule="linear", end_fraction=0.0)
  apply_overrides(config, {"optimizer.name": "adamw", "optimizer.schedule": "cosine"})
  optimizer = from_config_dict(PretrainConfig, config).optimizer
  assert (optimizer.muon_momentum, optimizer.end_fraction) == (0.95, 0.0)


def test_a_detail_given_beside_its_choice_is_not_taken_away_but_refused():
  config = to_config_dict(PretrainConfig())
  apply_overrides(config, {"optimizer.name": "adamw", "optimizer.muon_steps": "3"})
  with pytest.raises(ConfigError, match=r"optimizer\.muon_steps is 3"):
    from_config_dict(PretrainConfig, config)


def test_kept_checkpoints_are_among_those_saved():
  config = PretrainConfig()
  saved = {"save_every_steps": 20, "keep_every_steps": 60}
  train = dataclasses.replace(config.train, **saved)
  assert dataclasses.replace(config, train=train).save_every_steps == 20
  for values in ({"save_every_steps": 25}, {"save_every_steps": None}):
    with pytest.raises(ConfigError, match=r"train\.keep_every_steps is 60"):
      dataclasses.replace(config, train=dataclasses.replace(train, **values))
