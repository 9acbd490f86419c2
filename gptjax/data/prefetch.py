"""Reading ahead: what comes next is made in a thread while the devices compute."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


def prefetch(items: Iterable[ItemT], size: int) -> Iterator[ItemT]:
  """Reads ahead in a thread; the thread's exception is raised where its item would have come.

  Args:
    size: items kept ready, at least 1.
  """
  ready: queue.Queue = queue.Queue(size)
  stopped = threading.Event()

  def fill() -> None:
    end = None
    try:
      for item in items:
        ready.put((item, None))
        if stopped.is_set():
          return
    except BaseException as error:
      end = error
    ready.put((None, end or StopIteration()))

  thread = threading.Thread(target=fill, daemon=True)
  thread.start()
  try:
    while True:
      item, error = ready.get()
      if isinstance(error, StopIteration):
        return
      if error:
        raise error
      yield item
  finally:
    stopped.set()
    while thread.is_alive():
      with contextlib.suppress(queue.Empty):
        ready.get(timeout=0.01)
