"""Our rules equal transformers' processors, in the order in which transformers has them."""

import types

import numpy as np
import pytest

from gptjax.generate.constraint import make_constraint
from gptjax.generate.options import parse_options
from gptjax.generate.rules import apply_rules, make_rules
from gptjax.generate.sampling import Controls

pytestmark = pytest.mark.hf

VOCAB, MODEL_END = 23, 2
# Both in float32; several biases of one token may be summed in another order.
TOLERANCE = 1e-6

# Option: random values for a batch whose rows have `length` tokens, of them `prompt` the prompt's.
# Single end tokens are no bad words: transformers ignores them there, and we refuse them.
CHOICES = {
  "logit_bias": lambda rng, prompt: {
    tuple(rng.integers(0, 4, rng.integers(1, 4)).tolist()): float(rng.normal()) for _ in range(8)
  },
  "repetition_penalty": lambda rng, prompt: float(rng.uniform(0.5, 2.0)),
  "no_repeat_ngram_size": lambda rng, prompt: int(rng.integers(1, 5)),
  "bad_words_ids": lambda rng, prompt: [
    [*rng.integers(0, 3, rng.integers(0, 3)).tolist(), int(rng.integers(3, VOCAB))]
    for _ in range(6)
  ],
  "min_length": lambda rng, prompt: prompt + int(rng.integers(0, 4)),
  "min_new_tokens": lambda rng, prompt: int(rng.integers(1, 4)),
  "eos_token_id": lambda rng, prompt: rng.permutation(VOCAB)[: rng.integers(1, 4)].tolist(),
  "forced_bos_token_id": lambda rng, prompt: int(rng.integers(VOCAB)),
  "forced_eos_token_id": lambda rng, prompt: rng.permutation(VOCAB)[:2].tolist(),
  "suppress_tokens": lambda rng, prompt: rng.permutation(VOCAB)[:4].tolist(),
  "begin_suppress_tokens": lambda rng, prompt: rng.permutation(VOCAB)[:4].tolist(),
  "allowed_tokens": lambda rng, prompt: make_callback(rng.permutation(VOCAB)[:6]),
}


def make_callback(ids):
  return lambda prompt, tokens: [int((token + prompt) % VOCAB) for token in ids[: 2 + len(tokens)]]


@pytest.fixture(scope="module")
def hf():
  """transformers' generation code with torch; skips where they are not installed."""
  torch = pytest.importorskip("torch")
  generation = pytest.importorskip("transformers.generation")
  return types.SimpleNamespace(torch=torch, generation=generation)


def theirs(hf, given, scores_RV, tokens_RL, prompt_length, max_length, num_beams):
  """Applies the processors that transformers itself chooses for these options."""
  torch, ends = hf.torch, given.get("eos_token_id", MODEL_END)
  renamed = {key: value for key, value in given.items() if key != "allowed_tokens"}
  bias = renamed.pop("logit_bias", None)
  callback = given.get("allowed_tokens")
  config = hf.generation.GenerationConfig(
    **renamed,
    sequence_bias=bias,
    max_length=max_length,
    num_beams=num_beams,
    num_return_sequences=1,
  )
  config._eos_token_tensor = torch.tensor([ends] if isinstance(ends, int) else ends)
  model = hf.generation.GenerationMixin()
  model.config = types.SimpleNamespace(is_encoder_decoder=False)
  processors = hf.generation.GenerationMixin._get_logits_processor(
    model,
    config,
    input_ids_seq_length=prompt_length,
    prefix_allowed_tokens_fn=callback and (lambda prompt, ids: callback(prompt, ids.tolist())),
    device="cpu",
    model_kwargs={},
  )
  return processors(torch.tensor(tokens_RL).long(), torch.tensor(scores_RV)).numpy()


