"""Templates: how an example becomes a prompt and the answers to it. A template is a TOML file.

    prompt = "{premise|no_period} {question}"
    answer = " {answer|lower_first}"

    [data]
    adapter = "copa"
    [data.wording.question]
    cause = "because"
    effect = "therefore"

`{NAME}` stands for a column of the example, and `{answer}` for an answer to choose from, or the
word of a label (`[answers]`). `{NAME|FILTER}` changes it; `{{` and `}}` are braces. `[data]` has
the keys of `TaskFormat`, over those of an `adapter`. The other keys are the fields of `Template`.
Ready ones are in `gptjax/evaluate/prompts`.
"""

import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gptjax.config import from_mapping
from gptjax.data.examples import Example
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.task_format import TaskFormat
from gptjax.errors import ConfigError, UserError, check_choice, did_you_mean
from gptjax.generate.options import DecodingOptions

READY = Path(__file__).parent / "prompts"
DECISIONS = ("likeliest", "threshold", "completion")
NORMALIZATIONS = ("none", "token", "byte", "character", "unconditional")
FILTERS: Mapping[str, Callable[[str], str]] = {
  "lower_first": lambda text: text[:1].lower() + text[1:],
  "no_period": lambda text: text.rstrip().removesuffix("."),
}
ANSWER = "answer"
_BLANK_SIDES = ("before", "after")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}|]*)(?:\|([^{}|]*))?\}|[{}]")
# Of each decision, the keys that have an effect with it alone.
_DETAILS = {
  "likeliest": ("normalization", "unconditional_prompt"),
  "threshold": ("threshold",),
  "completion": ("stop", "max_new_tokens", "num_beams", "length_penalty"),
}


@dataclasses.dataclass(frozen=True)
class Template:
  """How examples become text, and how a model's answer is read.

  Attributes:
    data: what the examples look like.
    prompt: text before an answer; where it holds {answer}, it is another for each answer.
    answer: text that is scored, or completed.
    answers: {label: its word}, of every label; of scores, {number: its word}.
    blank: text in the last text column that the answer replaces; {before} and {after} are what is
      left and right of it.
    instructions: text before everything.
    separator: between instructions, shots and the prompt.
    decide: "likeliest" (of the answers), "threshold" (the second of two labels where the mean
      log-likelihood of a token of the answer is larger than a threshold), or "completion" (what
      the model writes, to be equal to the answer but for white space around).
    normalization: what a log-likelihood is divided by before answers are compared: "none"; the
      number of its "token"s, "byte"s or "character"s; or, "unconditional", the likelihood of the
      answer after unconditional_prompt. Brown et al. 2020, section 2.4.
    unconditional_prompt: see normalization.
    threshold: None is the one that is best on training examples.
    stop: texts that end a completion.
    max_new_tokens, num_beams, length_penalty: of a completion, as in `DecodingOptions`.

  Raises:
    ConfigError: a name that is no column, labels without word, or a key without effect.
  """

  data: TaskFormat
  prompt: str
  answer: str = " {answer}"
  answers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  blank: str = ""
  instructions: str = ""
  separator: str = "\n\n"
  decide: str = "likeliest"
  normalization: str = "token"
  unconditional_prompt: str = "Answer:"
  threshold: float | None = None
  stop: tuple[str, ...] = ("\n",)
  max_new_tokens: int = 32
  num_beams: int = 1
  length_penalty: float = 1.0

  def __post_init__(self):
    check_choice("decide", self.decide, DECISIONS)
    check_choice("normalization", self.normalization, NORMALIZATIONS)
    _refuse_stray(self)
    _check_answers(self)
    for key in ("prompt", "answer"):
      _check_fields(key, getattr(self, key), self.names)
    if not self.answer:
      raise ConfigError('answer is ""; it is the text that is scored, such as " {answer}"')
    if not self.unconditional_prompt:
      raise ConfigError('unconditional_prompt is ""; an answer needs some text before it')
    self.decoding_options()

  def decoding_options(self) -> DecodingOptions:
    """Returns how a completion is written. Raises ConfigError for a value that is none."""
    names = ("max_new_tokens", "stop", "num_beams", "length_penalty")
    return DecodingOptions(**{name: getattr(self, name) for name in names})

  @property
  def names(self) -> tuple[str, ...]:
    """What may stand in braces."""
    columns = (*self.data.text_columns, *self.data.text2_columns)
    sides = _BLANK_SIDES if self.blank else ()
    return (*dict.fromkeys((*columns, *sides, *([ANSWER] if self.has_answers else []))),)

  @property
  def has_answers(self) -> bool:
    """Whether there are answers to choose from."""
    return self.data.family == "multiple_choice" or bool(self.answers)

  @property
  def varies_prompt(self) -> bool:
    """Whether the prompt is another for each answer."""
    return any(name == ANSWER for name, _ in _fields(self.prompt))

  def words(self, example: Example) -> tuple[str, ...]:
    """Returns the answers to choose from, in the order of the labels; () where there are none."""
    if self.data.family == "multiple_choice":
      return example.choices
    labels = self.data.labels if self.data.target == "class" else self.answers
    return tuple(self.answers[label] for label in labels) if self.answers else ()

  def values(self, example: Example) -> dict[str, str]:
    """Returns {name: text} of an example, without the answer.

    Raises:
      ConfigError: its text has no blank, or several.
    """
    columns = (*self.data.text_columns, *self.data.text2_columns)
    values = dict(zip(columns, (*example.text, *example.text2), strict=True))
    if self.blank:
      text = values[columns[-1]]
      parts = text.split(self.blank)
      if len(parts) != 2:
        raise ConfigError(
          f'the text {text!r:.60} has the blank "{self.blank}" {len(parts) - 1} times; it must be'
          " there once"
        )
      values |= dict(zip(_BLANK_SIDES, parts))
    return values

  def fill(self, example: Example, word: str | None) -> tuple[str, str]:
    """Returns (prompt, answer) of one answer; white space between them belongs to the answer."""
    values = self.values(example) | ({} if word is None else {ANSWER: word})
    prompt, answer = _fill(self.prompt, values), _fill(self.answer, values)
    kept = prompt.rstrip(" ")
    return kept, prompt[len(kept) :] + answer


