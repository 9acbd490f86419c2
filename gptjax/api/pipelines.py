"""`pipeline`: calls a model with transformers' call shapes, and answers with its results."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.api.model import LOAD_OPTIONS, Model, load
from gptjax.checkpoint.models import to_stderr
from gptjax.data.examples import Example
from gptjax.errors import ConfigError, DataError, UserError, check_choice, did_you_mean
from gptjax.evaluate.classify import Classifier
from gptjax.evaluate.predictions import softmax
from gptjax.generate.options import OPTION_NAMES, parse_options

_LENGTHS = ("max_length", "max_new_tokens")
# Options of a pipeline's calls besides those of decoding.
_CALL_OPTIONS = ("return_full_text", "weights")
_CLASSIFICATION_OPTIONS = ("top_k", "function_to_apply")


class TextGenerationPipeline:
  """Calls a model as `transformers.pipeline("text-generation")` does; made by `pipeline`.

  Attributes:
    model, tokenizer: as of the Model.
  """

  def __init__(self, model: Model, **options: Any):
    self.model = model
    self.tokenizer = model.tokenizer
    self._options = options

  def __call__(self, text_inputs: str | list[str], **options: Any) -> list:
    """Continues texts.

    Args:
      text_inputs: a text, or a list of them.
      options: return_full_text=False leaves the prompt out; the others are as of `Model.generate`,
        at what the pipeline was made with, or else at transformers' defaults: sampling at
        temperature 0.7 among the 50 likeliest, 256 new tokens or as many as the context has room
        for.

    Returns:
      [{"generated_text": text}, ...] of each sequence; a list of these for a list of texts.
    """
    given = self._options
    if any(options.get(name) is not None for name in _LENGTHS):
      given = {name: value for name, value in given.items() if name not in _LENGTHS}
    options = given | options
    texts = [text_inputs] if isinstance(text_inputs, str) else list(text_inputs)
    results = [self._continue(text, **options) for text in texts]
    return results[0] if isinstance(text_inputs, str) else results

  def _continue(
    self, text: str, return_full_text: bool | None = None, **options: Any
  ) -> list[dict[str, str]]:
    defaults: dict[str, Any] = {}
    if options.get("do_sample", True) is not False:
      defaults |= {"do_sample": True, "temperature": 0.7}
      if options.get("temperature") != 0:
        defaults["top_k"] = 50
    if all(options.get(name) is None for name in _LENGTHS):
      room = self.model.config.context_length - len(self.model.encode(text)[0])
      defaults["max_new_tokens"] = max(1, min(256, room))
    out = self.model.generate(text, **(defaults | options))
    prefix = "" if return_full_text is False else text
    return [{"generated_text": prefix + new} for new in out.texts]


class TextClassificationPipeline:
  """Calls a model as `transformers.pipeline("text-classification")` does; made by `pipeline`.

  Attributes:
    model, tokenizer: as of the Model.
  """

  def __init__(self, model: Model, **options: Any):
    self.model = model
    self.tokenizer = model.tokenizer
    self._options = options
    self._classifier = Classifier(model, report=to_stderr)
    if self._classifier.task.is_choice:
      raise ConfigError("the model chooses among answers; use gptjax predict")

  def __call__(self, inputs: Any, **options: Any) -> Any:
    """Classifies texts.

    Args:
      inputs: a text, or {"text": first, "text_pair": second}; or a list of them.
      options: top_k: so many labels, the likeliest first, None being all; function_to_apply:
        "softmax" (of classes) or "none" (of scores), which are also what is taken by default.

    Returns:
      {"label", "score"} of the likeliest label of each, in a list; of one pair without a list. With
      top_k a list of these of each; of one input this list alone. A score has the label "LABEL_0".

    Raises:
      UserError: an option or input that does not fit the task.
    """
    options = self._options | options
    for name in options:
      if name not in _CLASSIFICATION_OPTIONS:
        hint = did_you_mean(name, _CLASSIFICATION_OPTIONS)
        raise ConfigError(f"text classification has no option {name!r}{hint}")
    is_list = isinstance(inputs, list | tuple)
    given = list(inputs) if is_list else [inputs]
    outputs_NC = self._classifier.outputs([self._example(item) for item in given])
    ranked = [self._rank(outputs_C, **options) for outputs_C in outputs_NC]
    if "top_k" in options:
      return ranked if is_list else ranked[0]
    best = [labels[0] for labels in ranked]
    return best[0] if isinstance(inputs, Mapping) else best

  def _example(self, item: Any) -> Example:
    pair = dict(item) if isinstance(item, Mapping) else {"text": item}
    wanted = {"text"} if self._classifier.task.family == "classification" else {"text", "text_pair"}
    if pair.keys() != wanted or not all(isinstance(text, str) for text in pair.values()):
      raise DataError(f"an input is {item!r:.60}; the model's task needs {sorted(wanted)}, texts")
    if not all(text.strip() for text in pair.values()):
      raise DataError(f"an input is {item!r:.60}; a text must not be empty")
    return Example("", (pair["text"],), (pair["text_pair"],) if len(pair) > 1 else ())

  def _rank(
    self, outputs_C: np.ndarray, top_k: int | None = 1, function_to_apply: str | None = None
  ) -> list[dict[str, Any]]:
    task = self._classifier.task
    usual = "none" if task.target == "score" else "softmax"
    check_choice("function_to_apply", function_to_apply or usual, ("softmax", "none"))
    if top_k is not None and top_k < 1:
      raise ConfigError(f"top_k is {top_k}; it must be at least 1, or None for all labels")
    if (function_to_apply or usual) == "softmax":
      (outputs_C,) = softmax(outputs_C[None])
    labels = task.labels or ("LABEL_0",)
    found = [{"label": label, "score": score} for label, score in zip(labels, outputs_C.tolist())]
    return sorted(found, key=lambda entry: -entry["score"])[:top_k]


_PIPELINES = {
  "text-generation": TextGenerationPipeline,
  "text-classification": TextClassificationPipeline,
}


def pipeline(
  task: str, model: Any, **options: Any
) -> TextGenerationPipeline | TextClassificationPipeline:
  """Makes what `transformers.pipeline` makes.

  Args:
    task: "text-generation", or "text-classification" with a fine-tuned model.
    model: a Model, or whatever `load` takes.
    options: of `load`, and those that its calls begin from.

  Raises:
    UserError: an unknown task or option, a model without a tokenizer or task, or as `load`.
  """
  check_choice("task", task, _PIPELINES)
  of_load = {name: options.pop(name) for name in LOAD_OPTIONS if name in options}
  if task == "text-generation":
    _check_call_options(options)
  if not isinstance(model, Model):
    model = load(model, **of_load)
  elif of_load:
    raise ConfigError(f"{next(iter(of_load))} has no effect on a model that is loaded already")
  if model.tokenizer is None:
    raise UserError("the model has no tokenizer, and a pipeline takes and gives text")
  return _PIPELINES[task](model, **options)


def _check_call_options(options: dict[str, Any]) -> None:
  """Says now, and not at the first call, what no call and no `load` understands."""
  known = (*LOAD_OPTIONS, *_CALL_OPTIONS, *OPTION_NAMES)
  for name in options:
    if name not in known:
      raise ConfigError(f"pipeline has no option {name!r}{did_you_mean(name, known)}")
  parse_options({name: value for name, value in options.items() if name not in _CALL_OPTIONS})
