"""The TAB editor: the page, and what the page asks of the model.

A request says all that it needs, and a session is only a cache: what the model has read of one
page's text, kept so that the next request is quick. A session that was let go costs time, never
another answer. Texts come as browsers count them, places as UTF-16 units.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from gptjax.generate.continuations import READ_AT_ONCE, Continuation, Continuations, NextToken
from gptjax.generate.generator import Generator
from gptjax.generate.options import DecodingOptions, parse_options
from gptjax.serve.connection import while_connected
from gptjax.serve.editor_text import (
  MAX_ROOM,
  Prompt,
  count_units,
  joins_spaces,
  make_prompt,
  place_values,
  room,
)
from gptjax.serve.failures import ApiError, failures
from gptjax.serve.schemas import Probability, Strict, Whole
from gptjax.serve.served import Served

Result = TypeVar("Result")

MAX_CHARACTERS = 2**17
# All are decoded, however many are shown: few rows cost what eight do.
MAX_CONTINUATIONS = 8
MAX_SESSIONS = 32
MAX_BYTES = 2 << 30
SESSION_SECONDS = 900
_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
  "Content-Security-Policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
  ),
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
  "Referrer-Policy": "no-referrer",
  "X-Content-Type-Options": "nosniff",
  "Cache-Control": "no-cache",
}


class Place(Strict):
  """A place in a text."""

  session: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{8,64}$", description="chosen by the page")]
  text: Annotated[str, Field(max_length=MAX_CHARACTERS, description="before the cursor")]


class ContinuationsRequest(Place):
  """A request for continuations; with a larger num_tokens, for the same ones, longer."""

  count: Annotated[int, Field(ge=1, le=MAX_CONTINUATIONS)] = 5
  num_tokens: Annotated[int, Field(ge=1, le=MAX_ROOM)] = 6


class InsightRequest(Place):
  """A request to look at a text with the model's eyes."""

  after: Annotated[str, Field(max_length=MAX_CHARACTERS, description="what follows the cursor")] = (
    ""
  )
  count: Annotated[int, Field(ge=1, le=64, description="next tokens")] = 12
  temperature: Annotated[float, Field(ge=0)] = 1.0
  top_k: Whole = 0
  top_p: Probability = 1.0
  min_p: Probability = 0.0
  typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class Reading(BaseModel):
  """What the model read of a text."""

  left_out: int = Field(description="UTF-16 units at the beginning that are beyond the context")
  num_tokens: int = Field(description="tokens before the cursor")
  num_run: int = Field(description="those that had to be run; the others were known")


class Choice(BaseModel):
  """One way to go on."""

  probability: float = Field(description="of the first token")
  pieces: list[str] = Field(description="the characters that each token completes, maybe none")
  logprobs: list[float] = Field(description="of each token, in nats, an end token included")
  is_end: bool = Field(description="the model ends the text here")


class Choices(Reading):
  """Ways to go on, which differ in their first tokens, the likeliest first."""

  choices: list[Choice]


class Surprise(BaseModel):
  """A token of the text, or several that share a character."""

  start: int
  end: int
  nats: float | None = Field(description="-log p; null for the first token")


class Next(BaseModel):
  """A token that may follow."""

  text: str = Field(description='empty for a part of a character, and for an "is_end"')
  probability: float
  is_cut: bool = Field(description="by temperature 0, top_k, top_p, min_p or typical_p")
  is_end: bool


class Insight(Reading):
  """A text with the model's eyes."""

  surprise: list[Surprise] | None = Field(
    description="of what was read of text + after, whose places these are; null where the tokenizer"
    " cannot say where its tokens stand"
  )
  next_tokens: list[Next]


class EditedModel(BaseModel):
  """The model that the editor writes with."""

  name: str
  context_length: int
  has_tokenizer: bool
  joins_spaces: bool = Field(description="a token may begin with the space before its word")
  max_new_tokens: int = Field(description="of a continuation, where the text fills the context")
  max_characters: int = Field(description="of a text that is sent")


class Sessions:
  """What the model remembers of each page's text; the longest unused are let go.

  Only the device thread may call it.
  """

  def __init__(self, generator: Generator, clock: Callable[[], float] = time.monotonic):
    self._generator, self._clock = generator, clock
    self._kept: OrderedDict[str, tuple[float, Continuations]] = OrderedDict()

  def __len__(self) -> int:
    return len(self._kept)

  def use(self, name: str, function: Callable[[Continuations], Result]) -> Result:
    """Calls a function with a session, and lets go of it if that fails."""
    self.sweep()
    _, tab = self._kept.pop(name, (None, None))
    tab = Continuations(self._generator) if tab is None else tab
    result = function(tab)
    self._kept[name] = self._clock(), tab
    self.sweep()
    return result

  def sweep(self) -> None:
    """Lets go of those that are too many, too large together, or too old."""
    while self._kept:
      used, _ = next(iter(self._kept.values()))
      size = sum(tab.num_bytes for _, tab in self._kept.values())
      is_full = len(self._kept) > MAX_SESSIONS or (size > MAX_BYTES and len(self._kept) > 1)
      if not is_full and used > self._clock() - SESSION_SECONDS:
        return
      self._kept.popitem(last=False)


def warm_up(generator: Generator, report: Callable[[str], None]) -> None:
  """Compiles what the first key presses need; on the device thread."""
  if generator.tokenizer is None:
    return
  report("compiling for the editor")
  tab, limit = Continuations(generator), generator.config.context_length
  tab.open([0] * min(sum(READ_AT_ONCE), limit - 1))
  tab.options(min(MAX_CONTINUATIONS, generator.config.vocab_size), 2)
  # As the page has them at first.
  tab.next_tokens(1, DecodingOptions(temperature=0.8, top_k=50, top_p=0.95))
  tab.surprise()


