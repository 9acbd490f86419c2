"""A small GPT to fine-tune afterwards: 1.3M parameters, minutes on two cores.

Source: ours; the optimiser is shakespeare.py's, which was tuned there.
Command: gptjax pretrain --config experiments/small.py --workdir runs/books \
    --config.data.files='["books/*.txt"]'
  Any text in any language; without the last line it reads Shakespeare's works (`make data`).
Hardware, time, metric: measured on two CPU cores; see docs/log.md.
"""

from gptjax.config import parse_arg, shrink, to_config_dict
from gptjax.train.config import PretrainConfig


def get_config(arg=None):
  """`tiny` runs in seconds, for tests and smoke runs."""
  arg = parse_arg(arg, tiny=False)
  config = to_config_dict(PretrainConfig())
  config.data.files = ("data/shakespeare/train/*.txt",)
  config.data.valid_files = ("data/shakespeare/valid/*.txt",)
  config.data.valid_fraction = 0.02
  config.data.tokenizer = "bpe"
  config.data.vocab_size = 4096

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

  config.train.num_steps = 1_000
  config.train.batch_rows = 32
  config.train.save_every_steps = 100
  config.eval.every_steps = 500
  config.eval.batch_rows = 64
  config.eval.sample_tokens = 80
  if arg.tiny:
    shrink(config)
  return config
