"""Tiny models with a task's head of unit scale, and examples for them."""

import types

import numpy as np
from families import make_config, make_params

from gptjax.checkpoint.reference import reference_activations
from gptjax.data.examples import Example
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.task_inputs import encode_examples, find_task_tokens, new_tokens
from gptjax.data.tokenizer import load_tokenizer, make_char_tokenizer

TASKS = {
  "classification": {"labels": ("no", "perhaps", "yes")},
  "entailment": {"labels": ("no", "yes")},
  "similarity": {"target": "score"},
  "multiple_choice": {},
}


def make_tokenizer(folder, config):
  make_char_tokenizer(["abcdefgh "]).save(folder / "tokenizer.json")
  return load_tokenizer(folder / "tokenizer.json", additional_special_tokens=new_tokens(config))


def make_model(folder, family, architecture="gpt2", **changes):
  """Returns a model whose vocabulary is its tokenizer's."""
  task = TaskDataConfig(family=family, **TASKS[family] | changes)
  tokenizer = make_tokenizer(folder, task)
  config = make_config(architecture, vocab_size=tokenizer.vocab_size)
  rng = np.random.default_rng(5)
  shape = (config.model_dim, task.task.num_outputs)
  head = {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[1])}
  params = make_params(config) | {"task_head": {k: v.astype(np.float32) for k, v in head.items()}}
  return types.SimpleNamespace(config=config, params=params, tokenizer=tokenizer, task=task)


def make_examples(family, count=21):
  rng = np.random.default_rng(3)

  def text(longest=8):
    return "".join(rng.choice(list("abcdefgh "), rng.integers(1, longest)))

  examples = []
  for number in range(count):
    second = (text(),) if family in ("entailment", "similarity") else ()
    choices = tuple(text() for _ in range(2 + number % 2)) if family == "multiple_choice" else ()
    examples.append(Example(str(number), (text(),), second, choices))
  return examples


def slow_outputs(model, example):
  """Reads the sequences of one example one at a time, in float64 NumPy."""
  tokens = find_task_tokens(model.tokenizer, model.task)
  longest = model.task.max_length or model.config.context_length
  encoded = encode_examples([example], model.task.task, model.tokenizer, tokens, longest)
  states_SD = []
  for pieces in encoded.sequences[0]:
    row = np.concatenate(pieces)
    states = reference_activations(model.params, model.config, row[None])["final_norm"]
    states_SD.append(states[0, -1])
  head = {name: np.asarray(leaf) for name, leaf in model.params["task_head"].items()}
  if not model.task.task.is_choice:
    states_SD = [sum(states_SD)]
  return (np.stack(states_SD) @ head["kernel"] + head["bias"]).reshape(-1)
