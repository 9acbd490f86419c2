"""GPT-3, eight sizes: gpt3.py:small, :medium, :large, :xl, :2.7b, :6.7b, :13b, :175b; `:tiny`.

Source: Brown et al. 2020, table 2.1 and appendix B; see gptjax/model/presets.py for its two
  misprints. Batches are the powers of two nearest to the table's tokens (1,536 rows for 3.2M).
  The ramp of the batch is over 4B tokens for the three smallest, 8B for the next three, 12B for
  the largest: the paper says "4-12 billion tokens depending on the model size". Ours doubles.
  Layers alternate dense and locally banded attention; the width of the band is not published.
Command: gptjax pretrain --config experiments/gpt3.py:small --workdir gs://BUCKET/gpt3 \\
    --config.train.mode=mesh --config.train.mesh_fsdp=-1 --config.train.mesh_data=1
  The mix of appendix A is not public: FineWeb's 350B-token sample takes its place, streamed.
Hardware, time, metric: not yet run.
"""

from gptjax.config import parse_arg, set_for_accelerators, shrink, to_config_dict
from gptjax.errors import check_choice
from gptjax.model.presets import preset
from gptjax.train.config import PretrainConfig

# size: (rows of 2,048 tokens a batch, learning rate, tokens of the batch ramp)
RECIPES = {
  "small": (256, 6.0e-4, 4e9),
  "medium": (256, 3.0e-4, 4e9),
  "large": (256, 2.5e-4, 4e9),
  "xl": (512, 2.0e-4, 8e9),
  "2.7b": (512, 1.6e-4, 8e9),
  "6.7b": (1024, 1.2e-4, 8e9),
  "13b": (1024, 1.0e-4, 12e9),
  "175b": (1536, 0.6e-4, 12e9),
}


def get_config(arg=None):
  """`size` is one of the eight."""
  arg = parse_arg(arg, size="small", tiny=False)
  check_choice("size", arg.size, RECIPES)
  batch_rows, learning_rate, ramp_tokens = RECIPES[arg.size]
  config = to_config_dict(PretrainConfig(model=preset(f"gpt3-{arg.size}")))
  set_for_accelerators(config)
  config.data.hub = "HuggingFaceFW/fineweb:sample-350BT"
  config.data.valid_fraction = 0.0001
  config.data.tokenizer = "bpe"
  config.data.vocab_size = 50_257

  config.model.remat = "dots"

  config.optimizer.learning_rate = learning_rate
  config.optimizer.end_fraction = 0.1
  config.optimizer.warmup_tokens = 375_000_000
  # The cosine reaches 10 % at 260B tokens and stays there to the end at 300B.
  config.optimizer.decay_tokens = 260_000_000_000 - 375_000_000
  config.optimizer.weight_decay = 0.1
  config.optimizer.beta2 = 0.95
  config.optimizer.clip_norm = 1.0

  config.train.num_tokens = 300_000_000_000
  config.train.batch_rows = batch_rows
  config.train.ramp_start_rows = 16  # 32k tokens
  config.train.ramp_tokens = int(ramp_tokens)
  config.train.loss_chunk_tokens = 16_384
  if arg.tiny:
    shrink(config)
  return config
