"""GPT-2, four sizes: gpt2.py:small (124M), :medium, :large, :xl; `:tiny` runs in seconds.

Source: Radford et al. 2019, section 2.3 (sizes, context 1024, 512 rows a batch). The paper gives
  no optimiser: the values are nanoGPT's reproduction (github.com/karpathy/nanoGPT, train.py).
Command: gptjax pretrain --config experiments/gpt2.py:small --workdir gs://BUCKET/gpt2
  WebText was not released: FineWeb's 10B-token sample takes its place, streamed from the hub. The
  tokenizer has GPT-2's size and is trained on it; OpenAI's own files: --config.data.tokenizer=DIR.
Hardware, time, metric: not yet run. nanoGPT's README has 2.85 nats on OpenWebText for 124M.
"""

from gptjax.config import parse_arg, set_for_accelerators, shrink, to_config_dict
from gptjax.errors import check_choice
from gptjax.model.presets import preset
from gptjax.train.config import PretrainConfig

PRESETS = {"small": "gpt2", "medium": "gpt2-medium", "large": "gpt2-large", "xl": "gpt2-xl"}


def get_config(arg=None):
  """`size` is small, medium, large or xl."""
  arg = parse_arg(arg, size="small", tiny=False)
  check_choice("size", arg.size, PRESETS)
  config = to_config_dict(PretrainConfig(model=preset(PRESETS[arg.size])))
  set_for_accelerators(config)
  config.data.hub = "HuggingFaceFW/fineweb:sample-10BT"
  config.data.valid_fraction = 0.001
  config.data.tokenizer = "bpe"
  config.data.vocab_size = 50_257

  config.model.remat = "none" if arg.size == "small" else "dots"

  config.optimizer.learning_rate = 6e-4
  config.optimizer.end_fraction = 0.1
  config.optimizer.warmup_steps = 2_000
  config.optimizer.weight_decay = 0.1
  config.optimizer.beta2 = 0.95

  config.train.num_steps = 600_000
  config.train.batch_rows = 512
  config.train.accumulation = 4
  config.train.loss_chunk_tokens = 16_384
  if arg.tiny:
    shrink(config)
  return config
