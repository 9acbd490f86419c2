"""`gptjax evaluate harness`: tasks of EleutherAI's lm-evaluation-harness on a gptjax model."""

import argparse
import contextlib
import importlib.metadata
import json
from collections.abc import Iterator

from gptjax.checkpoint.models import DTYPES, load_model
from gptjax.cli.compilation import enable_compilation_cache
from gptjax.cli.evaluate.arguments import add_model, round_weights, told
from gptjax.errors import ConfigError
from gptjax.evaluate.receipt import identify, versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_model(parser)
  parser.add_argument(
    "--tasks",
    nargs="+",
    action="extend",
    required=True,
    help="names that the harness knows, or that files of --include-path give",
  )
  parser.add_argument("--include-path", help="folder of tasks in the harness's YAML format")
  parser.add_argument("--shots", type=int, help="solved examples before each; default the task's")
  parser.add_argument("--limit", type=int, help="the first so many examples of each task")
  parser.add_argument("--seed", type=int, default=1234, help="of shots and sampled texts")
  parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the parameters")


def run(options: argparse.Namespace) -> None:
  enable_compilation_cache()
  with _needing_the_harness():
    from lm_eval.utils import make_table

    from gptjax.evaluate.harness import HarnessModel, run_tasks
  if options.limit is not None and options.limit < 1:
    raise ConfigError(f"--limit is {options.limit}; it must be at least 1")
  if options.shots is not None and options.shots < 0:
    raise ConfigError(f"--shots is {options.shots}; it must be at least 0")
  model = load_model(options.model, options.dtype, tokenizer=options.tokenizer)
  model = round_weights(model, options.weights)
  found = run_tasks(
    HarnessModel(model, options.batch_size),
    options.tasks,
    options.include_path,
    num_fewshot=options.shots,
    limit=options.limit,
    seed=options.seed,
  )
  if not options.json:
    print(make_table(found))
    return
  protocol = {"shots": options.shots, "limit": options.limit, "seed": options.seed}
  receipt = {
    **told(options),
    "task": "harness",
    "results": found["results"],
    "protocol": protocol | {"tasks": found["versions"], "dtype": options.dtype},
    **identify(model),
    "versions": versions() | {"lm_eval": importlib.metadata.version("lm_eval")},
  }
  print(json.dumps(receipt, ensure_ascii=False, default=str))


@contextlib.contextmanager
def _needing_the_harness() -> Iterator[None]:
  try:
    yield
  except ModuleNotFoundError as error:
    raise ConfigError(
      f"the harness is not installed ({error.name} is missing);"
      " run `.venv/bin/pip install -e '.[harness]'`"
    ) from error
