"""What each transferred layer brings: fine-tuning from the first 0, 1, ... N layers.

Source: Radford et al. 2018, figure 2, left; 0 layers transfer the embeddings.
Command: gptjax finetune --config experiments/finetune_layers.py:classification,small \\
    --workdir DIR --config.init_from=MODEL
  The other families by name; data and everything else as in experiments/finetune_FAMILY.py.
  N + 1 runs for each of --config.num_seeds, and the plot in DIR/report.html; the same command
  goes on.
Hardware, time, metric: not yet run.
"""

from pathlib import Path

from gptjax.checkpoint.models import describe_model
from gptjax.config import load_experiment, parse_arg
from gptjax.errors import ConfigError


def get_config(arg=None):
  """Takes a family, then what its own experiment takes: `similarity,small`."""
  arg = parse_arg(arg, family="classification", small=False, tiny=False)
  flags = ",".join(name for name in ("small", "tiny") if getattr(arg, name))
  return load_experiment(f"{Path(__file__).parent}/finetune_{arg.family}.py:{flags}")


def get_variants(config):
  """A variant for each number of layers."""
  if not config.init_from:
    raise ConfigError('init_from is ""; name the pretrained model whose layers are transferred')
  num_layers = describe_model(config.init_from).num_layers
  return {f"{count} layers": {"finetune.transfer_layers": count} for count in range(num_layers + 1)}
