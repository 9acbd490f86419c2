"""Answers of a language model to questions: the likeliest of some, or what it writes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.special

from gptjax.checkpoint.models import Loaded
from gptjax.data.building import show_progress
from gptjax.data.examples import Example
from gptjax.data.task_format import Task
from gptjax.errors import ConfigError
from gptjax.evaluate.completions import complete, make_generator
from gptjax.evaluate.scoring import Row, Scorer, continuation_row
from gptjax.evaluate.templates import NORMALIZATIONS, Template
from gptjax.evaluate.texts import encode, encode_pairs, start_ids

# Thresholds that are tried: values of training examples, at equal shares of them.
_THRESHOLDS = 200


@dataclasses.dataclass(frozen=True)
class Question:
  """An example, and solved ones that stand before it."""

  example: Example
  shots: tuple[Example, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answers:
  """What was answered to questions.

  Attributes:
    metrics: {name: value} of the task.
    by_normalization: the same under each normalization; {} where answers are not compared.
    is_right_N: float64, 1 where the answer is right; None of scores.
    lines: of each question, what was answered, for JSON.
    num_prompts: texts that the model was given.
    num_cut: of these, those that lost their beginning.
  """

  metrics: dict[str, float]
  by_normalization: dict[str, dict[str, float]]
  is_right_N: np.ndarray | None
  lines: list[dict[str, Any]]
  num_prompts: int
  num_cut: int


@dataclasses.dataclass(frozen=True)
class Likelihoods:
  """Of N questions with at most C answers; -inf, and sizes of 1, where there are fewer.

  Attributes:
    logprobs_NC: float64, of all tokens of an answer together.
    tokens_NC, bytes_NC, characters_NC: sizes of the answers; white space around is not counted in
      bytes and characters.
    unconditional_NC: float64, the answer's after the unconditional prompt.
  """

  logprobs_NC: np.ndarray
  tokens_NC: np.ndarray
  bytes_NC: np.ndarray
  characters_NC: np.ndarray
  unconditional_NC: np.ndarray

  def normalize(self, normalization: str) -> np.ndarray:
    """Returns [N, C], what answers are compared by; see `Template.normalization`."""
    if normalization == "unconditional":
      return self.logprobs_NC - self.unconditional_NC
    sizes = {"token": self.tokens_NC, "byte": self.bytes_NC, "character": self.characters_NC}
    return self.logprobs_NC / sizes.get(normalization, 1)


class Judge:
  """Asks one model by one template.

  Args:
    template: what is asked.
    model, scorer: what answers.
    start: the token before each prompt, as of `TextProtocol`.

  Attributes:
    threshold: of the template, or what was fitted.
  """

  def __init__(self, template: Template, model: Loaded, scorer: Scorer, start: str):
    form = template.data
    self.threshold = template.threshold
    self._template = template
    self._task = Task(form.family, form.target, form.labels, form.score_range, form.metrics)
    self._model = model
    self._scorer = scorer
    self._start = start_ids(model, start)

  def ask(self, questions: Sequence[Question]) -> Answers:
    """Returns what the model answers to questions."""
    decide = {
      "likeliest": self._choose,
      "threshold": self._compare,
      "completion": self._complete,
    }
    return decide[self._template.decide](questions)

  def fit(self, examples: Sequence[Example]) -> None:
    """Finds the threshold that is best on examples, by the first metric of the task."""
    means_N, _ = self._mean_logprobs([Question(example) for example in examples])
    labels_N = _labels(examples)
    tried = np.unique(np.quantile(means_N, np.linspace(0, 1, _THRESHOLDS), method="lower"))
    name = self._task.metrics[0]
    found = [self._measure(labels_N, means_N > value)[name] for value in tried]
    self.threshold = float(tried[int(np.argmax(found))])

  def _choose(self, questions: Sequence[Question]) -> Answers:
    pairs = [list(self._pairs(question)) for question in questions]
    rows, scores = self._score([pair for answers in pairs for pair in answers])
    alone = self._score_alone({answer for answers in pairs for _, answer in answers})
    likelihoods = _gather(pairs, scores, alone)
    labels_N = _labels([question.example for question in questions])
    decided = {
      normalization: self._decide(likelihoods.normalize(normalization))
      for normalization in NORMALIZATIONS
    }
    by_normalization = {
      normalization: self._measure(labels_N, decided_N)
      for normalization, decided_N in decided.items()
    }
    chosen = self._template.normalization
    lines = []
    for index, (question, answers) in enumerate(zip(questions, pairs)):
      lines.append(
        {
          "id": question.example.id,
          "label": question.example.label,
          "prediction": decided[chosen][index].item(),
          "logprobs": likelihoods.logprobs_NC[index, : len(answers)].tolist(),
          "tokens": likelihoods.tokens_NC[index, : len(answers)].tolist(),
          "unconditional": likelihoods.unconditional_NC[index, : len(answers)].tolist(),
        }
      )
    is_right_N = None if self._task.target == "score" else decided[chosen] == labels_N
    return Answers(by_normalization[chosen], by_normalization, is_right_N, lines, *rows)

  def _decide(self, outputs_NC: np.ndarray) -> np.ndarray:
    """Returns [N]: the index of the largest (the first of equals), or the mean of the scores."""
    if self._task.target != "score":
      return np.argmax(outputs_NC, axis=1)
    numbers_C = np.array([float(number) for number in self._template.answers])
    return scipy.special.softmax(outputs_NC, axis=1) @ numbers_C

  def _measure(self, labels_N: np.ndarray, decided_N: np.ndarray) -> dict[str, float]:
    # Other evaluations need not wait for scikit-learn.
    from gptjax.evaluate.task_metrics import task_metrics

    return task_metrics(self._task, labels_N, decided_N)

  def _compare(self, questions: Sequence[Question]) -> Answers:
    means_N, rows = self._mean_logprobs(questions)
    labels_N = _labels([question.example for question in questions])
    decided_N = (means_N > self.threshold).astype(np.int32)
    lines = [
      {
        "id": question.example.id,
        "label": question.example.label,
        "prediction": int(decided),
        "mean_logprob": float(mean),
      }
      for question, decided, mean in zip(questions, decided_N, means_N)
    ]
    return Answers(self._measure(labels_N, decided_N), {}, decided_N == labels_N, lines, *rows)

  def _mean_logprobs(self, questions: Sequence[Question]) -> tuple[np.ndarray, tuple[int, int]]:
    pairs = [self._template.fill(question.example, None) for question in questions]
    rows, scores = self._score(pairs)
    return np.array([found.logprob / len(found.logprobs_S) for found in scores]), rows

  def _complete(self, questions: Sequence[Question]) -> Answers:
    pairs = [self._right_pair(question) for question in questions]
    prompts = encode([prompt for prompt, _ in pairs], self._model)
    options = self._template.decoding_options()
    room = self._model.config.context_length - options.max_new_tokens
    prompts = [[*self._start, *prompt] for prompt in prompts]
    with show_progress("completing", len(prompts), "prompts") as advance:
      texts = complete(make_generator(self._model), prompts, options, advance=advance)
    gold = [answer.strip() for _, answer in pairs]
    texts = [text.strip() for text in texts]
    is_right_N = np.array([text == answer for text, answer in zip(texts, gold)])
    lines = [
      {"id": question.example.id, "label": answer, "prediction": text}
      for question, answer, text in zip(questions, gold, texts)
    ]
    num_cut = sum(len(prompt) > room for prompt in prompts)
    metrics = {"exact_match": float(is_right_N.mean())}
    return Answers(metrics, {}, is_right_N, lines, len(prompts), num_cut)

  def _pairs(self, question: Question) -> Iterator[tuple[str, str]]:
    """Yields (prompt, answer) for each answer to choose from."""
    before = self._before(question)
    for word in self._template.words(question.example):
      prompt, answer = self._template.fill(question.example, word)
      yield before + prompt, answer

  def _right_pair(self, question: Question) -> tuple[str, str]:
    prompt, answer = self._solve(question.example)
    return self._before(question) + prompt, answer

  def _solve(self, example: Example) -> tuple[str, str]:
    """Fills the template with the right answer."""
    words = self._template.words(example)
    if not words:
      return self._template.fill(example, None)
    label = example.label
    if self._task.target == "score":
      label = int(np.argmin([abs(float(n) - label) for n in self._template.answers]))
    return self._template.fill(example, words[label])

  def _before(self, question: Question) -> str:
    """Joins what stands before a question: instructions and shots."""
    parts = ["".join(self._solve(shot)) for shot in question.shots]
    instructions = [self._template.instructions] if self._template.instructions else []
    return "".join(part + self._template.separator for part in [*instructions, *parts])

  def _score_alone(self, answers: set[str]) -> dict[str, float]:
    """Returns the log-likelihood of each answer after the unconditional prompt."""
    answers = sorted(answers)
    pairs = [(self._template.unconditional_prompt, answer) for answer in answers]
    _, scores = self._score(pairs)
    return {answer: found.logprob for answer, found in zip(answers, scores)}

  def _score(self, pairs: Sequence[tuple[str, str]]) -> tuple[tuple[int, int], list]:
    """Returns ((rows, rows that were cut), scores) of the second texts."""
    limit, num_cut = self._model.config.context_length, 0
    rows: list[Row] = []
    for context, answer in encode_pairs(pairs, self._model):
      context = [*self._start, *context]
      if not context:
        # A text by itself begins with what nothing can be said about.
        context, answer = answer[:1], answer[1:]
      if not len(answer):
        raise ConfigError("an answer has no token that could be scored; give start a token")
      rows.append(continuation_row(context, answer, limit))
      num_cut += len(context) + len(answer) > limit + 1
    with show_progress("scoring", len(rows), "prompts") as advance:
      return (len(rows), num_cut), self._scorer.score(rows, advance=advance)


def _labels(examples: Sequence[Example]) -> np.ndarray:
  return np.array([example.label for example in examples])


def _gather(
  pairs: Sequence[Sequence[tuple[str, str]]], scores: Sequence, alone: dict[str, float]
) -> Likelihoods:
  """Puts scores, in the order of the pairs, into rows of questions."""
  shape = len(pairs), max(map(len, pairs))
  logprobs_NC, unconditional_NC = np.full(shape, -np.inf), np.zeros(shape)
  tokens_NC, bytes_NC, characters_NC = np.ones((3, *shape), np.int64)
  found = iter(scores)
  for row, answers in enumerate(pairs):
    for column, (_, answer) in enumerate(answers):
      score, text = next(found), answer.strip()
      logprobs_NC[row, column] = score.logprob
      tokens_NC[row, column] = len(score.logprobs_S)
      bytes_NC[row, column] = max(1, len(text.encode()))
      characters_NC[row, column] = max(1, len(text))
      unconditional_NC[row, column] = alone[answer]
  return Likelihoods(logprobs_NC, tokens_NC, bytes_NC, characters_NC, unconditional_NC)
