"""From tokens back to the bytes they were made from."""

import dataclasses

import numpy as np

from gptjax.data.corpus import BYTES_OF
from gptjax.data.token_files import TokenFiles
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Span:
  """Consecutive tokens from one place.

  Attributes:
    text: of the tokens, their end token included.
    path: file or hub split.
    start_byte, end_byte: where the tokens come from. In a txt file and in token files exactly
      these bytes; elsewhere the record that holds them.
    bytes_of: what the bytes are counted in: "the file", or see `corpus.BYTES_OF`.
  """

  text: str
  path: str
  start_byte: int
  end_byte: int
  bytes_of: str


def find_spans(tokens: TokenFiles, tokenizer: Tokenizer, start: int, stop: int) -> list[Span]:
  """Finds the sources of the tokens [start, stop), one span for each piece they touch.

  Raises:
    DataError: a source is gone or is not what was tokenised.
  """
  spans = []
  for number in range(tokens.piece_at(start), tokens.piece_at(stop - 1) + 1):
    first, source_number, start_byte, end_byte = tokens.pieces[number].tolist()
    is_last = number + 1 == len(tokens.pieces)
    end = tokens.num_tokens if is_last else int(tokens.pieces[number + 1][0])
    source = tokens.sources[source_number]
    low, high = max(start, first), min(stop, end)
    text = tokenizer.decode(tokens.read(low, high))
    if source["kind"] == "tokens":
      itemsize = (end_byte - start_byte) // (end - first)
      start_byte, end_byte = (start_byte + (at - first) * itemsize for at in (low, high))
    elif source["kind"] == "txt":
      bounds = _byte_bounds(
        source["path"], start_byte, end_byte, tokenizer, tokens.read(first, end)
      )
      start_byte, end_byte = int(bounds[low - first, 0]), int(bounds[high - first - 1, 1])
    bytes_of = BYTES_OF.get(source["kind"], "the file")
    spans.append(Span(text, source["path"], start_byte, end_byte, bytes_of))
  return spans


def _byte_bounds(
  path: str, start_byte: int, end_byte: int, tokenizer: Tokenizer, ids: np.ndarray
) -> np.ndarray:
  """Tokenises a piece again, for the file's bytes of each token: int64 [tokens, 2]."""
  try:
    with open(path, "rb") as file:
      file.seek(start_byte)
      text = file.read(end_byte - start_byte).decode()
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f'"{path}" cannot be read as it was when tokenised: {error}') from error
  again = tokenizer.encode(text)
  if ids[: len(again)].tolist() != again:
    raise DataError(f'"{path}" has changed since it was tokenised; start again to tokenise it anew')
  spans = start_byte + tokenizer.byte_spans(text)
  end_tokens = np.full((len(ids) - len(again), 2), end_byte)
  return np.concatenate([spans, end_tokens])
