"""How many rows each batch has, and how many rows and tokens came before it."""

import bisect
import dataclasses
import functools

from gptjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
  """How many rows each batch has.

  A ramp doubles: a batch is ramp_start_rows times the power of two at or below the straight line
  from ramp_start_rows to batch_rows over ramp_tokens tokens. Each size is a program to compile, so
  there are few.

  Attributes:
    batch_rows: rows of a batch, once the ramp is over.
    context_length: tokens of a row.
    ramp_start_rows, ramp_tokens: of the ramp; 0 is none.
    multiple: every batch is a multiple of this many rows.

  Source: Brown et al. 2020, appendix B, has the straight line, from 32k tokens.
  """

  batch_rows: int
  context_length: int
  ramp_start_rows: int = 0
  ramp_tokens: int = 0
  multiple: int = 1

  def __post_init__(self):
    if bool(self.ramp_start_rows) != bool(self.ramp_tokens):
      raise ConfigError("train.ramp_start_rows and train.ramp_tokens need each other; set both")
    if self.ramp_start_rows > self.batch_rows:
      raise ConfigError(
        f"train.ramp_start_rows {self.ramp_start_rows} is above train.batch_rows"
        f" {self.batch_rows}; a ramp grows"
      )
    for key in ("batch_rows", "ramp_start_rows"):
      if getattr(self, key) % self.multiple:
        raise ConfigError(
          f"train.{key} is {getattr(self, key)}; it must be a multiple of train.accumulation,"
          f" {self.multiple}"
        )

  def check_processes(self, process_count: int) -> None:
    """Raises ConfigError unless so many processes can share every batch evenly."""
    for key in ("ramp_start_rows", "batch_rows"):
      check_divides(getattr(self, key), process_count, f"train.{key}")

  def rows(self, batch: int) -> int:
    """Returns the rows of a batch."""
    return self.rows_before(batch + 1) - self.rows_before(batch)

  def rows_before(self, batch: int) -> int:
    """Returns the rows of all batches before this one."""
    ramp = len(self._ramp_rows) - 1
    return self._ramp_rows[min(batch, ramp)] + max(batch - ramp, 0) * self.batch_rows

  def tokens_before(self, batch: int) -> int:
    """Returns the tokens of all batches before this one, padding included."""
    return self.rows_before(batch) * self.context_length

  def batches_for(self, rows: int) -> int:
    """Returns how many batches it takes to see at least this many rows."""
    ramp = len(self._ramp_rows) - 1
    if rows > self._ramp_rows[ramp]:
      return ramp + -(-(rows - self._ramp_rows[ramp]) // self.batch_rows)
    return bisect.bisect_left(self._ramp_rows, rows)

  @functools.cached_property
  def _ramp_rows(self) -> list[int]:
    """Rows before each batch of the ramp, and before the first batch after it."""
    before = [0]
    while (tokens := before[-1] * self.context_length) < self.ramp_tokens:
      line = self.batch_rows * tokens + self.ramp_start_rows * (self.ramp_tokens - tokens)
      doublings = (line // (self.ramp_tokens * self.ramp_start_rows)).bit_length() - 1
      before.append(before[-1] + (self.ramp_start_rows << doublings))
    return before


def check_divides(rows: int, process_count: int, key: str) -> None:
  """Raises ConfigError, with the key to change, unless rows divide among the processes."""
  if rows % process_count:
    raise ConfigError(
      f"a batch of {rows} rows does not divide among {process_count} processes; make {key} a"
      f" multiple of {process_count}"
    )
