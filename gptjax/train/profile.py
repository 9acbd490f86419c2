"""The profiler switch: a trace of a few updates, for TensorBoard or Perfetto."""

import jax


class Profiler:
  """Traces updates [start_step, start_step + num_steps) of a run; a context manager.

  Args:
    folder: where the trace goes.
    start_step: completed updates before the first one traced.
    num_steps: 0 traces nothing.
  """

  def __init__(self, folder: str, start_step: int, num_steps: int):
    self._folder, self._start, self._stop = folder, start_step, start_step + num_steps
    self._is_tracing = False

  def before_step(self, step: int) -> None:
    """Starts or ends the trace; `step` counts completed updates."""
    if self._is_tracing and step >= self._stop:
      self._end()
    elif not self._is_tracing and self._start <= step < self._stop:
      jax.profiler.start_trace(self._folder)
      self._is_tracing = True

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_) -> None:
    if self._is_tracing:
      self._end()

  def _end(self) -> None:
    jax.profiler.stop_trace()
    self._is_tracing = False
