"""The model through which EleutherAI's lm-evaluation-harness scores and completes with gptjax.

Importing this module registers the name "gptjax" with the harness. Needs the extra "harness";
neither the harness nor this needs PyTorch. Texts become ids as they do in the harness's own "hf"
model: special tokens that a text spells are parsed, and a tokenizer's usual frame is put around.
"""

import difflib
import os
import random
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from gptjax.checkpoint.models import Loaded, load_model
from gptjax.errors import ConfigError, DataError
from gptjax.evaluate.completions import complete, make_generator
from gptjax.evaluate.scoring import Row, Scorer, continuation_row
from gptjax.generate.options import DecodingOptions, parse_options
from gptjax.model.parameters import count_parameters

_MAX_NEW_TOKENS = 256


@register_model("gptjax")
class HarnessModel(TemplateLM):
  """A gptjax model, as the harness calls one.

  Args:
    pretrained: whatever `gptjax.load` takes, or a model that is loaded.
    batch_size: rows of a whole context in a batch, and prompts; None or "auto" chooses. Changes
      speed and memory only.
    dtype: of the parameters, as of `gptjax.load`.
    max_length: most tokens of a row; None is the context of the model.
    prefix_token_id: stands before a text without context; None is the start token of the model,
      else its end token.
    device, max_batch_size: of the harness's command line; refused, as they have no effect.

  Raises:
    UserError: a model that cannot be loaded or has no tokenizer, or an option that does not fit.
  """

  def __init__(
    self,
    pretrained: str | os.PathLike | Loaded,
    batch_size: int | str | None = None,
    dtype: str | None = "float32",
    max_length: int | None = None,
    prefix_token_id: int | None = None,
    device: str | None = None,
    max_batch_size: int | None = None,
  ):
    super().__init__()
    for name, value in {"device": device, "max_batch_size": max_batch_size}.items():
      if value is not None:
        raise ConfigError(f"{name} is {value!r}, which has no effect on gptjax; leave it out")
    is_name = isinstance(pretrained, str | os.PathLike)
    model = load_model(pretrained, dtype) if is_name else pretrained
    if model.tokenizer is None:
      raise DataError("the model has no tokenizer, and the harness gives text")
    self._words = model.tokenizer
    self._batch_size = _parse_batch_size(batch_size)
    self._scorer = Scorer(model, self._batch_size)
    self._generator = make_generator(model)
    self._config = model.config
    self.max_length = _parse_max_length(max_length, model.config.context_length)
    self._end_ids = model.token_ids["eos"] or _known(model.tokenizer.end_id)
    start_ids = model.token_ids["bos"] or self._end_ids
    self._prefix_ids = start_ids if prefix_token_id is None else (int(prefix_token_id),)

  @property
  def eot_token_id(self) -> int:
    """The end token.

    Raises:
      DataError: the model has none.
    """
    return _first(self._end_ids, "end token")

  @property
  def prefix_token_id(self) -> int:
    """What stands before a text without context.

    Raises:
      DataError: the model has neither a start token nor an end token, and none was given.
    """
    return _first(self._prefix_ids, "start token; give prefix_token_id")

  @property
  def tokenizer_name(self) -> str:
    """Tells apart tokenizers in the harness's cache of requests."""
    return self._words.fingerprint

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Returns the ids of a text, with the frame of its tokenizer unless it is not wanted."""
    del kwargs
    framed = add_special_tokens is None or add_special_tokens
    return self._words.encode(string, parse_special_tokens=True, add_special_tokens=framed)

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Scores whole texts; a window begins where the one before ended, as the harness parts them."""
    rows, owners = [], []
    for owner, request in enumerate(requests):
      (text,) = request.args
      windows = utils.get_rolling_token_windows(
        token_list=self.tok_encode(text),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      )
      for context, continuation in map(utils.make_disjoint_window, windows):
        rows.append(continuation_row(context, continuation, self.max_length))
        owners.append(owner)
    totals = [0.0] * len(requests)
    for owner, scores in zip(owners, self._score(rows, disable_tqdm)):
      totals[owner] += scores.logprob
    for request, total in zip(requests, totals):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """Continues prompts; those with the same options go together."""
    groups: dict[DecodingOptions, list[int]] = {}
    for index, request in enumerate(requests):
      groups.setdefault(self._read_options(request.args[1]), []).append(index)
    texts = [""] * len(requests)
    with _progress(len(requests), disable_tqdm) as bar:
      for options, indices in groups.items():
        prompts = [self._encode_prompt(requests[index].args[0]) for index in indices]
        found = complete(self._generator, prompts, options, self._batch_size, bar.update)
        for index, text in zip(indices, found):
          texts[index] = text
    for request, text in zip(requests, texts):
      self.cache_hook.add_partial("generate_until", request.args, text)
    return texts

  def get_model_info(self) -> dict[str, Any]:
    """What the harness writes beside its results."""
    return {
      "model_num_parameters": count_parameters(self._config),
      "model_dtype": self._config.compute_dtype,
    }

  def _loglikelihood_tokens(
    self,
    requests: list[tuple[tuple[str, str], list[int], list[int]]],
    disable_tqdm: bool = False,
    **kwargs: Any,
  ) -> list[tuple[float, bool]]:
    del kwargs
    rows = [
      continuation_row(context, continuation, self.max_length)
      for _, context, continuation in requests
    ]
    answers = [(scores.logprob, scores.is_greedy) for scores in self._score(rows, disable_tqdm)]
    for (texts, _, _), answer in zip(requests, answers):
      self.cache_hook.add_partial("loglikelihood", texts, answer)
    return answers

  def _score(self, rows: list[Row], disable_tqdm: bool) -> list:
    with _progress(len(rows), disable_tqdm) as bar:
      return self._scorer.score(rows, advance=bar.update)

  def _encode_prompt(self, text: str) -> list[int]:
    return self.tok_encode(text) or [self.prefix_token_id]

  def _read_options(self, given: dict[str, Any]) -> DecodingOptions:
    """Reads the harness's names of options; sampling follows the seed of the harness."""
    options = dict(normalize_gen_kwargs(given, _MAX_NEW_TOKENS))
    options["max_new_tokens"] = options.pop("max_gen_toks")
    options["stop"] = [text for text in options.pop("until") if text]
    if not options["do_sample"]:
      options.pop("temperature", None)
    elif options.get("seed") is None:
      options["seed"] = random.getrandbits(32)
    return parse_options(options)


