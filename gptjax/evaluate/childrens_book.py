"""The Children's Book Test: which of ten words was left out of a sentence.

Source: Hill et al. 2016; Radford et al. 2019, section 3.2: the choice that makes the rest of the
sentence likeliest. What comes before the gap is the same for all choices, so whole sentences are
compared, each after the twenty before it.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.checkpoint.models import Loaded
from gptjax.data.building import show_progress
from gptjax.errors import DataError
from gptjax.evaluate.detokenizers import detokenize
from gptjax.evaluate.paper import compare_with_paper
from gptjax.evaluate.protocol import TextProtocol
from gptjax.evaluate.receipt import identify, make_receipt
from gptjax.evaluate.scoring import Scorer, continuation_row
from gptjax.evaluate.statistics import error_of_mean
from gptjax.evaluate.texts import encode_pairs, hash_documents, read_texts, start_ids

KINDS = {"CN": "cbt-cn", "NE": "cbt-ne"}
PROTOCOLS = {name: TextProtocol(name, detokenizer="treebank") for name in KINDS.values()}
_GAP = "XXXXX"
_NUMBERED = re.compile(r"\d+ ")


@dataclasses.dataclass(frozen=True)
class Question:
  """A passage, a sentence with a gap, and what may fill it.

  Attributes:
    passage: the sentences before.
    sentence: holds XXXXX.
    choices: words.
    answer: index of the right one.
  """

  passage: str
  sentence: str
  choices: tuple[str, ...]
  answer: int


def measure_childrens_book(
  data: Sequence[str], model: Loaded, scorer: Scorer, protocol: TextProtocol
) -> dict[str, Any]:
  """Answers questions and returns the receipt.

  Args:
    data: files as they are distributed, such as cbtest_CN_test_2500ex.txt.
    model, scorer: what scores.
    protocol: one of PROTOCOLS, by kind of word.

  Raises:
    DataError: nothing there, or not of this format.
  """
  texts = read_texts(data, protocol.documents, protocol.text_column)
  questions = [question for text in texts for question in parse(text)]
  start, limit = start_ids(model, protocol.start), model.config.context_length
  pairs = encode_pairs([*_fill(questions, protocol.detokenizer)], model)
  rows = [continuation_row([*start, *passage], rest, limit) for passage, rest in pairs]
  with show_progress("scoring", len(rows), "sentences") as advance:
    logprobs = iter([scores.logprob for scores in scorer.score(rows, advance=advance)])
  right = np.array(
    [
      np.argmax(list(itertools.islice(logprobs, len(question.choices)))) == question.answer
      for question in questions
    ],
    float,
  )
  found = {
    "accuracy": right.mean(),
    "accuracy_standard_error": error_of_mean(right),
    "counts": {"questions": len(questions), "choices": len(rows)},
  }
  found["published"] = compare_with_paper(protocol.name, found, model.config)
  return make_receipt(
    "cbt",
    identify(model),
    found,
    protocol=dataclasses.asdict(protocol),
    data_hash=hash_documents(text.encode() for text in texts),
  )


def parse(text: str) -> list[Question]:
  """Reads questions: numbered sentences, the last with tabs before its answer and its choices."""
  blocks = [block.split("\n") for block in re.split(r"\n\s*\n", text.strip())]
  return [_parse_block(block) for block in blocks]


def _parse_block(lines: list[str]) -> Question:
  *sentences, last = [_NUMBERED.sub("", line, count=1).strip() for line in lines]
  fields = [field for field in last.split("\t") if field]
  if len(fields) != 3 or _GAP not in fields[0] or not sentences:
    raise DataError(
      f"{lines[-1][:60]!r} is no question of the Children's Book Test; after some sentences comes"
      f" one with {_GAP}, then tabs, the answer, and the choices with | between"
    )
  sentence, answer, listed = fields
  choices = tuple(listed.split("|"))
  if answer not in choices:
    raise DataError(f"the answer {answer!r} is not among the choices {listed!r}")
  return Question(" ".join(sentences), sentence, choices, choices.index(answer))


def _fill(questions: Sequence[Question], detokenizer: str) -> Iterator[tuple[str, str]]:
  for question in questions:
    passage = detokenize(question.passage, detokenizer)
    for choice in question.choices:
      filled = question.sentence.replace(_GAP, choice)
      yield passage, " " + detokenize(filled, detokenizer)
