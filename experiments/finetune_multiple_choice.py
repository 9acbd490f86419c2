"""Fine-tunes for multiple choice: which of four passages comes next in a book.

Source: Radford et al. 2018, sections 3.2, 3.3 and 4.1; the task is ours.
Command: gptjax finetune --config experiments/finetune_multiple_choice.py --workdir DIR \\
    --config.init_from=MODEL
  Data: python -m gptjax.data.next_passage BOOK.txt ... --out data/tasks/next_passage
  Other splits: --config.data.files='["a.tsv"]' and data.valid_files; other sets: data.adapter
  (gptjax/data/adapters.py); your own: data.adapter= and the columns, see docs/finetune.md.
  A small model wants a higher rate: `:small`; three seeds: --config.num_seeds=3.
Hardware, time, metric: measured on two CPU cores; `:small`, 240 updates in about 6 minutes on one
  core: accuracy 0.362 pretrained and 0.248 from scratch, means of three seeds; see docs/log.md.
"""

from pathlib import Path

from gptjax.config import parse_arg, to_config_dict
from gptjax.train.finetune_config import FinetuneConfig, tiny_finetuning

EXAMPLES = Path(__file__).parent / "examples" / "multiple_choice.jsonl"


def get_config(arg=None):
  """The paper's recipe; `small` for models of a few million parameters, `tiny` for smoke runs."""
  arg = parse_arg(arg, small=False, tiny=False)
  if arg.tiny:
    return to_config_dict(tiny_finetuning("multiple_choice", str(EXAMPLES)))
  config = to_config_dict(FinetuneConfig())
  config.data.family = "multiple_choice"
  config.data.files = ("data/tasks/next_passage/train.jsonl",)
  config.data.valid_files = ("data/tasks/next_passage/valid.jsonl",)
  if arg.small:
    config.optimizer.learning_rate = 5e-4
    config.model.scan_layers = False
  return config
