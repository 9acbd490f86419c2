"""Values that would crash or hang a run are refused when the config is read, by key and value."""

import dataclasses
import math

import pytest

from gptjax.errors import ConfigError
from gptjax.model.config import ModelConfig
from gptjax.train.config import EvalConfig, OptimizerConfig, PretrainConfig, TrainConfig

GROUPS = {"train": TrainConfig, "eval": EvalConfig, "optimizer": OptimizerConfig,
          "model": ModelConfig}  # fmt: skip
BAD = [
  ("eval.every_steps", -1),
  ("eval.batch_rows", 0),
  ("eval.max_rows", -1),
  ("eval.sample_tokens", -1),
  ("eval.sample_temperature", -0.1),
  ("eval.batch_rows", 10**9),
  ("eval.sample_tokens", 10**9),
  ("train.host_devices", 10**6),
  ("optimizer.end_fraction", 5.0),
  ("optimizer.warmup_fraction", 5.0),
  ("optimizer.weight_decay", -1.0),
  ("model.num_layers", 10**12),
  ("train.num_steps", 0),
  ("train.num_tokens", 0),
  ("train.num_epochs", math.nan),
  ("train.save_every_steps", 0),
  ("train.keep_every_steps", -1),
  ("train.max_bad_steps", 0),
  ("train.loss_chunk_tokens", -1),
  ("train.profile_num_steps", -1),
  ("train.distributed_timeout_seconds", 0),
  ("optimizer.learning_rate", math.nan),
  ("optimizer.clip_norm", -1.0),
  ("optimizer.muon_steps", 0),
  ("optimizer.warmup_steps", -1),
  ("optimizer.decay_pattern", "(kernel"),
  ("model.vocab_multiple", 0),
  ("model.init_std", -0.1),
  ("model.head_dim", -1),
  ("model.attention_pattern", ()),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_a_value_out_of_range_is_named(key, value):
  group, _, name = key.partition(".")
  with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as error:
    GROUPS[group](**{name: value})
  assert "\n" not in str(error.value)


def test_the_least_values_are_taken():
  assert EvalConfig(every_steps=0, batch_rows=1, max_rows=0, sample_tokens=0, sample_temperature=0)
  assert TrainConfig(num_steps=1, save_every_steps=1, max_bad_steps=1, keep_every_steps=0)
  assert OptimizerConfig(learning_rate=0, clip_norm=0, muon_steps=1, warmup_steps=0)


def test_a_context_of_one_token_has_no_samples():
  model = ModelConfig(context_length=1)
  with pytest.raises(ConfigError, match="context_length"):
    PretrainConfig(model=model)
  config = PretrainConfig(model=model, eval=EvalConfig(sample_tokens=0))
  assert not config.eval.has_samples
  with pytest.raises(ConfigError, match="seed"):
    dataclasses.replace(config, seed=-1)
