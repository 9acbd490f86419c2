"""Rules on logits equal a plain reading of each, row by row, whatever the rows' companions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import ConfigError
from gptjax.generate.checks import resolve_lengths
from gptjax.generate.constraint import Constraint
from gptjax.generate.options import DecodingOptions, parse_options
from gptjax.generate.rules import apply_rules, make_rules
from gptjax.generate.sampling import Controls

VOCAB = 13
MODEL_END = 2
# One float32 rounding: XLA may contract a product and a sum into one instruction.
TOLERANCE = 1e-6

# Options of random rows; a row takes a few of them. Small vocabularies make repetitions likely.
CHOICES = {
  "logit_bias": [{3: 1.5, 4: float("-inf")}, {(5, 6): -2.0, 6: 0.5, (1, 5, 6): 4.0}],
  "repetition_penalty": [1.3, 0.7],
  "frequency_penalty": [0.5, -0.25],
  "presence_penalty": [0.75, -1.0],
  "no_repeat_ngram_size": [1, 2, 3, 30],
  "bad_words_ids": [[[4], [1, 2]], [[3, 4, 5], [0, 0], [7, 8, 9, 1, 2, 3]]],
  "min_new_tokens": [1, 3],
  "min_length": [6],
  "eos_token_id": [[1, 5], -1, 4],
  "forced_bos_token_id": [8, 0],
  "forced_eos_token_id": [9, [0, 10]],
  "suppress_tokens": [[0], [7, 11]],
  "begin_suppress_tokens": [[3, 12], [1]],
  "allowed_tokens": [lambda prompt, ids: {0, prompt % VOCAB, ids[-1], 7 * len(ids) % VOCAB}],
}


def expect(scores_V, ids, prompt_length, options, prompt=0):
  """Applies the rules of one row to its tokens `ids`, in NumPy and loops."""
  scores = scores_V.copy()
  lengths = resolve_lengths(options, [prompt_length], 100)
  new, completes = ids[prompt_length:], lambda run: ids[len(ids) - len(run) + 1 :] == run[:-1]

  def force(forced):
    scores[:] = -np.inf
    scores[list(forced)] = 0

  for run, weight in options.logit_bias:
    if len(run) <= len(ids) + 1 and completes(list(run)):
      scores[run[-1]] += np.float32(weight)
  for token in set(ids):
    factor = np.float32(options.repetition_penalty)
    scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
  for token in set(new):
    scores[token] -= np.float32(options.frequency_penalty) * new.count(token)
    scores[token] -= np.float32(options.presence_penalty)
  size = options.no_repeat_ngram_size
  for token in range(VOCAB):
    grams = [ids[i : i + size] for i in range(len(ids) - size + 1)]
    if size and size <= len(ids) and [*ids[len(ids) - size + 1 :], token] in grams:
      scores[token] = -np.inf
  for run in options.bad_words_ids:
    if len(run) <= len(ids) + 1 and completes(list(run)):
      scores[run[-1]] = -np.inf
  ends = (MODEL_END,) if options.eos_token_id is None else options.eos_token_id
  if len(ids) < lengths.min_lengths[0]:
    scores[list(ends)] = -np.inf
  if options.allowed_tokens is not None:
    allowed = list(options.allowed_tokens(prompt, ids))
    mask = np.full(VOCAB, -np.inf)
    mask[allowed] = 0
    scores = scores + mask if np.isfinite(scores[allowed]).any() else mask
  if options.forced_bos_token_id is not None and not new:
    force([options.forced_bos_token_id])
  if options.forced_eos_token_id and len(ids) == lengths.limits[0] - 1:
    force(options.forced_eos_token_id)
  scores[list(options.suppress_tokens)] = -np.inf
  if len(new) == (options.forced_bos_token_id is not None):
    scores[list(options.begin_suppress_tokens)] = -np.inf
  return scores


def random_options(rng, names=None, num_names=4):
  """Returns valid options: `names`, or a few at random."""
  names = rng.permutation(list(CHOICES))[:num_names] if names is None else names
  given = {name: CHOICES[name][rng.integers(len(CHOICES[name]))] for name in names}
  if "min_new_tokens" in given:
    given.pop("min_length", None)
  return parse_options(given | {"max_new_tokens": int(rng.integers(5, 9))})


def random_rows(rng, row_options, num_slots=24):
  """Returns (scores_RV, tokens_RS with junk after each row's end, lengths, prompt lengths)."""
  num_rows = len(row_options)
  scores_RV = rng.normal(size=(num_rows, VOCAB)).astype(np.float32)
  tokens_RS = rng.integers(0, VOCAB, (num_rows, num_slots)).astype(np.int32)
  repeats = rng.random((num_rows, num_slots)) < 0.5
  tokens_RS[repeats] = rng.integers(0, 3, repeats.sum())
  prompt_length_R = rng.integers(1, 10, num_rows).astype(np.int32)
  most_new = np.array([options.max_new_tokens - 1 for options in row_options])
  new_R = np.minimum(rng.choice([0, 1, 2, 4, 7], num_rows), most_new)
  return scores_RV, tokens_RS, (prompt_length_R + new_R).astype(np.int32), prompt_length_R


@jax.jit
def apply_jit(*args):
  return apply_rules(*args)


def make_controls(row_options, tokens_RS, length_R, prompt_R=None, **kwargs):
  """Makes the rules of rows; what allowed_tokens says is of each row's own function."""
  controls = Controls(rules=make_rules(row_options, model_end_id=MODEL_END, **kwargs))
  functions = [options.allowed_tokens for options in row_options]
  if not any(functions):
    return controls
  prompt_R = np.arange(len(row_options)) if prompt_R is None else prompt_R
  masks = [
    Constraint(function or (lambda prompt, ids: range(VOCAB)), prompt_R, VOCAB)
    .apply(controls, tokens_RS, length_R, np.arange(len(functions)) == row)
    .rules.allowed_RV[row]
    for row, function in enumerate(functions)
  ]
  return controls.replace(rules=controls.rules.replace(allowed_RV=np.stack(masks)))


def apply(row_options, scores_RV, tokens_RS, length_R, prompt_length_R, **kwargs):
  """Makes the rules of rows and applies them in a compiled program."""
  resolved = [
    resolve_lengths(options, [length], 100)
    for options, length in zip(row_options, prompt_length_R, strict=True)
  ]
  controls = make_controls(
    row_options,
    tokens_RS,
    length_R,
    min_length_R=[x.min_lengths[0] for x in resolved],
    limit_R=[x.limits[0] for x in resolved],
    **kwargs,
  )
  return np.asarray(apply_jit(scores_RV, tokens_RS, length_R, prompt_length_R, controls.rules))


def expect_rows(row_options, scores_RV, tokens_RS, length_R, prompt_length_R):
  return np.stack(
    [
      expect(scores_V, tokens_S[:length].tolist(), int(prompt_length), options, prompt)
      for prompt, (options, scores_V, tokens_S, length, prompt_length) in enumerate(
        zip(row_options, scores_RV, tokens_RS, length_R, prompt_length_R, strict=True)
      )
    ]
  )


def test_no_rules_is_nothing():
  rules = make_rules([DecodingOptions()] * 2, model_end_id=2, min_length_R=[0, 0], limit_R=[9, 9])
  assert jax.tree.leaves(rules) == []
  scores_RV = np.ones((2, VOCAB), np.float32)
  text = str(
    jax.make_jaxpr(apply_rules)(scores_RV, np.ones((2, 4), int), *np.ones((2, 2), int), rules)
  )
  assert text.count("=") == 0


@pytest.mark.parametrize("name", CHOICES)
def test_each_rule_alone_equals_its_plain_reading(name):
  rng = np.random.default_rng(list(CHOICES).index(name))
  changed = 0
  for _ in range(6):
    names = ["min_new_tokens", name] if name == "eos_token_id" else [name]
    row_options = [random_options(rng, names) for _ in range(8)]
    rows = random_rows(rng, row_options)
    ours = apply(row_options, *rows)
    np.testing.assert_allclose(ours, expect_rows(row_options, *rows), rtol=TOLERANCE)
    changed += np.any(ours != rows[0], axis=1).sum()
  assert changed  # the cases are such that the rule does something


def test_rows_with_different_rules_share_one_program():
  rng = np.random.default_rng(0)
  for _ in range(3):
    row_options = [random_options(rng) for _ in range(64)]
    rows = random_rows(rng, row_options)
    expected = expect_rows(row_options, *rows)
    np.testing.assert_allclose(
      apply(row_options, *rows), expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=False
    )


def test_the_plain_reading_notices_every_option():
  """The companion: an option that is left out, or read differently, does not pass."""
  rng = np.random.default_rng(1)
  for name in CHOICES:
    names = ["min_new_tokens", name] if name == "eos_token_id" else [name]
    row_options = [random_options(rng, names) for _ in range(48)]
    rows = random_rows(rng, row_options)
    without = [
      parse_options(
        {"max_new_tokens": options.max_new_tokens}
        | ({"min_new_tokens": options.min_new_tokens} if name == "eos_token_id" else {})
      )
      for options in row_options
    ]
    assert not np.allclose(apply(without, *rows), expect_rows(row_options, *rows)), name
  # The tokens after a row's end, its length and its prompt all matter where they should.
  given = {"no_repeat_ngram_size": 2, "frequency_penalty": 1.0, "max_new_tokens": 9}
  row_options = [parse_options(given)] * 48
  scores_RV, tokens_RS, length_R, prompt_length_R = random_rows(rng, row_options)
  expected = expect_rows(row_options, scores_RV, tokens_RS, length_R, prompt_length_R)
  for wrong in (
    (scores_RV, np.roll(tokens_RS, 1, axis=1), length_R, prompt_length_R),
    (scores_RV, tokens_RS, length_R - 1, np.minimum(prompt_length_R, length_R - 1)),
    (scores_RV, tokens_RS, length_R, prompt_length_R * 0 + 1),
  ):
    keep = wrong[2] >= 1
    ours = apply(row_options[: keep.sum()], *(x[keep] for x in wrong))
    assert not np.allclose(ours, expected[keep])


def test_a_row_does_not_depend_on_its_companions_or_on_free_slots():
  rng = np.random.default_rng(2)
  row_options = [random_options(rng, num_names=6) for _ in range(8)]
  scores_RV, tokens_RS, length_R, prompt_length_R = random_rows(rng, row_options)
  together = apply(row_options, scores_RV, tokens_RS, length_R, prompt_length_R)
  for r in range(3):
    shorter_1S = tokens_RS[r : r + 1, : length_R[r]]
    for tokens_1S in (shorter_1S, np.pad(shorter_1S, ((0, 0), (0, 40)), constant_values=-1)):
      alone = apply(
        row_options[r : r + 1],
        scores_RV[r : r + 1],
        tokens_1S,
        length_R[r : r + 1],
        prompt_length_R[r : r + 1],
        prompt_R=[r],
      )
      np.testing.assert_allclose(alone[0], together[r], rtol=TOLERANCE)


def test_rows_of_rules_can_be_picked_and_reordered():
  rng = np.random.default_rng(3)
  row_options = [random_options(rng, ["bad_words_ids", "logit_bias"]) for _ in range(6)]
  rows = random_rows(rng, row_options)
  rules = make_rules(row_options, model_end_id=2, min_length_R=[0] * 6, limit_R=[9] * 6)
  order = np.array([5, 0, 0, 3])
  picked = jax.tree.map(lambda x: x[order], rules)
  ours = apply_jit(*(x[order] for x in rows), picked)
  np.testing.assert_array_equal(ours, np.asarray(apply_jit(*rows, rules))[order])


def test_rules_compile_once_for_other_values_and_functions():
  count = 0

  @jax.jit
  def program(*args):
    nonlocal count
    count += 1
    return apply_rules(*args)

  rng = np.random.default_rng(4)
  for number in range(4):
    row_options = [
      parse_options(
        {
          "repetition_penalty": 1.1 + number,
          "no_repeat_ngram_size": 1 + number,
          "bad_words_ids": [[number, 1, 2]] * 3,
          "allowed_tokens": lambda prompt, ids, number=number: [number],
          "max_new_tokens": 9,
        }
      )
    ] * 2
    rows = random_rows(rng, row_options)
    controls = make_controls(row_options, *rows[1:3], min_length_R=[0, 0], limit_R=[9, 9])
    scores_RV = np.asarray(program(*rows, controls.rules))
    assert np.all(np.isfinite(scores_RV).sum(axis=1) == 1)
    assert np.all(np.isfinite(scores_RV[:, number]))
  assert count == 1


def test_rules_work_inside_a_loop_on_the_device():
  """Greedy text of one fixed ranking: without repeated bigrams, to the end that is forced."""
  options = parse_options(
    {"no_repeat_ngram_size": 2, "suppress_tokens": [12], "forced_eos_token_id": 7, "max_length": 10}
  )
  scores_RV = jnp.tile(jnp.arange(VOCAB, dtype=jnp.float32)[None, :], (2, 1))

  @jax.jit
  def run(tokens_RS, length_R, rules):
    prompt_length_R = length_R

    def step(carry):
      tokens_RS, length_R = carry
      best_R = jnp.argmax(
        apply_rules(scores_RV, tokens_RS, length_R, prompt_length_R, rules), axis=1
      )
      return tokens_RS.at[jnp.arange(2), length_R].set(best_R.astype(jnp.int32)), length_R + 1

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1] < 10), step, (tokens_RS, length_R))[0]

  tokens_RS = np.array([[0] * 10, [11] + [0] * 9], np.int32)
  rules = make_rules([options] * 2, model_end_id=2, min_length_R=[0, 0], limit_R=[10, 10])
  tokens_RS = np.asarray(run(tokens_RS, np.array([1, 1], np.int32), rules)).tolist()
  # 11 after 11 once; 10 after 11 once, 11 after 10 once, ...
  assert tokens_RS[0] == [0, 11, 11, 10, 11, 9, 11, 8, 11, 7]
  assert tokens_RS[1] == [11, 11, 10, 11, 9, 11, 8, 11, 7, 7]


