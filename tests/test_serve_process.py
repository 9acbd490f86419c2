"""A server as a process of its own, and clients of every kind: OpenAI's, many, rude and slow."""

import asyncio
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from benchmarks.serve import Server, ask, make_requests, run_clients, save_model
from gptjax.api import load
from gptjax.cli.main import main

pytestmark = pytest.mark.slow

needs_openai = pytest.mark.skipif(
  importlib.util.find_spec("openai") is None, reason="the openai client is not installed"
)
needs_schemathesis = pytest.mark.skipif(
  importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("model") / "small")
  save_model(folder, is_quick=True)
  return folder


@pytest.fixture(scope="module")
def server(folder):
  with Server(folder, num_slots=16) as server:
    yield server


@pytest.fixture(scope="module")
def texts(folder):
  """What generate gives for each of some requests."""
  model = load(folder)
  return {
    request["prompt"]: model.generate(
      request["prompt"], max_new_tokens=request["max_tokens"]
    ).texts[0]
    for request in make_requests(6, 24)
  }


def check_serves(server, texts):
  """Others are answered as ever."""
  request = make_requests(6, 24)[3]
  answer = asyncio.run(ask(server.port, request))
  assert answer.text == texts[request["prompt"]]


def send(server, content, wait=True):
  """Sends bytes, and returns what comes back."""
  with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
    connection.sendall(content)
    if not wait:
      return b""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def make_post(body, **headers):
  content = body if isinstance(body, bytes) else json.dumps(body).encode()
  lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
  headers = {"Content_Length": len(content), "Connection": "close"} | headers
  lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
  return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


@needs_openai
def test_the_official_client_works_unchanged(server, texts):
  import openai

  with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
    [model] = [card.id for card in client.models.list()]
    assert client.models.retrieve(model).id == model
    for request in make_requests(6, 24)[:3]:
      arguments = {"model": model, "prompt": request["prompt"], "temperature": 0}
      arguments["max_tokens"] = request["max_tokens"]
      whole = client.completions.create(**arguments, logprobs=2, echo=True)
      [choice] = whole.choices
      assert choice.text == request["prompt"] + texts[request["prompt"]]
      assert len(choice.logprobs.token_logprobs) == whole.usage.total_tokens
      pieces = list(client.completions.create(**arguments, stream=True))
      assert "".join(piece.choices[0].text for piece in pieces) == texts[request["prompt"]]
    messages = [{"role": "user", "content": "ABC"}]
    chat = client.chat.completions.create(
      model=model, messages=messages, max_completion_tokens=9, seed=1, logprobs=True, top_logprobs=2
    )
    pieces = client.chat.completions.create(
      model=model, messages=messages, max_tokens=9, seed=1, stream=True
    )
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert streamed == chat.choices[0].message.content
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens == 9
    embeddings = client.embeddings.create(model=model, input=["AB", "C"])
    assert [len(item.embedding) for item in embeddings.data] == [16, 16]
    with pytest.raises(openai.NotFoundError, match="not served"):
      client.completions.create(model="gpt-5", prompt="A")
    with pytest.raises(openai.BadRequestError, match="did you mean"):
      client.completions.create(model=model, prompt="A", extra_body={"top_kk": 2})
    drawn = client.completions.create(model=model, prompt="A", n=2, extra_body={"top_k": 1})
    assert drawn.choices[0].text == drawn.choices[1].text


@needs_openai
def test_the_official_client_awaits(server, texts):
  import openai

  async def work(client):
    async def one(request):
      stream = await client.completions.create(
        model="small",
        prompt=request["prompt"],
        max_tokens=request["max_tokens"],
        temperature=0,
        stream=True,
      )
      return "".join([piece.choices[0].text async for piece in stream])

    async with client:
      return await asyncio.gather(*(one(request) for request in make_requests(6, 24)))

  client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
  assert asyncio.run(work(client)) == list(texts.values())


@needs_schemathesis
def test_the_api_is_as_it_is_described(server):
  """Everything but one check: what the model refuses for its sense is a 400, as with OpenAI."""
  command = [sys.executable, "-m", "schemathesis.cli", "run", "--max-examples", "25"]
  command += ["--exclude-checks", "positive_data_acceptance", "--no-color", "--seed", "1"]
  command += ["--generation-database", "none", "--request-timeout", "60"]
  out = subprocess.run(
    [*command, f"http://127.0.0.1:{server.port}/openapi.json"], capture_output=True, text=True
  )
  assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-1000:]
  assert "0 skipped" not in out.stdout and "Selected" in out.stdout


