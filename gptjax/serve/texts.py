"""From a checked request to texts: on the slots of the engine, or between its steps, whole.

Choices are what the client asked for: n of each prompt. Where they are drawn, each is a text of its
own; where they are not, one text serves all of a prompt.
"""

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

from gptjax.generate.answer import Generation
from gptjax.generate.generator import draw_seed
from gptjax.generate.options import DecodingOptions, is_sampled, parse_options, strategy
from gptjax.generate.slots import Prompt, Read
from gptjax.serve.engine import Engine, Event
from gptjax.serve.failures import ApiError
from gptjax.serve.schemas import Decoding, Generating


@dataclasses.dataclass(frozen=True)
class Token:
  """A token of a choice, or of its prompt.

  Attributes:
    id: of the vocabulary.
    logprob: under the model alone; None of a prompt's first token.
    alternatives: (id, logprob), best first.
  """

  id: int
  logprob: float | None
  alternatives: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Piece:
  """What is new of a choice.

  Attributes:
    choice: its number.
    text: whole characters.
    tokens: new ones, an end token included.
    finish_reason: "stop" or "length" of the last piece, else None.
    prompt: tokens of the prompt where they are scored, and come with this piece.
  """

  choice: int
  text: str = ""
  tokens: Sequence[Token] = ()
  finish_reason: str | None = None
  prompt: Sequence[Token] = ()


@dataclasses.dataclass
class Job:
  """A request that was found good.

  Attributes:
    engine: what makes its texts.
    prompts: checked, or of a strategy that slots do not have, not yet.
    options: of all of them; num_return_sequences counts the texts that are drawn of a prompt.
    n: choices of each prompt.
    num_new: tokens of all choices so far, and of those that `best_of` draws beside them.
  """

  engine: Engine
  prompts: list[Prompt]
  options: DecodingOptions
  n: int
  num_new: int = 0

  @property
  def seed(self) -> int | None:
    """Of the draws; None where nothing is drawn."""
    return self.options.seed if is_sampled(self.options) else None

  @property
  def num_prompt(self) -> int:
    """Tokens of all prompts."""
    return sum(len(prompt.ids) for prompt in self.prompts)

  async def pieces(self) -> AsyncIterator[list[Piece]]:
    """Yields pieces as they come; those of one choice are in order.

    Raises:
      ApiError: as `Call.events` and `Engine.submit`.
    """
    if not _runs_on_slots(self.options):
      for index in range(len(self.prompts)):
        yield await self._make_whole(index)
      return
    call = self.engine.submit(self.prompts)
    if self.options.num_return_sequences > self.n:
      yield await self._choose_best(call.events())
      return
    async for events in call.events():
      pieces = [piece for event in events for piece in self._pieces_of(event)]
      self.num_new += sum(len(piece.tokens) for piece in pieces)
      yield _join(pieces)

  async def all_pieces(self) -> list[Piece]:
    """Returns the whole of every choice, in order; see `pieces`."""
    found = [piece async for pieces in self.pieces() for piece in pieces]
    return sorted(_join(found), key=lambda piece: piece.choice)

  def _pieces_of(self, event: Event) -> list[Piece]:
    start = event.prompt * self.n
    if isinstance(event.news, Read):
      reason = "length" if event.news.is_last else None
      piece = Piece(start, prompt=self._prompt_tokens(event), finish_reason=reason)
      if not (piece.prompt or reason):
        return []
      return [dataclasses.replace(piece, choice=start + i) for i in range(self.n)]
    is_shared = self.options.num_return_sequences < self.n
    choices = range(self.n) if is_shared else [event.text]
    tokens = [Token(event.news.token, event.news.logprob, event.news.alternatives)]
    return [
      Piece(start + choice, event.news.text, tokens, event.news.finish_reason) for choice in choices
    ]

  def _prompt_tokens(self, event: Event) -> list[Token]:
    """Returns the tokens of a prompt that wanted scores, else none."""
    prompt = self.prompts[event.prompt]
    if prompt.wants != "scores":
      return []
    logprobs, alternatives = [None, *event.news.logprobs], [[], *event.news.alternatives]
    return [Token(*token) for token in zip(prompt.ids, logprobs, alternatives, strict=True)]

  async def _choose_best(self, batches: AsyncIterator[list[Event]]) -> list[Piece]:
    """Waits for all texts, and keeps n of each prompt: those of the likeliest tokens on average."""
    texts: dict[tuple[int, int], Piece] = {}
    prompts: dict[int, Sequence[Token]] = {}
    async for events in batches:
      for event in events:
        key, news = (event.prompt, event.text), event.news
        if isinstance(news, Read):
          prompts[event.prompt] = self._prompt_tokens(event)
          continue
        self.num_new += 1
        tokens = [Token(news.token, news.logprob, news.alternatives)]
        new = Piece(0, news.text, tokens, news.finish_reason)
        texts[key] = _add(texts[key], new) if key in texts else new

    def mean(text: int, prompt: int) -> float:
      logprobs = [token.logprob for token in texts[prompt, text].tokens]
      return math.fsum(logprobs) / len(logprobs)

    best = []
    for index in range(len(self.prompts)):
      order = sorted(range(self.options.num_return_sequences), key=lambda t: -mean(t, index))
      best += [
        dataclasses.replace(
          texts[index, text], choice=index * self.n + rank, prompt=prompts.get(index, ())
        )
        for rank, text in enumerate(order[: self.n])
      ]
    return best

  async def _make_whole(self, index: int) -> list[Piece]:
    """Makes all texts of a prompt in one go, while the slots wait."""
    generator, ids, options = self.engine.generator, self.prompts[index].ids, self.options
    if options.seed is not None:
      options = dataclasses.replace(options, seed=(options.seed + index) % 2**32)
    out = await self.engine.run(lambda: generator.generate([ids], options))
    self.engine.metrics.new_tokens.inc(int(out.num_new.sum()))
    rows = [_row(out, row) for row in range(options.num_return_sequences)]
    rows *= self.n // len(rows)
    self.num_new += sum(len(row.tokens) for row in rows)
    return [dataclasses.replace(row, choice=index * self.n + i) for i, row in enumerate(rows)]


