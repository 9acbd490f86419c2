"""The fields of a foreign config.json: each handed out once, checked, by the name it may have."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from gptjax.errors import CheckpointError

# Where our own config.json keeps the task of a head.
TASK_FIELD = "gptjax_task"
# Names, ids, heads of other tasks, how to generate, what to return: nothing the logits depend on.
_HARMLESS = re.compile(
  r"_.*|gptjax_task|.*_token_ids?|summary_.*|output_.*|num_beam.*|.*return.*|classifier_dropout|id2label"
  r"|label2id|(num_)?labels|problem_type|architectures|auto_map|model_type|name_or_path"
  r"|tokenizer_class|transformers_version|task_specific_params|finetuning_task|prefix"
  r"|(torch_)?dtype|torchscript|use_bfloat16|use_cache|gradient_checkpointing|tf_legacy_loss"
  r"|attn_implementation|chunk_size_feed_forward|is_decoder|cross_attention_hidden_size"
  r"|tie_encoder_decoder|keys_to_ignore_at_inference|predict_special_tokens|n_ctx|n_special"
  r"|do_sample|temperature|top_[kp]|typical_p|early_stopping|diversity_penalty|bad_words_ids"
  r"|(max|min)_length|(length|repetition|exponential_decay_length)_penalty|remove_invalid_values"
  r"|(encoder_)?no_repeat_ngram_size|(begin_)?suppress_tokens"
)
_ABSENT = object()
_KINDS = {
  **{int: "a whole number", float: "a number", bool: "true or false"},
  **{str: "a text", list: "a list", dict: "an object"},
}


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON object. Raises CheckpointError if it is missing, none, or says a field twice."""
  try:
    # Editors of Windows put a mark first.
    fields = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
  except FileNotFoundError:
    raise CheckpointError(f'"{path.parent}" has no {path.name}') from None
  except (ValueError, OSError, RecursionError) as error:
    raise CheckpointError(f'"{path}" cannot be read: {error}') from error
  if not isinstance(fields, dict):
    raise CheckpointError(f'"{path}" is not a JSON object')
  return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  for name, value in pairs:
    if fields[name] != value and value == value:
      raise ValueError(f"{spell(name)} is there twice, {spell(value)} and {spell(fields[name])}")
  return fields


def spell(value: Any) -> str:
  """Writes a value as JSON does, on one short line."""
  text = json.dumps(value, default=repr)
  return text if len(text) <= 120 else text[:117] + "..."


class Fields:
  """The fields of a config: hands each out, checked, and knows what was never asked for."""

  def __init__(self, fields: Mapping[str, Any], source: str, aliases: Mapping[str, str]):
    self._fields, self._source, self._aliases = fields, source, aliases
    self._read = set()

  def take(self, name: str, default: Any, kind: type, least: float = -math.inf) -> Any:
    """Returns a field, or its default where it is absent."""
    names = [n for n in (name, self._aliases.get(name)) if n]
    self._read.update(names)
    given = [(n, self._fields[n]) for n in names if n in self._fields]
    if not given:
      if default is _ABSENT:
        raise CheckpointError(f"{self._source} has no {name}; it must be there")
      return default
    if any(value != given[0][1] for _, value in given[1:]):
      raise CheckpointError(
        f"{self._source} contradicts itself: "
        + " and ".join(f"{n} is {spell(value)}" for n, value in given)
      )
    used, value = given[0]
    if (value is None and default is None) or kind is object:
      return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_number = is_number and abs(value) < 2**53  # and so not NaN
    fits = {int: is_number and value == int(value), float: is_number}
    if not fits.get(kind, isinstance(value, kind)) or (is_number and value < least):
      more = f", at least {least:g}" if least > -math.inf else ""
      self.refuse(used, value, f"it must be {_KINDS[kind]}{more}")
    return kind(value)

  def within(self, group: Mapping[str, Any]) -> "Fields":
    """Returns the fields of a group among the fields."""
    return Fields(group, self._source, {})

  def has(self, name: str) -> bool:
    """Says whether a field is there."""
    return name in self._fields

  def size(self, name: str, default: Any = _ABSENT) -> int:
    """Returns a whole number of at least 1."""
    return self.take(name, default, int, least=1)

  def choose(self, name: str, default: str, choices: Mapping[str, Any]) -> Any:
    """Returns what a text stands for."""
    value = self.take(name, default, str)
    if value not in choices:
      self.refuse(name, value, f"supported are {', '.join(choices)}")
    return choices[value]

  def refuse(self, name: str, value: Any, reason: str) -> NoReturn:
    """Raises CheckpointError about one field."""
    raise CheckpointError(f"{self._source}: {name} is {spell(value)}; {reason}")

  def unread(self) -> list[str]:
    """Lists fields that were not asked for and are not known to be harmless."""
    strange = self._fields.keys() - self._read
    return sorted(name for name in strange if not _HARMLESS.fullmatch(name))
