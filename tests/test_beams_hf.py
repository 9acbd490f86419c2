"""Beam search equals transformers' token for token; beam-sample draws from its distribution."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, make_params

from gptjax.batch import Batch
from gptjax.generate.beams import BeamPlan, Game, make_ranking, search
from gptjax.generate.options import parse_options
from gptjax.generate.rules import apply_rules, make_rules
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_logits

pytestmark = pytest.mark.hf

SAME = 1e-4  # ours is float32, theirs float64 up to the logits
MARGIN = 1e-4  # a choice of theirs between scores as near as that is a toss-up
NUM_SLOTS = 22
PROMPTS = [[5, 3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 1, 7, 1]]


@functools.partial(jax.jit, static_argnames=("plan", "end_ids", "config"))
def run(params, tokens_BS, length_B, max_new_B, ranking, keys_B, rules, plan, end_ids, config):
  num_prompts, num_beams = len(tokens_BS), plan.num_beams

  def logits_at(tokens_RS, length_R):
    hidden = hidden_states(params["decoder"], Batch(tokens_RS, tokens_RS, tokens_RS), config)
    last = jnp.take_along_axis(hidden, length_R[:, None, None] - 1, axis=1)[:, 0]
    return lm_logits(params, last, config)

  def extend(token_BW, parent_BW, num_new, tokens_BWS):
    tokens_BWS = jnp.take_along_axis(tokens_BWS, parent_BW[:, :, None], axis=1)
    place_B = length_B + num_new - 1
    is_place_BS = jnp.arange(tokens_BS.shape[1])[None] == place_B[:, None]
    tokens_BWS = jnp.where(is_place_BS[:, None], token_BW[:, :, None], tokens_BWS)
    tokens_RS = tokens_BWS.reshape(-1, tokens_BS.shape[1])
    logits_RV = logits_at(tokens_RS, jnp.repeat(place_B + 1, num_beams))
    return logits_RV.reshape(num_prompts, num_beams, -1), tokens_BWS

  def process(log_probs_RV, tokens_RS, length_R):
    prompt_length_R = jnp.repeat(length_B, num_beams)
    return apply_rules(log_probs_RV, tokens_RS, length_R, prompt_length_R, rules), None

  def end(stop_state, token_R):
    return stop_state, jnp.isin(token_R, jnp.array(end_ids, jnp.int32)).astype(jnp.int32)

  memory = jnp.repeat(tokens_BS[:, None], num_beams, axis=1)
  game = Game(process, end, ranking, max_new_B, keys_B)
  return search(
    tokens_BS, length_B, None, logits_at(tokens_BS, length_B), extend, memory, game, plan
  )


def generate(params, config, prompts, max_new, end_ids, options, seed=0):
  """Returns [[(ids, score) of each beam] of each prompt]."""
  parsed = parse_options(options)
  tokens = np.zeros((len(prompts), NUM_SLOTS), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  limits = np.repeat(lengths + max_new, parsed.num_beams)
  rules = make_rules(
    [parsed] * len(limits),
    model_end_id=None,
    min_length_R=np.zeros_like(limits),
    limit_R=limits,
    num_beams=parsed.num_beams,
  )
  plan = BeamPlan(parsed.num_beams, len(end_ids), parsed.do_sample)
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(prompts)))
  texts = run(
    params,
    tokens,
    lengths,
    np.full(len(prompts), max_new, np.int32),
    make_ranking(parsed.length_penalty, parsed.early_stopping),
    keys_B,
    rules,
    plan,
    tuple(end_ids),
    config,
  )
  texts = jax.tree.map(np.asarray, texts)
  return [
    [
      (row_S[:length].tolist(), float(score))
      for row_S, length, score in zip(tokens_WS, length_W, score_W)
    ]
    for tokens_WS, length_W, score_W in zip(texts.tokens_BWS, texts.length_BW, texts.score_BW)
  ]


@contextlib.contextmanager
def watch_margins(torch):
  """Yields the list of the smallest differences between scores that torch.topk told apart."""
  margins, topk = [np.inf], torch.topk

  def watched(values, k):
    best = topk(values, min(k + 1, values.shape[-1]))[0].double().numpy()
    gaps = np.abs(np.diff(best, axis=-1))[best[..., 1:] > -1e8]
    margins.extend(gaps.tolist())
    return topk(values, k)

  torch.topk = watched
  try:
    yield margins
  finally:
    torch.topk = topk


def hf_generate(model, prompt, max_new, end_ids, options, num_return_sequences=1):
  """Returns ([(ids, score)], the smallest margin of a choice)."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  model.generation_config = transformers.GenerationConfig()
  config = transformers.GenerationConfig(
    **options,
    max_new_tokens=max_new,
    eos_token_id=list(end_ids) or None,
    pad_token_id=0,
    num_return_sequences=num_return_sequences,
    return_dict_in_generate=True,
    output_scores=True,
    output_logits=True,
  )
  tokens = torch.tensor([prompt])
  with watch_margins(torch) as margins, torch.no_grad():
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
  found = []
  for ids, score, beams in zip(out.sequences, out.sequences_scores, out.beam_indices):
    length = len(prompt) + int((beams >= 0).sum())
    found.append((ids[:length].tolist(), float(score)))
  return found, min(margins)


