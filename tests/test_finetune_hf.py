"""One fine-tuning step against PyTorch: transformers' GPT-1, the original's loss and its Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import relative_error
from test_task_objective import (
  CONFIG,
  LM_COEFFICIENT,
  TASKS,
  loss_and_gradient,
  make_examples,
  make_task_params,
  padded_batch,
)

from gptjax.train.config import OptimizerConfig
from gptjax.train.optimizer import hyperparameters
from gptjax.train.schedule import Durations
from gptjax.train.step import init_state, make_train_step
from gptjax.train.task_objective import TaskObjective

pytestmark = pytest.mark.hf

OPTIMIZER = OptimizerConfig(
  name="gpt1_adam",
  schedule="gpt1",
  learning_rate=1e-3,
  warmup_steps=0,
  weight_decay=0.01,
  beta2=0.999,
)
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def hf():
  """The tests' bridge to transformers; skips where PyTorch is not installed."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  return pytest.importorskip("hf_models")


def torch_loss(torch, model, head, encoded, task):
  """Transcribes train.py: losses of the task, and of the language model by sequence."""
  task_losses, lm_losses = [], []
  for sequences, label in zip(encoded.sequences, encoded.labels_N.tolist()):
    states = []
    for (tokens,) in sequences:
      ids = torch.from_numpy(tokens.astype(np.int64))[None]
      hidden = model.transformer(input_ids=ids).last_hidden_state
      logits = model.lm_head(hidden)
      lm_losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
      states.append(hidden[0, -1])
    states = torch.stack(states)
    if task.is_choice:
      logits = (states @ head["kernel"] + head["bias"])[:, 0]
    else:
      logits = states.sum(0) @ head["kernel"] + head["bias"]
    if task.target == "score":
      task_losses.append((logits[0] - label) ** 2)
    else:
      target = torch.tensor([label])
      task_losses.append(torch.nn.functional.cross_entropy(logits[None], target))
  return torch.stack(task_losses).mean() + LM_COEFFICIENT * torch.stack(lm_losses).mean()


def torch_update(torch, parameters, config):
  """Transcribes opt.py for the first update; its schedule is at 1."""
  norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters.values()))
  clip = min(1.0, config.clip_norm / float(norm))
  rate = config.learning_rate * np.sqrt(1 - config.beta2) / (1 - config.beta1)
  with torch.no_grad():
    for parameter in parameters.values():
      g = clip * parameter.grad
      m, v = (1 - config.beta1) * g, (1 - config.beta2) * g * g
      update = m / (torch.sqrt(v) + config.epsilon)
      if parameter.ndim > 1:
        update = update + config.weight_decay * parameter
      parameter -= rate * update


@pytest.mark.parametrize("family", TASKS)
def test_a_step_equals_the_original_recipe(hf, family):
  torch = pytest.importorskip("torch")
  task = TASKS[family]
  params, encoded = make_task_params(task), make_examples(task)
  objective = TaskObjective(CONFIG, task)
  batch = padded_batch(encoded)
  loss, gradient = loss_and_gradient(objective, params, batch)

  model = hf.make_hf_model({"decoder": params["decoder"]}, CONFIG)
  head = {
    name: torch.tensor(array, dtype=torch.float64, requires_grad=True)
    for name, array in params["task_head"].items()
  }
  expected = torch_loss(torch, model, head, encoded, task)
  expected.backward()
  assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
  theirs = dict(model.named_parameters()) | head
  ours = hf.to_hf({"decoder": gradient["decoder"]}, CONFIG) | gradient["task_head"]
  # A softmax does not feel a shift of all its inputs: those gradients are noise.
  shifts = ["bias"] if task.is_choice else []
  for name in theirs:
    if name not in shifts:
      assert relative_error(ours[name], theirs[name].grad.numpy()) < TOLERANCE, name

  hyper = hyperparameters(OPTIMIZER, Durations(10, 0, 10), lm_coefficient=LM_COEFFICIENT)
  state = init_state(jax.tree.map(jnp.asarray, params), OPTIMIZER, hyper, jax.random.key(0))
  step = make_train_step(objective, OPTIMIZER)
  micro = batch.map(lambda array: array[None])
  after, _ = jax.jit(lambda state: step(state, micro, axis_name=None))(state)
  torch_update(torch, theirs, OPTIMIZER)
  ours = hf.to_hf({"decoder": after.params["decoder"]}, CONFIG) | after.params["task_head"]
  before = hf.to_hf({"decoder": params["decoder"]}, CONFIG) | params["task_head"]
  for name in theirs:
    if name in shifts:
      continue
    moved, should_move = ours[name] - before[name], theirs[name].detach().numpy() - before[name]
    # The first update is the gradient's sign times the rate, where the gradient is no noise.
    size = np.abs(theirs[name].grad.numpy())
    is_clear = (size > 1e-5 * size.max()) | (size == 0)
    assert is_clear.mean() > 0.5, name
    assert relative_error(moved[is_clear], should_move[is_clear]) < 2e-3, name
