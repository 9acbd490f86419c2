"""Counts and times of a server, as Prometheus reads them."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_REQUEST_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
  """What a server has done; each has a registry of its own.

  Args:
    num_waiting: returns the requests that wait for slots.
    num_running: returns the slots in use.

  Attributes:
    prompt_tokens, new_tokens, refused: counters; the last of requests that found the queue full.
    step_seconds: histogram.
    requests: counter by route and status.
    request_seconds: histogram by route.
  """

  def __init__(self, num_waiting: Callable[[], int], num_running: Callable[[], int]):
    self._registry = CollectorRegistry()
    kinds = {"registry": self._registry, "namespace": "gptjax"}
    self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts taken.", **kinds)
    self.new_tokens = Counter("new_tokens", "Tokens generated.", **kinds)
    self.refused = Counter("refused", "Requests that found the queue full.", **kinds)
    self.step_seconds = Histogram(
      "step_seconds", "Steps of the batch, prompts included.", buckets=_STEP_BUCKETS, **kinds
    )
    self.requests = Counter("requests", "Requests answered.", ["route", "status"], **kinds)
    self.request_seconds = Histogram(
      "request_seconds", "Time to answer.", ["route"], buckets=_REQUEST_BUCKETS, **kinds
    )
    waiting = Gauge("waiting_requests", "Requests that wait for slots.", **kinds)
    waiting.set_function(num_waiting)
    running = Gauge("running_texts", "Texts in the making.", **kinds)
    running.set_function(num_running)

  def to_text(self) -> str:
    """Returns Prometheus's text format."""
    return generate_latest(self._registry).decode()
