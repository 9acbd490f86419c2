"""Reading ahead keeps order, errors, and no thread behind."""

import itertools
import threading

import pytest

from gptjax.data.prefetch import prefetch
from gptjax.errors import DataError


def test_prefetch_keeps_the_order_and_ends():
  assert list(prefetch(iter(range(50)), 3)) == list(range(50))


def test_prefetch_raises_what_the_thread_raised():
  def broken():
    yield 1
    raise DataError("gone")

  items = prefetch(broken(), 2)
  assert next(items) == 1
  with pytest.raises(DataError, match="gone"):
    next(items)


def test_prefetch_stops_its_thread():
  before = threading.active_count()
  items = prefetch(itertools.count(), 2)
  assert next(items) == 0
  assert threading.active_count() == before + 1
  items.close()
  assert threading.active_count() == before