def run_tasks(
  model: HarnessModel,
  tasks: Sequence[str],
  include_path: str | None = None,
  *,
  num_fewshot: int | None = None,
  limit: int | None = None,
  seed: int = 1234,
) -> dict[str, Any]:
  """Runs tasks of the harness, and returns what its `simple_evaluate` does.

  Args:
    model: what is scored.
    tasks: names, also with wildcards.
    include_path: a folder of tasks; the harness's own are looked for if it lacks one.
    num_fewshot: shots; None is what each task says.
    limit: the first so many examples of each task; None is all.
    seed: of shots, and of texts that are drawn.

  Raises:
    ConfigError: no such folder, or no such task.
    DataError: data of a task that cannot be read, or had without network.
  """
  if include_path is not None and not os.path.isdir(include_path):
    raise ConfigError(f'include_path is "{include_path}", which is no folder')
  manager = _find_tasks(tasks, include_path)
  try:
    return simple_evaluate(
      model=model,
      tasks=manager.match_tasks(list(tasks)),
      task_manager=manager,
      num_fewshot=num_fewshot,
      limit=limit,
      log_samples=False,
      random_seed=seed,
      numpy_random_seed=seed,
      torch_random_seed=None,
      fewshot_random_seed=seed,
    )
  except OSError as error:
    raise DataError(f"the data of a task cannot be read: {error}") from error


def _find_tasks(tasks: Sequence[str], include_path: str | None) -> TaskManager:
  """Lists the tasks of a folder, or, since that takes seconds, only then the harness's own too."""
  if include_path is not None:
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if all(manager.match_tasks([name]) for name in tasks):
      return manager
  manager = TaskManager(include_path=include_path)
  for name in tasks:
    if not manager.match_tasks([name]):
      # There are thousands; all of them would be no help.
      near = difflib.get_close_matches(name, manager.all_tasks, n=3)
      hint = f"; the nearest are {', '.join(near)}" if near else ""
      raise ConfigError(f'the harness has no task "{name}"{hint}')
  return manager


def _progress(total: int, is_disabled: bool) -> tqdm:
  return tqdm(total=total, disable=is_disabled, file=sys.stderr)


def _known(token_id: int | None) -> tuple[int, ...]:
  return () if token_id is None else (token_id,)


def _first(ids: Sequence[int], what: str) -> int:
  if not ids:
    raise DataError(f"the model has no {what}")
  return ids[0]


def _parse_batch_size(batch_size: int | str | None) -> int | None:
  if batch_size is None or str(batch_size).startswith("auto"):
    return None
  try:
    return int(batch_size)
  except ValueError:
    raise ConfigError(f"batch_size is {batch_size!r}; it must be a whole number or auto") from None


def _parse_max_length(max_length: int | None, context_length: int) -> int:
  if max_length is None:
    return context_length
  if not 1 <= int(max_length) <= context_length:
    raise ConfigError(
      f"max_length is {max_length}; it must be from 1 to {context_length}, the context of the model"
    )
  return int(max_length)


def main() -> None:
  """Runs the harness's own command line, which then knows `--model gptjax`."""
  from lm_eval.__main__ import cli_evaluate

  cli_evaluate()


if __name__ == "__main__":
  main()