def load_template(name: str) -> Template:
  """Reads a template.

  Args:
    name: of a ready one, or the path of a file.

  Raises:
    ConfigError: there is none, or it is no template.
  """
  path = READY / f"{name}.toml"
  if not path.is_file():
    path = Path(name)
  if not path.is_file():
    raise ConfigError(f'template "{name}" is no file{did_you_mean(name, ready_templates())}')
  try:
    return read_template(tomllib.loads(path.read_text(encoding="utf-8")))
  except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, UserError) as error:
    raise ConfigError(f'template "{name}": {error}') from error


def ready_templates() -> list[str]:
  """Returns the names of those that come with gptjax."""
  return sorted(path.stem for path in READY.glob("*.toml"))


def read_template(content: Mapping[str, Any]) -> Template:
  """Makes a template of what its file says.

  Raises:
    ConfigError: an unknown key, a wrong value, or as Template.
  """
  table = content.get("data", {})
  known = ("adapter", *(field.name for field in dataclasses.fields(TaskFormat)))
  for key in table:
    if key not in known:
      raise ConfigError(f'unknown key "data.{key}"{did_you_mean(key, known)}')
  form = from_mapping(TaskDataConfig, table, "data.").format
  if not form.family:
    raise ConfigError('data.family is ""; name the family of the task, or a data.adapter')
  answers = content.get("answers", {})
  if form.target == "class" and form.family != "multiple_choice" and not form.labels and answers:
    form = dataclasses.replace(form, labels=tuple(answers))
  return from_mapping(Template, {**content, "data": form})


def _fields(text: str) -> Iterable[tuple[str, str | None]]:
  """Yields (name, filter) of each field; a brace by itself has the name "{" or "}"."""
  for match in _FIELD.finditer(text):
    if match.group() not in ("{{", "}}"):
      is_brace = match.group() in ("{", "}")
      yield (match.group(), None) if is_brace else match.groups()


def _fill(text: str, values: Mapping[str, str]) -> str:
  def replace(match: re.Match) -> str:
    if match.group() in ("{{", "}}"):
      return match.group()[0]
    name, filter_name = match.groups()
    return FILTERS.get(filter_name, str)(values[name])

  return _FIELD.sub(replace, text)


def _check_fields(key: str, text: str, names: Iterable[str]) -> None:
  for name, filter_name in _fields(text):
    if name in ("{", "}"):
      raise ConfigError(f'{key} has a "{name}" by itself; write it twice for a brace')
    if name not in names:
      raise ConfigError(f'{key} has the field "{{{name}}}"{did_you_mean(name, names)}')
    if filter_name is not None:
      check_choice(f"a filter of {key}", filter_name, FILTERS)


def _check_answers(template: Template) -> None:
  form, answers = template.data, template.answers
  if form.family == "multiple_choice":
    if answers:
      raise ConfigError("[answers] has no effect on multiple choice, which has its own; leave out")
  elif form.target == "score":
    for number in answers:
      if not re.fullmatch(r"-?\d+(\.\d+)?", number):
        raise ConfigError(f'[answers] has "{number}"; the answers of a score are named by numbers')
  elif answers or template.decide == "likeliest":
    for label in form.labels:
      if label not in answers:
        raise ConfigError(f'[answers] has no word for the label "{label}"; give each label one')
    for label in answers:
      if label not in form.labels:
        raise ConfigError(f'[answers] has the label "{label}"{did_you_mean(label, form.labels)}')
  if template.decide == "likeliest" and not template.has_answers:
    raise ConfigError('decide is "likeliest", and there are no [answers] to choose from')
  if template.decide == "completion" and template.varies_prompt:
    raise ConfigError('decide is "completion", and prompt holds {answer}; only answer may')
  if template.decide == "threshold" and (form.target == "score" or len(form.labels) != 2):
    raise ConfigError('decide is "threshold", which tells two labels apart; name two in data')
  if template.decide == "completion" and form.target == "score":
    raise ConfigError('decide is "completion", and the target is a score; use "likeliest"')
  columns = (*form.text_columns, *form.text2_columns)
  if template.has_answers and ANSWER in columns:
    raise ConfigError(f'a column is called "{ANSWER}", which is what stands for the answer')


def _refuse_stray(template: Template) -> None:
  """Refuses what another decision leaves without effect."""
  usual = {field.name: field.default for field in dataclasses.fields(Template)}
  for decision, keys in _DETAILS.items():
    for key in keys:
      value = getattr(template, key)
      if decision != template.decide and value != usual[key]:
        raise ConfigError(
          f'{key} is {value!r}, which has no effect with decide "{template.decide}"; leave it out'
        )
