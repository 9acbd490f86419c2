"""nanoGPT's model and recipe in PyTorch, to measure against; the only file that imports torch.

Written from their description. The recipe is nanoGPT's for a CPU: pre-LN blocks without biases,
exact GELU, learned positions, tied head, AdamW with its default (looped) implementation, clipping,
cosine decay, random crops, eager execution, the loss read at every step, and every 250 steps an
estimate of both losses over 20 batches.
"""

import argparse
import dataclasses
import json
import math
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

VALID_FRACTION = 0.1
ESTIMATE_EVERY_STEPS = 250
ESTIMATE_BATCHES = 20


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The twin's sizes and optimiser; the defaults are nanoGPT's CPU recipe."""

  vocab_size: int = 65
  context_length: int = 64
  num_layers: int = 4
  num_heads: int = 4
  model_dim: int = 128
  bias: bool = False
  batch_rows: int = 12
  row_tokens: int = 64
  num_steps: int = 2_000
  learning_rate: float = 1e-3
  final_learning_rate: float = 1e-4
  warmup_steps: int = 100
  weight_decay: float = 0.1
  betas: tuple[float, float] = (0.9, 0.99)
  clip_norm: float = 1.0


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, recipe: Recipe):
    super().__init__()
    D, bias = recipe.model_dim, recipe.bias
    self.num_heads = recipe.num_heads
    self.attention_norm = nn.LayerNorm(D, bias=bias)
    self.qkv = nn.Linear(D, 3 * D, bias=bias)
    self.attention_output = nn.Linear(D, D, bias=bias)
    self.mlp_norm = nn.LayerNorm(D, bias=bias)
    self.up = nn.Linear(D, 4 * D, bias=bias)
    self.gelu = nn.GELU()
    self.down = nn.Linear(4 * D, D, bias=bias)

  def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
    B, L, D = x_BLD.shape
    qkv = self.qkv(self.attention_norm(x_BLD)).split(D, dim=2)
    heads = (part.view(B, L, self.num_heads, -1).transpose(1, 2) for part in qkv)
    mixed_BHLK = F.scaled_dot_product_attention(*heads, is_causal=True)
    mixed_BLD = mixed_BHLK.transpose(1, 2).contiguous().view(B, L, D)
    x_BLD = x_BLD + self.attention_output(mixed_BLD)
    return x_BLD + self.down(self.gelu(self.up(self.mlp_norm(x_BLD))))


class Twin(nn.Module):
  """GPT-2 with a tied head; returns the mean cross-entropy."""

  def __init__(self, recipe: Recipe):
    super().__init__()
    self.tokens = nn.Embedding(recipe.vocab_size, recipe.model_dim)
    self.positions = nn.Embedding(recipe.context_length, recipe.model_dim)
    self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.num_layers))
    self.final_norm = nn.LayerNorm(recipe.model_dim, bias=recipe.bias)
    residual_std = 0.02 / math.sqrt(2 * recipe.num_layers)
    for name, parameter in self.named_parameters():
      if parameter.dim() >= 2:
        is_residual = name.endswith(("attention_output.weight", "down.weight"))
        nn.init.normal_(parameter, std=residual_std if is_residual else 0.02)
      elif name.endswith("bias"):
        nn.init.zeros_(parameter)

  def forward(self, tokens_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
    x_BLD = self.tokens(tokens_BL) + self.positions(torch.arange(tokens_BL.shape[1]))
    for block in self.blocks:
      x_BLD = block(x_BLD)
    logits_BLV = F.linear(self.final_norm(x_BLD), self.tokens.weight)
    return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())


class Trainer:
  """Model, optimiser and data of one run."""

  def __init__(self, recipe: Recipe, tokens: np.ndarray, seed: int = 1337):
    torch.manual_seed(seed)
    self.recipe, self.tokens, self.step = recipe, tokens, 0
    self.model = Twin(recipe)
    parameters = list(self.model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    self.optimizer = torch.optim.AdamW(
      [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
      ],
      lr=recipe.learning_rate,
      betas=recipe.betas,
    )

  def train(self, num_steps: int) -> float:
    """Runs updates; returns the last loss."""
    for _ in range(num_steps):
      for group in self.optimizer.param_groups:
        group["lr"] = learning_rate(self.recipe, self.step)
      loss = self.model(*self.draw(self.tokens))
      loss.backward()
      nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
      self.optimizer.step()
      self.optimizer.zero_grad(set_to_none=True)
      self.step += 1
      last = loss.item()
    return last

  def draw(self, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts random rows, with replacement."""
    L = self.recipe.row_tokens
    starts = torch.randint(len(tokens) - L, (self.recipe.batch_rows,)).tolist()
    crops = [torch.from_numpy(tokens[i : i + L + 1].astype(np.int64)) for i in starts]
    crops_BL = torch.stack(crops)
    return crops_BL[:, :-1], crops_BL[:, 1:]

  @torch.no_grad()
  def estimate(self, tokens: np.ndarray) -> float:
    """Averages the loss over random batches, as nanoGPT does while it trains."""
    losses = [self.model(*self.draw(tokens)).item() for _ in range(ESTIMATE_BATCHES)]
    return sum(losses) / len(losses)

  @torch.no_grad()
  def evaluate(self, tokens: np.ndarray, rows: int = 256) -> float:
    """Returns nats per token over all of `tokens`, in rows that do not overlap."""
    L, targets = self.recipe.row_tokens, len(tokens) - 1
    tokens = torch.from_numpy(tokens.astype(np.int64))
    whole = targets // L * L
    parts = [(tokens[:whole].view(-1, L), tokens[1 : whole + 1].view(-1, L))]
    if whole < targets:
      parts.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))
    loss_sum = 0.0
    for inputs, outputs in parts:
      for x_BL, y_BL in zip(inputs.split(rows), outputs.split(rows), strict=True):
        loss_sum += self.model(x_BL, y_BL).item() * y_BL.numel()
    return loss_sum / targets