@pytest.fixture(scope="module")
def hf():
  """The tests' bridge to transformers; skips where PyTorch is not installed."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  return pytest.importorskip("hf_models")


def compare(got, expected):
  """Says whether texts are equal, in order, and scores nearly."""
  return [ids for ids, _ in got] == [ids for ids, _ in expected] and all(
    score == pytest.approx(other, rel=SAME) for (_, score), (_, other) in zip(got, expected)
  )


# Rows of one family share compiled programs where only lengths and penalties differ.
OPTIONS = [
  {"num_beams": 3, "length_penalty": 1.0},
  {"num_beams": 3, "length_penalty": 0.0},
  {"num_beams": 3, "length_penalty": -1.5},
  {"num_beams": 3, "length_penalty": 2.0},
  {"num_beams": 3, "length_penalty": 1.0, "early_stopping": True},
  {"num_beams": 3, "length_penalty": 1.0, "early_stopping": "never"},
  {"num_beams": 3, "length_penalty": -0.5, "early_stopping": "never"},
  {"num_beams": 4, "no_repeat_ngram_size": 2, "early_stopping": True},
]
END_IDS = {"none": (), "one": (11,), "several": (11, 0, 35)}
FAMILY_NAMES = ["gpt1", "gpt2", "gptj", "gptneo", "gptneox"]


def compare_all(hf, config, ends, options, seeds, perturb=0.0):
  """Returns (how many agree, disagree, and disagree at a margin that is a toss-up)."""
  counts = {"agree": 0, "disagree": 0, "toss-up": 0}
  for seed in seeds:
    params = make_params(config, seed)
    model = hf.make_hf_model(params, config)
    params["decoder"]["token_embedding"]["embedding"][:, 0] += perturb
    for max_new in (1, 6, 12):
      got = generate(params, config, PROMPTS, max_new, END_IDS[ends], options)
      for prompt, texts in zip(PROMPTS, got):
        expected, margin = hf_generate(
          model, prompt, max_new, END_IDS[ends], options, options["num_beams"]
        )
        if compare(texts, expected):
          counts["agree"] += 1
        else:
          counts["toss-up" if margin < MARGIN else "disagree"] += 1
          print(options, max_new, prompt, margin, texts, expected, sep="\n")
  return counts


@pytest.mark.parametrize("ends", END_IDS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_beams_equal_transformers(hf, family, ends):
  total = {"agree": 0, "disagree": 0, "toss-up": 0}
  for options in OPTIONS:
    for name, count in compare_all(hf, FAMILIES[family], ends, options, range(2)).items():
      total[name] += count
  print(family, ends, total)
  assert total["disagree"] == 0
  assert total["toss-up"] <= total["agree"] // 20
