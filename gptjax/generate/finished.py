"""Texts on the host, of any strategy: joined window by window, stacked row by row.

Letters as in sampling.py.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from gptjax.generate import sampling
from gptjax.generate.sampling import Texts


@dataclasses.dataclass(frozen=True)
class FinishedRows:
  """Rows of tokens and how they ended; fields as of `sampling.Texts`.

  Attributes:
    scores_R: of beams.
    num_rounds_R: of speculation.
  """

  tokens_RS: np.ndarray
  prompt_length_R: np.ndarray
  length_R: np.ndarray
  finish_R: np.ndarray
  logprobs_RS: np.ndarray
  scores_R: np.ndarray | None = None
  num_rounds_R: np.ndarray | None = None
  alternatives: sampling.Alternatives | None = None

  @classmethod
  def of(cls, texts: Texts) -> "FinishedRows":
    shared = {field.name for field in dataclasses.fields(cls)} - {"scores_R", "num_rounds_R"}
    return cls(**{name: getattr(texts, name) for name in shared})

  @classmethod
  def start(cls, prompt: list[int]) -> "FinishedRows":
    """One row that has its prompt only."""
    length_R, tokens_RS = np.array([len(prompt)], np.int32), np.array([prompt], np.int32)
    return cls(tokens_RS, length_R, length_R, length_R * 0, np.zeros(tokens_RS.shape, np.float32))

  def join(self, part: "FinishedRows") -> "FinishedRows":
    """Appends the new tokens of `part`, which began with a window of this row."""
    new = slice(int(part.prompt_length_R[0]), int(part.length_R[0]))
    tokens_RS = np.concatenate([self.tokens_RS, part.tokens_RS[:, new]], axis=1)
    alternatives = part.alternatives
    if alternatives is not None:
      cut = jax.tree.map(lambda array_RSX: array_RSX[:, new], alternatives)
      shape = (1, self.tokens_RS.shape[1], alternatives.ids_RSX.shape[2])
      old = self.alternatives or sampling.Alternatives(np.zeros(shape, np.int32), np.zeros(shape))
      alternatives = jax.tree.map(lambda *both: np.concatenate(both, axis=1), old, cut)
    return dataclasses.replace(
      self,
      tokens_RS=tokens_RS,
      length_R=np.array([tokens_RS.shape[1]], np.int32),
      finish_R=part.finish_R,
      logprobs_RS=np.concatenate([self.logprobs_RS, part.logprobs_RS[:, new]], axis=1),
      alternatives=alternatives,
    )

  @staticmethod
  def stack(rows: Sequence["FinishedRows"]) -> "FinishedRows":
    """Joins single rows of unlike lengths, padded with zeros."""
    width = max(row.tokens_RS.shape[1] for row in rows)

    def join(*arrays):
      if arrays[0].ndim == 1:
        return np.concatenate(arrays)
      widen = [[(0, 0), (0, width - a.shape[1]), *[(0, 0)] * (a.ndim - 2)] for a in arrays]
      return np.concatenate([np.pad(a, pads) for a, pads in zip(arrays, widen)])

    return FinishedRows(
      **{
        field.name: jax.tree.map(join, *(getattr(row, field.name) for row in rows))
        for field in dataclasses.fields(FinishedRows)
      }
    )
