"""Fine-tunes for entailment: does a hypothesis follow from a text, RTE.

Source: Radford et al. 2018, sections 3.2, 3.3 and 4.1; GLUE's RTE.
Command: gptjax finetune --config experiments/finetune_entailment.py --workdir DIR \\
    --config.init_from=MODEL
  Data: GLUE's RTE/train.tsv and dev.tsv in data/tasks/rte.
  Other splits: --config.data.files='["a.tsv"]' and data.valid_files; other sets: data.adapter
  (gptjax/data/adapters.py); your own: data.adapter= and the columns, see docs/finetune.md.
  A small model wants a higher rate: `:small`; three seeds: --config.num_seeds=3.
Hardware, time, metric: measured on two CPU cores; `:small`, 210 updates in about 3 minutes on one
  core: accuracy 0.505 pretrained and 0.531 from scratch, means of three seeds, 251 pairs: nothing
  is learned.
"""

from pathlib import Path

from gptjax.config import parse_arg, to_config_dict
from gptjax.train.finetune_config import FinetuneConfig, tiny_finetuning

EXAMPLES = Path(__file__).parent / "examples" / "entailment.tsv"


def get_config(arg=None):
  """The paper's recipe; `small` for models of a few million parameters, `tiny` for smoke runs."""
  arg = parse_arg(arg, small=False, tiny=False)
  if arg.tiny:
    return to_config_dict(tiny_finetuning("entailment", str(EXAMPLES)))
  config = to_config_dict(FinetuneConfig())
  config.data.family = "entailment"
  config.data.adapter = "rte"
  config.data.files = ("data/tasks/rte/train.tsv",)
  config.data.valid_files = ("data/tasks/rte/dev.tsv",)
  if arg.small:
    config.optimizer.learning_rate = 5e-4
    config.model.scan_layers = False
  return config
