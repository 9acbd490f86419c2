"""/v1/chat/completions: answers to messages."""

import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gptjax.serve.answers import respond
from gptjax.serve.failures import ApiError, failures
from gptjax.serve.schemas import (
  ChatChoice,
  ChatCompletion,
  ChatCompletionChunk,
  ChatLogprobs,
  ChatMessage,
  ChatPiece,
  ChatRequest,
  TokenLogprob,
  TopLogprob,
  Usage,
)
from gptjax.serve.served import Served, stream_of
from gptjax.serve.texts import Job, Piece, Token, make_job
from gptjax.serve.token_names import TokenNames


def make_chat(served: Served) -> APIRouter:
  """Makes the route."""
  router = APIRouter(tags=["text"])

  @router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=failures(400, 401, 404, 408, 413, 429, 503, 504) | stream_of(ChatCompletionChunk),
  )
  async def chat(body: ChatRequest, request: Request) -> Response:
    served.check_model(body.model)
    job = await _make_job(served, body)
    choices = [_Choice(served.names, bool(body.logprobs)) for _ in range(job.n)]
    frame = {
      "id": f"chatcmpl-{uuid.uuid4().hex}",
      "created": served.now(),
      "model": served.name,
      "seed": job.seed,
      "chat_template": served.template.name,
    }

    def write_whole(pieces: Sequence[Piece], usage: Usage | None) -> ChatCompletion:
      news = [
        ChatChoice(
          index=piece.choice,
          message=ChatMessage(role="assistant", content=piece.text),
          logprobs=choices[piece.choice].logprobs(piece.tokens),
          finish_reason=piece.finish_reason,
        )
        for piece in pieces
      ]
      return ChatCompletion(choices=news, usage=usage, **frame)

    def write_event(pieces: Sequence[Piece], usage: Usage | None) -> ChatCompletionChunk:
      news = [choices[piece.choice].write(piece) for piece in pieces]
      return ChatCompletionChunk(choices=news, usage=usage, **frame)

    return await respond(request, job, body, write_whole, write_event)

  return router


async def _make_job(served: Served, body: ChatRequest) -> Job:
  max_tokens = _max_tokens(body)
  if body.top_logprobs is not None and not body.logprobs:
    raise ApiError(400, "top_logprobs goes with logprobs; add it", param="top_logprobs")
  messages = [message.for_template() for message in body.messages]
  # Templates write special tokens; the plain one has none to write.
  parses = served.template.name == "model"
  prompt = served.template.render(messages)
  ids = served.tokenizer.encode(prompt, parse_special_tokens=parses)
  if max_tokens is None and body.max_length is None:
    max_tokens = max(1, served.engine.num_positions - len(ids))
  stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
  return await make_job(
    served.engine,
    [ids],
    body.model_copy(update={"stop": [*stops, *served.template.stops]}),
    max_tokens=max_tokens,
    top_logprobs=body.top_logprobs or 0,
  )


def _max_tokens(body: ChatRequest) -> int | None:
  if body.max_tokens is not None and body.max_completion_tokens is not None:
    raise ApiError(
      400, "max_tokens and max_completion_tokens are one; give one of them", param="max_tokens"
    )
  return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


class _Choice:
  """Writes the pieces of one answer.

  Args:
    names: of tokens.
    has_logprobs: whether tokens are told of.
  """

  def __init__(self, names: TokenNames, has_logprobs: bool):
    self._names, self._has_logprobs = names, has_logprobs
    self._context, self._is_first = 0, True

  def write(self, piece: Piece) -> ChatPiece:
    """Returns what is new."""
    role, self._is_first = ("assistant" if self._is_first else None), False
    return ChatPiece(
      index=piece.choice,
      delta=ChatMessage(role=role, content=piece.text),
      logprobs=self.logprobs(piece.tokens),
      finish_reason=piece.finish_reason,
    )

  def logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
    """Returns the entries of tokens, if they are wanted."""
    if not self._has_logprobs:
      return None
    content = []
    for token in tokens:
      top = [self._describe(*pair) for pair in token.alternatives]
      own = self._describe(token.id, token.logprob)
      content.append(TokenLogprob(**own.model_dump(), top_logprobs=top))
      self._context = self._names.after(token.id, self._context)
    return ChatLogprobs(content=content)

  def _describe(self, token: int, logprob: float) -> TopLogprob:
    added = self._names.bytes_of(token, self._context)
    return TopLogprob(
      token=self._names.name(token, self._context),
      logprob=logprob,
      bytes=None if added is None else list(added),
    )
