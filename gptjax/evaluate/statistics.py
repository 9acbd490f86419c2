"""Perplexities and standard errors of what is measured on text."""

import math

import numpy as np
from scipy import stats

# Of intervals.
CONFIDENCE = 0.95
# With fewer documents than this, errors are estimated from windows.
FEWEST_DOCUMENTS = 30


def perplexity_of(nats: float) -> float | None:
  """Returns exp(nats), or None where that is no float."""
  try:
    return math.exp(nats)
  except OverflowError:
    return None


def independent_units(document_W: np.ndarray) -> tuple[str, np.ndarray]:
  """Returns what is taken as independent, and the number of the unit of each window."""
  # A document of one token has no window, and is no unit.
  documents, document_W = np.unique(document_W, return_inverse=True)
  if len(documents) >= FEWEST_DOCUMENTS:
    return "documents", document_W
  return "windows", np.arange(len(document_W))


def standard_error(sums: np.ndarray, weights: np.ndarray, units: np.ndarray) -> float | None:
  """Estimates the standard error of sum(sums) / sum(weights) from units drawn independently.

  Args:
    sums, weights: of parts.
    units: number of the unit of each part.

  Returns:
    None for a single unit. Source: Cochran 1977, "Sampling Techniques", section 6.4 (the variance
    of a ratio).
  """
  sums, weights = np.bincount(units, sums), np.bincount(units, weights)
  count = len(sums)
  if count < 2:
    return None
  residuals = sums - sums.sum() / weights.sum() * weights
  variance = count / (count - 1) * float(residuals @ residuals)
  return math.sqrt(variance) / float(weights.sum())


def error_of_mean(values: np.ndarray) -> float | None:
  """Returns the standard error of the mean of independent values; None for a single one."""
  return standard_error(values, np.ones(len(values)), np.arange(len(values)))


def half_width(values: np.ndarray) -> float | None:
  """Returns half of the 95 % interval (Student) of the mean of independent values; None for one."""
  error = error_of_mean(np.asarray(values))
  return (
    None if error is None else float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
  )