def apply_callback(function, scores_RV=None, num_beams=1, num_rows=2):
  options = parse_options({"allowed_tokens": function, "max_new_tokens": 9})
  scores_RV = np.zeros((num_rows, VOCAB), np.float32) if scores_RV is None else scores_RV
  ones_R = np.ones(num_rows, np.int32)
  tokens_RS = np.arange(num_rows * 4, dtype=np.int32).reshape(num_rows, 4)
  return apply([options] * num_rows, scores_RV, tokens_RS, ones_R * 3, ones_R, num_beams=num_beams)


def test_a_callback_sees_its_prompt_and_all_tokens_so_far():
  seen = []
  apply_callback(lambda prompt, ids: seen.append((prompt, ids)) or [1])
  assert seen == [(0, [0, 1, 2]), (1, [4, 5, 6])]
  assert all(type(token) is int for _, ids in seen for token in ids)


def fail(prompt, ids):
  raise KeyError("the user's own")


@pytest.mark.parametrize(
  "function, kind, message",
  [
    (lambda prompt, ids: [], ConfigError, "returned no ids for prompt 0 after 3 tokens"),
    (
      lambda prompt, ids: [1, VOCAB],
      ConfigError,
      "returned 13, but the model's tokens are 0 to 12",
    ),
    (lambda prompt, ids: [-1, 2], ConfigError, "returned -1"),
    (lambda prompt, ids: None, TypeError, "NoneType"),
    (fail, KeyError, "the user's own"),
  ],
)
def test_what_a_callback_raises_arrives_as_it_is(function, kind, message):
  with pytest.raises(kind, match=message):
    apply_callback(function)


