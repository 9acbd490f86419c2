"""Fine-tuning's loss and gradient against the original recipe, sequence by sequence in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import make_config, make_params, relative_error

from gptjax.checkpoint.reference import reference_activations, reference_loss
from gptjax.data.task_batches import PADDING, make_batch
from gptjax.data.task_format import Task
from gptjax.data.task_inputs import EncodedTask
from gptjax.model.heads import MISSING, task_logits
from gptjax.model.parameters import task_head_specs
from gptjax.parallel import make_parallel
from gptjax.train.config import OptimizerConfig
from gptjax.train.optimizer import hyperparameters
from gptjax.train.schedule import Durations
from gptjax.train.step import init_state, make_train_step
from gptjax.train.task_objective import TaskObjective, example_losses, output_program
from gptjax.tree import map_named, named_leaves

LM_COEFFICIENT = 0.5
CLASSES = ("no", "maybe", "yes")
TASKS = {
  "classification": Task("classification", "class", CLASSES, (), ("accuracy",)),
  "entailment": Task("entailment", "class", CLASSES, (), ("accuracy",)),
  "similarity": Task("similarity", "score", (), (0.0, 5.0), ("pearson",)),
  "multiple_choice": Task("multiple_choice", "class", (), (), ("accuracy",)),
}
CONFIG = make_config("gpt1")


def make_examples(task, num_examples=4, seed=0):
  """Draws sequences of different lengths, of choices in different numbers, and labels."""
  rng = np.random.default_rng(seed)

  def draw(count):
    return [(rng.integers(0, CONFIG.vocab_size, n).astype(np.int32),) for n in count]

  numbers = {"similarity": [2] * num_examples, "multiple_choice": [3, 2, 3, 2]}
  sequences = [draw(rng.integers(2, 9, n)) for n in numbers.get(task.family, [1] * num_examples)]
  if task.target == "score":
    labels_N = rng.uniform(0, 5, num_examples).astype(np.float32)
  else:
    labels_N = rng.integers(0, 2, num_examples).astype(np.int32)
  return EncodedTask(sequences, labels_N, 0)


def make_task_params(task, config=CONFIG):
  rng = np.random.default_rng(5)
  head = task_head_specs(config, task.num_outputs)
  head = {name: rng.normal(0, 0.3, spec.shape).astype(np.float32) for name, spec in head.items()}
  return make_params(config, gain=0.7) | {"task_head": head}


def original_loss(params, encoded, task, lm_coefficient=LM_COEFFICIENT):
  """Transcribes train.py of Radford et al. 2018: no rows, no padding, float64."""
  head = {name: np.asarray(array, np.float64) for name, array in params["task_head"].items()}
  task_losses, lm_losses = [], []
  for sequences, label in zip(encoded.sequences, encoded.labels_N):
    states = []
    for (tokens,) in sequences:
      found = reference_activations(params, CONFIG, tokens[None])
      lm_losses.append(reference_loss(found["logits"][:, :-1], tokens[None, 1:]))
      states.append(found[f"layers/{CONFIG.num_layers - 1}/output"][0, -1])
    if task.is_choice:
      logits = np.array(states) @ head["kernel"][:, 0] + head["bias"]
    else:
      logits = sum(states) @ head["kernel"] + head["bias"]
    if task.target == "score":
      task_losses.append((logits[0] - label) ** 2)
    else:
      task_losses.append(np.log(np.exp(logits).sum()) - logits[label])
  return np.mean(task_losses) + lm_coefficient * np.mean(lm_losses)


class Hyper:
  """What the objective reads of the hyperparameters."""

  lm_coefficient = LM_COEFFICIENT


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(objective, params, batch):
  def loss(params):
    terms, _ = objective(params, batch, Hyper, None)
    weights = objective.weights(batch)
    return sum(term / weights[name] for name, term in terms.items())

  return jax.value_and_grad(loss)(params)


def padded_batch(encoded, length=12):
  """Three examples of padding are among the real ones."""
  return make_batch(encoded, np.array([0, 1, PADDING, 2, 3, PADDING, PADDING]), length)


slow = pytest.mark.slow
CASES = ["multiple_choice", *(pytest.param(name, marks=slow) for name in list(TASKS)[:3])]


@pytest.mark.parametrize("family", CASES)
def test_loss_and_gradient_are_the_original_recipes(family):
  task = TASKS[family]
  params, encoded = make_task_params(task), make_examples(task)
  loss, gradient = loss_and_gradient(TaskObjective(CONFIG, task), params, padded_batch(encoded))
  expected = original_loss(params, encoded, task)
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  # A mean over all tokens, or a loss that forgets the task, would be noticed.
  assert abs(original_loss(params, encoded, task, 0.0) - expected) > 0.1
  wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  rng = np.random.default_rng(0)
  slopes = named_leaves(gradient)
  # The softmax does not see key biases: their gradient is zero, and float32 leaves rounding.
  zero = np.linalg.norm(slopes.pop("decoder/layers/attention/key/bias"))
  assert zero < 1e-6 * np.linalg.norm(slopes["decoder/layers/attention/query/bias"])
  for name in slopes:
    direction = rng.normal(size=slopes[name].shape)
    step = 1e-5

    def moved(by, name=name, direction=direction):
      return map_named(lambda n, leaf: leaf + by * direction if n == name else leaf, wide)

    ahead, behind = (original_loss(moved(by), encoded, task) for by in (step, -step))
    slope = float(np.sum(np.asarray(slopes[name], np.float64) * direction))
    scale = np.linalg.norm(slopes[name]) * np.linalg.norm(direction)
    assert abs((ahead - behind) / (2 * step) - slope) < 1e-5 * scale + 1e-7, name


@pytest.mark.parametrize("family", ["similarity", "multiple_choice"])
def test_rows_of_an_example_and_nothing_else_decide(family):
  """Padding examples, longer rows and other examples change no logit; both orders are one."""
  task = TASKS[family]
  encoded, params = make_examples(task), make_task_params(task)
  parallel = make_parallel("pmap", devices=jax.devices()[:1])
  program = output_program(parallel, TaskObjective(CONFIG, task))
  hyper = hyperparameters(OptimizerConfig(), Durations(10, 0, 10))
  state = init_state(params, OptimizerConfig(), hyper, jax.random.key(0))

  def outputs(encoded, indices, length=12):
    batch = make_batch(encoded, np.array(indices), length)
    return np.asarray(program(state, parallel.shard_batch(batch, 1)))

  whole = outputs(encoded, [0, 1, 2, 3])
  # Where a row stands may change the order of a product's sums.
  others = outputs(encoded, [3, PADDING, 1, PADDING], length=16)
  np.testing.assert_allclose(others[[0, 2]], whole[[3, 1]], rtol=1e-5)
  if family == "similarity":
    swapped = dataclasses.replace(encoded, sequences=[rows[::-1] for rows in encoded.sequences])
    np.testing.assert_array_equal(outputs(swapped, [0, 1, 2, 3]), whole)
  else:
    missing = np.array([[len(rows) <= i for i in range(3)] for rows in encoded.sequences])
    np.testing.assert_array_equal(whole == MISSING, missing)


def head_inputs(num_rows, num_examples, dim=64):
  """Equal states in all rows, so that only dropout can tell them apart."""
  encoded = EncodedTask(
    [[(np.arange(3, dtype=np.int32),)] * (num_rows // num_examples)] * num_examples,
    np.zeros(num_examples, np.int32),
    0,
  )
  batch = make_batch(encoded, np.arange(num_examples), 4)
  return jnp.ones((num_rows, 4, dim)), batch


def test_the_answers_of_an_example_share_a_dropout_mask():
  hidden_BLD, batch = head_inputs(6, 2)
  rng = np.random.default_rng(0)
  head = {"kernel": jnp.asarray(rng.normal(size=(64, 1)), jnp.float32), "bias": jnp.zeros(1)}
  logits = task_logits(
    {"task_head": head},
    hidden_BLD,
    batch,
    is_choice=True,
    dropout_rate=0.5,
    key=jax.random.key(1),
  )
  assert logits.shape == (2, 3)
  assert np.ptp(logits, axis=1).max() == 0
  assert logits[0, 0] != logits[1, 0]


def test_class_weights_weigh_examples_and_divide():
  task = TASKS["classification"]
  encoded = make_examples(task)
  objective = TaskObjective(CONFIG, task, class_weights=(1.0, 3.0, 0.0))
  batch = jax.tree.map(jnp.asarray, padded_batch(encoded))
  weights_N = np.array((1.0, 3.0, 0.0))[encoded.labels_N]
  assert float(objective.weights(batch)["loss"]) == weights_N.sum()
  assert float(TaskObjective(CONFIG, task).weights(batch)["loss"]) == len(encoded.labels_N)


def test_a_score_is_judged_by_squared_error():
  losses = example_losses(TASKS["similarity"], jnp.array([[1.5], [4.0]]), jnp.array([1.0, 4.0]))
  np.testing.assert_array_equal(losses, [0.25, 0.0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "mesh"])
def test_devices_and_micro_batches_change_nothing(mode):
  task = TASKS["multiple_choice"]
  encoded, params = make_examples(task), make_task_params(task)
  batch = make_batch(encoded, np.array([0, 1, 2, 3, PADDING, 0, 3, PADDING]), 12)
  optimizer = OptimizerConfig(name="gpt1_adam", schedule="gpt1", clip_norm=0.0)
  hyper = hyperparameters(optimizer, Durations(10, 0, 10), lm_coefficient=LM_COEFFICIENT)
  step = make_train_step(TaskObjective(CONFIG, task), optimizer)

  def run(devices, accumulation):
    parallel = make_parallel(mode, devices=jax.devices()[:devices])
    state = parallel.init_state(
      lambda key: init_state(jax.tree.map(jnp.asarray, params), optimizer, hyper, key),
      jax.random.key(0),
    )
    state, metrics = parallel.compile_step(step)(state, parallel.shard_batch(batch, accumulation))
    return parallel.to_host((state.params, metrics))

  one, metrics = run(1, 1)
  for devices, accumulation in ((4, 1), (1, 4), (2, 2)):
    other, other_metrics = run(devices, accumulation)
    for name in ("train_loss", "train_lm_loss", "grad_norm", "tokens"):
      assert float(other_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
    for name, leaf in named_leaves(other).items():
      # A softmax does not feel a shift: their gradients are noise, which Adam makes large.
      if name not in ("task_head/bias", "decoder/layers/attention/key/bias"):
        assert relative_error(leaf, named_leaves(one)[name]) < 1e-4, name
