"""FinetuneConfig: a whole fine-tuning run. Its defaults are GPT-1's (Radford et al. 2018, 4.1)."""

import dataclasses
from collections.abc import Mapping

from gptjax.data.task_config import TaskDataConfig
from gptjax.errors import ConfigError
from gptjax.model.config import ModelConfig
from gptjax.train.config import (
  EvalConfig,
  OptimizerConfig,
  RunConfig,
  TrainConfig,
  check_least,
  check_pattern,
)


@dataclasses.dataclass(frozen=True)
class FinetuneModelConfig:
  """What a run says of the model; the rest of the architecture is init_from's.

  Attributes are those of ModelConfig.
  """

  embedding_dropout: float = 0.1
  attention_dropout: float = 0.1
  residual_dropout: float = 0.1
  compute_dtype: str = "float32"
  attention_implementation: str = "auto"
  scan_layers: bool = True
  remat: str = "none"

  def __post_init__(self):
    self.apply(ModelConfig())

  def apply(self, model: ModelConfig) -> ModelConfig:
    """Returns `model` with these values."""
    return dataclasses.replace(model, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
  """What is transferred, and what is minimised.

  Attributes:
    pretrained: False draws all parameters afresh: init_from gives its architecture and tokenizer.
    transfer_layers: only the embeddings and the first n layers are init_from's, the others are
      drawn afresh; None transfers everything, 0 the embeddings.
    classifier_dropout: on the state of the extract token.
    lm_coefficient: lambda, of the language model's loss on the same sequences [traced]; 0 leaves
      it out.
    class_weights: of the classes in the loss, in the order of the labels; () weighs all alike.
    balance_classes: weigh classes by the inverse of their frequency in the training examples.
    lora_pattern: regular expression; kernels of the layers whose path matches are trained by LoRA,
      and everything else is frozen but the head, or what optimizer.frozen_pattern says where that
      is set; "" is off. See `gptjax.model.lora`.
    lora_rank: of the update of a kernel.
    lora_alpha: the update is scaled by lora_alpha / lora_rank.
    patience: evaluations without a better first metric after which training ends; the best
      checkpoint is then the model. 0 never ends early and takes the last.
  """

  pretrained: bool = True
  transfer_layers: int | None = None
  classifier_dropout: float = 0.1
  lm_coefficient: float = 0.5
  class_weights: tuple[float, ...] = ()
  balance_classes: bool = False
  lora_pattern: str = ""
  lora_rank: int = 8
  lora_alpha: float = 16.0
  patience: int = 0

  def __post_init__(self):
    check_least("finetune", self, transfer_layers=0, lm_coefficient=0, patience=0)
    check_least("finetune", self, lora_rank=1, lora_alpha=0)
    check_pattern("finetune.lora_pattern", self.lora_pattern)
    for key in ("lora_rank", "lora_alpha"):
      if not self.lora_pattern and (value := getattr(self, key)) != getattr(type(self), key):
        raise ConfigError(f"finetune.{key} is {value}, which has no effect without lora_pattern")
    if not 0 <= self.classifier_dropout < 1:
      raise ConfigError(
        f"finetune.classifier_dropout is {self.classifier_dropout}; it must be in [0, 1)"
      )
    if any(not weight >= 0 for weight in self.class_weights):
      raise ConfigError(
        f"finetune.class_weights is {list(self.class_weights)}; weights are at least 0"
      )
    if self.class_weights and self.balance_classes:
      raise ConfigError(
        "finetune.class_weights and finetune.balance_classes are both set; keep one"
      )
    if not self.pretrained and self.transfer_layers is not None:
      raise ConfigError("finetune.transfer_layers has no effect with finetune.pretrained=False")

  @property
  def lora_scale(self) -> float:
    """What the product of the factors is multiplied by."""
    return self.lora_alpha / self.lora_rank


GPT1_OPTIMIZER = OptimizerConfig(
  name="gpt1_adam",
  learning_rate=6.25e-5,
  schedule="gpt1",
  warmup_fraction=0.002,
  weight_decay=0.01,
  beta2=0.999,
)
# Keys of `train` that say nothing about labelled examples, and what leaves them unset.
NOT_FOR_TASKS = {"num_tokens": None, "ramp_start_rows": 0, "ramp_tokens": 0, "z_loss": 0.0}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RunConfig):
  """A whole fine-tuning run.

  Attributes:
    model, data, finetune, optimizer, train, eval: the groups.
    seed: of the fresh parameters, the order of examples and dropout.
    num_seeds: runs with the seeds seed, seed + 1, ..., each in a directory of its own.
    init_from: the pretrained model: whatever `gptjax.load` takes.
    tokenizer: of an init_from that has none of its own; as `gptjax.load` takes it.
    tags: free notes kept with the run.
  """

  model: FinetuneModelConfig = FinetuneModelConfig()
  data: TaskDataConfig = TaskDataConfig()
  finetune: FinetuneSettings = FinetuneSettings()
  optimizer: OptimizerConfig = GPT1_OPTIMIZER
  train: TrainConfig = TrainConfig(num_epochs=3.0)
  eval: EvalConfig = EvalConfig(every_steps=100, batch_rows=64, sample_prompts=())
  seed: int = 0
  num_seeds: int = 1
  init_from: str = ""
  tokenizer: str = ""
  tags: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.check()
    if self.num_seeds < 1:
      raise ConfigError(f"num_seeds is {self.num_seeds}; it must be at least 1")
    every, saved = self.eval.every_steps, self.save_every_steps
    if self.finetune.patience and (not every or every % saved):
      raise ConfigError(
        f"finetune.patience needs a checkpoint at each evaluation, and eval.every_steps is {every},"
        f" train.save_every_steps {saved}; leave the latter unset, and evaluate regularly"
      )
    for key, unset in NOT_FOR_TASKS.items():
      if (value := getattr(self.train, key)) != unset:
        raise ConfigError(
          f"train.{key} is {value}, which has no effect in fine-tuning; leave it at {unset}"
        )


@dataclasses.dataclass(frozen=True)
class ResolvedFinetuneConfig(FinetuneConfig):
  """A fine-tuning run whose architecture, labels and length are known: what config.json holds."""

  model: ModelConfig = ModelConfig()


def tiny_finetuning(family: str, examples: str) -> FinetuneConfig:
  """Returns fine-tuning that runs in seconds on a CPU, offline: `:tiny` of an experiment.

  Args:
    family: of the task.
    examples: a file with the usual columns.
  """
  return FinetuneConfig(
    data=TaskDataConfig(
      family=family,
      target="score" if family == "similarity" else "",
      files=(examples,),
      valid_fraction=0.25,
      num_buckets=1,
    ),
    optimizer=dataclasses.replace(GPT1_OPTIMIZER, learning_rate=1e-3),
    train=TrainConfig(num_epochs=2.0, batch_rows=8, log_every_steps=1),
    eval=EvalConfig(every_steps=0, batch_rows=8, sample_prompts=()),
  )