def test_rows_that_have_ended_are_not_asked_about():
  seen = []
  constraint = Constraint(lambda prompt, ids: seen.append(prompt) or [1], np.array([4, 5]), VOCAB)
  rules = make_rules([parse_options({})] * 2, model_end_id=2, min_length_R=[0, 0], limit_R=[9, 9])
  tokens_RS, length_R = np.zeros((2, 4), np.int32), np.array([3, 3])
  made = constraint.apply(Controls(rules=rules), tokens_RS, length_R, np.array([False, True]))
  assert seen == [5]
  assert made.rules.allowed_RV.sum(axis=1).tolist() == [VOCAB, 1]


def test_where_nothing_allowed_is_left_the_allowed_win_unless_another_beam_goes_on():
  scores_RV = np.zeros((4, VOCAB), np.float32)
  scores_RV[[0, 2, 3], 5] = -np.inf
  by_row = apply_callback(lambda prompt, ids: [5], scores_RV, num_rows=4)
  assert by_row[:, 5].tolist() == [0, 0, 0, 0]
  by_beam = apply_callback(lambda prompt, ids: [5], scores_RV, num_beams=2, num_rows=4)
  assert by_beam[:, 5].tolist() == [-np.inf, 0, 0, 0]


def test_penalties_keep_what_is_forbidden_forbidden():
  options = parse_options(
    {
      "logit_bias": {0: float("-inf")},
      "repetition_penalty": 0.5,
      "frequency_penalty": -5.0,
      "max_new_tokens": 9,
    }
  )
  rows = (np.ones((1, VOCAB), np.float32), np.zeros((1, 4), np.int32), np.array([3]), np.array([1]))
  assert apply([options], *rows)[0, 0] == -np.inf


def test_memory_is_not_of_vocabulary_times_slots():
  options = parse_options(
    {"repetition_penalty": 1.2, "frequency_penalty": 1.0, "no_repeat_ngram_size": 4}
  )
  rules = make_rules([options], model_end_id=2, min_length_R=[0], limit_R=[9])
  vocab, slots = 50_000, 1_000
  shapes = [((1, vocab), np.float32), ((1, slots), np.int32), ((1,), np.int32), ((1,), np.int32)]
  structs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  memory = jax.jit(apply_rules).lower(*structs, rules).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 20 * 4 * vocab  # one array of V * S would be 1000 * 4 * V


def test_lists_are_padded_to_powers_of_two():
  row_options = [
    parse_options({"bad_words_ids": [[1, 2, 3]]}),
    parse_options({"bad_words_ids": [[n] for n in range(5)], "suppress_tokens": [1, 2, 3]}),
  ]
  rules = make_rules(row_options, model_end_id=2, min_length_R=[0, 0], limit_R=[9, 9])
  assert rules.bad_RNW.shape == (2, 8, 4) and rules.suppressed_RN.shape == (2, 4)
  assert len(jax.tree.leaves(rules)) == 2
