"""The routes beside texts: models, embeddings, tokens, health and metrics."""

import base64
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from gptjax.generate.options import DecodingOptions
from gptjax.generate.slots import Prompt
from gptjax.serve.connection import while_connected
from gptjax.serve.engine import Engine
from gptjax.serve.failures import failures
from gptjax.serve.schemas import (
  Detokenized,
  DetokenizeRequest,
  Embedding,
  EmbeddingRequest,
  Embeddings,
  Health,
  ModelCard,
  Models,
  TokenizeRequest,
  TokenizerInfo,
  Tokens,
  Usage,
)
from gptjax.serve.served import Served, as_list


def make_models(served: Served) -> APIRouter:
  """Makes the routes that say what is served."""
  router = APIRouter(tags=["models"])
  config = served.engine.generator.config
  card = ModelCard(
    id=served.name,
    created=served.created,
    context_length=config.context_length,
    vocab_size=config.vocab_size,
  )

  @router.get("/v1/models", responses=failures(401))
  async def list_models() -> Models:
    return Models(data=[card])

  @router.get("/v1/models/{model:path}", responses=failures(401, 404))
  async def show_model(model: str) -> ModelCard:
    served.check_model(model)
    return card

  return router


def make_embeddings(served: Served) -> APIRouter:
  """Makes the route of embeddings."""
  router = APIRouter(tags=["text"])

  @router.post("/v1/embeddings", responses=failures(400, 401, 404, 408, 413, 429, 503, 504))
  async def embed(body: EmbeddingRequest, request: Request) -> Embeddings:
    served.check_model(body.model)
    engine = served.engine
    prompts = await engine.check(
      as_list(body.input),
      DecodingOptions(),
      wants="embedding",
      is_continued=False,
    )
    vectors = await while_connected(request, _read_all(engine, prompts))
    count = sum(len(prompt.ids) for prompt in prompts)
    is_text = body.encoding_format == "base64"
    return Embeddings(
      data=[
        Embedding(index=index, embedding=_encode(vector_D) if is_text else vector_D.tolist())
        for index, vector_D in enumerate(vectors)
      ],
      model=served.name,
      usage=Usage(prompt_tokens=count, total_tokens=count),
    )

  return router


def make_tokens(served: Served) -> APIRouter:
  """Makes the routes between texts and ids."""
  router = APIRouter(tags=["tokens"])
  statuses = failures(400, 401, 404, 408, 413)

  # Not coroutines: the tokenizer may take a while, which other requests need not wait for.
  @router.post("/tokenize", responses=statuses)
  def tokenize(body: TokenizeRequest) -> Tokens:
    served.check_model(body.model)
    ids = served.tokenizer.encode(
      body.prompt,
      parse_special_tokens=body.parse_special_tokens,
      add_special_tokens=body.add_special_tokens,
    )
    return Tokens(tokens=ids, count=len(ids), max_model_len=served.engine.num_positions)

  @router.post("/detokenize", responses=statuses)
  def detokenize(body: DetokenizeRequest) -> Detokenized:
    served.check_model(body.model)
    return Detokenized(prompt=served.tokenizer.decode(body.tokens))

  @router.get("/tokenizer_info", responses=failures(400, 401))
  async def describe() -> TokenizerInfo:
    tokenizer = served.tokenizer
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    return TokenizerInfo(
      vocab_size=tokenizer.vocab_size,
      chat_template=served.template.text,
      **{role: tokenizer.roles.get(role) for role in roles},
    )

  return router


def make_health(served: Served) -> APIRouter:
  """Makes the routes for who watches the server."""
  router = APIRouter(tags=["health"])

  @router.get("/health", response_model=Health, responses={503: {"model": Health}})
  async def health() -> Response:
    engine = served.engine
    return JSONResponse({"status": engine.status}, 200 if engine.is_ready else 503)

  @router.get("/metrics", response_class=PlainTextResponse, responses=failures(401))
  async def metrics() -> str:
    return served.engine.metrics.to_text()

  return router


async def _read_all(engine: Engine, prompts: Sequence[Prompt]) -> list[np.ndarray]:
  """Returns the embedding of each prompt, of length 1."""
  found: dict[int, np.ndarray] = {}
  async for events in engine.submit(prompts).events():
    for event in events:
      mean_D = event.news.mean_D
      found[event.prompt] = mean_D / max(np.linalg.norm(mean_D), np.float32(1e-12))
  return [found[index] for index in range(len(prompts))]


def _encode(vector_D: np.ndarray) -> str:
  return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
