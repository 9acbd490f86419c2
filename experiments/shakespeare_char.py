"""Tiny Shakespeare by characters: nanoGPT's CPU recipe, and ours to beat it with.

Source: github.com/karpathy/nanoGPT, config/train_shakespeare_char.py with its README's CPU flags:
  4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps, no dropout, no biases.
Command: gptjax pretrain --config experiments/shakespeare_char.py --workdir runs/char \
    --config.data.files='["input.txt"]'
  Without the last line the text comes from the hub, cut into passages (not run here).
  `:fast` is our recipe for the same model; `:tiny` runs in seconds.
The rows of a batch are drawn without replacement, nanoGPT's with it.
Hardware, time, metric: measured on two CPU cores; see docs/log.md.
"""

from gptjax.config import parse_arg, shrink, to_config_dict
from gptjax.train.config import PretrainConfig


def get_config(arg=None):
  """Returns nanoGPT's recipe; `fast` changes the optimiser, `tiny` the sizes."""
  arg = parse_arg(arg, fast=False, tiny=False)
  config = to_config_dict(PretrainConfig())
  # karpathy/tiny_shakespeare is a script, which `datasets` no longer runs.
  config.data.hub = "Trelis/tiny-shakespeare"
  config.data.hub_valid_split = "test"
  config.data.text_column = "Text"
  config.data.tokenizer = "char"
  config.data.end_token = ""
  config.data.valid_fraction = 0.1

  config.model.context_length = 64
  config.model.num_layers = 4
  config.model.model_dim = 128
  config.model.num_heads = 4
  config.model.activation = "gelu"
  config.model.norm_bias = False
  config.model.qkv_bias = False
  config.model.attention_output_bias = False
  config.model.mlp_bias = False
  config.model.scan_layers = False

  config.optimizer.learning_rate = 1e-3
  config.optimizer.end_fraction = 0.1
  config.optimizer.warmup_steps = 100
  config.optimizer.weight_decay = 0.1
  config.optimizer.beta2 = 0.99

  config.train.num_steps = 2_000
  config.train.batch_rows = 12
  config.eval.every_steps = 250
  config.eval.batch_rows = 256
  config.eval.sample_prompts = ("\n",)
  config.eval.sample_tokens = 300
  if arg.fast:
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.muon_learning_rate = 0.06
    config.optimizer.muon_momentum = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.schedule = "linear"
    config.optimizer.end_fraction = 0.0
    config.optimizer.warmup_steps = 10
    config.train.num_steps = 190
    config.train.batch_rows = 32
    config.eval.every_steps = 190
  if arg.tiny:
    shrink(config)
  return config
