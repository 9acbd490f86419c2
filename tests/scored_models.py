"""A tiny model with a tokenizer of characters, and its log-likelihoods in float64 NumPy."""

import string

import numpy as np
from families import FAMILIES, make_params

from gptjax.checkpoint.models import Loaded
from gptjax.checkpoint.reference import reference_activations
from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.evaluate.scoring import Scorer

END_TOKEN = "<|end|>"
# 60 characters and the end token: the 61 ids of the tiny configs.
CHARACTERS = string.ascii_lowercase + string.digits + " \n.,:'\"`-_@<>()=?!|XNé日本"
CONFIG = FAMILIES["gpt2"]


def make_loaded(config=CONFIG, seed=0, gain=2.0):
  """Returns a model as `load_model` does, with NumPy parameters."""
  tokenizer = make_char_tokenizer([CHARACTERS], END_TOKEN)
  assert tokenizer.vocab_size == config.vocab_size
  token_ids = {"bos": (), "eos": (tokenizer.end_id,), "pad": ()}
  return Loaded(config, make_params(config, seed, gain), tokenizer, token_ids)


def make_scorer(model, batch_size=8):
  """Eight devices, a row on each."""
  return Scorer(model, batch_size)


def make_text(length, seed=0):
  """Draws words of plain letters."""
  rng = np.random.default_rng(seed)
  letters = np.array(list("abcdefgh  .\n"))
  return "".join(rng.choice(letters, length))


def reference_nats(model, ids):
  """Returns float64 nats of ids[1:], each given all before it."""
  ids = np.asarray(ids)
  logits_LV = reference_activations(model.params, model.config, ids[None, :-1])["logits"][0]
  logits_LV = logits_LV - logits_LV.max(axis=-1, keepdims=True)
  log_probs_LV = logits_LV - np.log(np.exp(logits_LV).sum(axis=-1, keepdims=True))
  return -log_probs_LV[np.arange(len(ids) - 1), ids[1:]]
