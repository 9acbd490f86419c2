"""Fine-tuning on a labelled task: puts a config's examples, pretrained model and loop together."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.batch import Batch
from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data.batch_schedule import check_divides
from gptjax.data.task_batches import PADDING, TaskBatches, scoring_batches
from gptjax.evaluate.predictions import decide, describe_predictions
from gptjax.evaluate.task_metrics import task_metrics
from gptjax.model.lora import merge_lora
from gptjax.model.parameters import ParameterSpec
from gptjax.parallel import Parallel
from gptjax.train.finetune_config import FinetuneConfig
from gptjax.train.loop import Event
from gptjax.train.optimizer import Hyperparameters, hyperparameters
from gptjax.train.run import IsEnough, TrainingRun, launch, never
from gptjax.train.schedule import resolve_durations
from gptjax.train.setup import (
  say,
)
from gptjax.train.step import TrainState
from gptjax.train.task_objective import TaskObjective, example_losses, output_program
from gptjax.train.task_report import task_report
from gptjax.train.task_setup import TaskExamples, param_specs, resolve_config
from gptjax.train.transfer import find_origin, load_transferred


def finetune(config: FinetuneConfig, workdir: str, is_enough: IsEnough = never) -> bool:
  """Fine-tunes a pretrained model into a run directory, or goes on with the run that is there.

  Args:
    config: the run; its num_seeds is 1.
    workdir: the run directory.
    is_enough: as of TrainingRun.

  Returns:
    Whether the run is complete, and not stopped before its end.

  Raises:
    UserError: whatever in config, data, model or the directory keeps it from running.
  """

  def prepare(parallel: Parallel, run: RunDirectory, started: float) -> Finetuning:
    check_divides(config.train.batch_rows, parallel.process_count, "train.batch_rows")
    origin = find_origin(config, run)
    examples = TaskExamples.load(config, origin)
    resolved = resolve_config(config, origin, examples)
    return Finetuning(
      config=resolved,
      run=run,
      tokenizer=origin.tokenizer,
      parallel=parallel,
      num_steps=resolved.train.num_steps,
      started=started,
      is_enough=is_enough,
      best_metric=f"negated_{examples.task.metrics[0]}",
      examples=examples,
    )

  return launch(config, workdir, prepare)


@dataclasses.dataclass(kw_only=True)
class Finetuning(TrainingRun):
  """A run on labelled examples.

  Attributes:
    examples: what it trains on, and is measured on.
  """

  examples: TaskExamples

  def __post_init__(self):
    config, examples = self.config, self.examples
    self._batches = TaskBatches(
      examples.train, config.train.batch_rows, config.seed, examples.buckets
    )
    self._scores: dict[int, float] | None = None
    self._outputs_NC: np.ndarray | None = None

  def describe_data(self) -> dict[str, Any]:
    return self.examples.describe()

  def is_finished(self) -> bool:
    results = self.run.read_results()
    if results is None or results["step"] != self.run.latest_step():
      return False
    with CheckpointStore(self.run.checkpoints_path) as store:
      return store.is_whole(results["step"])

  def objective(self) -> TaskObjective:
    settings = self.config.finetune
    objective = TaskObjective(
      self.config.model,
      self.examples.task,
      has_lm=settings.lm_coefficient > 0,
      classifier_dropout=settings.classifier_dropout,
      class_weights=settings.class_weights,
      lora_scale=settings.lora_scale,
      chunk_tokens=self.config.train.loss_chunk_tokens,
    )
    self._output_step = output_program(self.parallel, objective)
    return objective

  def hyperparameters(self) -> Hyperparameters:
    config = self.config
    durations = resolve_durations(config.optimizer, self.num_steps, self._tokens_before)
    return hyperparameters(
      config.optimizer, durations, lm_coefficient=config.finetune.lm_coefficient
    )

  def _tokens_before(self, step: int) -> int:
    """Counts tokens as if all steps had as many: an epoch's mean."""
    train = self.examples.train
    num_tokens = sum(len(piece) for each in train.sequences for row in each for piece in row)
    return round(step * num_tokens / self._batches.batches_per_epoch)

  def specs(self) -> Any:
    specs = param_specs(self.config)
    if self.examples.task.target == "score":
      # The best guess without a look at the texts, from which 3 epochs at 6e-5 could not come far.
      mean = float(self.examples.train.labels_N.mean())
      specs["task_head"]["bias"] = ParameterSpec((1,), mean=mean)
    return specs

  def load_initial(self, params: Any) -> Any:
    if not self.config.finetune.pretrained:
      say(f"everything is drawn afresh; {self.config.init_from} gives architecture and tokenizer")
      return params
    return load_transferred(self.config, params, self.config.model, self.parallel)

  def batches(self, start_step: int) -> Iterator[Batch]:
    parallel = self.parallel
    for batch in self._batches.batches(start_step, parallel.process_index, parallel.process_count):
      yield self._fill_up(batch, self.config.train.accumulation)

  def row_size(self) -> tuple[int, int]:
    rows = self.config.train.batch_rows * self.examples.train.num_sequences
    return rows, self.examples.buckets[-1]

  def model_params(self, state: TrainState) -> Any:
    return merge_lora(state.eval_params, self.config.finetune.lora_scale)

  def events(self) -> list[Event]:
    evaluation = Event(self.config.eval.every_steps, self._evaluate, "evaluating", measures=True)
    return [evaluation, *self.sample_events()]

  def has_converged(self) -> bool:
    """Says whether the last finetune.patience evaluations brought nothing better."""
    patience = self.config.finetune.patience
    if not patience:
      return False
    scores = [*self._known_scores().values()]
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])

  def _known_scores(self) -> dict[int, float]:
    """Returns {step: first metric}, of earlier processes too."""
    if self._scores is None:
      name = f"valid_{self.examples.task.metrics[0]}"
      lines = self.run.read_metrics()
      self._scores = {line["step"]: line[name] for line in lines if name in line}
    return self._scores

  def _evaluate(self, step: int, state: TrainState) -> Mapping[str, float]:
    self._outputs_NC = self._outputs(state, self.config.eval.max_rows)
    values = self._measure(self._outputs_NC)
    self._known_scores()[step] = values[self.examples.task.metrics[0]]
    return {f"valid_{name}": value for name, value in values.items()}

  def saved_metrics(self, line: Mapping[str, Any]) -> dict[str, float]:
    name = f"valid_{self.examples.task.metrics[0]}"
    return {self.best_metric: -line[name]} if name in line else {}

  def _measure(self, outputs_NC: np.ndarray) -> dict[str, float]:
    """Returns the task's metrics and the mean loss of the first validation examples."""
    task, labels_N = self.examples.task, self.examples.valid.labels_N[: len(outputs_NC)]
    metrics = task_metrics(task, labels_N, decide(task, outputs_NC))
    losses_N = np.asarray(example_losses(task, jnp.asarray(outputs_NC), jnp.asarray(labels_N)))
    return {"loss": float(losses_N.mean(dtype=np.float64)), **metrics}

  def _outputs(self, state: TrainState, max_examples: int = 0) -> np.ndarray:
    """Returns float32 [N, C] of the validation examples, in their order, in every process."""
    parallel, valid = self.parallel, self.examples.valid
    if max_examples:
      valid = dataclasses.replace(
        valid, sequences=valid.sequences[:max_examples], labels_N=valid.labels_N[:max_examples]
      )
    batch_rows = self.config.eval.batch_rows
    batch_rows += -batch_rows % parallel.process_count
    outputs_NC = None
    for indices_E, batch in scoring_batches(valid, batch_rows, self.examples.buckets):
      share = self._fill_up(self._share(batch), 1)
      gathered = parallel.to_host(self._output_step(state, parallel.shard_batch(share, 1)))
      by_process = parallel.by_process(gathered)
      outputs_EC = by_process[:, : batch_rows // parallel.process_count].reshape(batch_rows, -1)
      if outputs_NC is None:
        outputs_NC = np.zeros((valid.num_examples, outputs_EC.shape[1]), np.float32)
      is_real_E = indices_E != PADDING
      outputs_NC[indices_E[is_real_E]] = outputs_EC[is_real_E]
    return outputs_NC

  def _share(self, batch: Batch) -> Batch:
    """Returns this process's part of a batch."""
    index, count = self.parallel.process_index, self.parallel.process_count
    return batch.map(lambda array: np.split(array, count)[index])

  def _fill_up(self, batch: Batch, accumulation: int) -> Batch:
    """Adds examples of padding until they divide among micro-batches and devices, whole."""
    parallel = self.parallel
    num_examples = len(batch.labels_B)
    missing = -num_examples % (accumulation * parallel.row_multiple // parallel.process_count)

    def pad(array):
      rows = missing * (len(array) // num_examples)
      return np.pad(array, [(0, rows), *[(0, 0)] * (array.ndim - 1)])

    return batch.map(pad)

  def finish(self, state: TrainState, step: int) -> None:
    """Chooses the checkpoint, scores it on all validation examples, and writes the results."""
    if self.config.finetune.patience and (best := self.store.best_step()) not in (None, step):
      say(f"the best checkpoint is that of step {best}; those after it are removed")
      self.store.drop_after(best)
      restored = self.store.restore_latest(self.abstract_state())
      state, chosen = self.parallel.from_saved(restored.state), restored.step
    else:
      chosen = step
    self._outputs_NC = outputs_NC = self._outputs(state)
    metrics = self._measure(outputs_NC)
    say("validation: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    self.store.wait()
    if self.parallel.process_index == 0:
      task, examples = self.examples.task, self.examples.data.valid
      predictions = describe_predictions(task, examples, outputs_NC)
      gold = (task.labels[e.label] if task.labels else e.label for e in examples)
      results = {
        "step": chosen,
        "steps_trained": step,
        "metrics": metrics,
        "examples": len(examples),
        "seconds": self.seconds(),
      }
      self.run.write_results(
        results, [line | {"gold": label} for line, label in zip(predictions, gold)]
      )

  def report_page(self, metrics: list[dict[str, Any]], **common: Any) -> str:
    return task_report(self.run.path.name, metrics, self.examples.data, self._outputs_NC, **common)
