"""Tokenising a stream of documents on all cores, in order and in bounded memory.

Small corpora are tokenised here, where the tokenizer's own threads use all cores at once. Large
ones go to processes, which scale further; `python -m gptjax.data.encoding TOKENIZER` is one of
them. They are plain subprocesses and not multiprocessing's, because those run the caller's main
module again, which may start jax.
"""

import collections
import concurrent.futures
import contextlib
import os
import pickle
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gptjax.data.corpus import Document
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.errors import DataError

TASK_CHARS = 1 << 20

Encoded = tuple[list[Document], list[np.ndarray]]


def encode_documents(
  documents: Iterable[Document], tokenizer: Tokenizer, processes: int
) -> Iterator[Encoded]:
  """Tokenises documents.

  Args:
    documents: a stream.
    processes: to start; 0 is none.

  Yields:
    (documents, int32 ids [tokens] of each), in the order of the stream.
  """
  tasks = _group(documents)
  if not processes:
    for task in tasks:
      yield task, tokenizer.encode_arrays([document.text for document in task])
    return
  with _start_workers(tokenizer, processes) as submit:
    waiting = collections.deque()
    for task in tasks:
      waiting.append((task, submit([document.text for document in task])))
      if len(waiting) > 2 * processes:
        task, future = waiting.popleft()
        yield task, future.result()
    for task, future in waiting:
      yield task, future.result()


def _group(documents: Iterable[Document]) -> Iterator[list[Document]]:
  task, chars = [], 0
  for document in documents:
    task.append(document)
    chars += len(document.text)
    if chars >= TASK_CHARS:
      yield task
      task, chars = [], 0
  if task:
    yield task


@contextlib.contextmanager
def _start_workers(tokenizer: Tokenizer, processes: int):
  """Gives a function that sends texts to an idle process and returns a future of their ids."""
  idle = queue.SimpleQueue()
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    file = Path(folder) / "tokenizer.json"
    tokenizer.save(file)
    for _ in range(processes):
      idle.put(stack.enter_context(_worker(file)))
    threads = concurrent.futures.ThreadPoolExecutor(processes)
    stack.callback(threads.shutdown, cancel_futures=True)
    yield lambda texts: threads.submit(_encode_in, idle, texts)


@contextlib.contextmanager
def _worker(tokenizer_file: Path) -> Iterator[subprocess.Popen]:
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    "TOKENIZERS_PARALLELISM": "false",
  }
  process = subprocess.Popen(
    [sys.executable, "-m", "gptjax.data.encoding", str(tokenizer_file)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=environment,
    start_new_session=True,  # Ctrl-C reaches us alone; a worker ends with its standard input
  )
  try:
    yield process
  finally:
    process.kill()
    process.communicate()


def _encode_in(idle: queue.SimpleQueue, texts: list[str]) -> list[np.ndarray]:
  worker = idle.get()
  try:
    pickle.dump(texts, worker.stdin)
    worker.stdin.flush()
    result = pickle.load(worker.stdout)
  except (EOFError, OSError) as error:
    raise DataError(
      f"a tokenising process died (status {worker.wait()}); if memory is short,"
      " set data.build_processes lower"
    ) from error
  finally:
    idle.put(worker)
  if isinstance(result, DataError):
    raise result
  return result


def _serve(tokenizer_file: str) -> None:
  # The end token decides nothing about the ids of a text, once it is marked as special.
  tokenizer = load_tokenizer(tokenizer_file)
  requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
  while True:
    try:
      texts = pickle.load(requests)
    except EOFError:
      return
    try:
      result = tokenizer.encode_arrays(texts)
    except DataError as error:
      result = error
    pickle.dump(result, replies)
    replies.flush()


if __name__ == "__main__":
  _serve(sys.argv[1])
