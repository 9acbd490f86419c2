"""The certificate of invariance: what must not change a text does not, for one model.

Each check generates twice and compares log-probabilities place by place, up to where texts part;
they may part only where the model's two likeliest tokens are nearer than TOLERANCE, since float32
sums in another order decide there.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gptjax.errors import DataError
from gptjax.generate import programs
from gptjax.generate.answer import Generation
from gptjax.generate.generator import Generator
from gptjax.generate.options import DecodingOptions

TOLERANCE = 1e-4  # nats
_NEW_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Check:
  """One equality.

  Attributes:
    name: what was varied.
    num_places: tokens compared.
    difference: the largest, of log-probabilities in nats.
    num_parted: texts that part at a toss-up.
    is_passed: whether all is equal but for these.
  """

  name: str
  num_places: int
  difference: float
  num_parted: int
  is_passed: bool


def certify(generator: Generator, prompts: Sequence[Sequence[int]]) -> list[Check]:
  """Checks batch size, padding, cache length, the cache itself, and texts a prompt.

  Args:
    prompts: ids, of unlike lengths, two at least.

  Raises:
    UserError: fewer than two prompts, or a context too short for twice the new tokens.
  """
  prompts = [list(prompt) for prompt in prompts]
  context, longest = generator.config.context_length, max(map(len, prompts), default=0)
  num_new = min(_NEW_TOKENS, (context - longest) // 2)
  if len(prompts) < 2 or num_new < 1:
    raise DataError(
      f"invariance needs two prompts and room for two tokens after {longest} of {context}"
    )
  plain = DecodingOptions(max_new_tokens=num_new, eos_token_id=(), top_logprobs=2)

  def run(prompts, **changes) -> Generation:
    return generator.generate(prompts, dataclasses.replace(plain, **changes))

  together = run(prompts)
  padded, mask = _pad_left(prompts)
  sampled = {"do_sample": True, "seed": 0}
  return [
    _compare("batch size", together, [run([prompt]) for prompt in prompts]),
    _compare("left padding", together, [run(padded, attention_mask=mask)]),
    _compare("cache length", together, [run(prompts, max_new_tokens=context - longest)]),
    _check_cache(generator, together),
    _compare(
      "texts a prompt, sampled",
      run(prompts[:1], **sampled),
      [run(prompts[:1], num_return_sequences=5, **sampled)],
      is_sampled=True,
    ),
  ]


def _pad_left(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
  width = max(map(len, prompts)) + 1
  padded = np.array([[0] * (width - len(prompt)) + prompt for prompt in prompts])
  mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
  return padded, mask


def _rows(out: Generation) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Returns (new tokens, their log-probabilities, how far ahead the likeliest was) of each row."""
  copies = len(out.num_new) // len(out.prompts)
  rows = []
  for row, num_new in enumerate(out.num_new):
    start = len(out.prompts[row // copies])
    margins = out.top_logprobs[row, :num_new, 0] - out.top_logprobs[row, :num_new, 1]
    rows.append((out.tokens[row, start : start + num_new], out.logprobs[row, :num_new], margins))
  return rows


def _compare(
  name: str, expected: Generation, found: Sequence[Generation], *, is_sampled: bool = False
) -> Check:
  """Compares the rows of one call with those of others, in order, as far as both go.

  Args:
    is_sampled: the margin of the two likeliest excuses no draw.
  """
  others = [row for out in found for row in _rows(out)]
  num_places, difference, num_parted, is_passed = 0, 0.0, 0, True
  for (tokens, logprobs, margins), (other_tokens, other_logprobs, _) in zip(
    _rows(expected), others
  ):
    size = min(len(tokens), len(other_tokens))
    unlike = np.flatnonzero(tokens[:size] != other_tokens[:size])
    same = unlike[0] if len(unlike) else size
    if len(unlike):
      num_parted += 1
      is_passed &= not is_sampled and bool(margins[same] < TOLERANCE)
    gaps = np.abs(logprobs[:same] - other_logprobs[:same])
    num_places, difference = num_places + int(same), max(difference, float(gaps.max(initial=0)))
  return Check(name, num_places, difference, num_parted, is_passed and difference < TOLERANCE)


def _check_cache(generator: Generator, out: Generation) -> Check:
  """Compares with reading each whole text at once, which uses no cache."""
  whole = programs.find_alternatives(generator.weights, out.tokens, 1, generator.config)
  best_RS, logprob_RS = (np.asarray(x)[..., 0] for x in (whole.ids_RSX, whole.logprobs_RSX))
  num_places, difference, num_parted, is_passed = 0, 0.0, 0, True
  for row, (tokens, logprobs, margins) in enumerate(_rows(out)):
    places = slice(len(out.prompts[row]), len(out.prompts[row]) + len(tokens))
    is_other = best_RS[row, places] != tokens
    num_parted += int(is_other.any())
    is_passed &= bool((margins[is_other] < TOLERANCE).all())
    gaps = np.abs(logprob_RS[row, places] - logprobs)[~is_other]
    num_places, difference = num_places + len(gaps), max(difference, float(gaps.max(initial=0)))
  name = "no cache: the whole text read at once"
  return Check(name, num_places, difference, num_parted, is_passed and difference < TOLERANCE)
