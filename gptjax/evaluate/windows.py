"""Documents cut into windows, which overlap so that each token is scored once."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from gptjax.evaluate.protocol import Protocol
from gptjax.evaluate.scoring import Row
from gptjax.evaluate.texts import Corpus


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """A corpus cut into rows.

  Attributes:
    rows: in the order of the text.
    document_W: int64, the document of each.
  """

  rows: list[Row]
  document_W: np.ndarray

  @property
  def scored_W(self) -> np.ndarray:
    """int64, the scored tokens of each row."""
    return np.array([row.num_scored for row in self.rows], np.int64)


def cut_windows(corpus: Corpus, protocol: Protocol) -> Windows:
  """Cuts documents into overlapping windows.

  Args:
    corpus: documents of two tokens or more.
    protocol: resolved.
  """
  rows, document = [], []
  for index, ids in enumerate(corpus.documents):
    cut = list(_cut_document(ids, protocol.context, protocol.stride))
    rows += cut
    document += [index] * len(cut)
  return Windows(rows, np.array(document, np.int64))


def _cut_document(ids: np.ndarray, context: int, stride: int) -> Iterator[Row]:
  """Source: transformers' documentation, "Perplexity of fixed-length models"."""
  scored_to = 0
  for start in range(0, len(ids), stride):
    end = min(start + context, len(ids))
    # The first token of a window has nothing before it there.
    num_scored = end - max(scored_to, start + 1)
    if num_scored:
      yield Row(ids[start:end], num_scored)
    scored_to = end
    if end == len(ids):
      return
