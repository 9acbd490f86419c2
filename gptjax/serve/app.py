"""The app: routes, middleware and the engine's life, put together."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from gptjax import __version__
from gptjax.serve.chat import make_chat
from gptjax.serve.classify import make_classify
from gptjax.serve.completions import make_completions
from gptjax.serve.connection import Gate
from gptjax.serve.editor import make_editor, make_pages
from gptjax.serve.failures import add_handlers
from gptjax.serve.inspection import make_embeddings, make_health, make_models, make_tokens
from gptjax.serve.served import Served

_OPEN_PATHS = frozenset({"/health", "/openapi.json"})
_MAKERS = (
  make_completions,
  make_chat,
  make_embeddings,
  make_classify,
  make_models,
  make_tokens,
  make_health,
  make_editor,
)
_DESCRIPTION = "The completions, chats and embeddings of OpenAI's API, from a model of one's own."


@dataclasses.dataclass(frozen=True)
class Access:
  """Who may call.

  Attributes:
    api_key: that requests must send; None lets everybody in.
    cors_origins: pages of these origins may call from a browser, "*" any; none by default.
  """

  api_key: str | None = None
  cors_origins: tuple[str, ...] = ()


def make_app(served: Served, access: Access = Access()) -> FastAPI:
  """Makes the app of a model; the engine starts and stops with it."""

  @contextlib.asynccontextmanager
  async def live(app: FastAPI) -> AsyncIterator[None]:
    del app
    served.engine.start()
    yield
    await served.engine.stop()

  # The usual pages of documentation are made of scripts from elsewhere.
  app = FastAPI(
    title="gptjax",
    description=_DESCRIPTION,
    version=__version__,
    lifespan=live,
    docs_url=None,
    redoc_url=None,
  )
  for make in _MAKERS:
    app.include_router(make(served))
  pages = make_pages()
  app.include_router(pages)
  add_handlers(app)
  page_paths = frozenset(route.path for route in pages.routes)
  paths = frozenset(app.openapi()["paths"]) | page_paths
  app.add_middleware(
    Gate,
    metrics=served.engine.metrics,
    api_key=access.api_key,
    open_paths=_OPEN_PATHS | page_paths,
    routes=paths,
  )
  if access.cors_origins:
    app.add_middleware(
      CORSMiddleware,
      allow_origins=list(access.cors_origins),
      allow_methods=["GET", "POST"],
      allow_headers=["Authorization", "Content-Type"],
    )
  _describe_key(app)
  return app


def _describe_key(app: FastAPI) -> None:
  """Tells readers of the OpenAPI description about the key, which the Gate asks for."""
  schema: dict[str, Any] = app.openapi()
  schema.setdefault("components", {})["securitySchemes"] = {
    "key": {"type": "http", "scheme": "bearer"}
  }
  for path, methods in schema["paths"].items():
    if path not in _OPEN_PATHS:
      for operation in methods.values():
        operation["security"] = [{"key": []}, {}]
