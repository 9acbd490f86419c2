"""The engine: one thread drives the device, and requests share its steps.

What waits is admitted in turns, a prompt of each request at a time, as slots become free; a request
that has ended, was given up, or took too long leaves its slots at once. Between two steps the
thread does other things that need the device, one at a time. Answers travel to the event loop once
a step, for all requests together.
"""

import asyncio
import collections
import contextlib
import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from gptjax.checkpoint.models import to_stderr
from gptjax.errors import ConfigError
from gptjax.generate.generator import Generator
from gptjax.generate.options import DecodingOptions
from gptjax.generate.slots import Produced, Prompt, Read, Slots
from gptjax.serve.failures import ApiError
from gptjax.serve.metrics import Metrics
from gptjax.serve.schemas import MAX_BIASED_TOKENS, MAX_LISTED, MAX_TOP_LOGPROBS

Result = TypeVar("Result")

# While the device works, the event loop must get its turn at Python, and the other way around.
_SWITCH_SECONDS = 0.0005
_RETRY_SECONDS = 1
# Of a bad word; longer ones compile the step anew, once.
_BAD_WORD_TOKENS = 7
# Characters or tokens that are encoded and checked in less than a millisecond.
_SHORT = 4096


@dataclasses.dataclass(frozen=True)
class Limits:
  """How much an engine takes on.

  Attributes:
    num_slots: texts that are made at the same time.
    num_positions: tokens of a prompt and its text together; 0 is the context.
    max_queue: requests that wait for slots; one more is refused.
    seconds: that a request may take, waiting included.
  """

  num_slots: int = 16
  num_positions: int = 0
  max_queue: int = 128
  seconds: float = 600.0

  def __post_init__(self):
    for name in ("num_slots", "max_queue"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
    if self.num_positions < 0:
      raise ConfigError(f"num_positions is {self.num_positions}; it must be 0 (all) or more")
    if not self.seconds > 0:
      raise ConfigError(f"seconds is {self.seconds}; it must be more than 0")


@dataclasses.dataclass(frozen=True)
class Event:
  """Something new about a text of a request.

  Attributes:
    prompt: number of the prompt in its request.
    text: number of the text among the prompt's.
    news: a token, or that the prompt was read, which is told of its first text.
  """

  prompt: int
  text: int
  news: Produced | Read


class Call:
  """A request that was taken: what comes of it is read by `events`.

  Args:
    prompts: from `Engine.check`.
    deadline: in seconds of `time.monotonic`.
  """

  def __init__(self, prompts: Sequence[Prompt], deadline: float):
    self.prompts, self.deadline = prompts, deadline
    self.is_cancelled = False
    self.num_admitted = 0  # of the prompts; the engine's thread counts
    self.num_open = sum(prompt.options.num_return_sequences for prompt in prompts)
    self._events: list[Event] = []
    self._error: Exception | None = None
    self._is_done = False
    self._has_news = asyncio.Event()

  async def events(self) -> AsyncIterator[list[Event]]:
    """Yields what has come since, until all texts have ended; left early, the request is given up.

    Raises:
      ApiError: the request took too long, or the device failed.
    """
    try:
      while True:
        await self._has_news.wait()
        self._has_news.clear()
        # More may come while the reader is busy with these.
        events, error, is_done = self._events, self._error, self._is_done
        self._events = []
        if events:
          yield events
        if error is not None:
          raise error
        if is_done:
          return
    finally:
      self.is_cancelled = True

  def deliver(self, events: list[Event], error: Exception | None) -> None:
    """Takes what is new; called on the event loop."""
    self._events += events
    self.num_open -= sum(event.news.is_last for event in events)
    self._error, self._is_done = error, self.num_open == 0
    self._has_news.set()


class Engine:
  """A model at work for many.

  Args:
    generator: the model.
    model_name: what requests call it.
    limits: how much is taken on.
    warm_ups: what else its thread does before it is ready, each called with `report`.
    report: takes lines about the start, and what fails.

  Attributes:
    generator, model_name, limits: as given.
    metrics: what has been done, counted.
  """

  def __init__(
    self,
    generator: Generator,
    model_name: str,
    limits: Limits = Limits(),
    warm_ups: Sequence[Callable[[Callable[[str], None]], None]] = (),
    report: Callable[[str], None] = to_stderr,
  ):
    self.generator, self.model_name, self.limits = generator, model_name, limits
    self.num_positions = limits.num_positions or generator.config.context_length
    self.metrics = Metrics(lambda: len(self._waiting), lambda: len(self._running))
    self._warm_ups, self._report = warm_ups, report
    self._status = "starting"
    self._slots = Slots(generator, limits.num_slots, self.num_positions)
    self._wake = threading.Condition()
    self._waiting: collections.deque[Call] = collections.deque()
    self._functions: collections.deque[tuple[Callable[[], Any], asyncio.Future]] = (
      collections.deque()
    )
    # The engine's thread alone: slot -> (its request, number of the prompt, of the text).
    self._running: dict[int, tuple[Call, int, int]] = {}
    self._loop: asyncio.AbstractEventLoop | None = None
    self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

  @property
  def status(self) -> str:
    """Returns "starting", "ready", "stopping" or "failed"."""
    return self._status

  @property
  def is_ready(self) -> bool:
    """Whether requests are taken."""
    return self._status == "ready"

  def start(self) -> None:
    """Starts the thread; called on the event loop that requests come from."""
    self._loop = asyncio.get_running_loop()
    sys.setswitchinterval(_SWITCH_SECONDS)
    self._thread.start()

  async def stop(self) -> None:
    """Takes nothing more, finishes what runs, and ends the thread; a start is not waited for."""
    with self._wake:
      was_ready, self._status = self.is_ready, "stopping"
      self._wake.notify()
    while was_ready and self._thread.is_alive():
      await asyncio.sleep(0.01)

  async def check(
    self, prompts: Sequence[Any], options: DecodingOptions, **kinds: Any
  ) -> list[Prompt]:
    """Looks at prompts, without the device: see `Slots.check`.

    Raises:
      UserError: as `Slots.check`. ApiError: as `submit`.
    """
    self._check_takes_more()

    def check() -> list[Prompt]:
      return [self._slots.check(prompt, options, **kinds) for prompt in prompts]

    # Long texts take a while to encode, and other requests should not wait for them.
    is_short = sum(map(len, prompts)) < _SHORT
    return check() if is_short else await asyncio.to_thread(check)

  def submit(self, prompts: Sequence[Prompt]) -> Call:
    """Takes a request.

    Raises:
      ApiError: 429 where too many wait; 503 where none is taken.
    """
    call = Call(prompts, time.monotonic() + self.limits.seconds)
    with self._wake:
      self._check_takes_more()
      self._waiting.append(call)
      self._wake.notify()
    self.metrics.prompt_tokens.inc(sum(len(prompt.ids) for prompt in prompts))
    return call

  async def run(self, function: Callable[[], Result]) -> Result:
    """Runs a function on the engine's thread, between two steps, and returns what it returns.

    Others wait meanwhile. Where the caller is cancelled before it began, it does not begin.

    Raises:
      ApiError: as `submit`, or it took too long. Exception: what the function raises.
    """
    future = asyncio.get_running_loop().create_future()
    with self._wake:
      self._check_takes_more()
      self._functions.append((function, future))
      self._wake.notify()
    try:
      return await asyncio.wait_for(future, self.limits.seconds)
    except TimeoutError:
      raise self._late() from None

  def _late(self) -> ApiError:
    return ApiError(
      504, f"the request took more than {self.limits.seconds:g} seconds", code="time_limit"
    )

  def _check_takes_more(self) -> None:
    if not self.is_ready:
      raise ApiError(
        503, f"the server is {self._status}", code=self._status, headers={"Retry-After": "5"}
      )
    if len(self._waiting) + len(self._functions) >= self.limits.max_queue:
      self.metrics.refused.inc()
      raise ApiError(
        429,
        f"{self.limits.max_queue} requests wait already; try again later",
        code="queue_full",
        headers={"Retry-After": str(_RETRY_SECONDS)},
      )

  def _main(self) -> None:
    try:
      self._warm_up()
    except Exception as error:
      self._status = "failed"
      self._report(f"the engine could not start: {error}")
      traceback.print_exc()
      return
    with self._wake:
      if self._status == "starting":
        self._status = "ready"
    while self._tick():
      pass

  def _warm_up(self) -> None:
    started = time.monotonic()

    def progress(done: int, total: int) -> None:
      seconds = time.monotonic() - started
      self._report(f"compiled {done} of {total} programs for {self.model_name}, {seconds:.0f} s")

    self._slots.warm_up(_most_options(self.generator.config.vocab_size), progress)
    for warm_up in self._warm_ups:
      warm_up(self._report)

  def _tick(self) -> bool:
    """One turn of the thread; returns whether there is to be another one."""
    with self._wake:
      self._wake.wait_for(
        lambda: self._waiting or self._running or self._functions or self._status == "stopping"
      )
      if not (self._waiting or self._running or self._functions):
        return False
      function = self._functions.popleft() if self._functions else None
    if function is not None:
      self._run_function(*function)
    news: dict[Call, list[Event]] = {}
    errors = self._leave()
    try:
      self._admit()
      self._step(news)
    except Exception as error:
      traceback.print_exc()
      self._report(f"a step failed, and with it the requests that ran: {error}")
      failure = ApiError(500, "the device failed; the server's log says more")
      errors |= {call: failure for call, _, _ in self._running.values()}
      self._running.clear()
      self._slots = Slots(self.generator, self.limits.num_slots, self.num_positions)
      self._slots.warm_up(_most_options(self.generator.config.vocab_size))
    if news or errors:
      self._on_loop(_deliver, news, errors)
    return True

  def _run_function(self, function: Callable[[], Any], future: asyncio.Future) -> None:
    if future.cancelled():
      return
    try:
      result, error = function(), None
    except Exception as raised:
      result, error = None, raised
    self._on_loop(_resolve, future, result, error)

  def _leave(self) -> dict[Call, Exception]:
    """Frees what was given up or took too long; returns the requests of the latter."""
    now, late = time.monotonic(), {}

    def leaves(call: Call) -> bool:
      if now > call.deadline:
        late[call] = self._late()
      return call.is_cancelled or call in late

    for slot in [slot for slot, (call, _, _) in self._running.items() if leaves(call)]:
      self._slots.release(slot)
      del self._running[slot]
    with self._wake:
      if any(leaves(call) for call in self._waiting):
        self._waiting = collections.deque(call for call in self._waiting if not leaves(call))
    return late

  def _admit(self) -> None:
    """Admits a prompt of each waiting request in turn, while there are slots."""
    while True:
      with self._wake:
        if not self._waiting:
          return
        call = self._waiting[0]
        index = call.num_admitted
        prompt = call.prompts[index]
        if prompt.options.num_return_sequences > self._slots.num_free:
          return
        self._waiting.popleft()
        call.num_admitted += 1
        if call.num_admitted < len(call.prompts):
          self._waiting.append(call)
      for text, slot in enumerate(self._slots.admit(prompt, prompt_index=index)):
        self._running[slot] = call, index, text

  def _step(self, news: dict[Call, list[Event]]) -> None:
    started = time.monotonic()
    produced = self._slots.step()
    if not produced:
      return
    self.metrics.step_seconds.observe(time.monotonic() - started)
    for one in produced:
      slots = one.slots if isinstance(one, Read) else [one.slot]
      call, prompt, text = self._running[slots[0]]
      news.setdefault(call, []).append(Event(prompt, text, one))
      if one.is_last:
        for slot in slots:
          del self._running[slot]
    self.metrics.new_tokens.inc(sum(isinstance(one, Produced) for one in produced))

  def _on_loop(self, function: Callable, *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # a loop that is closed: nobody waits
      self._loop.call_soon_threadsafe(function, *arguments)


def _deliver(news: dict[Call, list[Event]], errors: dict[Call, Exception]) -> None:
  for call in {**news, **errors}:
    call.deliver(news.get(call, []), errors.get(call))


def _resolve(future: asyncio.Future, result: Any, error: Exception | None) -> None:
  if future.cancelled():
    return
  if error is None:
    future.set_result(result)
  else:
    future.set_exception(error)


def _most_options(vocab_size: int) -> DecodingOptions:
  """Makes the options of a text that uses all there is, at its largest."""
  ids = list(range(min(MAX_LISTED, vocab_size - 1)))
  return DecodingOptions(
    max_new_tokens=2,
    do_sample=True,
    top_k=vocab_size - 1,
    top_p=0.9,
    min_p=0.1,
    typical_p=0.9,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    no_repeat_ngram_size=3,
    min_new_tokens=2,
    bad_words_ids=[[0] * _BAD_WORD_TOKENS + [token] for token in ids],
    logit_bias=dict.fromkeys(range(min(MAX_BIASED_TOKENS, vocab_size)), 0.1),
    suppress_tokens=ids,
    begin_suppress_tokens=ids,
    forced_bos_token_id=vocab_size - 1,
    forced_eos_token_id=vocab_size - 1,
    eos_token_id=ids,
    top_logprobs=min(MAX_TOP_LOGPROBS, vocab_size),
  )
