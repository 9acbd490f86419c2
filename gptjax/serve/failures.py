"""What goes wrong, in OpenAI's words: status, and `{"error": {message, type, param, code}}`."""

import http
import re
import sys
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from gptjax.errors import TooLongError, UserError
from gptjax.serve.schemas import ErrorBody

# OpenAI's names for who is to blame; all else below 500 is an "invalid_request_error".
_TYPES = {429: "rate_limit_error"}
# What pydantic calls the types it tries, in the place of a problem.
_TYPE = re.compile(r"str|int|float|bool|constrained-\w+|Classified|.*[\[(].*")


class ApiError(HTTPException):
  """An answer that is an error.

  Args:
    status: of HTTP.
    message: the value, what was expected, what to change.
    code: a word for programs, or None.
    param: the field that is wrong, or None.
    headers: of the answer.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
  ):
    super().__init__(status, message, headers)
    self.code, self.param = code, param


def error_object(error: Exception) -> dict[str, Any]:
  """Returns what stands under "error" in the answer to an exception."""
  if isinstance(error, TooLongError):
    return _error(400, error.message, "context_length_exceeded")
  if isinstance(error, UserError):
    return _error(400, " ".join(str(error).split()))
  if isinstance(error, StarletteHTTPException):
    code, param = getattr(error, "code", None), getattr(error, "param", None)
    return _error(error.status_code, str(error.detail), code, param)
  return _error(500, "the server failed; its log says more")


def error_response(error: Exception) -> JSONResponse:
  """Returns the answer to an exception."""
  status, headers = 500, None
  if isinstance(error, UserError):
    status = 400
  elif isinstance(error, StarletteHTTPException):
    status, headers = error.status_code, error.headers
  return JSONResponse({"error": error_object(error)}, status, headers)


def add_handlers(app: FastAPI) -> None:
  """Has an app answer every exception in OpenAI's format."""

  async def answer(request: Request, error: Exception) -> JSONResponse:
    del request
    return error_response(error)

  async def find_nothing(request: Request, error: StarletteHTTPException) -> JSONResponse:
    if not isinstance(error, ApiError) and error.status_code in (404, 405):
      there_is = (
        f"there is no {request.method} {request.url.path}; /openapi.json lists all there is"
      )
      error = StarletteHTTPException(error.status_code, there_is, error.headers)
    return error_response(error)

  async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
    del request
    return error_response(_explain(error))

  async def fail(request: Request, error: Exception) -> JSONResponse:
    print(f"{request.method} {request.url.path} failed:", file=sys.stderr)
    traceback.print_exception(error)
    return error_response(error)

  app.add_exception_handler(UserError, answer)
  app.add_exception_handler(StarletteHTTPException, find_nothing)
  app.add_exception_handler(RequestValidationError, refuse)
  app.add_exception_handler(Exception, fail)


def failures(*statuses: int) -> dict[int, dict[str, Any]]:
  """Describes answers that are errors, for the OpenAPI description of a route."""
  return {
    status: {"model": ErrorBody, "description": http.HTTPStatus(status).phrase}
    for status in (*statuses, 500)
  }


def _error(
  status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
  kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
  return {"message": message, "type": kind, "param": param, "code": code}


def _explain(error: RequestValidationError) -> ApiError:
  """Says the first thing that is wrong with a request."""
  problems = error.errors()
  # Of a list that might also have been a text, a wrong name inside says more than the wrong type.
  problem = next((each for each in problems if each["type"] == "field"), problems[0])
  name = _field(problem)
  if problem["type"] == "json_invalid":
    return ApiError(400, f"the body is no JSON: {problem['ctx']['error']}")
  if problem["type"] == "field":
    path = ".".join([*name, problem["ctx"]["field"]])
    return ApiError(400, problem["msg"], code=problem["ctx"]["code"], param=path)
  if not name:
    return ApiError(400, f"the body must be a JSON object: {problem['msg'].lower()}")
  path = ".".join(name)
  if problem["type"] == "missing":
    return ApiError(
      400, f'"{path}" is missing; add it', code="missing_required_parameter", param=path
    )
  # A value that may be of several types fails once for each.
  same = [each for each in problems if _field(each)[:1] == name[:1]]
  messages = dict.fromkeys(each["msg"].removeprefix("Input should be ") for each in same)
  code = "invalid_type" if problem["type"].endswith("_type") else "invalid_value"
  expected = " or ".join(list(messages)[:3])
  text = f'"{path}" is {_show(problem["input"])}; expected: {expected}'
  return ApiError(400, text, code=code, param=path)


def _field(problem: dict[str, Any]) -> list[str]:
  """Returns where in the body a problem is, without pydantic's names of the types it tried."""
  return [str(part) for part in problem["loc"][1:] if not _TYPE.fullmatch(str(part))]


def _show(value: Any) -> str:
  text = " ".join(repr(value).split())
  return text if len(text) <= 60 else text[:57] + "..."