def make_pages() -> APIRouter:
  """Makes the routes of the page and its files; nothing on it comes from elsewhere."""
  router = APIRouter(include_in_schema=False)

  def add(route: str, file: Path) -> None:
    router.add_api_route(route, lambda: FileResponse(file, headers=_PAGE_HEADERS), methods=["GET"])

  add("/", _PAGE / "index.html")
  for file in sorted(_PAGE.iterdir()):
    add(f"/page/{file.name}", file)
  return router


def make_editor(served: Served) -> APIRouter:
  """Makes the routes that the page asks."""
  engine, generator = served.engine, served.engine.generator
  sessions = Sessions(generator)
  router = APIRouter(prefix="/editor", tags=["editor"], responses=failures(400, 401, 429, 503, 504))

  async def sweep() -> None:
    with contextlib.suppress(ApiError):  # the server stops
      await engine.run(sessions.sweep)

  async def use(place: Place, ids: list[int], function: Callable[[Continuations], Result]):
    """Reads a prompt and calls a function; returns (how many tokens had to be run, its result).

    A long prompt is read in blocks, and others have the device between two.
    """

    def open_and_call(tab: Continuations) -> Result:
      tab.open(ids)
      return function(tab)

    def run(function: Callable[[Continuations], Any]):
      return engine.run(partial(sessions.use, place.session, function))

    known = await run(lambda tab: tab.num_known(ids))
    for end in range(known + READ_AT_ONCE[0], len(ids), READ_AT_ONCE[0]):
      await run(lambda tab, end=end: tab.open(ids[:end]))
    result = await run(open_and_call)
    loop = asyncio.get_running_loop()
    loop.call_later(SESSION_SECONDS + 1, lambda: loop.create_task(sweep()))
    return len(ids) - known, result

  @router.get("/model")
  async def model() -> EditedModel:
    """Describes the model."""
    return EditedModel(
      name=served.name,
      context_length=generator.config.context_length,
      has_tokenizer=generator.tokenizer is not None,
      joins_spaces=joins_spaces(generator),
      max_new_tokens=room(generator),
      max_characters=min(MAX_CHARACTERS, 8 * generator.config.context_length),
    )

  @router.post("/read")
  async def read(place: Place, request: Request) -> Reading:
    """Reads a text, so that what is asked of it next is quick."""
    prompt = await asyncio.to_thread(make_prompt, place.text, generator)
    num_run, _ = await while_connected(request, use(place, prompt.ids, lambda tab: None))
    return Reading(**_reading(place, prompt, num_run))

  @router.post("/continuations")
  async def continuations(place: ContinuationsRequest, request: Request) -> Choices:
    """Goes on from the cursor in the likeliest ways."""
    prompt = await asyncio.to_thread(make_prompt, place.text, generator)
    most = min(MAX_CONTINUATIONS, generator.config.vocab_size)

    def find(tab: Continuations) -> list[Continuation]:
      return tab.options(most, place.num_tokens, prompt.only_V)

    num_run, found = await while_connected(request, use(place, prompt.ids, find))
    choices = [_choice(one, prompt, generator) for one in found[: place.count]]
    return Choices(choices=choices, **_reading(place, prompt, num_run))

  @router.post("/insight")
  async def insight(place: InsightRequest, request: Request) -> Insight:
    """Says how the text surprises the model, and what it expects at the cursor."""
    prompt = await asyncio.to_thread(make_prompt, place.text, generator)
    text, options = place.text[prompt.start :] + place.after, _warpers(place)
    ids = await asyncio.to_thread(generator.tokenizer.encode, text)
    ids = ids[: generator.config.context_length - 1]

    def look(tab: Continuations) -> tuple[list[float | None], list[NextToken]]:
      nats = [None, *tab.surprise()] if ids else []
      tab.open(prompt.ids)
      return nats, tab.next_tokens(place.count, options, prompt.only_V)

    num_run, (nats, following) = await while_connected(request, use(place, ids or prompt.ids, look))
    reading = _reading(place, prompt, num_run)
    placed = place_values(text, nats, generator.tokenizer)
    return Insight(
      surprise=placed and [_surprise(*one, reading["left_out"]) for one in placed],
      next_tokens=[_next(one, prompt, generator) for one in following],
      **reading,
    )

  return router


def _warpers(place: InsightRequest) -> DecodingOptions:
  names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
  return parse_options({name: getattr(place, name) for name in names})


def _reading(place: Place, prompt: Prompt, num_run: int) -> dict[str, int]:
  left_out = count_units(place.text[: prompt.start])
  return {"left_out": left_out, "num_tokens": len(prompt.ids), "num_run": num_run}


def _choice(found: Continuation, prompt: Prompt, generator: Generator) -> Choice:
  pieces = list(found.pieces)
  first = next((i for i, piece in enumerate(pieces) if piece), None)
  if first is not None:
    pieces[first] = _without_space(pieces[first], prompt)
  return Choice(
    probability=found.probability,
    pieces=pieces,
    logprobs=found.logprobs,
    is_end=found.tokens[-1] in generator.end_ids,
  )


def _surprise(start: int, end: int, nats: float | None, left_out: int) -> Surprise:
  return Surprise(start=left_out + start, end=left_out + end, nats=nats)


def _next(found: NextToken, prompt: Prompt, generator: Generator) -> Next:
  return Next(
    text=_without_space(found.text, prompt),
    probability=found.probability,
    is_cut=found.is_cut,
    is_end=found.token in generator.end_ids,
  )


def _without_space(piece: str, prompt: Prompt) -> str:
  return piece.removeprefix(" ") if prompt.has_space else piece