def learning_rate(recipe: Recipe, step: int) -> float:
  """Linear warm-up, then a cosine to the final rate."""
  if step < recipe.warmup_steps:
    return recipe.learning_rate * (step + 1) / (recipe.warmup_steps + 1)
  done = (step - recipe.warmup_steps) / max(recipe.num_steps - recipe.warmup_steps, 1)
  factor = 0.5 * (1 + math.cos(math.pi * min(done, 1)))
  return recipe.final_learning_rate + factor * (recipe.learning_rate - recipe.final_learning_rate)


def read_characters(path: str) -> tuple[np.ndarray, int]:
  """Returns a text's characters as uint16 ids, and how many kinds there are."""
  with open(path, encoding="utf-8") as file:
    text = file.read()
  ids = {character: i for i, character in enumerate(sorted(set(text)))}
  return np.array([ids[character] for character in text], np.uint16), len(ids)


def make_stepper(text: str = "", **sizes):
  """Contestant: returns `run(count)` -> seconds of `count` updates.

  Args:
    text: file of characters to train on; without one, random tokens.
    **sizes: fields of Recipe.
  """
  if text:
    tokens, vocab_size = read_characters(text)
    recipe = Recipe(**sizes, vocab_size=vocab_size)
  else:
    recipe = Recipe(**sizes)
    tokens = np.random.default_rng(0).integers(0, recipe.vocab_size, 1 << 20, np.uint16)
  trainer = Trainer(recipe, tokens)
  trainer.train(1)

  def run(count: int) -> float:
    started = time.perf_counter()
    trainer.train(count)
    return time.perf_counter() - started

  return run


def make_matmul(size: int):
  """Contestant: returns `run(count)` -> FLOP/s of the fastest of `count` square products."""
  matrix = torch.ones(size, size)
  matrix @ matrix

  def run(count: int) -> float:
    best = 0.0
    for _ in range(count):
      started = time.perf_counter()
      matrix @ matrix
      best = max(best, 2.0 * size**3 / (time.perf_counter() - started))
    return best

  return run


def main() -> None:
  """Trains on a text as nanoGPT's command does; the line "trained" marks the end of that."""
  parser = argparse.ArgumentParser(description=main.__doc__)
  parser.add_argument("--text", required=True)
  parser.add_argument("--steps", type=int, default=2_000)
  options = parser.parse_args()
  tokens, vocab_size = read_characters(options.text)
  split = int(len(tokens) * (1 - VALID_FRACTION))
  train, valid = tokens[:split], tokens[split:]
  trainer = Trainer(Recipe(vocab_size=vocab_size, num_steps=options.steps), train)
  estimate_seconds = 0.0
  while True:
    started = time.perf_counter()
    losses = {"train": trainer.estimate(train), "valid": trainer.estimate(valid)}
    print({"step": trainer.step, **losses}, flush=True)
    estimate_seconds += time.perf_counter() - started
    if trainer.step == options.steps:
      break
    trainer.train(min(ESTIMATE_EVERY_STEPS, options.steps - trainer.step))
  print("trained", flush=True)
  result = {"valid_loss": trainer.evaluate(valid), "estimate_seconds": estimate_seconds}
  print(json.dumps({"benchmark": "torch_twin", "steps": trainer.step, **result}))


if __name__ == "__main__":
  main()
