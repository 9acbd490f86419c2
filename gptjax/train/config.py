"""Configs of training: optimiser, loop, evaluation, and the whole of a pretraining run."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from gptjax.data.config import DataConfig
from gptjax.details import check_details
from gptjax.errors import ConfigError, check_choice
from gptjax.model.config import ModelConfig


def check_least(group: str, config: Any, **least: float) -> None:
  """Raises ConfigError for a value below its least, or NaN; None is unset."""
  for key, bound in least.items():
    value = getattr(config, key)
    if value is not None and not value >= bound:
      raise ConfigError(f"{group}.{key} is {value}; it must be at least {bound}")


def check_most(group: str, config: Any, **most: float) -> None:
  """Raises ConfigError for a value above its most; None is unset."""
  for key, bound in most.items():
    value = getattr(config, key)
    if value is not None and value > bound:
      raise ConfigError(f"{group}.{key} is {value}; it must be at most {bound}")


def check_pattern(key: str, pattern: str) -> None:
  """Raises ConfigError for what is no regular expression."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise ConfigError(f'{key} "{pattern}" is no regular expression: {error}') from error


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The update rule and its schedule.

  Values marked [traced] are leaves of the train state: changing them compiles nothing.

  Attributes:
    name: "adamw"; "muon" (hidden matrices by Muon, the rest by AdamW); "gpt1_adam" (the Adam of
      GPT-1's released fine-tuning code).
    learning_rate: peak rate [traced].
    schedule: "cosine", "linear", "constant", "wsd" (warm-up, stable, decay), "gpt1"
      (linear to 0 from step 0, times the warm-up ramp: Radford et al. 2018, released code).
    end_fraction: final rate as a fraction of the peak [traced]; the schedule "gpt1" ends at 0.
    warmup_steps: linear warm-up [traced]; or warmup_tokens, or warmup_fraction of the run.
    decay_steps: length of the decay [traced]; None: cosine and linear decay over all that
      follows the warm-up, "wsd" over the last fifth of the run. Or decay_tokens.
    weight_decay: decoupled, times the learning rate [traced].
    decay_pattern: regular expression; parameters whose path matches are decayed.
    frozen_pattern: regular expression; parameters whose path matches are not trained, and have
      neither gradients nor moments; "" trains all.
    beta1, beta2, epsilon: Adam's [traced].
    clip_norm: global gradient norm is clipped to this [traced]; 0 is off.
    muon_learning_rate: peak rate of Muon's matrices, same schedule [traced].
    muon_momentum: Nesterov momentum of Muon [traced].
    muon_steps: Newton-Schulz iterations.
    ema_decay: decay of an average of the parameters, which evaluation and saving use; 0 is off.
  """

  name: str = "adamw"
  learning_rate: float = 6e-4
  schedule: str = "cosine"
  end_fraction: float = 0.1
  warmup_steps: int | None = None
  warmup_tokens: int | None = None
  warmup_fraction: float | None = None
  decay_steps: int | None = None
  decay_tokens: int | None = None
  weight_decay: float = 0.1
  decay_pattern: str = r"(kernel|embedding)$"
  frozen_pattern: str = ""
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  clip_norm: float = 1.0
  muon_learning_rate: float = 0.02
  muon_momentum: float = 0.95
  muon_steps: int = 5
  ema_decay: float = 0.0

  def __post_init__(self):
    check_choice("optimizer.name", self.name, ("adamw", "muon", "gpt1_adam"))
    check_choice(
      "optimizer.schedule", self.schedule, ("cosine", "linear", "constant", "wsd", "gpt1")
    )
    warmups = (self.warmup_steps, self.warmup_tokens, self.warmup_fraction)
    if sum(value is not None for value in warmups) > 1:
      raise ConfigError("set only one of optimizer.warmup_steps, _tokens and _fraction")
    if self.decay_steps is not None and self.decay_tokens is not None:
      raise ConfigError("set only one of optimizer.decay_steps and optimizer.decay_tokens")
    for key in ("beta1", "beta2", "muon_momentum", "ema_decay"):
      if not 0 <= getattr(self, key) < 1:
        raise ConfigError(f"optimizer.{key} is {getattr(self, key)}; it must be in [0, 1)")
    check_least("optimizer", self, muon_steps=1)
    check_least(
      "optimizer",
      self,
      **dict.fromkeys(("learning_rate", "muon_learning_rate", "clip_norm", "epsilon"), 0),
      **dict.fromkeys(("warmup_steps", "warmup_tokens", "warmup_fraction"), 0),
      **dict.fromkeys(("decay_steps", "decay_tokens", "end_fraction", "weight_decay"), 0),
    )
    check_most("optimizer", self, end_fraction=1, warmup_fraction=1)
    for key in ("decay_pattern", "frozen_pattern"):
      check_pattern(f"optimizer.{key}", getattr(self, key))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The run: how long, how many rows, on which devices.

  Attributes:
    num_steps: updates; or num_tokens, or num_epochs (exactly one of the three).
    batch_rows: rows of a global batch, over all devices and micro-batches; in fine-tuning its
      examples, however many rows each of them takes.
    accumulation: micro-batches that one update sums, exactly, whatever their weights.
    ramp_start_rows, ramp_tokens: grow the batch from ramp_start_rows to batch_rows over the first
      ramp_tokens tokens, by doubling (GPT-3); 0 is off.
    z_loss: coefficient of logsumexp squared, averaged over tokens [traced].
    loss_chunk_tokens: the head and the loss run over chunks of this many tokens, so that the
      logits of a whole batch never exist; 0 computes them at once.
    mode: "pmap" (replicated data parallelism) or "mesh" (axes data x fsdp x tensor).
    mesh_data, mesh_fsdp, mesh_tensor: its sizes; one of them may be -1: what is left.
    host_devices: devices that a CPU shows; small models train fastest on one per core.
    matmul_precision: "default", or "highest" for true float32 on TPU and GPU.
    coordinator, num_processes, process_id: several processes; detected on TPU pods and SLURM.
    distributed_timeout_seconds: how long to wait for the other processes.
    log_every_steps: a line of metrics.jsonl and a refreshed progress bar.
    save_every_steps: checkpoints; the last step is always saved. None: at each evaluation.
    keep_latest: newest checkpoints kept, besides the best and every keep_every_steps-th (0: none).
    skip_nonfinite: leave the state as it was when loss or gradient is not finite.
    spike_sigmas: also skip a step whose loss or gradient norm lies this many deviations above
      its running mean; 0 is off.
    max_bad_steps: stop after this many skipped steps in a row.
    trackers: besides metrics.jsonl: "tensorboard", "wandb".
    profile_start_step, profile_num_steps: write a profiler trace; 0 steps is off.
    peak_flops_per_second: of one device, for the utilisation; None is looked up or, on CPU,
      measured with a matrix product.
  """

  num_steps: int | None = None
  num_tokens: int | None = None
  num_epochs: float | None = None
  batch_rows: int = 32
  accumulation: int = 1
  ramp_start_rows: int = 0
  ramp_tokens: int = 0
  z_loss: float = 0.0
  loss_chunk_tokens: int = 0
  mode: str = "pmap"
  mesh_data: int = -1
  mesh_fsdp: int = 1
  mesh_tensor: int = 1
  host_devices: int = 2
  matmul_precision: str = "default"
  coordinator: str = ""
  num_processes: int | None = None
  process_id: int | None = None
  distributed_timeout_seconds: int = 300
  log_every_steps: int = 10
  save_every_steps: int | None = None
  keep_latest: int = 2
  keep_every_steps: int = 0
  skip_nonfinite: bool = True
  spike_sigmas: float = 0.0
  max_bad_steps: int = 10
  trackers: tuple[str, ...] = ()
  profile_start_step: int = 10
  profile_num_steps: int = 0
  peak_flops_per_second: float | None = None

  def __post_init__(self):
    check_choice("train.mode", self.mode, ("pmap", "mesh"))
    check_choice("train.matmul_precision", self.matmul_precision, ("default", "highest"))
    for tracker in self.trackers:
      check_choice("train.trackers", tracker, ("tensorboard", "wandb"))
    lengths = (self.num_steps, self.num_tokens, self.num_epochs)
    if sum(value is not None for value in lengths) > 1:
      raise ConfigError("set only one of train.num_steps, train.num_tokens, train.num_epochs")
    check_least(
      "train",
      self,
      **dict.fromkeys(("num_steps", "num_tokens", "batch_rows", "accumulation"), 1),
      **dict.fromkeys(("host_devices", "log_every_steps", "save_every_steps", "keep_latest"), 1),
      **dict.fromkeys(("max_bad_steps", "distributed_timeout_seconds"), 1),
      **dict.fromkeys(("ramp_start_rows", "ramp_tokens", "z_loss", "loss_chunk_tokens"), 0),
      **dict.fromkeys(("keep_every_steps", "spike_sigmas"), 0),
      **dict.fromkeys(("profile_start_step", "profile_num_steps", "peak_flops_per_second"), 0),
    )
    check_most("train", self, host_devices=1024, distributed_timeout_seconds=10**6)
    if self.num_epochs is not None and not 0 < self.num_epochs < math.inf:
      raise ConfigError(f"train.num_epochs is {self.num_epochs}; it must be above 0 and finite")
    if self.batch_rows % self.accumulation:
      raise ConfigError(
        f"train.batch_rows {self.batch_rows} is not a multiple of"
        f" train.accumulation {self.accumulation}"
      )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What the loop runs now and then.

  Attributes:
    every_steps: steps between evaluations; the last step is always evaluated. 0: only the last.
    max_rows: rows (examples) of the validation split to score; 0 is all of them.
    batch_rows: rows (examples) scored at a time.
    sample_prompts: texts to continue at each evaluation, into samples.txt.
    sample_tokens: new tokens of each; 0 writes no samples.
    sample_temperature: temperature of the draw; 0 is greedy.
  """

  every_steps: int = 250
  max_rows: int = 0
  batch_rows: int = 32
  sample_prompts: tuple[str, ...] = ("",)
  sample_tokens: int = 100
  sample_temperature: float = 0.8

  def __post_init__(self):
    check_least(
      "eval", self, batch_rows=1, every_steps=0, max_rows=0, sample_tokens=0, sample_temperature=0
    )
    check_most("eval", self, batch_rows=10**6, sample_tokens=10**6)

  @property
  def has_samples(self) -> bool:
    return bool(self.sample_prompts and self.sample_tokens)


class RunConfig:
  """What the configs of whole runs share: groups optimizer, train and eval, a seed, and checks."""

  def check(self) -> None:
    """Raises ConfigError for values that contradict each other."""
    if not 0 <= self.seed < 2**32:
      raise ConfigError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
    check_details(self)
    kept, saved = self.train.keep_every_steps, self.save_every_steps
    if kept and (not saved or kept % saved):
      saves = f"saves are every {saved} steps" if saved else "only the last step is saved"
      raise ConfigError(
        f"train.keep_every_steps is {kept}, but {saves}; make it a multiple of"
        " train.save_every_steps"
      )

  @property
  def save_every_steps(self) -> int:
    """Updates between checkpoints; 0: only the last."""
    return self.train.save_every_steps or self.eval.every_steps


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
  """A whole pretraining run.

  Attributes:
    model, data, optimizer, train, eval: the groups.
    seed: of initialisation, data order, dropout and samples.
    init_from: whose parameters to start from: a run directory, a Hugging Face folder, or whatever
      else `gptjax.load` takes, of this architecture and tokenizer; "" is from scratch.
    tags: free notes kept with the run: {"paper": "..."}.
  """

  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  seed: int = 0
  init_from: str = ""
  tags: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.check()
    if self.model.mup_base_dim and self.optimizer.name == "gpt1_adam":
      raise ConfigError(
        'model.mup_base_dim needs optimizer.name "adamw" or "muon": muP has no rule for "gpt1_adam"'
      )
    if self.eval.has_samples and self.model.context_length < 2:
      raise ConfigError(
        "model.context_length is 1, too short for samples; set eval.sample_tokens=0"
      )
