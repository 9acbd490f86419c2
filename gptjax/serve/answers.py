"""Answers that are whole, or a stream of what is new."""

from collections.abc import AsyncIterator, Callable, Sequence

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from gptjax.serve.connection import EventStream, while_connected
from gptjax.serve.failures import ApiError
from gptjax.serve.schemas import Generating, Usage
from gptjax.serve.texts import Job, Piece

Write = Callable[[Sequence[Piece], Usage | None], BaseModel]


async def respond(
  request: Request, job: Job, body: Generating, write_whole: Write, write_event: Write
) -> Response:
  """Runs a job and answers as the body asks; what fails before the first piece has its own status.

  Args:
    request: given up when its client goes.
    job: what makes the texts.
    body: whether to stream, and to tell the usage then.
    write_whole, write_event: make an object of pieces and the usage.
  """
  options = body.stream_options
  if not body.stream:
    if options is not None:
      raise ApiError(400, "stream_options goes with stream; add it", param="stream_options")
    pieces = await while_connected(request, job.all_pieces())
    return _json(write_whole(pieces, _usage(job)))
  pieces = job.pieces()
  first = await while_connected(request, anext(pieces))
  has_usage = options is not None and options.include_usage
  return EventStream(_events(first, pieces, job, write_event, has_usage))


async def _events(
  first: list[Piece],
  rest: AsyncIterator[list[Piece]],
  job: Job,
  write: Write,
  has_usage: bool,
) -> AsyncIterator[str]:
  try:
    yield write(first, None).model_dump_json()
    async for pieces in rest:
      if any(piece.text or piece.tokens or piece.finish_reason for piece in pieces):
        yield write(pieces, None).model_dump_json()
  finally:
    await rest.aclose()
  if has_usage:
    yield write([], _usage(job)).model_dump_json()


def _usage(job: Job) -> Usage:
  total = job.num_prompt + job.num_new
  return Usage(prompt_tokens=job.num_prompt, completion_tokens=job.num_new, total_tokens=total)


def _json(answer: BaseModel) -> Response:
  return Response(answer.model_dump_json(), media_type="application/json")
