"""Fine-tunes for similarity: how alike are two sentences, from 0 to 5, STS-B.

Source: Radford et al. 2018, sections 3.2, 3.3 and 4.1; the STS benchmark.
Command: gptjax finetune --config experiments/finetune_similarity.py --workdir DIR \\
    --config.init_from=MODEL
  Data: the benchmark's sts-train.csv and sts-dev.csv in data/tasks/stsb.
  Other splits: --config.data.files='["a.tsv"]' and data.valid_files; other sets: data.adapter
  (gptjax/data/adapters.py); your own: data.adapter= and the columns, see docs/finetune.md.
  A small model wants a higher rate: `:small`; three seeds: --config.num_seeds=3.
Hardware, time, metric: measured on two CPU cores; `:small`, 540 updates in about 6 minutes on one
  core: Pearson 0.188 pretrained and 0.157 from scratch, means of three seeds; see docs/log.md.
"""

from pathlib import Path

from gptjax.config import parse_arg, to_config_dict
from gptjax.train.finetune_config import FinetuneConfig, tiny_finetuning

EXAMPLES = Path(__file__).parent / "examples" / "similarity.tsv"


def get_config(arg=None):
  """The paper's recipe; `small` for models of a few million parameters, `tiny` for smoke runs."""
  arg = parse_arg(arg, small=False, tiny=False)
  if arg.tiny:
    return to_config_dict(tiny_finetuning("similarity", str(EXAMPLES)))
  config = to_config_dict(FinetuneConfig())
  config.data.family = "similarity"
  config.data.adapter = "stsb"
  config.data.files = ("data/tasks/stsb/sts-train.csv",)
  config.data.valid_files = ("data/tasks/stsb/sts-dev.csv",)
  if arg.small:
    config.optimizer.learning_rate = 5e-4
    config.model.scan_layers = False
  return config
