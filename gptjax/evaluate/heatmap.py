"""Which tokens of a text surprise a model, and what it would rather have seen."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gptjax.checkpoint.models import Loaded
from gptjax.errors import DataError
from gptjax.evaluate.protocol import Protocol
from gptjax.evaluate.scoring import Scorer, Scores
from gptjax.evaluate.texts import TokenTexts, encode, need_tokenizer, start_ids
from gptjax.evaluate.windows import score_tokens


@dataclasses.dataclass(frozen=True)
class Token:
  """A scored token.

  Attributes:
    text: of the token alone; part of a character shows as U+FFFD.
    bits: of surprise, -log2 of its probability; None where nothing comes before it.
    alternatives: the likeliest tokens in its place with their probabilities, best first.
  """

  text: str
  bits: float | None
  alternatives: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Cell:
  """A piece of the text with the tokens it was made from: none, one, or those of a character.

  Attributes:
    text: as it stands in the text.
    tokens: in order.
  """

  text: str
  tokens: tuple[Token, ...]

  @property
  def bits(self) -> float | None:
    """Of all its tokens; None where one is not known, or there is none."""
    bits = [token.bits for token in self.tokens]
    return sum(bits) if bits and None not in bits else None


def make_heatmap(
  text: str,
  model: Loaded,
  scorer: Scorer,
  protocol: Protocol,
  num_alternatives: int = 5,
  num_tokens: int | None = None,
) -> list[Cell]:
  """Scores the tokens of a text and puts them in their places; the cells join to the text.

  Args:
    text: not empty.
    model, scorer: what scores.
    protocol: windows and start token.
    num_alternatives: shown beside each token.
    num_tokens: stop after so many; None is all.

  Raises:
    DataError: no tokenizer, or one that rewrites text; or nothing to score.
  """
  tokenizer = need_tokenizer(model)
  spans = tokenizer.byte_spans(text)[:num_tokens]
  ids = encode([text], model)[0][:num_tokens]
  start = start_ids(model, protocol.start)
  if len(ids) + len(start) < 2:
    raise DataError("the text has one token, and nothing comes before it; give more text")
  whole = [np.array([*start, *ids], np.int32)]
  (scores,) = score_tokens(whole, protocol.resolve(model.config), scorer, num_alternatives)
  decode = TokenTexts(tokenizer)
  tokens = [
    _token(scores, place + len(start), index, decode) for place, index in enumerate(ids.tolist())
  ]
  data = text.encode()
  return _place(tokens, spans, data if num_tokens is None else data[: int(spans[-1, 1])])


def _token(scores: Scores, place: int, index: int, decode: TokenTexts) -> Token:
  logprob = float(scores.logprobs_S[place])
  if math.isnan(logprob):
    return Token(decode(index), None, ())
  alternatives = zip(
    scores.alternatives_SX[place].tolist(), scores.alternative_logprobs_SX[place].tolist()
  )
  return Token(
    decode(index),
    -logprob / math.log(2),
    tuple((decode(other), math.exp(logprob)) for other, logprob in alternatives),
  )


def _place(tokens: Sequence[Token], spans: np.ndarray, data: bytes) -> list[Cell]:
  """Joins the tokens of one character, and puts in what no token was made from."""
  cells, at, reach = [], 0, 0
  pending: list[Token] = []
  starts = [*spans[1:, 0].tolist(), len(data)]
  for token, (start, end), following in zip(tokens, spans.tolist(), starts, strict=True):
    if start > at and not pending:
      cells.append(Cell(data[at:start].decode(), ()))
      at = start
    pending.append(token)
    reach = max(reach, end)
    # Tokens of one character all have its bytes as their span.
    if following >= reach:
      cells.append(Cell(data[at:reach].decode(), tuple(pending)))
      at, pending = reach, []
  if at < len(data):
    cells.append(Cell(data[at:].decode(), ()))
  return cells
