"""Examples as token sequences: GPT-1's input transformations.

    classification   <s> text <e>
    entailment       <s> premise $ hypothesis <e>
    similarity       <s> text $ text2 <e> and <s> text2 $ text <e>
    multiple choice  <s> context $ answer <e>, a sequence for each answer

Source: Radford et al. 2018, section 3.3 and figure 1. Imports no jax.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from gptjax.data.examples import Example
from gptjax.data.task_config import MARKS, TaskDataConfig
from gptjax.data.task_format import Task
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import ConfigError, DataError, did_you_mean

# How a tokenizer spells the tokens that are added for the roles; text that says so is text.
NEW_TOKENS = {"start": "<|start|>", "delimiter": "<|delimiter|>", "extract": "<|extract|>"}

# Of one sequence: int32 tokens to be joined. Sequences share those of a text that they share.
Pieces = tuple[np.ndarray, ...]
# Of one sequence: the texts before the delimiter, and those after it if it has one.
Outline = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class TaskTokens:
  """Ids of the tokens that mark a sequence, `<s>`, `$` and `<e>` of the paper; None is no mark."""

  start: int | None
  delimiter: int | None
  extract: int | None


@dataclasses.dataclass(frozen=True)
class EncodedTask:
  """Examples as sequences of tokens.

  Attributes:
    sequences: of each example, in order. The last token is what a head reads.
    labels_N: int32 classes or answers, or float32 scores; 0 where the label is not known.
    num_cut: examples of which a text did not fit and lost its end.
  """

  sequences: list[list[Pieces]]
  labels_N: np.ndarray
  num_cut: int

  @property
  def num_examples(self) -> int:
    return len(self.sequences)

  @functools.cached_property
  def num_sequences(self) -> int:
    """Most sequences of an example."""
    return max(map(len, self.sequences))

  @functools.cached_property
  def lengths_N(self) -> np.ndarray:
    """Tokens of the longest sequence of each example."""
    lengths = [max(sum(map(len, pieces)) for pieces in sequences) for sequences in self.sequences]
    return np.array(lengths, np.int32)


def new_tokens(config: TaskDataConfig) -> list[str]:
  """Returns the tokens that a tokenizer needs for a task, where it does not have them yet.

  `load_tokenizer` and `load_model` take them as additional_special_tokens.
  """
  return [NEW_TOKENS[mark] for mark in config.marks if not getattr(config, f"{mark}_token")]


def find_task_tokens(tokenizer: Tokenizer, config: TaskDataConfig) -> TaskTokens:
  """Finds the ids of the tokens that mark a sequence.

  Raises:
    ConfigError: one that the config names is not in the tokenizer.
    DataError: the tokenizer lacks the tokens of `new_tokens`.
  """
  vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
  ids = {}
  for mark in config.marks:
    given, new = getattr(config, f"{mark}_token"), NEW_TOKENS[mark]
    if given and given not in vocab:
      hint = did_you_mean(given, vocab)
      raise ConfigError(f'data.{mark}_token "{given}" is not in the tokenizer{hint}')
    if not given and new not in vocab:
      raise DataError(
        f'the tokenizer has no "{new}"; it is not that of a model for tasks, or not of this one'
      )
    ids[mark] = vocab[given or new]
  if len(set(ids.values())) < len(ids):
    raise ConfigError("data.start_token, delimiter_token and extract_token must be different")
  return TaskTokens(*(ids.get(mark) for mark in MARKS))


def mark_texts(tokenizer: Tokenizer, config: TaskDataConfig) -> Backend:
  """Returns a copy of the backend that marks a text or a pair by itself.

  A post-processor does it, which our own Tokenizer does not ask and transformers does.
  """
  backend = Backend.from_str(tokenizer.backend.to_str())
  found = dataclasses.astuple(find_task_tokens(tokenizer, config))
  start, delimiter, extract = ([] if i is None else [backend.id_to_token(i)] for i in found)
  marking = processors.TemplateProcessing(
    single=[*start, "$A", *extract],
    pair=[*start, "$A", *delimiter, "$B", *extract],
    special_tokens=[(backend.id_to_token(i), i) for i in found if i is not None],
  )
  earlier = backend.post_processor
  backend.post_processor = processors.Sequence([earlier, marking]) if earlier else marking
  return backend


def encode_examples(
  examples: Sequence[Example],
  task: Task,
  tokenizer: Tokenizer,
  tokens: TaskTokens,
  max_length: int,
) -> EncodedTask:
  """Makes the sequences of examples.

  Where one would be longer than max_length, the longest texts of the example lose their ends
  until it fits: none that is shorter than others is cut, no marking token is lost, and all
  sequences of an example have the same part of what they share. The original gives each of two
  texts half of the context; this never keeps less.

  Args:
    examples: of one task.
    task: what is asked.
    tokenizer: for the texts, in which it parses no special tokens.
    tokens: from `find_task_tokens`.
    max_length: most tokens of a sequence.

  Raises:
    ConfigError: max_length has no room for a token of every text.
    DataError: a text that the tokenizer refuses.
  """
  outlines_N = [_outlines(example, task) for example in examples]
  texts = dict.fromkeys(text for outlines in outlines_N for text in _texts(outlines))
  ids = dict(zip(texts, tokenizer.encode_arrays(list(texts))))
  marks = [
    np.array([] if mark is None else [mark], np.int32) for mark in dataclasses.astuple(tokens)
  ]
  sequences, num_cut = [], 0
  for outlines in outlines_N:
    most = min(_most_tokens(outline, ids, marks, max_length) for outline in outlines)
    num_cut += any(len(ids[text]) > most for text in _texts(outlines))
    sequences.append([_sequence(outline, ids, marks, most) for outline in outlines])
  dtype = np.float32 if task.target == "score" else np.int32
  labels_N = np.array([example.label or 0 for example in examples], dtype)
  return EncodedTask(sequences, labels_N, num_cut)


def _outlines(example: Example, task: Task) -> list[Outline]:
  """Returns an outline of each sequence; a space parts the parts of a text."""
  text, text2 = (
    tuple(" " * (i > 0) + part for i, part in enumerate(parts))
    for parts in (example.text, example.text2)
  )
  if task.family == "multiple_choice":
    return [(text, (choice,)) for choice in example.choices]
  if task.family == "similarity":
    # Sorted, so that a pair makes the same rows however it is given: in another row of a batch a
    # product may differ in its last bit.
    return sorted([(text, text2), (text2, text)])
  return [(text, text2)] if task.family == "entailment" else [(text,)]


def _texts(outlines: list[Outline]) -> Iterator[str]:
  return (text for outline in outlines for side in outline for text in side)


def _most_tokens(
  outline: Outline, ids: Mapping[str, np.ndarray], marks: list[np.ndarray], max_length: int
) -> int:
  """Returns how many tokens a text may keep for the sequence to fit."""
  room = max_length - sum(map(len, _sequence(outline, ids, marks, 0)))
  lengths = sorted(len(ids[text]) for text in _texts([outline]))
  for place, length in enumerate(lengths):
    share = room // (len(lengths) - place)
    if share < 1:
      raise ConfigError(
        f"a sequence has {max_length} tokens at most, too few for {len(lengths)} texts and their"
        " marks; raise data.max_length"
      )
    if length > share:
      return share
    room -= length
  return max(lengths)


def _sequence(
  outline: Outline, ids: Mapping[str, np.ndarray], marks: list[np.ndarray], most: int
) -> Pieces:
  """Marks the texts of an outline, of each at most so many tokens."""
  start, delimiter, extract = marks
  delimited = [piece for side in outline for piece in (delimiter, *(ids[t][:most] for t in side))]
  return (start, *delimited[1:], extract)
