"""Texts that continue prompts, many at a time and in few compiled sizes."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gptjax.checkpoint.models import Loaded
from gptjax.errors import ConfigError
from gptjax.generate.generator import Generator, draw_seed
from gptjax.generate.options import DecodingOptions, is_sampled

# Prompts of a batch where no batch size is given.
BATCH_PROMPTS = 16


def make_generator(model: Loaded) -> Generator:
  """Makes what writes the texts of a model; of parameters on every device it uses one copy."""

  def one_copy(leaf):
    is_on_all = isinstance(leaf, jax.Array) and leaf.is_fully_replicated
    return leaf.addressable_data(0) if is_on_all else leaf

  return Generator(
    jax.tree.map(one_copy, model.params),
    model.config,
    model.tokenizer,
    end_ids=model.token_ids["eos"],
  )


def complete(
  generator: Generator,
  prompts: Sequence[Sequence[int]],
  options: DecodingOptions,
  batch_size: int | None = None,
  advance: Callable[[int], None] = lambda num_prompts: None,
) -> list[str]:
  """Continues prompts; a prompt that is too long loses its beginning.

  Args:
    generator: has a tokenizer.
    prompts: ids of each, at least one.
    options: max_new_tokens is given.
    batch_size: prompts in a batch; changes speed and memory only.
    advance: called with the number of prompts done, as they are done.

  Returns:
    The new text of each prompt, without end token and stop text.

  Raises:
    ConfigError: no room for a prompt, or options that do not fit.
  """
  if options.num_return_sequences > 1:
    raise ConfigError(
      f"num_return_sequences is {options.num_return_sequences}, and a prompt has one completion"
      " here; leave it out"
    )
  room = generator.config.context_length - options.max_new_tokens
  if room < 1:
    raise ConfigError(
      f"max_new_tokens is {options.max_new_tokens}, and the context of the model,"
      f" {generator.config.context_length} tokens, must hold a prompt too; lower it"
    )
  kept = [list(prompt)[-room:] for prompt in prompts]
  if is_sampled(options):
    return _draw(generator, kept, options, advance)
  size = min(batch_size or BATCH_PROMPTS, len(kept))
  order = sorted(range(len(kept)), key=lambda index: len(kept[index]), reverse=True)
  texts = [""] * len(kept)
  for start in range(0, len(order), size):
    indices = order[start : start + size]
    # The last batch is filled up, so that all have one size.
    batch = [kept[index] for index in indices] + [kept[indices[-1]]] * (size - len(indices))
    for index, text in zip(indices, generator.generate(batch, options).texts):
      texts[index] = text
    advance(len(indices))
  return texts


def _draw(generator, prompts, options, advance) -> list[str]:
  """Draws a text for each prompt by itself, since a draw depends on the place in a batch."""
  seeds = np.random.SeedSequence(int(draw_seed(options))).generate_state(len(prompts))
  texts = []
  for prompt, seed in zip(prompts, seeds):
    drawn = generator.generate(prompt, dataclasses.replace(options, seed=int(seed)))
    texts.append(drawn.texts[0])
    advance(1)
  return texts
