"""/v1/completions: texts that continue prompts."""

import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gptjax.serve.answers import respond
from gptjax.serve.failures import failures
from gptjax.serve.schemas import (
  Completion,
  CompletionChoice,
  CompletionLogprobs,
  CompletionRequest,
  Usage,
)
from gptjax.serve.served import Served, as_list, stream_of
from gptjax.serve.texts import Piece, Token, make_job
from gptjax.serve.token_names import TokenNames

DEFAULT_MAX_TOKENS = 16


def make_completions(served: Served) -> APIRouter:
  """Makes the route."""
  router = APIRouter(tags=["text"])

  @router.post(
    "/v1/completions",
    response_model=Completion,
    responses=failures(400, 401, 404, 408, 413, 429, 503, 504) | stream_of(Completion),
  )
  async def complete(body: CompletionRequest, request: Request) -> Response:
    served.check_model(body.model)
    given = as_list(body.prompt)
    prompts = await served.parse_prompts(given) if body.parse_special_tokens else given
    max_tokens = body.max_tokens
    if max_tokens is None and body.max_length is None:
      max_tokens = DEFAULT_MAX_TOKENS
    job = await make_job(
      served.engine,
      prompts,
      body,
      max_tokens=max_tokens,
      top_logprobs=body.logprobs or 0,
      best_of=body.best_of,
      is_scored=bool(body.echo) and body.logprobs is not None,
    )
    echoes = [served.text_of(prompt) if body.echo else "" for prompt in given]
    choices = [
      _Choice(index, echoes[index // job.n], served.names, body.logprobs is not None)
      for index in range(len(prompts) * job.n)
    ]
    frame = Completion(
      id=f"cmpl-{uuid.uuid4().hex}",
      created=served.now(),
      model=served.name,
      choices=[],
      seed=job.seed,
    )

    def write(pieces: Sequence[Piece], usage: Usage | None) -> Completion:
      news = [choices[piece.choice].write(piece) for piece in pieces]
      return frame.model_copy(update={"choices": news, "usage": usage})

    return await respond(request, job, body, write, write)

  return router


class _Choice:
  """Writes the pieces of one choice.

  Args:
    index: its number.
    echo: what comes before its text.
    names: of tokens.
    has_logprobs: whether tokens are told of.
  """

  def __init__(self, index: int, echo: str, names: TokenNames, has_logprobs: bool):
    self._index, self._echo, self._names = index, echo, names
    self._has_logprobs = has_logprobs
    self._context = self._offset = 0

  def write(self, piece: Piece) -> CompletionChoice:
    """Returns what is new."""
    text, self._echo = self._echo + piece.text, ""
    logprobs = self._logprobs([*piece.prompt, *piece.tokens]) if self._has_logprobs else None
    return CompletionChoice(
      index=self._index, text=text, logprobs=logprobs, finish_reason=piece.finish_reason
    )

  def _logprobs(self, tokens: Sequence[Token]) -> CompletionLogprobs:
    names, tops, offsets = [], [], []
    for token in tokens:
      name = self._names.name(token.id, self._context)
      names.append(name)
      offsets.append(self._offset)
      tops.append(self._top(token, name))
      self._offset += self._names.num_characters(token.id, self._context)
      self._context = self._names.after(token.id, self._context)
    return CompletionLogprobs(
      tokens=names,
      token_logprobs=[token.logprob for token in tokens],
      top_logprobs=tops,
      text_offset=offsets,
    )

  def _top(self, token: Token, name: str) -> dict[str, float] | None:
    """Returns {name: log-probability}; of two tokens of one name the likelier, and the token's."""
    if token.logprob is None:
      return None
    top: dict[str, float] = {}
    for other, logprob in token.alternatives:
      top.setdefault(self._names.name(other, self._context), logprob)
    top.setdefault(name, token.logprob)
    return top
