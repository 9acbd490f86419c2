"""Generator: prompts and options in, texts out. Prepares weights once and picks the programs."""

import collections
import dataclasses
import functools
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import ConfigError
from gptjax.generate import programs, sampling
from gptjax.generate.answer import REASONS, Generation, make_generation
from gptjax.generate.beams import BeamPlan, make_ranking
from gptjax.generate.beams import Texts as BeamTexts
from gptjax.generate.candidates import Sampling, make_sampling
from gptjax.generate.checks import Lengths, check_options, resolve_lengths
from gptjax.generate.constraint import Constraint, make_constraint
from gptjax.generate.finished import FinishedRows
from gptjax.generate.kernels import prepare
from gptjax.generate.options import (
  DecodingOptions,
  encode_bad_words,
  is_sampled,
  remove_padding,
  strategy,
)
from gptjax.generate.prompts import check_ids, encode_prompts
from gptjax.generate.rules import make_rules, pad_lists
from gptjax.generate.sampling import Controls, Texts
from gptjax.generate.speculation import Draft
from gptjax.generate.stopping import Stops, StopStrings
from gptjax.generate.writer import Writer
from gptjax.model.config import ModelConfig

PyTree = Any

# True float32 on every device.
_exact = functools.partial(jax.default_matmul_precision, "highest")


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a streamed text: what one more token completed.

  Attributes:
    text: whole characters, maybe none.
    token, logprob: the token and what the model thought of it; None where text was held back.
    finish_reason: of the last piece, else None.
  """

  text: str
  token: int | None = None
  logprob: float | None = None
  finish_reason: str | None = None


class Generator:
  """A model that generates.

  Args:
    params: the whole tree; it may be let go afterwards.
    config: the architecture.
    tokenizer: None takes and gives ids only.
    end_ids: tokens that end a text where options do not say.
    pad_id: fills rows of ids after their end; None is the first end token, or 0.
    weights: "float32" (as the parameters are) or "int8".
  """

  def __init__(
    self,
    params: PyTree,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    *,
    end_ids: Sequence[int] = (),
    pad_id: int | None = None,
    weights: str = "float32",
  ):
    self.config = config
    self.tokenizer = tokenizer
    self.weights = prepare(params, config, weights)
    self.end_ids = tuple(end_ids)
    self._pad_id = pad_id

  def generate(self, prompts: Any, options: DecodingOptions) -> Generation:
    """Continues prompts.

    Args:
      prompts: a text, texts, ids of one prompt, or ids of several (rows of any lengths).
      options: how; defaults are greedy with 20 new tokens.

    Raises:
      UserError: options that do not fit, an empty prompt, one longer than the context, ids outside
        the vocabulary, or text without a tokenizer.
    """
    ids, options, lengths = self.read(prompts, options)
    seed = draw_seed(options)
    run = {
      "beams": self._search_beams,
      "beam_sample": self._search_beams,
      "lookup": self._speculate,
      "draft": self._speculate,
    }.get(strategy(options), self._sample)
    with _exact():
      rows = run(ids, options, lengths, seed)
    wanted = (options.pad_token_id, self._pad_id, *options.eos_token_id, 0)
    padding = next(token for token in wanted if token is not None)
    return make_generation(ids, rows, options, seed, self.tokenizer, padding)

  def stream(self, prompt: Any, options: DecodingOptions) -> Iterator[Piece]:
    """Continues one prompt, a token at a time; pieces joined are the text of `generate`.

    Raises:
      UserError: as `generate`, and for strategies that know no text before their end.
    """
    ids, options, lengths = self.read(prompt, options)
    if strategy(options) in ("lookup", "draft"):
      raise ConfigError(
        "streaming gives a token at a time, and speculation several; leave draft_model and"
        " prompt_lookup_num_tokens out"
      )
    if len(ids) > 1 or options.num_return_sequences > 1 or options.num_beams > 1:
      raise ConfigError("streaming gives one text of one prompt, without beams; leave them out")
    if options.beyond_context == "slide":
      raise ConfigError('streaming ends with the context; leave beyond_context="slide" out')
    return self._stream(ids, options, lengths)

  def _stream(self, ids, options: DecodingOptions, lengths: Lengths) -> Iterator[Piece]:
    seed = draw_seed(options)
    writer = Writer(self.tokenizer, options.stop, ids[0])
    for texts in self._steps(*self._set_up(ids, options, lengths, seed)):
      length, finish = int(texts.length_R[0]), int(texts.finish_R[0])
      token = int(texts.tokens_RS[0, length - 1])
      logprob = float(texts.logprobs_RS[0, length - 1])
      text = writer.step(
        token, is_last=finish != sampling.RUNNING, is_end=finish == sampling.END_TOKEN
      )
      reason = None if finish == sampling.RUNNING else REASONS[finish]
      yield Piece(text, token, logprob, reason)

  def read(self, prompts: Any, options: DecodingOptions):
    """Checks what was given; returns (ids of each prompt, options all looked up, lengths)."""
    ids = encode_prompts(prompts, self.tokenizer)
    if options.attention_mask is not None:
      ids = remove_padding(ids, options)
    if options.eos_token_id is None:
      options = dataclasses.replace(options, eos_token_id=self.end_ids)
    options = encode_bad_words(options, self.tokenizer)
    prompt_lengths = [len(row) for row in ids]
    check_options(options, self.config, prompt_lengths, options.eos_token_id)
    check_ids(ids, self.config.vocab_size)
    if options.top_logprobs > self.config.vocab_size:
      raise ConfigError(
        f"top_logprobs is {options.top_logprobs}, more than the vocabulary's"
        f" {self.config.vocab_size}; lower it"
      )
    return ids, options, resolve_lengths(options, prompt_lengths, self.config.context_length)

  def _set_up(
    self, ids, options, lengths: Lengths, seed: int, first_prompt: int = 0
  ) -> tuple[np.ndarray, Texts, Controls, Constraint | None]:
    """Makes what the programs of greedy search and sampling take, and what constrains them.

    Args:
      first_prompt: number of the first of the prompts.
    """
    copies = options.num_return_sequences
    num_rows = len(ids) * copies
    prompts_PL = self._pad(ids)
    limit_R = np.repeat(np.asarray(lengths.limits, np.int32), copies)
    num_slots = programs.bucket(int(limit_R.max()), self.config.context_length)
    tokens_RS = np.zeros((num_rows, max(num_slots, prompts_PL.shape[1])), np.int32)
    tokens_RS[:, : prompts_PL.shape[1]] = np.repeat(prompts_PL, copies, axis=0)
    prompt_R = np.repeat(np.arange(len(ids)), copies)
    stops, stop_state_RZ = self._stops(options, prompt_R, ids)
    texts = sampling.new_texts(
      tokens_RS,
      np.repeat(np.array([len(row) for row in ids], np.int32), copies),
      limit_R,
      _row_keys(seed, len(ids), copies),
      stop_state_RZ,
      options.top_logprobs,
    )
    controls = Controls(
      rules=make_rules(
        [options] * num_rows,
        model_end_id=None,
        min_length_R=np.repeat(lengths.min_lengths, copies),
        limit_R=limit_R,
      ),
      sampling=self._sampling(options, num_rows),
      end_RE=pad_lists([options.eos_token_id] * num_rows),
      stops=stops,
    )
    constraint = make_constraint(options, first_prompt + prompt_R, self.config.vocab_size)
    return prompts_PL, texts, controls, constraint

  def _sample(self, ids, options, lengths: Lengths, seed: int) -> FinishedRows:
    if max(lengths.limits) > self.config.context_length:
      return self._slide(ids, options, lengths, seed)
    return FinishedRows.of(jax.device_get(self._run(*self._set_up(ids, options, lengths, seed))))

  def _run(
    self, prompts_PL: np.ndarray, texts: Texts, controls: Controls, constraint: Constraint | None
  ) -> Texts:
    if constraint is None:
      return programs.sample(self.weights, prompts_PL, texts, controls, self.config)
    [last] = collections.deque(self._steps(prompts_PL, texts, controls, constraint), maxlen=1)
    return last

  def _steps(
    self, prompts_PL: np.ndarray, texts: Texts, controls: Controls, constraint: Constraint | None
  ) -> Iterator[Texts]:
    """Yields the rows after each token, until all have ended."""

    def constrain() -> Controls:
      if constraint is None:
        return controls
      tokens_RS, length_R, finish_R = map(
        np.asarray, (texts.tokens_RS, texts.length_R, texts.finish_R)
      )
      return constraint.apply(controls, tokens_RS, length_R, finish_R == sampling.RUNNING)

    # The precision is set call by call: between two tokens of a stream the caller has its own.
    with _exact():
      texts, cache = programs.start(self.weights, prompts_PL, texts, constrain(), self.config)
    yield texts
    while (np.asarray(texts.finish_R) == sampling.RUNNING).any():
      with _exact():
        texts, cache = programs.step(self.weights, texts, cache, constrain(), self.config)
      yield texts

  def _speculate(self, ids, options, lengths: Lengths, seed: int) -> FinishedRows:
    draft = None
    if options.draft_model is not None:
      draft = self._check_draft(options.draft_model, max(lengths.limits))
    prompts_PL, texts, controls, _ = self._set_up(ids, options, lengths, seed)
    texts, num_rounds_R = programs.speculate(
      self.weights,
      prompts_PL,
      texts,
      controls,
      draft,
      options.prompt_lookup_num_tokens if draft is None else options.num_draft_tokens,
      self.config,
    )
    return dataclasses.replace(
      FinishedRows.of(jax.device_get(texts)), num_rounds_R=jax.device_get(num_rounds_R)
    )

  def _check_draft(self, draft: Any, longest: int) -> Draft:
    if not isinstance(draft, Generator):
      raise ConfigError(f"draft_model is a {type(draft).__name__}; give a model, or its Generator")
    ours, its = self.config, draft.config
    if its.vocab_size != ours.vocab_size:
      raise ConfigError(
        f"draft_model has {its.vocab_size} tokens and the model {ours.vocab_size}; take a draft"
        " with the tokenizer of the model"
      )
    if longest > its.context_length:
      raise ConfigError(
        f"draft_model has a context of {its.context_length}, and a text may grow to {longest}"
        " tokens; lower max_new_tokens, or take another draft"
      )
    return Draft(draft.weights, its)

  def _search_beams(self, ids, options, lengths: Lengths, seed: int) -> FinishedRows:
    num_prompts, num_beams = len(ids), options.num_beams
    num_rows = num_prompts * num_beams
    prompts_BL = self._pad(ids)
    prompt_length_B = np.array([len(row) for row in ids], np.int32)
    max_new_B = np.asarray(lengths.limits, np.int32) - prompt_length_B
    stops, stop_state_BZ = self._stops(options, np.arange(num_prompts), ids)
    controls = Controls(
      rules=make_rules(
        [options] * num_rows,
        model_end_id=None,
        min_length_R=np.repeat(lengths.min_lengths, num_beams),
        limit_R=np.repeat(lengths.limits, num_beams),
        num_beams=num_beams,
      ),
      sampling=self._sampling(options, num_rows),
      end_RE=pad_lists([options.eos_token_id] * num_prompts),
      stops=stops,
    )
    task = programs.BeamTask(
      prompt_length_B,
      max_new_B,
      make_ranking(options.length_penalty, options.early_stopping),
      controls,
      _prompt_keys(seed, num_prompts),
    )
    plan = BeamPlan(num_beams, len(options.eos_token_id), is_sampled(options))
    num_new_slots = programs.bucket(int(max_new_B.max()))
    constraint = make_constraint(
      options, np.repeat(np.arange(num_prompts), num_beams), self.config.vocab_size
    )
    beams = jax.device_get(
      self._run_beams(prompts_BL, stop_state_BZ, task, plan, num_new_slots, constraint)
    )
    wanted = options.num_return_sequences

    def rows(array_BW):
      return array_BW[:, :wanted].reshape(num_prompts * wanted, *array_BW.shape[2:])

    found = FinishedRows(
      tokens_RS=rows(beams.tokens_BWS),
      prompt_length_R=np.repeat(prompt_length_B, wanted),
      length_R=rows(beams.length_BW),
      finish_R=rows(beams.finish_BW),
      logprobs_RS=rows(beams.log_probs_BWS),
      scores_R=rows(beams.score_BW),
    )
    if not options.top_logprobs:
      return found
    alternatives = programs.find_alternatives(
      self.weights, found.tokens_RS, options.top_logprobs, self.config
    )
    return dataclasses.replace(found, alternatives=jax.device_get(alternatives))

  def _run_beams(
    self, prompts_BL: np.ndarray, stop_state_BZ, task, plan, num_new_slots: int, constraint
  ) -> BeamTexts:
    if constraint is None:
      return programs.search_beams(
        self.weights, prompts_BL, stop_state_BZ, task, plan, num_new_slots, self.config
      )

    def constrain(tokens_BWS, length_BW, is_done_B) -> programs.BeamTask:
      tokens_RS = np.asarray(tokens_BWS).reshape(-1, tokens_BWS.shape[-1])
      is_running_R = np.repeat(~np.asarray(is_done_B), plan.num_beams)
      length_R = np.asarray(length_BW).reshape(-1)
      return task.replace(
        controls=constraint.apply(task.controls, tokens_RS, length_R, is_running_R)
      )

    def copies(array):
      return np.repeat(array[:, None], plan.num_beams, axis=1)

    first = constrain(
      copies(prompts_BL), copies(task.prompt_length_B), np.zeros(len(prompts_BL), bool)
    )
    state, tree = programs.start_beams(
      self.weights, prompts_BL, stop_state_BZ, first, plan, num_new_slots, self.config
    )
    while not np.asarray(state.is_done_B).all():
      running = state.running
      state, tree = programs.step_beams(
        self.weights,
        state,
        tree,
        constrain(running.tokens_BWS, running.length_BW, state.is_done_B),
        prompts_BL.shape[1],
        plan,
        self.config,
      )
    return state.finished

  def _slide(self, ids, options, lengths: Lengths, seed: int) -> FinishedRows:
    """Generates beyond the context: whenever it is full, the last half of it is kept.

    Rules on earlier tokens see the window; penalties count what is new in it.

    Each row goes by itself, since rows of unlike lengths slide at unlike places.
    """
    num_rows = len(ids) * options.num_return_sequences
    return FinishedRows.stack(
      [self._slide_one(ids, index, options, lengths, seed) for index in range(num_rows)]
    )

  def _slide_one(self, ids, index: int, options, lengths: Lengths, seed: int) -> FinishedRows:
    context, prompt = self.config.context_length, index // options.num_return_sequences
    if context < 2:
      raise ConfigError("a model with a context of 1 token has no window to slide")
    key_R = _row_keys(seed, len(ids), options.num_return_sequences)[index : index + 1]
    limit, min_length = lengths.limits[prompt], lengths.min_lengths[prompt]
    single = dataclasses.replace(options, num_return_sequences=1)
    whole, total, stop_state = FinishedRows.start(ids[prompt]), len(ids[prompt]), None
    while total < limit:
      window = whole.tokens_RS[0, max(0, total - (context if total < context else context // 2)) :]
      offset = total - len(window)
      part = Lengths((max(0, min_length - offset),), (min(limit - offset, context),))
      here = _within_text(single, is_first=offset == 0, is_last=offset + part.limits[0] == limit)
      prompts_PL, texts, controls, constraint = self._set_up(
        [window.tolist()], here, part, seed, prompt
      )
      stop_state = texts.stop_state_RZ if stop_state is None else stop_state
      keys = key_R if offset == 0 else jax.vmap(jax.random.fold_in, (0, None))(key_R, total)
      texts = texts.replace(keys_R=keys, stop_state_RZ=stop_state)
      texts = self._run(prompts_PL, texts, controls, constraint)
      stop_state = texts.stop_state_RZ
      whole = whole.join(FinishedRows.of(jax.device_get(texts)))
      total = int(whole.length_R[0])
      if whole.finish_R[0] != sampling.LENGTH:
        break
    return whole

  def _stops(
    self, options: DecodingOptions, prompt_R: np.ndarray, ids: list[list[int]]
  ) -> tuple[Stops | None, np.ndarray | None]:
    """Returns (automata of the stop texts, their states after the prompts)."""
    if not options.stop:
      return None, None
    if self.tokenizer is None:
      raise ConfigError("stop needs a tokenizer, and the model has none; use eos_token_id")
    return self.stop_strings.make([options.stop] * len(prompt_R), [ids[i] for i in prompt_R])

  @functools.cached_property
  def stop_strings(self) -> StopStrings:
    """Makes stop texts; needs the tokenizer."""
    return StopStrings(self.tokenizer, self.config.vocab_size)

  def _sampling(self, options: DecodingOptions, num_rows: int) -> Sampling | None:
    if not is_sampled(options):
      return None
    return make_sampling(
      self.config.vocab_size,
      [options.temperature] * num_rows,
      [options.top_k] * num_rows,
      [options.top_p] * num_rows,
      [options.min_p] * num_rows,
      [options.typical_p] * num_rows,
    )

  def _pad(self, ids: list[list[int]]) -> np.ndarray:
    """Returns int32 [P, L], padded on the right to a bucket."""
    length = programs.bucket(max(map(len, ids)), self.config.context_length)
    padded = np.zeros((len(ids), length), np.int32)
    for line, row in zip(padded, ids):
      line[: len(row)] = row
    return padded


def draw_seed(options: DecodingOptions) -> np.uint32:
  """Returns the options' seed, or a fresh one."""
  return np.uint32(secrets.randbits(32) if options.seed is None else options.seed)


def _within_text(options: DecodingOptions, *, is_first: bool, is_last: bool) -> DecodingOptions:
  """Leaves out, for a window of a text, what belongs to the text's beginning or end."""
  if not is_first:
    options = dataclasses.replace(options, forced_bos_token_id=None, begin_suppress_tokens=())
  return options if is_last else dataclasses.replace(options, forced_eos_token_id=())


@functools.partial(jax.jit, static_argnums=(1, 2))
def _row_keys(seed: int, num_prompts: int, copies: int) -> jax.Array:
  """A stream for each row, by its prompt's place and its own among the prompt's."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys_B = fold(jax.random.key(seed), np.arange(num_prompts))
  return jax.vmap(lambda key: fold(key, np.arange(copies)))(keys_B).reshape(-1)


@functools.partial(jax.jit, static_argnums=1)
def _prompt_keys(seed: int, num_prompts: int) -> jax.Array:
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(num_prompts))
