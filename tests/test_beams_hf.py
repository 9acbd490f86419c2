"""Beam search equals transformers' token for token; beam-sample draws from its distribution."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, make_config, make_params

from gptjax.batch import Batch
from gptjax.generate.beams import BeamPlan, Game, make_ranking, search
from gptjax.generate.branches import make_extend, plant
from gptjax.generate.options import parse_options
from gptjax.generate.rules import apply_rules, make_rules
from gptjax.model.block import Layer, block
from gptjax.model.decoder import embed, final_norm, row_mixer, unstack_layers
from gptjax.model.heads import lm_logits
from gptjax.model.positions import rotary_angles, rotate

pytestmark = pytest.mark.hf

SAME = 1e-4  # ours is float32, theirs float64 up to the logits
MARGIN = 1e-4  # a choice of theirs between scores as near as that is a toss-up
MAX_NEW = 12
PROMPTS = [[5, 3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 1, 7, 1]]


def read_prompts(decoder, layers, tokens_BL, num_slots, config):
  """Returns (hidden states [B, L, D], keys and values of each layer [B, H, M, K])."""
  mix = row_mixer(Batch(tokens_BL, tokens_BL, tokens_BL), config, None)
  shape = (*tokens_BL.shape, config.num_heads, config.head_width)
  places_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)

  def keep(query_TA, key_TA, value_TA, layer):
    key, value = key_TA.reshape(shape), value_TA.reshape(shape)
    if config.positions == "rotary":
      key = rotate(key, rotary_angles(places_BL, config), config)
    room = ((0, 0), (0, 0), (0, num_slots - shape[1]), (0, 0))
    kept = tuple(jnp.pad(jnp.swapaxes(x, 1, 2), room) for x in (key, value))
    return mix(query_TA, key_TA, value_TA, layer)[0], kept

  x_TD, kept = embed(decoder, tokens_BL, places_BL, config), []
  for index, layer in enumerate(layers):
    kind = config.attention_pattern[index % len(config.attention_pattern)]
    x_TD, pair = block(layer, x_TD, config, keep, Layer(kind, index))
    kept.append(pair)
  hidden_TD = final_norm(decoder, x_TD, config)
  return hidden_TD.reshape(*tokens_BL.shape, -1), *zip(*kept)


@functools.partial(jax.jit, static_argnames=("plan", "end_ids", "config"))
def run(params, tokens_BL, length_B, max_new_B, ranking, keys_B, rules, plan, end_ids, config):
  num_prompt_slots, num_beams = tokens_BL.shape[1], plan.num_beams
  layers = unstack_layers(params["decoder"]["layers"], config)
  weights = {"decoder": params["decoder"], "layers": layers}

  def logits(hidden_XD):
    return lm_logits(params, hidden_XD, config)

  def process(log_probs_RV, tokens_RS, length_R):
    prompt_length_R = jnp.repeat(length_B, num_beams)
    return apply_rules(log_probs_RV, tokens_RS, length_R, prompt_length_R, rules), None

  def end(stop_state, token_R):
    return stop_state, jnp.isin(token_R, jnp.array(end_ids, jnp.int32)).astype(jnp.int32)

  num_slots = num_prompt_slots + (MAX_NEW - 1) * num_beams
  hidden_BLD, keys, values = read_prompts(params["decoder"], layers, tokens_BL, num_slots, config)
  last_BD = hidden_BLD[jnp.arange(len(length_B)), length_B - 1]
  tree = plant(keys, values, length_B, num_prompt_slots, num_beams)
  extend = make_extend(weights, logits, length_B, num_prompt_slots, config)
  tokens_BS = jnp.pad(tokens_BL, ((0, 0), (0, MAX_NEW)))
  game = Game(process, end, ranking, max_new_B, keys_B)
  return search(tokens_BS, length_B, None, logits(last_BD), extend, tree, game, plan)


def generate(params, config, prompts, max_new, end_ids, options, seed=0):
  """Returns [[(ids, score) of each beam] of each prompt]."""
  parsed = parse_options(options)
  tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
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
END_IDS = {"none": (), "one": (11,), "several": (11, 0, 35, 50, 3, 20, 44)}
FAMILY_NAMES = ["gpt1", "gpt2", "gptj", "gptneo", "gptneox"]


def compare_all(hf, config, ends, options, seeds, perturb=0.0):
  """Returns (how many agree, disagree, and disagree at a margin that is a toss-up)."""
  counts = {"agree": 0, "disagree": 0, "toss-up": 0}
  for seed in seeds:
    params = make_params(config, seed)
    model = hf.make_hf_model(params, config)
    params["decoder"]["token_embedding"]["embedding"][:, 0] += perturb
    for max_new in (1, 6, MAX_NEW):
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


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_beams_equal_transformers(hf, family):
  total = {"agree": 0, "disagree": 0, "toss-up": 0}
  for seed, options in enumerate(OPTIONS):
    for ends in END_IDS:
      counts = compare_all(hf, FAMILIES[family], ends, options, [seed])
      total = {name: total[name] + count for name, count in counts.items()}
  print(family, total)
  assert total["disagree"] == 0
  assert total["toss-up"] <= total["agree"] // 20


def test_another_model_and_another_option_are_noticed(hf):
  options = {"num_beams": 3, "length_penalty": 1.0}
  counts = compare_all(hf, FAMILIES["gpt2"], "one", options, [0], perturb=0.5)
  assert counts["disagree"] > counts["agree"]
  config, params = FAMILIES["gpt2"], make_params(FAMILIES["gpt2"])
  model = hf.make_hf_model(params, config)
  for change in ({"length_penalty": -1.5}, {"no_repeat_ngram_size": 1}, {"num_beams": 5}):
    got = generate(params, config, PROMPTS, MAX_NEW, END_IDS["several"], options | change)
    expected = [hf_generate(model, p, MAX_NEW, END_IDS["several"], options, 3)[0] for p in PROMPTS]
    assert not all(compare(*pair) for pair in zip(got, expected)), change


def test_beam_samples_follow_the_distribution_of_transformers(hf):
  """Of three tokens after each of many equal prompts: both count the same texts, up to chance."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  config, num_draws, max_new, end = make_config("gpt2", vocab_size=9), 4000, 3, 2
  params = make_params(config, seed=3)
  options = {"num_beams": 2, "do_sample": True, "length_penalty": 1.0}

  def draw(**changes):
    texts = generate(params, config, [[3, 1]] * num_draws, max_new, (end,), options | changes)
    return [tuple(beams[0][0][2:]) for beams in texts]

  model = hf.make_hf_model(params, config, dtype=torch.float32)
  model.generation_config = transformers.GenerationConfig()
  torch.manual_seed(0)
  generation_config = transformers.GenerationConfig(
    **options, max_new_tokens=max_new, eos_token_id=end, pad_token_id=end, top_k=0
  )
  tokens = torch.tensor([[3, 1]]).repeat(num_draws, 1)
  out = model.generate(
    tokens, attention_mask=torch.ones_like(tokens), generation_config=generation_config
  )
  # A text that ended is padded with its end token.
  rows = out[:, 2:].tolist()
  theirs = [tuple(row[: row.index(end) + 1] if end in row else row) for row in rows]
  assert len(set(theirs)) > 10

  def is_alike(ours):
    counts = [(ours.count(text), theirs.count(text)) for text in {*ours, *theirs}]
    # Five standard deviations of the difference of two counts, and some for the rarest.
    return all(abs(a - b) < 5 * np.sqrt(a + b) + 3 for a, b in counts)

  assert is_alike(draw())
  assert not is_alike(draw(length_penalty=0.0))
  assert not is_alike(draw(num_beams=3))
