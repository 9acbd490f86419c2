"""A tiny model behind the app, in process."""

import contextlib
import time

from families import make_config, make_params
from starlette.testclient import TestClient

from gptjax.data.tokenizer import train_bpe
from gptjax.generate.generator import Generator
from gptjax.serve.app import make_app
from gptjax.serve.engine import Engine, Limits
from gptjax.serve.served import Served

WORDS = "hello world, 今日は世界。 안녕하세요 你好 🙂 "
LIMITS = Limits(num_slots=4, max_queue=3)


def make_generator(context_length=64, **changes):
  """A model of random weights that writes bytes of every kind."""
  tokenizer = train_bpe([WORDS * 9], 290)
  config = make_config(
    "gpt2", vocab_size=tokenizer.vocab_size, context_length=context_length, **changes
  )
  return Generator(make_params(config), config, tokenizer)


@contextlib.contextmanager
def serve(generator, limits=LIMITS, **served):
  """Gives (a client of the app, its engine) once it is ready."""
  engine = Engine(generator, "tiny", limits, report=lambda line: None)
  app = make_app(Served(engine, **served))
  with TestClient(app, raise_server_exceptions=False) as client:
    while not engine.is_ready:
      time.sleep(0.02)
    yield client, engine
