"""Two models on the same text: the difference in bits a byte, its interval, and a verdict.

Bytes are what models with different tokenizers have in common. The text is parted into units, each
model's nats of a unit are added up, and the units' differences are what the interval is of.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from gptjax.checkpoint.models import Loaded
from gptjax.errors import DataError
from gptjax.evaluate.detokenizers import detokenize
from gptjax.evaluate.protocol import Protocol
from gptjax.evaluate.receipt import identify, make_receipt
from gptjax.evaluate.scoring import Scorer
from gptjax.evaluate.statistics import CONFIDENCE, FEWEST_DOCUMENTS, standard_error
from gptjax.evaluate.texts import encode, hash_documents, read_texts, start_ids
from gptjax.evaluate.windows import score_tokens

# Documents that are too few are parted at ends of lines or sentences into segments of this size.
_SEGMENT_BYTES = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Units:
  """A text in parts that are taken as independent.

  Attributes:
    kind: "documents" or "segments".
    bounds: for each document int64 [units + 1], the byte where each unit begins, and the end.
  """

  kind: str
  bounds: list[np.ndarray]

  @property
  def bytes_U(self) -> np.ndarray:
    return np.concatenate([np.diff(bounds) for bounds in self.bounds])


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
  """What was measured.

  Attributes:
    receipt: as `--json` prints it.
    units: of the text.
    bits_U: of the first and of the second model, for each unit.
    texts: of the units.
  """

  receipt: dict[str, Any]
  units: Units
  bits_U: tuple[np.ndarray, np.ndarray]
  texts: list[str]


def compare(
  data: Sequence[str],
  models: Sequence[tuple[str, Loaded, Scorer]],
  protocol: Protocol,
  advance: Callable[[int], None] = lambda num_windows: None,
) -> Comparison:
  """Compares two models on texts.

  Args:
    data: as `read_texts` takes it.
    models: name, model and scorer of both.
    protocol: resolved for each model by itself, so that a longer context is used.
    advance: called with the number of windows scored, as they are.

  Raises:
    DataError: as `read_texts`; or a tokenizer that rewrites text, and too few documents to compare
      them as they are.
  """
  originals = read_texts(data, protocol.documents, protocol.text_column)
  texts = [detokenize(text, protocol.detokenizer) for text in originals]
  units = part(texts)
  sides, bits = [], []
  for name, model, scorer in models:
    nats_U, counted = _score(texts, units, model, scorer, protocol, advance)
    bits.append(nats_U / math.log(2))
    sides.append({"model": name, **identify(model), **counted})
    sides[-1]["bits_per_byte"] = float(bits[-1].sum() / units.bytes_U.sum())
    sides[-1]["nats_per_token"] = float(nats_U.sum() / counted["tokens"])
  found = judge(bits[0], bits[1], units)
  receipt = make_receipt(
    "compare",
    {"models": sides},
    found,
    protocol=dataclasses.asdict(protocol),
    data_hash=hash_documents(text.encode() for text in originals),
  )
  parts = [
    text.encode()[start:end].decode()
    for text, bounds in zip(texts, units.bounds)
    for start, end in itertools.pairwise(bounds)
  ]
  return Comparison(receipt, units, (bits[0], bits[1]), parts)


def judge(first_U: np.ndarray, second_U: np.ndarray, units: Units) -> dict[str, Any]:
  """Computes the difference of two models' bits a byte (first less second), and the verdict.

  Returns:
    difference, standard_error and interval (95 %, Student's t over units), all in bits a byte;
    verdict: "the first is better", "the second is better", "not distinguishable" where the interval
    holds 0, or "equal" where every unit costs the same.
  """
  bytes_U, differences_U = units.bytes_U, first_U - second_U
  count = len(bytes_U)
  difference = float(differences_U.sum() / bytes_U.sum())
  error = standard_error(differences_U, bytes_U, np.arange(count))
  low = high = None
  if error is not None:
    width = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    low, high = difference - width, difference + width
  verdict = "not distinguishable"
  if not differences_U.any():
    verdict = "equal"
  elif low is not None and (high < 0 or low > 0):
    verdict = "the first is better" if high < 0 else "the second is better"
  return {
    "difference": difference,
    "standard_error": error,
    "interval": [low, high],
    "verdict": verdict,
    "units": units.kind,
    "counts": {
      "units": count,
      "first_is_better_in": int((differences_U < 0).sum()),
      "bytes": int(bytes_U.sum()),
    },
  }


def part(texts: Sequence[str]) -> Units:
  """Parts texts into units: documents where there are 30 or more, else segments of about 1 kB."""
  if len(texts) >= FEWEST_DOCUMENTS:
    return Units("documents", [np.array([0, len(text.encode())]) for text in texts])
  return Units("segments", [_segment_bounds(text.encode()) for text in texts])


def _segment_bounds(data: bytes) -> np.ndarray:
  """Parts a text before newlines, or before spaces where there is none for long."""
  bounds = [0]
  while len(data) - bounds[-1] > 1.5 * _SEGMENT_BYTES:
    earliest = bounds[-1] + _SEGMENT_BYTES
    cuts = (data.find(mark, earliest, earliest + _SEGMENT_BYTES) for mark in (b"\n", b" "))
    cut = next((cut for cut in cuts if cut > 0), None)
    if cut is None:
      # No spaces: before the first byte of a character.
      cut = earliest
      while data[cut] & 0xC0 == 0x80:
        cut += 1
    bounds.append(cut)
  return np.array([*bounds, len(data)])


def _score(
  texts: Sequence[str],
  units: Units,
  model: Loaded,
  scorer: Scorer,
  protocol: Protocol,
  advance: Callable[[int], None],
) -> tuple[np.ndarray, dict[str, int]]:
  """Returns the nats of each unit, and how many tokens were scored and were not."""
  start = start_ids(model, protocol.start)
  ids = [np.array([*start, *ids], np.int32) for ids in encode(texts, model)]
  scores = score_tokens(ids, protocol.resolve(model.config), scorer, advance=advance)
  nats, tokens = [], 0
  for text, bounds, found in zip(texts, units.bounds, scores, strict=True):
    logprobs = found.logprobs_S[len(start) :].astype(np.float64)
    tokens += int(np.count_nonzero(~np.isnan(logprobs)))
    unit = np.zeros(len(logprobs), np.int64)
    if len(bounds) > 2:
      unit = np.searchsorted(bounds, model.tokenizer.byte_spans(text)[:, 0], side="right") - 1
    nats.append(np.bincount(unit, np.nan_to_num(-logprobs), len(bounds) - 1))
  total = sum(len(row) - len(start) for row in ids)
  if not tokens:
    raise DataError("every document has one token, and nothing comes before it; give more text")
  return np.concatenate(nats), {"tokens": tokens, "tokens_not_scored": total - tokens}
