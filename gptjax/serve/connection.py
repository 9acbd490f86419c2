"""Between a request and its answer: keys, sizes, slow and vanished clients, streams of events."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptjax.serve.failures import ApiError, error_object, error_response
from gptjax.serve.metrics import Metrics

Result = TypeVar("Result")

MAX_BODY_BYTES = 8 << 20
BODY_SECONDS = 30.0
# The client closed the connection before an answer; nobody reads this.
CLIENT_GONE = 499
_EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Gate:
  """ASGI middleware that lets in who has the key, with bodies of some size, sent in some time.

  It answers itself where it refuses, before anything is read, and counts all answers.

  Args:
    app: what is behind it.
    metrics: counts answers.
    api_key: None lets everybody in.
    open_paths: that need no key.
    routes: paths that are counted by name; others are one.
  """

  def __init__(
    self,
    app: ASGIApp,
    metrics: Metrics,
    api_key: str | None,
    open_paths: frozenset[str],
    routes: frozenset[str],
  ):
    self._app, self._metrics = app, metrics
    self._key = None if api_key is None else api_key.encode()
    self._open, self._routes = open_paths, routes

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    started, status = time.monotonic(), CLIENT_GONE
    route = scope["path"] if scope["path"] in self._routes else "other"

    async def count(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    try:
      self._check_key(scope)
      await self._app(scope, _limited(scope, receive), count)
    except ApiError as error:
      await error_response(error)(scope, receive, count)
    finally:
      self._metrics.requests.labels(route, str(status)).inc()
      self._metrics.request_seconds.labels(route).observe(time.monotonic() - started)

  def _check_key(self, scope: Scope) -> None:
    if self._key is None or scope["path"] in self._open or scope["method"] == "OPTIONS":
      return
    headers = dict(scope["headers"])
    kind, _, given = headers.get(b"authorization", b"").partition(b" ")
    is_right = hmac.compare_digest(given.strip(), self._key)
    if kind.lower() != b"bearer" or not is_right:
      raise ApiError(
        401,
        'the API key is wrong or missing; send it as "Authorization: Bearer KEY"',
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
      )


def _limited(scope: Scope, receive: Receive) -> Receive:
  """Makes a `receive` that refuses a body that is too large, or comes too slowly."""
  length = dict(scope["headers"]).get(b"content-length", b"0")
  if length.isdigit() and int(length) > MAX_BODY_BYTES:
    raise _too_large()
  size, is_complete, deadline = 0, False, time.monotonic() + BODY_SECONDS

  async def receive_some() -> Message:
    nonlocal size, is_complete
    if is_complete:
      return await receive()
    try:
      message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
    except TimeoutError:
      raise ApiError(
        408, f"the body took more than {BODY_SECONDS:g} seconds", headers={"Connection": "close"}
      ) from None
    size += len(message.get("body", b""))
    is_complete = not message.get("more_body", False)
    if size > MAX_BODY_BYTES:
      raise _too_large()
    return message

  return receive_some


def _too_large() -> ApiError:
  return ApiError(
    413,
    f"the body has more than {MAX_BODY_BYTES} bytes; send less at once",
    headers={"Connection": "close"},
  )


async def while_connected(request: Request, awaitable: Awaitable[Result]) -> Result:
  """Waits for a result as long as the client does; then cancels it.

  Raises:
    ApiError: the client has gone.
  """
  task = asyncio.ensure_future(awaitable)
  gone = asyncio.ensure_future(_wait_until_gone(request))
  try:
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
      return task.result()
    raise ApiError(CLIENT_GONE, "the client has gone")
  finally:
    task.cancel()
    gone.cancel()
    await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


class EventStream(StreamingResponse):
  """Server-sent events: JSON of each, `[DONE]` last, or an error that ends them.

  Args:
    events: JSON texts; closed when the client goes.
  """

  def __init__(self, events: AsyncIterator[str]):
    self._events = events
    super().__init__(_lines(events), media_type="text/event-stream", headers=_EVENT_HEADERS)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      await self.body_iterator.aclose()
      await self._events.aclose()


async def _lines(events: AsyncIterator[str]) -> AsyncIterator[str]:
  try:
    async for event in events:
      yield f"data: {event}\n\n"
  except ApiError as error:
    yield f"data: {json.dumps({'error': error_object(error)})}\n\n"
    return
  yield "data: [DONE]\n\n"
