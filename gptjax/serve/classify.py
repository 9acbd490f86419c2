"""/classify: what a fine-tuned model was taught to tell of texts."""

from collections.abc import Callable

from fastapi import APIRouter, Request

from gptjax.data.examples import Example
from gptjax.data.task_format import Task
from gptjax.evaluate.classify import Classifier
from gptjax.evaluate.predictions import describe_predictions
from gptjax.serve.connection import while_connected
from gptjax.serve.failures import ApiError, failures
from gptjax.serve.schemas import Classes, Classification, Classified, ClassifyRequest
from gptjax.serve.served import Served


def make_classify(served: Served) -> APIRouter:
  """Makes the route; a model that was taught no task refuses what is asked."""
  router = APIRouter(tags=["text"])

  @router.post("/classify", responses=failures(400, 401, 404, 408, 413, 429, 503, 504))
  async def classify(body: ClassifyRequest, request: Request) -> Classes:
    served.check_model(body.model)
    if served.classifier is None:
      raise ApiError(400, f'"{served.name}" was not fine-tuned on a task; see gptjax finetune')
    items = body.input if isinstance(body.input, list) else [body.input]
    items = [Classified(text=item) if isinstance(item, str) else item for item in items]
    task = served.classifier.task
    examples = [_make_example(task, item, index) for index, item in enumerate(items)]
    outputs_NC = await while_connected(
      request, served.engine.run(lambda: served.classifier.outputs(examples))
    )
    found = describe_predictions(task, examples, outputs_NC)
    return Classes(
      data=[
        Classification(index=index, **{name: each[name] for name in each if name != "id"})
        for index, each in enumerate(found)
      ],
      model=served.name,
    )

  return router


def make_warm_up(classifier: Classifier) -> Callable[[Callable[[str], None]], None]:
  """Makes what compiles the program of short texts, on the device thread."""

  def warm_up(report: Callable[[str], None]) -> None:
    report("classifier")
    text2 = {"classification": {}, "multiple_choice": {"choices": ["a", "b"]}}
    more = text2.get(classifier.task.family, {"text2": "a"})
    classifier.outputs([_make_example(classifier.task, Classified(text="a", **more), 0)])

  return warm_up


def _make_example(task: Task, item: Classified, index: int) -> Example:
  """Makes an example of what was sent, which must be what the task is about."""
  needed = {"classification": None, "multiple_choice": "choices"}.get(task.family, "text2")
  for name in ("text2", "choices"):
    value, path = getattr(item, name), f"input.{index}.{name}"
    if value and name != needed:
      raise ApiError(400, f"{name} has no effect on a task of {task.family}", param=path)
    if not value and name == needed:
      raise ApiError(400, f"a task of {task.family} needs {name}; add it", param=path)
  choices = tuple(item.choices or ())
  if task.is_choice and len(choices) < 2:
    raise ApiError(400, "there is one choice; give at least two", param=f"input.{index}.choices")
  texts = (item.text, item.text2, *choices)
  if not all(text.strip() for text in texts if text is not None):
    raise ApiError(400, f"input.{index} has an empty text; give it words", param=f"input.{index}")
  text2 = (item.text2.strip(),) if item.text2 else ()
  return Example(str(index), (item.text.strip(),), text2, choices)
