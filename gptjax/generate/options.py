"""Every decoding option: its name, unit, value when off, and what it may be combined with.

Names are transformers' where it has the option; ALIASES says which other names are understood.
None always means the default. Every option is used or refused: here an unknown name or a value out
of range, in checks.py what does not fit together. Imports no jax.
"""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import ConfigError, DataError, did_you_mean

DEFAULT_NEW_TOKENS = 20
_MAX_INT32 = 2**31 - 1  # of the device's counters
ALIASES = {
  "stop_strings": "stop",
  "prefix_allowed_tokens_fn": "allowed_tokens",
  "sequence_bias": "logit_bias",
  "assistant_model": "draft_model",
  "num_assistant_tokens": "num_draft_tokens",
}
# Options of transformers that gptjax does not have, at the values that switch them off.
FOREIGN_OFF: Mapping[str, tuple[Any, ...]] = {
  "use_cache": (True,),
  "num_beam_groups": (1,),
  "diversity_penalty": (0, 0.0),
  "epsilon_cutoff": (0, 0.0),
  "eta_cutoff": (0, 0.0),
  "guidance_scale": (1, 1.0),
  "remove_invalid_values": (False,),
  "renormalize_logits": (False,),
  "encoder_repetition_penalty": (1, 1.0),
  "encoder_no_repeat_ngram_size": (0,),
}


@dataclasses.dataclass(frozen=True)
class _Kind:
  """What an option's value may be: `convert` raises unless it is `expected`."""

  convert: Callable[[Any], Any]
  expected: str


def _require(condition: bool) -> None:
  if not condition:
    raise ValueError


def _to_int(value: Any) -> int:
  _require(not isinstance(value, bool))
  return operator.index(value)


def _to_float(value: Any) -> float:
  _require(not isinstance(value, bool | str | bytes))
  return float(value)


def _whole(low: int, high: int | None = None) -> _Kind:
  def convert(value: Any) -> int:
    number = _to_int(value)
    _require(low <= number <= (_MAX_INT32 if high is None else high))
    return number

  limits = f"at least {low} and below 2**31" if high is None else f"{low} to {high}"
  return _Kind(convert, f"a whole number, {limits}")


def _number(low: float, high: float, expected: str) -> _Kind:
  def convert(value: Any) -> float:
    number = _to_float(value)
    _require(low <= number <= high)  # NaN is not
    return number

  return _Kind(convert, expected)


def _one_of(*choices: Any) -> _Kind:
  def convert(value: Any) -> Any:
    value = value.item() if isinstance(value, np.bool_) else value
    (same,) = [x for x in choices if type(x) is type(value) and x == value]
    return same

  return _Kind(convert, " or ".join(repr(choice) for choice in choices))


def _to_ids(value: Any) -> tuple[int, ...]:
  value = value.tolist() if hasattr(value, "tolist") else value
  ids = [_to_int(item) for item in (value if isinstance(value, Iterable) else [value])]
  _require(min(ids, default=0) >= 0)
  return tuple(ids)


def _to_end_ids(value: Any) -> tuple[int, ...]:
  value = value.tolist() if hasattr(value, "tolist") else value
  return () if value in (-1, [-1], (-1,)) else _to_distinct_ids(value)


def _to_distinct_ids(value: Any) -> tuple[int, ...]:
  return tuple(dict.fromkeys(_to_ids(value)))


def _to_sequence(value: Any) -> tuple[int, ...]:
  ids = _to_ids(value)
  _require(len(ids) > 0)
  return ids


def _to_sequences(value: Any) -> tuple[tuple[int, ...], ...]:
  _require(all(isinstance(item, Iterable) for item in value))
  return tuple(dict.fromkeys(_to_sequence(item) for item in value))


