"""The paper's Table 5 in small: fine-tuning without pretraining, and without the auxiliary loss.

Source: Radford et al. 2018, section 5 and table 5 (its LSTM is left out).
Command: gptjax finetune --config experiments/ablation.py:classification,small --workdir DIR \\
    --config.init_from=MODEL
  The other families by name; data and everything else as in experiments/finetune_FAMILY.py.
  Nine runs, DIR/VARIANT/seed-K, and the table in DIR/report.html; the same command goes on.
Hardware, time, metric: measured on two CPU cores; `classification,small` with NSMC, about 2 minutes
  a run on one core: accuracy 0.817, without LM loss 0.821, from scratch 0.798.
"""

from pathlib import Path

from gptjax.config import load_experiment, parse_arg


def get_config(arg=None):
  """Takes a family, then what its own experiment takes: `similarity,small`."""
  arg = parse_arg(arg, family="classification", small=False, tiny=False)
  flags = ",".join(name for name in ("small", "tiny") if getattr(arg, name))
  config = load_experiment(f"{Path(__file__).parent}/finetune_{arg.family}.py:{flags}")
  config.num_seeds = 3
  return config


def get_variants(config):
  """Each row of the table: what it changes."""
  return {
    "pretrained, with LM loss": {},
    "pretrained, without LM loss": {"finetune.lm_coefficient": 0.0},
    "from scratch, with LM loss": {"finetune.pretrained": False},
  }