def ours(given, scores_RV, tokens_RL, prompt_length, max_length, num_beams):
  """Applies our rules, with junk in the slots after the rows' ends."""
  options, num_rows = parse_options(given), len(tokens_RL)
  tokens_RS = np.pad(tokens_RL, ((0, 0), (0, 5)), constant_values=1).astype(np.int32)
  minimum = prompt_length + options.min_new_tokens if options.min_new_tokens else options.min_length
  controls = Controls(
    rules=make_rules(
      [options] * num_rows,
      model_end_id=MODEL_END,
      min_length_R=[minimum] * num_rows,
      limit_R=[max_length] * num_rows,
      num_beams=num_beams,
    )
  )
  length_R = np.full(num_rows, tokens_RL.shape[1], np.int32)
  prompt_length_R = np.full(num_rows, prompt_length, np.int32)
  if constraint := make_constraint(options, np.arange(num_rows) // num_beams, VOCAB):
    controls = constraint.apply(controls, tokens_RS, length_R, length_R > 0)
  return np.asarray(apply_rules(scores_RV, tokens_RS, length_R, prompt_length_R, controls.rules))


def random_case(rng, names):
  """Returns (options, scores, tokens, prompt length, length limit, beams)."""
  num_beams = int(rng.choice([1, 3]))
  # transformers forces the first token only after a prompt of one token.
  prompt_length = 1 if "forced_bos_token_id" in names else int(rng.integers(1, 8))
  length = prompt_length + int(rng.choice([0, 0, 1, 2, 5]))
  given = {name: CHOICES[name](rng, prompt_length) for name in names}
  if "min_new_tokens" in given:
    given.pop("min_length", None)
  forced = {given.get("forced_bos_token_id"), *given.get("forced_eos_token_id", ())}
  for name in ("suppress_tokens", "begin_suppress_tokens"):
    if name in given:  # they may not contradict each other
      given[name] = [id for id in given[name] if id not in forced]
  ends = given.get("eos_token_id", [MODEL_END])
  if "bad_words_ids" in given:
    given["bad_words_ids"] = [run for run in given["bad_words_ids"] if run[-1] not in ends]
    given["bad_words_ids"] += [[0, 1, 1]]
  tokens_RL = rng.integers(0, 4, (2 * num_beams, length)).astype(np.int32)
  scores_RV = rng.normal(size=(2 * num_beams, VOCAB)).astype(np.float32)
  if num_beams > 1:
    scores_RV -= np.log(np.exp(scores_RV).sum(axis=1, keepdims=True))
  return given, scores_RV, tokens_RL, prompt_length, length + int(rng.integers(1, 4)), num_beams


def same(a, b):
  return np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", CHOICES)
def test_each_rule_equals_transformers_and_its_absence_does_not(hf, name):
  rng = np.random.default_rng(list(CHOICES).index(name))
  names = ["min_new_tokens", name] if name == "eos_token_id" else [name]
  noticed = 0
  for _ in range(25):
    given, *case = random_case(rng, names)
    expected = theirs(hf, given, *case)
    assert same(ours(given, *case), expected)
    without = {key: value for key, value in given.items() if key != name}
    noticed += not same(ours(without, *case), expected)
  assert noticed >= 3  # the companion: what must fail does


def test_all_rules_together_equal_transformers_in_its_order(hf):
  rng = np.random.default_rng(100)
  for _ in range(150):
    names = rng.permutation(list(CHOICES))[: rng.integers(3, len(CHOICES))].tolist()
    case = random_case(rng, names)
    assert same(ours(*case), theirs(hf, *case)), names


@pytest.mark.parametrize(
  "name, wrong",
  [
    ("repetition_penalty", lambda value: value * 1.01),
    ("no_repeat_ngram_size", lambda value: value + 1),
    ("bad_words_ids", lambda value: value[1:]),
    ("bad_words_ids", lambda value: [run[-2:] for run in value]),
    ("logit_bias", lambda value: {run[-1:]: weight for run, weight in value.items()}),
    ("min_length", lambda value: value + 1),
    ("min_new_tokens", lambda value: value + 1),
    ("begin_suppress_tokens", lambda value: value[:-1] or [0]),
  ],
)
def test_a_slightly_wrong_rule_is_noticed(hf, name, wrong):
  """The companion of parity: off by one, by one entry, by one percent."""
  rng = np.random.default_rng(7)
  cases = [random_case(rng, [name]) for _ in range(40)]
  changed = [
    not same(ours({name: wrong(given[name])}, *case), theirs(hf, given, *case))
    for given, *case in cases
  ]
  assert any(changed)