async def make_job(
  engine: Engine,
  prompts: Sequence[Any],
  body: Generating,
  *,
  max_tokens: int | None,
  top_logprobs: int,
  best_of: int | None = None,
  is_scored: bool = False,
) -> Job:
  """Checks a request for texts.

  Args:
    engine: what is to make them.
    prompts: texts or ids.
    body: the rest of the request.
    max_tokens: new tokens at most; 0 only reads the prompts, None leaves it to `max_length`.
    top_logprobs: alternatives of each token.
    best_of: texts to draw of each prompt, of which the best n are kept.
    is_scored: what the model thinks of the prompts is wanted.

  Raises:
    UserError, ApiError: a request that does not fit the model, or itself.
  """
  n = body.n or 1
  count = n if best_of is None else best_of
  if count < n:
    raise ApiError(400, f"best_of is {count}, fewer than n, {n}; raise it", param="best_of")
  lengths = {"max_new_tokens": max_tokens or None, "top_logprobs": top_logprobs}
  options = parse_options(_decoding_values(body) | lengths)
  is_drawn = is_sampled(options)
  if is_drawn and options.seed is None:
    options = dataclasses.replace(options, seed=int(draw_seed(options)))
  if (is_drawn or options.num_beams > 1) and max_tokens != 0:
    options = dataclasses.replace(options, num_return_sequences=count)
  if _runs_on_slots(options):
    wants = "scores" if is_scored else ""
    checked = await engine.check(prompts, options, wants=wants, is_continued=max_tokens != 0)
    return Job(engine, checked, options, n)
  if is_scored or count > n or max_tokens == 0:
    name = "best_of" if count > n else "logprobs with echo"
    raise ApiError(
      400, f"{name} goes with greedy search and sampling, not with beams or speculation"
    )
  ids, options, _ = await asyncio.to_thread(engine.generator.read, list(prompts), options)
  return Job(engine, [Prompt(row, options, 0, 0) for row in ids], options, n)


def _runs_on_slots(options: DecodingOptions) -> bool:
  return strategy(options) in ("greedy", "sample")


def _decoding_values(body: Generating) -> dict[str, Any]:
  """Returns the decoding options of a request, by gptjax's names and OpenAI's defaults."""
  given = ((name, getattr(body, name)) for name in Decoding.model_fields)
  values = {name: value for name, value in given if value is not None}
  if "do_sample" not in values:
    values["do_sample"] = values.get("num_beams", 1) == 1 and values.get("temperature") != 0
  if values.get("temperature") == 0:
    # As with OpenAI: the likeliest token is in every nucleus.
    values.pop("top_p", None)
  return values


def _row(out: Generation, row: int) -> Piece:
  """Returns a text that was made whole, as one piece."""
  count, start = int(out.num_new[row]), len(out.prompts[0])
  tokens = []
  for place in range(count):
    pairs = []
    if out.top_tokens is not None:
      ids, logprobs = out.top_tokens[row, place].tolist(), out.top_logprobs[row, place].tolist()
      pairs = list(zip(ids, logprobs))
    logprob = float(out.logprobs[row, place])
    tokens.append(Token(int(out.tokens[row, start + place]), logprob, pairs))
  text = "" if out.texts is None else out.texts[row]
  return Piece(0, text, tokens, out.finish_reasons[row])


def _join(pieces: Sequence[Piece]) -> list[Piece]:
  """Joins the pieces of each choice, which are in order."""
  joined: dict[int, Piece] = {}
  for piece in pieces:
    old = joined.get(piece.choice)
    joined[piece.choice] = piece if old is None else _add(old, piece)
  return list(joined.values())


def _add(old: Piece, new: Piece) -> Piece:
  return Piece(
    new.choice,
    old.text + new.text,
    [*old.tokens, *new.tokens],
    new.finish_reason,
    [*old.prompt, *new.prompt],
  )