def test_64_clients_get_what_each_gets_alone(server, texts):
  requests = make_requests(6, 24)
  answers, _ = asyncio.run(run_clients(server.port, requests, 64, 3.0))
  assert len(answers) >= 64
  assert all(answer.text == texts[requests[index]["prompt"]] for index, answer in answers)


@pytest.mark.parametrize(
  ("content", "status"),
  [
    (b"\x00\xff\x00 nonsense\r\n\r\n", b"400"),
    (make_post(b"{"), b"400"),
    (make_post(b"\xff" * 1000), b"400"),
    (make_post({"prompt": "A", "max_tokens": 1e400}), b"400"),
    (make_post(b"x", Content_Length=1 << 40), b"413"),
    (make_post(b"[" * 500_000), b"400"),
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
    (b"BREW / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"400"),
    (b"DELETE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"405"),
  ],
)
def test_rude_clients_are_refused_and_disturb_nobody(server, texts, content, status):
  assert send(server, content).split(b" ", 2)[1] == status
  check_serves(server, texts)


def test_who_leaves_in_the_middle_disturbs_nobody(server, texts):
  body = {"prompt": "A", "max_tokens": 60, "temperature": 0}
  for stream in (True, False) * 8:
    send(server, make_post(body | {"stream": stream}), wait=False)
  send(server, make_post(b"{", Content_Length=1000), wait=False)
  check_serves(server, texts)


def test_who_reads_and_writes_slowly_disturbs_nobody(server, texts):
  request = make_requests(6, 24)[0]
  content = make_post(request)
  with socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow:
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    for start in range(0, len(content), 40):
      slow.sendall(content[start : start + 40])
      time.sleep(0.05)
    check_serves(server, texts)
    time.sleep(1)
    received = b"".join(iter(lambda: slow.recv(64), b""))
  assert b"[DONE]" in received


def test_a_stop_finishes_what_runs(folder):
  with Server(folder, num_slots=2) as server:
    request = {**make_requests(1, 24)[0], "max_tokens": 60}
    request["prompt"] = request["prompt"][:4]
    answers = []
    client = threading.Thread(target=lambda: answers.append(asyncio.run(ask(server.port, request))))
    client.start()
    while not _is_busy(server):
      assert client.is_alive()
    server.process.send_signal(signal.SIGTERM)
    client.join()
    assert server.process.wait(60) == 0
  assert answers[0].tokens == 60


def _is_busy(server):
  head = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
  return b"gptjax_running_texts 0.0" not in send(server, head)


def test_an_address_that_is_taken_is_one_line(folder, server, capsys):
  assert main(["serve", "--model", folder, "--port", str(server.port)]) == 2
  assert f"port {server.port}" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--num-slots", "0"], "num_slots is 0"),
    (["--num-positions", "999"], "num_positions is 999"),
    (["--port", "99999"], "99999"),
    (["--api-key-file", "/none"], "--api-key-file /none"),
    (["--time-limit", "0"], "seconds is 0"),
  ],
)
def test_wrong_flags_are_one_line(folder, arguments, said, capsys):
  assert main(["serve", "--model", folder, *arguments]) == 2
  assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_harness_scores_a_served_model_as_it_does_locally(server, folder):
  """Through local-completions, with the tokenizer of the server: no file, and no transformers."""
  pytest.importorskip("lm_eval", reason="needs the extra test-serve")
  pytest.importorskip("tenacity", reason="needs the extra test-serve")
  from lm_eval.api.instance import Instance
  from lm_eval.models.openai_completions import LocalCompletionsAPI

  from gptjax.evaluate.harness import HarnessModel

  pairs = [("To be or not", " to be"), ("All the world", "'s a stage"), ("x", " = y")] * 4
  requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
  texts = ["Shall I compare thee to a summer's day? " * 4, "Thou art"]
  rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
  # The harness takes windows of two tokens less through an API, which generates one beyond them.
  local = HarnessModel(folder, prefix_token_id=0, max_length=62)
  served = LocalCompletionsAPI(
    f"http://127.0.0.1:{server.port}/v1/completions",
    model="small",
    batch_size=4,
    max_length=64,
    custom_prefix_token_id=0,
  )
  assert served.tokenizer_backend == "remote"
  found, expected = served.loglikelihood(requests), local.loglikelihood(requests)
  np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-4)
  assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
  found = served.loglikelihood_rolling(rolling)
  np.testing.assert_allclose(found, local.loglikelihood_rolling(rolling), rtol=1e-4)
