"""Documents cut into windows, which overlap so that each token is scored once."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gptjax.evaluate.protocol import Protocol
from gptjax.evaluate.scoring import Row, Scorer, Scores
from gptjax.evaluate.texts import Corpus


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """A corpus cut into rows.

  Attributes:
    rows: in the order of the text.
    document_W: int64, the document of each.
    new_W: int64, tokens that no window before holds; all are scored but a document's first, and
      those that a window begins with.
  """

  rows: list[Row]
  document_W: np.ndarray
  new_W: np.ndarray

  @property
  def scored_W(self) -> np.ndarray:
    """int64, the scored tokens of each row."""
    return np.array([row.num_scored for row in self.rows], np.int64)


def cut_windows(corpus: Corpus, protocol: Protocol) -> Windows:
  """Cuts documents into overlapping windows.

  Args:
    corpus: one of its documents has two tokens or more.
    protocol: resolved.
  """
  cut = [
    (index, window)
    for index, ids in enumerate(corpus.documents)
    for window in _cut_document(ids, protocol)
  ]
  return Windows(
    [window.row for _, window in cut],
    np.array([index for index, _ in cut], np.int64),
    np.array([window.num_new for _, window in cut], np.int64),
  )


def score_tokens(
  documents: Sequence[np.ndarray],
  protocol: Protocol,
  scorer: Scorer,
  num_alternatives: int = 0,
  advance: Callable[[int], None] = lambda num_rows: None,
) -> list[Scores]:
  """Scores every token of documents, in the windows of a protocol.

  Args:
    documents: ids of each.
    protocol: resolved.
    scorer, num_alternatives, advance: see `Scorer.score`.

  Returns:
    Scores of each document with an entry for each of its ids; of those that nothing comes before,
    the log-probability is NaN.
  """
  cut = [
    (index, window)
    for index, ids in enumerate(documents)
    for window in _cut_document(ids, protocol)
  ]
  found = [_unknown(len(ids), num_alternatives) for ids in documents]
  scored = scorer.score([window.row for _, window in cut], num_alternatives, advance)
  for (index, window), scores in zip(cut, scored, strict=True):
    places = slice(window.end - window.row.num_scored, window.end)
    for field in dataclasses.fields(Scores):
      getattr(found[index], field.name)[places] = getattr(scores, field.name)
  return found


def _unknown(length: int, num_alternatives: int) -> Scores:
  return Scores(
    np.full(length, np.nan, np.float32),
    np.zeros(length, bool),
    np.zeros((length, num_alternatives), np.int32),
    np.zeros((length, num_alternatives), np.float32),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Window:
  """A row, where it ends in its document, and how many of its tokens no window before holds."""

  row: Row
  end: int
  num_new: int


def _cut_document(ids: np.ndarray, protocol: Protocol) -> Iterator[_Window]:
  """Yields the windows that have something to score.

  Source: transformers' documentation, "Perplexity of fixed-length models".
  """
  scored_to = 0
  for start in range(0, len(ids), protocol.stride):
    end = min(start + protocol.context, len(ids))
    # The first token of a window has nothing before it there.
    num_scored = end - max(scored_to, start + 1)
    if num_scored:
      yield _Window(Row(ids[start:end], num_scored), end, end - scored_to)
    scored_to = end
    if end == len(ids):
      return
