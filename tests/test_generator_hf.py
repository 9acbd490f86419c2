"""Greedy texts equal transformers' token for token, for every family and its rules."""

import pytest
from families import FAMILIES, make_params

from gptjax.api import Model

pytestmark = pytest.mark.hf

MARGIN = 1e-4  # ours is float32, theirs float64: a choice between scores as near is a toss-up
PROMPTS = [[5, 3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 1, 7, 1]]
OPTIONS = {
  "plain": {},
  "repetition": {"repetition_penalty": 1.3},
  "ngrams": {"no_repeat_ngram_size": 2},
  "bad words": {"bad_words_ids": [[24], [26, 53], [53, 53]]},
  "minimum": {"min_new_tokens": 5, "eos_token_id": [24, 26, 53]},
  "ends": {"eos_token_id": [24, 26, 53]},
  "suppressed": {"suppress_tokens": [24, 53], "begin_suppress_tokens": [26]},
  "last": {"forced_eos_token_id": 11, "max_length": 14},
  "all": {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "suppress_tokens": [24]},
}


@pytest.fixture(scope="module")
def hf():
  """The tests' bridge to transformers; skips where PyTorch is not installed."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  return pytest.importorskip("hf_models")


def theirs(model, prompt, options):
  """Returns (new ids, the smallest margin of a choice)."""
  import torch
  import transformers

  model.generation_config = transformers.GenerationConfig()
  options = {"max_new_tokens": 12, "eos_token_id": None} | options
  if "max_length" in options:
    del options["max_new_tokens"]
  config = transformers.GenerationConfig(
    **options, pad_token_id=0, return_dict_in_generate=True, output_scores=True
  )
  tokens = torch.tensor([prompt])
  with torch.no_grad():
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
  best = [score[0].topk(2).values for score in out.scores]
  margins = [float(first - second) for first, second in best]
  return out.sequences[0, len(prompt) :].tolist(), min(margins)


def compare(hf, family, seeds, perturb=0.0):
  """Returns how many texts agree, disagree, and disagree where a choice is a toss-up."""
  counts = {"agree": 0, "disagree": 0, "toss-up": 0}
  for seed in seeds:
    params = make_params(FAMILIES[family], seed)
    their_model = hf.make_hf_model(params, FAMILIES[family])
    params["decoder"]["token_embedding"]["embedding"][:, 0] += perturb
    model = Model(FAMILIES[family], params)
    for options in OPTIONS.values():
      ours = {"eos_token_id": -1} | options
      if "max_length" not in options:
        ours["max_new_tokens"] = 12
      out = model.generate(PROMPTS, **ours)
      for row, num_new, prompt in zip(out.tokens, out.num_new, PROMPTS):
        expected, margin = theirs(their_model, prompt, options)
        same = row[len(prompt) :][:num_new].tolist() == expected
        counts["agree" if same else "toss-up" if margin < MARGIN else "disagree"] += 1
  return counts


@pytest.mark.parametrize("family", ["gpt1", "gpt2", "gptj", "gptneo", "gptneox"])
def test_greedy_texts_are_transformers(hf, family):
  counts = compare(hf, family, seeds=range(2))
  assert counts["disagree"] == 0
  assert counts["toss-up"] <= 2
  assert counts["agree"] >= 2 * len(OPTIONS) * len(PROMPTS) - 2


def test_another_model_would_be_noticed(hf):
  assert compare(hf, "gpt2", seeds=[0], perturb=0.3)["disagree"] > 0
