"""Prompts: whatever a user gives, as rows of token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError


def encode_prompts(prompts: Any, tokenizer: Tokenizer | None) -> list[list[int]]:
  """Returns the token ids of each prompt.

  Args:
    prompts: a text, texts, ids of one prompt, or ids of several (rows of any lengths).
    tokenizer: None takes ids only.

  Raises:
    DataError: something else, or text without a tokenizer.
  """
  if isinstance(prompts, str):
    prompts = [prompts]
  if hasattr(prompts, "tolist"):
    prompts = np.asarray(prompts).tolist()
  if not isinstance(prompts, list | tuple):
    raise DataError(f"prompts are a {type(prompts).__name__}; give text, texts or rows of ids")
  if prompts and all(isinstance(prompt, int | np.integer) for prompt in prompts):
    prompts = [prompts]
  return [_encode_one(prompt, tokenizer) for prompt in prompts]


def _encode_one(prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
  if isinstance(prompt, str):
    if tokenizer is None:
      raise DataError("the model has no tokenizer; give token ids instead of text")
    return tokenizer.encode(prompt)
  try:
    array = np.asarray(prompt)
  except ValueError:
    array = np.array("")
  if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
    raise DataError("a prompt is neither a text nor a row of whole numbers; correct it")
  return array.tolist()


def check_ids(ids: Sequence[Sequence[int]], vocab_size: int) -> None:
  """Raises DataError where a token is outside of the vocabulary."""
  for row in ids:
    outside = [token for token in row if not 0 <= token < vocab_size]
    if outside:
      raise DataError(
        f"a prompt has the token {outside[0]}, but the model's are 0 to {vocab_size - 1};"
        " encode it with the tokenizer of the model"
      )
