"""The TAB editor: the page, and what the page asks of the model.

A request says all that it needs, and a session is only a cache: what the model has read of one
page's text, kept so that the next request is quick. A session that was let go costs time, never
another answer. Texts come as browsers count them, places as UTF-16 units.
"""

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from fastapi import APIRouter
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError
from gptjax.generate.continuations import READ_AT_ONCE, Continuation, Continuations
from gptjax.generate.generator import Generator
from gptjax.generate.options import DecodingOptions, parse_options
from gptjax.serve.failures import failures
from gptjax.serve.schemas import Probability, Strict, Whole
from gptjax.serve.served import Served

MAX_CHARACTERS = 2**17
# All are decoded, however many are shown: few rows cost what eight do.
MAX_CONTINUATIONS = 8
MAX_SESSIONS = 4
SESSION_SECONDS = 900
_MAX_ROOM = 128
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
  num_tokens: Annotated[int, Field(ge=1, le=_MAX_ROOM)] = 6


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

  def get(self, name: str) -> Continuations:
    """Returns the session of this name, a new one if need be."""
    now = self._clock()
    _, tab = self._kept.pop(name, (now, None))
    while self._kept and (
      len(self._kept) >= MAX_SESSIONS or next(iter(self._kept.values()))[0] < now - SESSION_SECONDS
    ):
      self._kept.popitem(last=False)
    tab = Continuations(self._generator) if tab is None else tab
    self._kept[name] = now, tab
    return tab

  def open(self, name: str, ids: list[int]) -> Continuations:
    """Returns the session of this name, with a prompt open in it."""
    tab = self.get(name)
    tab.open(ids)
    return tab


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is given to the model of a text before a cursor.

  Attributes:
    ids: never empty.
    start: characters of the text that are left out.
    only_V: the tokens that may follow, where the text ends in a space that belongs to the next
      token; else None.
    has_space: the text ends in a space that the next token brings again.
  """

  ids: list[int]
  start: int
  only_V: np.ndarray | None
  has_space: bool


def make_prompt(text: str, generator: Generator) -> Prompt:
  """Encodes a text before a cursor, its end if it is too long.

  Raises:
    DataError: no tokenizer, characters that it lacks, or no text and no token that begins one.
  """
  tokenizer = generator.tokenizer
  if tokenizer is None:
    raise DataError("the model has no tokenizer, and the editor writes text; serve one that has")
  start = _cut(text, tokenizer, generator.config.context_length - _room(generator))
  text = text[start:]
  ids = tokenizer.encode(text)
  has_space, only_V = False, None
  if text.endswith(" "):
    # "a " continues as "a king" does: models have seen " king", and next to never " " and "king".
    without = tokenizer.encode(text[:-1])
    space_V = _spaces(generator)
    if ids == without:
      has_space = True
    elif ids[:-1] == without and space_V.sum() > MAX_CONTINUATIONS:
      ids, has_space, only_V = without, True, space_V
  ids = ids or list(generator.end_ids[:1])
  if not ids:
    raise DataError("there is no text before the cursor; write a few words first")
  return Prompt(ids, start, only_V, has_space)


def warm_up(generator: Generator, report: Callable[[str], None]) -> None:
  """Compiles what the first key presses need; on the device thread."""
  report("editor")
  tab, limit = Continuations(generator), generator.config.context_length
  tab.open([0] * min(sum(READ_AT_ONCE), limit - 1))
  tab.options(min(MAX_CONTINUATIONS, generator.config.vocab_size), 2)
  tab.next_tokens(1)
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
  router = APIRouter(prefix="/editor", tags=["editor"], responses=failures(400, 401, 429, 503))

  async def read(session: str, ids: list[int]) -> int:
    """Reads all but the last block, and lets others have the device between two."""
    known = await engine.run(lambda: sessions.get(session).num_known(ids))
    for end in range(known + READ_AT_ONCE[0], len(ids), READ_AT_ONCE[0]):
      await engine.run(partial(sessions.open, session, ids[:end]))
    return len(ids) - known

  @router.get("/model")
  async def model() -> EditedModel:
    """Describes the model."""
    return EditedModel(
      name=served.name,
      context_length=generator.config.context_length,
      has_tokenizer=generator.tokenizer is not None,
      joins_spaces=generator.tokenizer is not None and bool(_spaces(generator).sum() > 1),
      max_new_tokens=_room(generator),
      max_characters=min(MAX_CHARACTERS, 8 * generator.config.context_length),
    )

  @router.post("/read")
  async def read_ahead(place: Place) -> Reading:
    """Reads a text, so that what is asked of it next is quick."""
    prompt = make_prompt(place.text, generator)
    num_run = await read(place.session, prompt.ids)
    await engine.run(partial(sessions.open, place.session, prompt.ids))
    return _reading(place, prompt, num_run)

  @router.post("/continuations")
  async def continuations(request: ContinuationsRequest) -> Choices:
    """Goes on from the cursor in the likeliest ways."""
    prompt = make_prompt(request.text, generator)
    num_run = await read(request.session, prompt.ids)

    def find() -> list[Continuation]:
      tab = sessions.open(request.session, prompt.ids)
      most = min(MAX_CONTINUATIONS, generator.config.vocab_size)
      return tab.options(most, request.num_tokens, prompt.only_V)

    found = await engine.run(find)
    choices = [_choice(one, prompt, generator) for one in found[: request.count]]
    return Choices(choices=choices, **_reading(request, prompt, num_run).model_dump())

  @router.post("/insight")
  async def insight(request: InsightRequest) -> Insight:
    """Says how the text surprises the model, and what it expects at the cursor."""
    prompt = make_prompt(request.text, generator)
    whole = request.text[prompt.start :] + request.after
    whole_ids = generator.tokenizer.encode(whole)[: generator.config.context_length - 1]
    options = _warpers(request)
    num_run = await read(request.session, whole_ids or prompt.ids)

    def look():
      nats = sessions.open(request.session, whole_ids).surprise() if whole_ids else []
      tab = sessions.open(request.session, prompt.ids)
      return nats, tab.next_tokens(request.count, options, prompt.only_V)

    nats, following = await engine.run(look)
    next_tokens = [
      Next(
        text=_without_space(one.text, prompt),
        probability=one.probability,
        is_cut=one.is_cut,
        is_end=one.token in generator.end_ids,
      )
      for one in following
    ]
    reading = _reading(request, prompt, num_run)
    surprise = _place(whole, [None, *nats][: len(whole_ids)], reading.left_out, generator.tokenizer)
    return Insight(surprise=surprise, next_tokens=next_tokens, **reading.model_dump())

  return router


def _room(generator: Generator) -> int:
  """Returns how many tokens of the context are kept free for new ones."""
  return min(_MAX_ROOM, max(1, generator.config.context_length // 4))


def _cut(text: str, tokenizer: Tokenizer, most: int) -> int:
  """Returns where the end of a text begins that has `most` tokens or fewer.

  It moves on by quarters, so that it stays where it is for a while of typing, and what was read
  with it; and to the beginning of a word where one is near.
  """
  start = 0
  while len(tokenizer.encode(text[start:])) > most:
    start += max(1, (len(text) - start) // 4)
    space = text.find(" ", start, start + 32)
    start = space if space >= 0 else start
  return start


def _spaces(generator: Generator) -> np.ndarray:
  """Returns bool [V], the tokens that begin with a space."""
  own = generator.tokenizer.begins_with_space[: generator.config.vocab_size]
  return np.pad(own, (0, generator.config.vocab_size - len(own)))


def _warpers(request: InsightRequest) -> DecodingOptions:
  names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
  return parse_options({name: getattr(request, name) for name in names})


def _reading(place: Place, prompt: Prompt, num_run: int) -> Reading:
  left_out = _count_units(place.text[: prompt.start])
  return Reading(left_out=left_out, num_tokens=len(prompt.ids), num_run=num_run)


def _choice(found: Continuation, prompt: Prompt, generator: Generator) -> Choice:
  pieces = list(found.pieces)
  first = next((i for i, piece in enumerate(pieces) if piece), None)
  if first is not None:
    pieces[first] = _without_space(pieces[first], prompt)
  is_end = found.tokens[-1] in generator.end_ids
  return Choice(
    probability=found.probability, pieces=pieces, logprobs=found.logprobs, is_end=is_end
  )


def _without_space(piece: str, prompt: Prompt) -> str:
  return piece.removeprefix(" ") if prompt.has_space else piece


def _count_units(text: str) -> int:
  return len(text.encode("utf-16-le")) // 2


def _place(
  text: str, nats: list[float | None], offset: int, tokenizer: Tokenizer
) -> list[Surprise] | None:
  """Finds the places of the first tokens of a text; tokens of one character become one."""
  try:
    spans = tokenizer.byte_spans(text)
  except DataError:
    return None
  sizes = np.array([(len(char.encode()), _count_units(char)) for char in text], int).reshape(-1, 2)
  byte_ends, unit_ends = np.cumsum(sizes, axis=0).T
  units = dict(zip([0, *byte_ends.tolist()], [offset, *(unit_ends + offset).tolist()]))
  placed: list[Surprise] = []
  for (start, end), one in zip(spans.tolist(), nats):
    if placed and units[start] < placed[-1].end:
      last = placed[-1]
      last.end, last.nats = units[end], None if last.nats is None else last.nats + (one or 0.0)
    else:
      placed.append(Surprise(start=units[start], end=units[end], nats=one))
  return placed
