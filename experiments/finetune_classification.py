"""Fine-tunes for classification: the sentiment of a sentence, SST-2.

Source: Radford et al. 2018, sections 3.2, 3.3 and 4.1; Socher et al. 2013 in GLUE's form.
Command: gptjax finetune --config experiments/finetune_classification.py --workdir DIR \\
    --config.init_from=MODEL
  Data: GLUE's SST-2/train.tsv and dev.tsv in data/tasks/sst2.
  Other splits: --config.data.files='["a.tsv"]' and data.valid_files; other sets: data.adapter
  (gptjax/data/adapters.py); your own: data.adapter= and the columns, see docs/finetune.md.
  A small model wants a higher rate: `:small`; three seeds: --config.num_seeds=3.
Hardware, time, metric: measured on two CPU cores; `:small` with NSMC, 600 updates in about 2
  minutes on one core: accuracy 0.817 pretrained and 0.798 from scratch, means of five seeds. SST-2
  not run in full.
"""

from pathlib import Path

from gptjax.config import parse_arg, to_config_dict
from gptjax.train.finetune_config import FinetuneConfig, tiny_finetuning

EXAMPLES = Path(__file__).parent / "examples" / "classification.tsv"


def get_config(arg=None):
  """The paper's recipe; `small` for models of a few million parameters, `tiny` for smoke runs."""
  arg = parse_arg(arg, small=False, tiny=False)
  if arg.tiny:
    return to_config_dict(tiny_finetuning("classification", str(EXAMPLES)))
  config = to_config_dict(FinetuneConfig())
  config.data.family = "classification"
  config.data.adapter = "sst2"
  config.data.files = ("data/tasks/sst2/train.tsv",)
  config.data.valid_files = ("data/tasks/sst2/dev.tsv",)
  if arg.small:
    config.optimizer.learning_rate = 5e-4
    config.model.scan_layers = False
  return config
