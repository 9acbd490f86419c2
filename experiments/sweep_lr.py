"""The best learning rate against the width, in the standard parametrisation and in muP.

Source: Yang et al. 2022, "Tensor Programs V", figure 1, in small: two layers on Shakespeare.
Command: gptjax sweep --config experiments/sweep_lr.py --workdir runs/sweep_lr --workers 2
  56 runs of 200 updates; `:tiny` is four of a few, for tests. The plot is in its report, and in
  docs/sweep.md.
Hardware, time, metric: measured on two CPU cores, 14 minutes beside other work; the best rate of
  the standard parametrisation falls from 8e-3 at width 32 to 2e-3 at 256, that of muP is 4e-3 or
  8e-3.
"""

from gptjax.config import parse_arg, shrink, to_config_dict
from gptjax.sweep.space import product
from gptjax.train.config import PretrainConfig

WIDTHS = (32, 64, 128, 256)
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3)


def get_config(arg=None):
  """`tiny` runs in seconds, for tests and smoke runs."""
  arg = parse_arg(arg, tiny=False)
  config = to_config_dict(PretrainConfig())
  config.data.files = ("data/shakespeare/train/*.txt",)
  config.data.valid_files = ("data/shakespeare/valid/*.txt",)
  config.data.tokenizer = "char"

  config.model.context_length = 64
  config.model.num_layers = 2
  config.model.model_dim = WIDTHS[0]
  config.model.num_heads = 4
  config.model.scan_layers = False

  config.optimizer.schedule = "linear"
  config.optimizer.end_fraction = 0.0
  config.optimizer.warmup_steps = 20
  config.optimizer.weight_decay = 0.0

  config.train.num_steps = 200
  config.train.batch_rows = 8
  config.train.host_devices = 1
  config.eval.every_steps = 100
  config.eval.max_rows = 256
  config.eval.batch_rows = 128
  config.eval.sample_tokens = 0
  if arg.tiny:
    shrink(config)
  return config


def get_sweep(arg=None):
  """Every width at every rate, in both parametrisations."""
  widths, rates = WIDTHS, LEARNING_RATES
  if parse_arg(arg, tiny=False).tiny:
    widths, rates = (32,), (1e-3, 8e-3)
  standard = {"model.mup_base_dim": None, "model.attention_scale": "sqrt_head_dim"}
  mup = {"model.mup_base_dim": WIDTHS[0], "model.attention_scale": "head_dim"}
  points = product({"model.model_dim": widths, "optimizer.learning_rate": rates})
  return {
    "settings": [
      parametrisation | point for parametrisation in (standard, mup) for point in points
    ],
    "plot_x": "optimizer.learning_rate",
    "plot_series": "model.model_dim",
    "plot_panels": "model.mup_base_dim",
  }
