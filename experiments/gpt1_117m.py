"""GPT-1: 117M parameters, 100 epochs of books. `:tiny` runs in seconds.

Source: Radford et al. 2018, section 4.1. Adam's betas are not given; they are those of the
  released fine-tuning code, as is the clipping.
Command: gptjax pretrain --config experiments/gpt1_117m.py --workdir gs://BUCKET/gpt1 \\
    --config.data.files='["books/*.txt"]'
  BooksCorpus is no longer distributed: give your own books, one a file. The tokenizer has GPT-1's
  size but is byte-level and keeps case; OpenAI's own files, without an end token:
  --config.data.tokenizer=gpt1-paper:DIR --config.data.end_token=
Hardware, time, metric: not yet run. The paper has a token perplexity of 18.4 on BooksCorpus.
"""

from gptjax.config import parse_arg, set_for_accelerators, shrink, to_config_dict
from gptjax.model.presets import preset
from gptjax.train.config import PretrainConfig


def get_config(arg=None):
  """The paper's recipe."""
  arg = parse_arg(arg, tiny=False)
  config = to_config_dict(PretrainConfig(model=preset("gpt1")))
  set_for_accelerators(config)
  config.data.files = ("data/books/*.txt",)
  config.data.valid_fraction = 0.01
  config.data.tokenizer = "bpe"
  config.data.vocab_size = 40_478

  config.optimizer.learning_rate = 2.5e-4
  config.optimizer.end_fraction = 0.0
  config.optimizer.warmup_steps = 2_000
  config.optimizer.weight_decay = 0.01
  config.optimizer.beta2 = 0.999

  config.train.num_epochs = 100.0
  config.train.batch_rows = 64
  if arg.tiny:
    shrink(config)
  return config
