"""Texts as an editor has them: what of one the model is given, and where its tokens stand in it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError
from gptjax.generate.generator import Generator

MAX_ROOM = 128
# With no more tokens that begin with a space, it is a token like others, as of letters.
_FEW = 8


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is given to the model of a text before a cursor.

  Attributes:
    ids: never empty.
    start: characters of the text that are left out.
    only_V: the tokens that may follow, where the text ends in a space that belongs to the next
      token; else None.
    has_space: the text ends in a space that the next token brings again.
  """

  ids: list[int]
  start: int
  only_V: np.ndarray | None
  has_space: bool


def make_prompt(text: str, generator: Generator) -> Prompt:
  """Encodes a text before a cursor, its end if it is too long.

  Raises:
    DataError: no tokenizer, characters that it lacks, or no text and no token that begins one.
  """
  tokenizer = generator.tokenizer
  if tokenizer is None:
    raise DataError("the model has no tokenizer, and the editor writes text; serve one that has")
  start = _cut(text, tokenizer, generator.config.context_length - room(generator))
  text = text[start:]
  ids = tokenizer.encode(text)
  has_space, only_V = False, None
  if text.endswith(" "):
    # "a " continues as "a king" does: models have seen " king", and next to never " " and "king".
    without = tokenizer.encode(text[:-1])
    if ids == without:
      has_space = True
    elif ids[:-1] == without and joins_spaces(generator):
      ids, has_space, only_V = without, True, _spaces(generator)
  ids = ids or list(generator.end_ids[:1])
  if not ids:
    raise DataError("there is no text before the cursor; write a few words first")
  return Prompt(ids, start, only_V, has_space)


def room(generator: Generator) -> int:
  """Returns how many tokens of the context are kept free for new ones."""
  return min(MAX_ROOM, max(1, generator.config.context_length // 4))


def joins_spaces(generator: Generator) -> bool:
  """Whether tokens of words have the space before them."""
  return generator.tokenizer is not None and bool(_spaces(generator).sum() > _FEW)


def count_units(text: str) -> int:
  """Returns the length of a text as JavaScript has it, in UTF-16 units."""
  return len(text.encode("utf-16-le")) // 2


def place_values(
  text: str, values: Sequence[float | None], tokenizer: Tokenizer
) -> list[tuple[int, int, float | None]] | None:
  """Says where in a text the values of its first tokens stand.

  Returns:
    (start, end, value), in UTF-16 units; tokens that share a character become one, with the sum of
    their values. None where the tokenizer cannot say.
  """
  try:
    spans = tokenizer.byte_spans(text)
  except DataError:
    return None
  sizes = np.array([(len(char.encode()), count_units(char)) for char in text], int).reshape(-1, 2)
  byte_ends, unit_ends = np.cumsum(sizes, axis=0).T.tolist()
  unit_of_byte = dict(zip([0, *byte_ends], [0, *unit_ends]))
  placed: list[tuple[int, int, float | None]] = []
  for span, value in zip(spans.tolist(), values):
    start, end = (unit_of_byte[byte] for byte in span)
    if placed and start < placed[-1][1]:
      start, _, before = placed.pop()
      value = None if before is None else before + value
    placed.append((start, end, value))
  return placed


def _cut(text: str, tokenizer: Tokenizer, most: int) -> int:
  """Returns where the end of a text begins that has `most` tokens or fewer.

  It moves on by quarters, so that it stays where it is for a while of typing, and what was read
  with it; and to the beginning of a word where one is near.
  """
  start = 0
  while len(tokenizer.encode(text[start:])) > most:
    start += max(1, (len(text) - start) // 4)
    space = text.find(" ", start, start + 32)
    start = space if space >= 0 else start
  return start


def _spaces(generator: Generator) -> np.ndarray:
  """Returns bool [V], the tokens that begin with a space."""
  own = generator.tokenizer.begins_with_space[: generator.config.vocab_size]
  return np.pad(own, (0, generator.config.vocab_size - len(own)))