def _to_bias(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
  bias = {}
  for key, weight in value.items() if isinstance(value, Mapping) else value:
    ids = _to_sequence(int(key) if isinstance(key, str) else key)  # JSON's keys are texts
    bias[ids] = _to_float(weight)
    _require(bias[ids] < math.inf)  # NaN is not
  return tuple((ids, weight) for ids, weight in bias.items() if weight)


def _to_texts(value: Any) -> tuple[str, ...]:
  texts = (value,) if isinstance(value, str) else tuple(value)
  _require(all(isinstance(text, str) and text for text in texts))
  return texts


def _to_mask(value: Any) -> np.ndarray:
  mask = np.asarray(value)
  _require(mask.ndim == 2 and bool(np.isin(mask, (0, 1)).all()))
  return mask.astype(bool)


def _to_callable(value: Any) -> Any:
  _require(callable(value))
  return value


_FLAG = _one_of(False, True)
_IDS = _Kind(_to_distinct_ids, "a token id or a list of them, none negative")
_END_IDS = _Kind(_to_end_ids, "a token id, a list of them, or -1 for none")
_SEQUENCES = _Kind(_to_sequences, "a list of lists of token ids, none of them empty or negative")
_BIAS = _Kind(
  _to_bias, "a mapping of token ids, or tuples of them, to numbers below infinity (-inf forbids)"
)
_TEXTS = _Kind(_to_texts, "a text or a list of texts, none of them empty")
_MASK = _Kind(_to_mask, "rows of one length of 0 (padding) and 1")
_FINITE = _number(-3.4e38, 3.4e38, "a finite number")


def _option(default: Any, kind: _Kind, text: str, compare: bool = True) -> Any:
  """Declares an option; `text` also is its line in `gptjax generate --help`."""
  return dataclasses.field(default=default, compare=compare, metadata={"kind": kind, "help": text})


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
  """How to continue prompts. Each option's default switches it off; its text says the rest.

  Building one (or `dataclasses.replace`) checks every value by itself; `check_options` checks
  them together, and against a model and its prompts.

  Raises:
    ConfigError: a value that is not of its option's kind.
  """

  # Lengths, in tokens.
  max_new_tokens: int | None = _option(
    None, _whole(1), "tokens to add at most; default 20, unless max_length is given"
  )
  max_length: int | None = _option(None, _whole(1), "tokens of prompt and text together, at most")
  min_new_tokens: int = _option(0, _whole(0), "no end token before this many new tokens")
  min_length: int = _option(0, _whole(0), "no end token before prompt and text are this long")
  beyond_context: str = _option(
    "error",
    _one_of("error", "slide"),
    'what to do where the context is full: "error", or "slide" a window over the last tokens',
  )

  # Choosing tokens.
  do_sample: bool = _option(False, _FLAG, "draw tokens; otherwise the likeliest is taken")
  temperature: float = _option(
    1.0,
    _number(0.0, 3.4e38, "a number, 0 (greedy) or larger"),
    "logits are divided by it before a draw; 0 takes the likeliest token",
  )
  top_k: int = _option(0, _whole(0), "draw among this many of the likeliest tokens; 0 is off")
  top_p: float = _option(
    1.0,
    _number(0.0, 1.0, "a probability, 0 to 1 (off)"),
    "draw among the likeliest tokens that together have this probability; 1 is off",
  )
  min_p: float = _option(
    0.0,
    _number(0.0, 1.0, "a probability, 0 (off) to 1"),
    "draw among tokens at least this probable, relative to the likeliest; 0 is off",
  )
  typical_p: float = _option(
    1.0,
    _number(5e-324, 1.0, "a probability, larger than 0, to 1 (off)"),
    "draw among tokens of typical information with this probability together; 1 is off",
  )
  seed: int | None = _option(
    None, _whole(0, 2**32 - 1), "of all draws; default a fresh one, which is reported"
  )

  # Beams.
  num_beams: int = _option(1, _whole(1, 4096), "width of a beam search; 1 is off")
  length_penalty: float = _option(
    1.0, _FINITE, "beams compare log-probability / length ** this; larger prefers longer texts"
  )
  early_stopping: bool | str = _option(
    False,
    _one_of(False, True, "never"),
    "beams stop once num_beams are finished (true), when improvement is unlikely (false), or"
    ' impossible ("never")',
  )
  num_return_sequences: int = _option(1, _whole(1, 65_536), "texts for each prompt")

  # Rules on logits.
  repetition_penalty: float = _option(
    1.0,
    _number(5e-324, 3.4e38, "a number larger than 0"),
    "logits of tokens in prompt or text are divided by it if positive, else multiplied; 1 is off",
  )
  frequency_penalty: float = _option(
    0.0, _FINITE, "taken from a token's logit for each time that it is in the new text; 0 is off"
  )
  presence_penalty: float = _option(
    0.0, _FINITE, "taken from the logit of every token that is in the new text; 0 is off"
  )
  no_repeat_ngram_size: int = _option(
    0, _whole(0), "no run of this many tokens comes twice, prompt included; 0 is off"
  )
  bad_words_ids: tuple[tuple[int, ...], ...] = _option(
    (), _SEQUENCES, "runs of token ids that are never completed"
  )
  bad_words: tuple[str, ...] = _option(
    (), _TEXTS, "texts that are never completed, as the tokenizer spells them"
  )
  logit_bias: tuple[tuple[tuple[int, ...], float], ...] = _option(
    (), _BIAS, "{token id: number added to its logit}; a run of ids biases its last token"
  )
  suppress_tokens: tuple[int, ...] = _option((), _IDS, "token ids that are never chosen")
  begin_suppress_tokens: tuple[int, ...] = _option(
    (), _IDS, "token ids that are not chosen as the first new token (or second, after a forced one)"
  )
  forced_bos_token_id: int | None = _option(None, _whole(0), "token id of the first new token")
  forced_eos_token_id: tuple[int, ...] = _option(
    (), _IDS, "token ids, one of which comes last where the length limit ends a text"
  )
  allowed_tokens: Callable[[int, list[int]], Iterable[int]] | None = _option(
    None,
    _Kind(_to_callable, "a function of (number of the prompt, ids so far) to a list of ids"),
    "a function of (number of the prompt, ids so far) to the ids that may follow",
  )

  # Ends.
  eos_token_id: tuple[int, ...] | None = _option(
    None, _END_IDS, "token ids that end a text; default the model's, -1 is none"
  )
  pad_token_id: int | None = _option(
    None, _whole(0), "token id after a text's end in rows of ids; default the end token"
  )
  stop: tuple[str, ...] = _option((), _TEXTS, "texts that end the new text, and are cut off")

  # Answers and speed.
  top_logprobs: int = _option(
    0, _whole(0), "report this many of the likeliest tokens at each place"
  )
  prompt_lookup_num_tokens: int = _option(
    0, _whole(0), "guess this many tokens at a time from repetitions; 0 is off"
  )
  draft_model: Any = _option(
    None, _Kind(lambda value: value, ""), "a smaller model that guesses tokens", compare=False
  )
  num_draft_tokens: int = _option(5, _whole(1), "tokens that draft_model guesses at a time")
  attention_mask: np.ndarray | None = _option(
    None, _MASK, "rows of 0 (padding, left or right) and 1 for prompts of ids", compare=False
  )

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is field.default:
        continue
      object.__setattr__(self, field.name, _convert(field, value))


# Every name that `parse_options` understands.
OPTION_NAMES = (
  *(field.name for field in dataclasses.fields(DecodingOptions)),
  *ALIASES,
  *FOREIGN_OFF,
)


def _convert(field: dataclasses.Field, value: Any) -> Any:
  if value is None:
    return field.default
  kind = field.metadata["kind"]
  try:
    return kind.convert(value)
  except (TypeError, ValueError, OverflowError):
    raise ConfigError(f"{field.name} is {_show(value)}; it must be {kind.expected}") from None


def _show(value: Any) -> str:
  text = " ".join(repr(value).split())
  return text if len(text) <= 60 else text[:57] + "..."


def parse_options(given: Mapping[str, Any]) -> DecodingOptions:
  """Reads options by name, transformers' names included.

  Args:
    given: {name: value}; None is the default.

  Raises:
    ConfigError: an unknown name (with the nearest one), one option under two names, or a value
      that is not of its option's kind.
  """
  values, names = {}, {}
  for given_name, value in given.items():
    name = ALIASES.get(given_name, given_name)
    if given_name in FOREIGN_OFF:
      _check_foreign(given_name, value)
      continue
    if name not in OPTION_NAMES:
      near = did_you_mean(given_name, OPTION_NAMES)
      raise ConfigError(f'unknown decoding option "{given_name}"{near}')
    if value is None:
      continue
    if name in names:
      raise ConfigError(f"{names[name]} and {given_name} are one option; give one of them")
    names[name], values[name] = given_name, value
  return DecodingOptions(**values)


def _check_foreign(name: str, value: Any) -> None:
  if value is not None and value not in FOREIGN_OFF[name]:
    raise ConfigError(
      f"{name} is {_show(value)}; gptjax does not have this option of transformers; leave it out"
    )


def is_sampled(options: DecodingOptions) -> bool:
  """Says whether tokens are drawn: temperature 0 takes the likeliest."""
  return options.do_sample and options.temperature > 0


def strategy(options: DecodingOptions) -> str:
  """Returns "greedy", "sample", "beams", "beam_sample", "lookup" or "draft"."""
  if options.draft_model is not None:
    return "draft"
  if options.prompt_lookup_num_tokens:
    return "lookup"
  if options.num_beams > 1:
    return "beam_sample" if is_sampled(options) else "beams"
  return "sample" if is_sampled(options) else "greedy"


def end_ids(options: DecodingOptions, model_end_id: int | None) -> tuple[int, ...]:
  """Returns the tokens that end a text: the options', or else the model's, or none."""
  if options.eos_token_id is not None:
    return options.eos_token_id
  return () if model_end_id is None else (model_end_id,)


def encode_bad_words(options: DecodingOptions, tokenizer: Tokenizer | None) -> DecodingOptions:
  """Moves bad_words to bad_words_ids, as the tokenizer spells them with and without a space before.

  Raises:
    ConfigError: there is no tokenizer.
    DataError: a word that the tokenizer cannot spell.
  """
  if not options.bad_words:
    return options
  if tokenizer is None:
    raise ConfigError("bad_words needs a tokenizer, and the model has none; use bad_words_ids")
  spelled = []
  for word in options.bad_words:
    spelled.append(tuple(tokenizer.encode(word)))
    with contextlib.suppress(DataError):  # no space in the vocabulary: no such text
      spelled.append(tuple(tokenizer.encode(" " + word)))
  return dataclasses.replace(
    options, bad_words=(), bad_words_ids=(*options.bad_words_ids, *filter(None, spelled))
  )


def remove_padding(
  rows: Sequence[Sequence[int]], options: DecodingOptions
) -> Sequence[Sequence[int]]:
  """Cuts what attention_mask calls padding, at the left or the right, off rows of ids.

  Raises:
    ConfigError: a mask of another shape, or with padding between tokens.
  """
  mask_BL = options.attention_mask
  if mask_BL is None:
    return rows
  if len(rows) != len(mask_BL) or any(len(row) != mask_BL.shape[1] for row in rows):
    lengths = ", ".join(map(str, sorted({len(row) for row in rows})))
    raise ConfigError(
      f"attention_mask has {mask_BL.shape[0]} rows of {mask_BL.shape[1]}, but there are {len(rows)}"
      f" prompts of {lengths} tokens; they must agree"
    )
  kept = []
  for index, (row, mask_L) in enumerate(zip(rows, mask_BL, strict=True)):
    places = np.flatnonzero(mask_L)
    start, end = (places[0], places[-1] + 1) if len(places) else (0, 0)
    if end - start != len(places):
      raise ConfigError(
        f"attention_mask has zeros between the tokens of row {index};"
        " padding must be at the left or at the right"
      )
    kept.append(row[start:end])
  return kept
