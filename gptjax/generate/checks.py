"""What decoding options may not say together, or of a model and its prompts; and row lengths."""

import dataclasses
import math
from collections.abc import Sequence

from gptjax.errors import ConfigError, TooLongError
from gptjax.generate.options import DEFAULT_NEW_TOKENS, DecodingOptions, is_sampled, strategy
from gptjax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Tokens of prompt and new text together, one entry a prompt.

  Attributes:
    min_lengths: no end token before a row is this long.
    limits: a row that is this long has ended; at least one more than its prompt.
  """

  min_lengths: tuple[int, ...]
  limits: tuple[int, ...]


def resolve_lengths(
  options: DecodingOptions, prompt_lengths: Sequence[int], context_length: int
) -> Lengths:
  """Turns the options on lengths into totals for each prompt.

  Where no length is given, a row ends 20 tokens after its prompt or where the context is full.

  Raises:
    ConfigError: options that contradict each other or a prompt, or exceed the context.
  """
  for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
    if getattr(options, total) and getattr(options, new):
      raise ConfigError(
        f"{total}={getattr(options, total)} counts the prompt and {new}={getattr(options, new)}"
        " does not; give one of them"
      )
  limits = [_limit(options, int(length), context_length) for length in prompt_lengths]
  min_lengths = [
    length + options.min_new_tokens if options.min_new_tokens else options.min_length
    for length in map(int, prompt_lengths)
  ]
  for minimum, limit in zip(min_lengths, limits, strict=True):
    if minimum > limit:
      name = "min_new_tokens" if options.min_new_tokens else "min_length"
      raised = "max_length" if options.max_length else "max_new_tokens"
      raise ConfigError(
        f"{name}={getattr(options, name)} asks for {minimum} tokens with the prompt, but the limit"
        f" is {limit}; lower it, or raise {raised}"
      )
  return Lengths(tuple(min_lengths), tuple(limits))


def _limit(options: DecodingOptions, prompt_length: int, context_length: int) -> int:
  room = math.inf if options.beyond_context == "slide" else context_length
  otherwise = ', or set beyond_context="slide"'
  if options.max_length is not None and options.max_length <= prompt_length:
    raise ConfigError(
      f"max_length is {options.max_length}, but a prompt has {prompt_length} tokens already;"
      " raise it, or use max_new_tokens"
    )
  if prompt_length >= room:
    raise TooLongError(
      f"a prompt has {prompt_length} tokens, and the model's context of {context_length} must hold"
      " it and a new one; shorten it",
      otherwise,
    )
  if options.max_length is not None:
    limit, asked = options.max_length, f"max_length is {options.max_length}, which exceeds"
  elif options.max_new_tokens is not None:
    limit = prompt_length + options.max_new_tokens
    asked = f"a prompt of {prompt_length} tokens and {options.max_new_tokens} new ones exceed"
  else:
    return int(min(prompt_length + DEFAULT_NEW_TOKENS, room))
  if limit > room:
    change = "shorten one of them" if options.max_length is None else "lower it"
    raise TooLongError(f"{asked} the model's context of {context_length}; {change}", otherwise)
  return limit


def check_options(
  options: DecodingOptions,
  config: ModelConfig,
  prompt_lengths: Sequence[int],
  end_ids: Sequence[int] = (),
) -> None:
  """Checks options together, and against the model and the prompts.

  Args:
    options: with bad_words encoded.
    config: for its vocabulary and context.
    prompt_lengths: tokens of each prompt, without padding.
    end_ids: as `end_ids` returns them.

  Raises:
    ConfigError: the first thing that does not fit, and what to change.
  """
  _check_strategy(options)
  _check_effects(options)
  _check_ids(options, config.vocab_size, end_ids)
  if not len(prompt_lengths):
    raise ConfigError("there are no prompts; give at least one")
  if min(prompt_lengths) < 1:
    raise ConfigError("a prompt has no tokens; give it at least one")
  resolve_lengths(options, prompt_lengths, config.context_length)


def _check_strategy(options: DecodingOptions) -> None:
  chosen, beams, texts = strategy(options), options.num_beams, options.num_return_sequences
  if chosen == "draft" and options.prompt_lookup_num_tokens:
    raise ConfigError(
      "draft_model and prompt_lookup_num_tokens both guess tokens; give one of them"
    )
  if chosen in ("draft", "lookup") and beams > 1:
    guesser = "draft_model" if chosen == "draft" else "prompt_lookup_num_tokens"
    raise ConfigError(f"num_beams={beams} cannot be combined with {guesser}; leave one out")
  if chosen in ("draft", "lookup") and options.allowed_tokens is not None:
    raise ConfigError(
      "allowed_tokens is asked before each token, and speculation guesses several; leave"
      " allowed_tokens, or draft_model and prompt_lookup_num_tokens, out"
    )
  if options.beyond_context == "slide" and chosen not in ("greedy", "sample"):
    raise ConfigError(
      'beyond_context="slide" works with greedy search and sampling only; leave it out, or'
      " num_beams, draft_model and prompt_lookup_num_tokens"
    )
  if beams > 1 and texts > beams:
    raise ConfigError(
      f"num_return_sequences={texts} is more than num_beams={beams}; a search has no more texts"
      " than beams, so raise num_beams"
    )
  if beams == 1 and texts > 1 and not is_sampled(options):
    raise ConfigError(
      f"num_return_sequences={texts} would give the same greedy text {texts} times; add"
      " do_sample=True at a temperature above 0, or num_beams"
    )


def _check_effects(options: DecodingOptions) -> None:
  without_effect = {}
  if not is_sampled(options):
    reason = (
      "at temperature 0, which takes the likeliest token; raise the temperature"
      if options.do_sample
      else "without sampling; add do_sample=True"
    )
    without_effect |= dict.fromkeys(("top_k", "top_p", "min_p", "typical_p"), reason)
    if options.temperature > 0:
      without_effect["temperature"] = reason
  if options.num_beams == 1:
    reason = "without beams; add num_beams"
    without_effect |= dict.fromkeys(("length_penalty", "early_stopping"), reason)
  if options.draft_model is None:
    without_effect["num_draft_tokens"] = "without a draft_model; add it"
  for field in dataclasses.fields(options):
    if field.name in without_effect and getattr(options, field.name) != field.default:
      value = getattr(options, field.name)
      raise ConfigError(
        f"{field.name}={value!r} has no effect {without_effect[field.name]},"
        f" or leave {field.name} out"
      )


def _check_ids(options: DecodingOptions, vocab_size: int, end_ids: Sequence[int]) -> None:
  ids_of = {
    "eos_token_id": options.eos_token_id or (),
    "pad_token_id": [id for id in [options.pad_token_id] if id is not None],
    "forced_bos_token_id": [id for id in [options.forced_bos_token_id] if id is not None],
    "forced_eos_token_id": options.forced_eos_token_id,
    "suppress_tokens": options.suppress_tokens,
    "begin_suppress_tokens": options.begin_suppress_tokens,
    "bad_words_ids": [id for word in options.bad_words_ids for id in word],
    "logit_bias": [id for ids, _ in options.logit_bias for id in ids],
  }
  for name, ids in ids_of.items():
    if max(ids, default=0) >= vocab_size:
      raise ConfigError(
        f"{name} has the token {max(ids)}, but the model's are 0 to {vocab_size - 1}; correct it"
      )
  suppressed = set(options.suppress_tokens)
  for name in ("forced_bos_token_id", "forced_eos_token_id"):
    if ids_of[name] and suppressed.issuperset(ids_of[name]):
      raise ConfigError(f"{name} forces what suppress_tokens suppresses; correct one of them")
  for name in ("suppress_tokens", "begin_suppress_tokens"):
    if len(suppressed.union(ids_of[name])) == vocab_size:
      raise ConfigError(f"{name} leaves no token of the vocabulary; allow at least one")
  if banned := [id for id in end_ids if (id,) in options.bad_words_ids]:
    raise ConfigError(
      f"bad_words_ids has the end token {banned[0]} alone; to put off the end use min_new_tokens,"
      " and to have none eos_token_id=-1"
    )
