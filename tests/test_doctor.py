"""The doctor names every mistake that is planted, and none where there is none."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from families import FAMILIES, make_config, make_params

from gptjax.batch import Batch
from gptjax.checkpoint import doctor
from gptjax.checkpoint.doctor import examine, text_rows
from gptjax.checkpoint.export import save_hf
from gptjax.checkpoint.mistakes import Suspect, known_mistakes
from gptjax.cli.main import main
from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.errors import CheckpointError, DataError
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_logits
from gptjax.model.parameters import init_parameters

TEXT = doctor.TEXT
TOKENIZER = make_char_tokenizer([TEXT])
IDS = TOKENIZER.encode(TEXT)
TRAINED = {
  "vocab_size": TOKENIZER.vocab_size,
  "vocab_multiple": 128,
  "context_length": 32,
  "num_layers": 2,
  "model_dim": 48,
  "num_heads": 4,
  "scan_layers": False,
}


def train(config, num_steps=70):
  """Learns by heart the rows of TEXT that the doctor reads."""
  rows_BL = np.array(IDS[: 4 * 32], np.int32).reshape(-1, 32)
  inputs, targets = rows_BL[:, :-1], rows_BL[:, 1:]
  batch = Batch(inputs, targets, np.ones(inputs.shape, np.float32))
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))

  def loss(params):
    logits = lm_logits(params, hidden_states(params["decoder"], batch, config), config)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

  def step(carry, _):
    params, state = carry
    gradients = jax.grad(loss)(params)
    updates, state = optimizer.update(gradients, state)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def run(params):
    return jax.lax.scan(step, (params, optimizer.init(params)), length=num_steps)[0][0]

  params = run(init_parameters(config, jax.random.key(1)))
  return jax.device_get(params)


@pytest.fixture(scope="module")
def trained():
  """GPT-2, and GPT-J with an untied head, that know TEXT."""
  models = {}
  for family in ("gpt2", "gptj"):
    rotary = {"rotary_dim": 8} if family == "gptj" else {}
    config = make_config(family, **TRAINED | rotary)
    models[family] = config, train(config)
  return models


def replaced(params, path, function):
  """Returns the tree with one array replaced."""
  name, *rest = path.split("/")
  child = params[name]
  return params | {name: replaced(child, "/".join(rest), function) if rest else function(child)}


def transpose(params, *names):
  for name in names:
    path = f"decoder/layers/attention/{name}/kernel"
    params = replaced(params, path, lambda kernel: kernel.swapaxes(1, 2))
  return params


def fuse_wrongly(params, config):
  suspect = Suspect(params, config)
  wrong = next(m for m in known_mistakes(suspect) if m.kind == "fused order")
  return wrong.undone.params


def shift(table):
  """A row too many at the front, as after a padding row."""
  return np.concatenate([table[:1] * 0, table[:-1]])


# What is planted: (family, kind to be named, its change, parameters, config).
PLANTED = {
  "output transposed": ("gpt2", "transposed", "output", lambda p, c: transpose(p, "output"), {}),
  "linear transposed": (
    "gptj",
    "transposed",
    "query, key, value, output",
    lambda p, c: transpose(p, "query", "key", "value", "output"),
    {},
  ),
  "projections transposed": (
    "gptj",
    "transposed",
    "transposed: query, key, value",
    lambda p, c: transpose(p, "query", "key", "value"),
    {},
  ),
  "fused head by head": ("gpt2", "fused order", "one after", fuse_wrongly, {}),
  "rotary halves": ("gptj", "rotary", "interleaved", None, {"rotary_style": "halves"}),
  "epsilon": ("gpt2", "epsilon", "1e-05", None, {"norm_epsilon": 0.5}),
  "unscaled": ("gpt2", "attention scale", "sqrt_head_dim", None, {"attention_scale": "one"}),
  "scaled by layer": (
    "gptj",
    "attention scale",
    "scale_attention_by_layer False",
    None,
    {"scale_attention_by_layer": True},
  ),
  "positions late": (
    "gpt2",
    "position offset",
    "+1",
    lambda p, c: replaced(p, "decoder/position_embedding/embedding", shift),
    {},
  ),
  "positions early": (
    "gpt2",
    "position offset",
    "-1",
    lambda p, c: replaced(
      p, "decoder/position_embedding/embedding", lambda table: np.roll(table, -1, axis=0)
    ),
    {},
  ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_named_by_the_text(trained, name):
  family, kind, change, spoil, wrong = PLANTED[name]
  config, params = trained[family]
  params = spoil(params, config) if spoil else params
  diagnosis = examine(params, dataclasses.replace(config, **wrong), IDS)
  assert diagnosis.disagreement is None
  assert diagnosis.culprit.kind == kind
  assert change in diagnosis.culprit.change
  assert not diagnosis.is_healthy and diagnosis.is_faulty
  assert diagnosis.verdict.startswith(f"{kind}: ")
  assert diagnosis.culprit.change in diagnosis.verdict


def test_a_head_that_should_be_tied_is_named(trained):
  config, params = trained["gpt2"]
  head = make_params(dataclasses.replace(config, tie_embeddings=False))["lm_head"]
  untied = dataclasses.replace(config, tie_embeddings=False)
  diagnosis = examine(params | {"lm_head": head}, untied, IDS)
  assert diagnosis.culprit.kind == "tie"


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_right_model_is_healthy(trained, family):
  config, params = trained[family]
  diagnosis = examine(params, config, IDS)
  assert diagnosis.is_healthy and diagnosis.culprit is None
  assert diagnosis.loss < 0.5 * diagnosis.chance
  assert diagnosis.verdict.startswith("healthy")


def test_an_untrained_model_is_not_blamed_on_a_mistake():
  config = make_config("gpt2", **TRAINED)
  diagnosis = examine(make_params(config), config, IDS)
  assert diagnosis.culprit is None and not diagnosis.is_healthy and not diagnosis.is_faulty
  assert "no better than chance" in diagnosis.verdict


@pytest.mark.parametrize("ids", [IDS, None])
def test_what_no_text_can_tell_is_said_where_it_leaves_the_recipe(trained, ids):
  """The two forms of gelu differ by less than the noise of any short text."""
  config, params = trained["gpt2"]
  diagnosis = examine(params, dataclasses.replace(config, activation="gelu"), ids)
  assert diagnosis.culprit is None
  assert [trial.kind for trial in diagnosis.suspicions] == ["gelu"]
  assert "activation gelu_tanh instead of gelu is what gpt2 has" in diagnosis.verdict
  assert examine(params, config, ids).suspicions == []


# What the reference runs instead: (family, kind to be named, first activation, change of config).
DISAGREEMENTS = [
  ("gpt2", "gelu", "layers/0/mlp_up", {"activation": "gelu"}),
  ("gpt2", "epsilon", "layers/0/attention_norm", {"norm_epsilon": 1e-3}),
  ("gptj", "rotary", "layers/0/rotated_query", {"rotary_style": "halves"}),
  ("gptj", "attention scale", "layers/0/mixed", {"attention_scale": "one"}),
  ("gpt2", "attention scale", "layers/1/mixed", {"scale_attention_by_layer": True}),
]


@pytest.mark.parametrize(("family", "kind", "first", "change"), DISAGREEMENTS)
def test_a_disagreement_is_placed_and_repaired(family, kind, first, change):
  config = FAMILIES[family]
  params = make_params(config)
  diagnosis = examine(params, config, reference=(params, dataclasses.replace(config, **change)))
  assert diagnosis.disagreement.name == first
  assert diagnosis.culprit.kind == kind
  assert "repairs it" in diagnosis.verdict


@pytest.mark.parametrize(
  ("path", "first"),
  [
    ("decoder/layers/attention/value/kernel", "layers/1/value"),
    ("decoder/layers/attention/output/bias", "layers/1/attention"),
    ("decoder/layers/mlp_norm/scale", "layers/1/mlp_norm"),
    ("decoder/layers/mlp/down/kernel", "layers/1/mlp"),
    ("decoder/final_norm/bias", "final_norm"),
  ],
)
def test_a_changed_weight_is_found(path, first):
  config = FAMILIES["gpt2"]
  params = make_params(config)

  def spoil(array):
    array = array.copy()
    array[-1] += 0.01
    return array

  diagnosis = examine(params, config, reference=(replaced(params, path, spoil), config))
  assert diagnosis.disagreement.name == first
  assert diagnosis.culprit is None and diagnosis.is_faulty
  assert first.split("/")[-1] in diagnosis.verdict and "no known mistake" in diagnosis.verdict


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_its_reference(family):
  config = FAMILIES[family]
  diagnosis = examine(make_params(config), config)
  names = {found.name for found in diagnosis.comparisons}
  assert {"embedding", "layers/0/query", "layers/1/mixed", "layers/1/output", "logits"} <= names
  assert diagnosis.disagreement is None and diagnosis.culprit is None
  assert "only a text could tell" in diagnosis.verdict


def test_values_that_are_not_finite_are_named():
  config = FAMILIES["gpt2"]
  path = "decoder/layers/mlp/up/kernel"
  params = replaced(make_params(config), path, lambda kernel: kernel * np.nan)
  diagnosis = examine(params, config, [1, 2, 3])
  assert not diagnosis.is_healthy
  assert diagnosis.verdict == f"values that are not finite, first in {path}"


def test_undoing_a_mistake_twice_changes_nothing():
  config = FAMILIES["gptj"]
  suspect = Suspect(make_params(config), config)
  kinds = [mistake.kind for mistake in known_mistakes(suspect)]
  assert kinds.count("fused order") == 2 and {"rotary", "gelu", "tie"} <= set(kinds)
  by_head = next(m for m in known_mistakes(suspect) if m.change.endswith("head by head")).undone
  back = next(m for m in known_mistakes(by_head) if m.change.endswith("after the other")).undone
  jax.tree.map(np.testing.assert_array_equal, back.params, suspect.params)
  assert not np.array_equal(
    by_head.params["decoder"]["layers"]["attention"]["key"]["kernel"],
    suspect.params["decoder"]["layers"]["attention"]["key"]["kernel"],
  )


def test_models_of_two_architectures_are_refused():
  config = FAMILIES["gpt2"]
  other = make_config("gpt2", ffw_dim=20)
  with pytest.raises(CheckpointError, match="compares models of one architecture"):
    examine(make_params(config), config, reference=(make_params(other), other))
  gpt1 = FAMILIES["gpt1"]
  with pytest.raises(CheckpointError, match="norm_position is pre and post"):
    examine(make_params(config), config, reference=(make_params(gpt1), gpt1))


def test_a_context_of_one_token_is_enough():
  config = make_config("gpt2", context_length=1)
  other = dataclasses.replace(config, norm_epsilon=1e-3)
  assert examine(make_params(config), config, reference=(make_params(config), other)).culprit


def test_rows_of_a_text():
  config = make_config("gpt2")
  assert text_rows(list(range(50)), config).shape == (2, 24)
  assert text_rows([1, 2], config).shape == (1, 2)
  with pytest.raises(DataError, match="1 tokens"):
    text_rows([1], config)
  with pytest.raises(DataError, match="token id 61"):
    text_rows([1, 61], config)


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory):
  """A right folder, and one whose config.json was changed."""
  path = tmp_path_factory.mktemp("folders")
  config, params = trained["gpt2"]
  for name in ("right", "wrong", "bare"):
    save_hf(path / name, config, params, None if name == "bare" else TOKENIZER)
  fields = json.loads((path / "wrong/config.json").read_text())
  (path / "wrong/config.json").write_text(json.dumps(fields | {"scale_attn_weights": False}))
  return path


def test_the_verb_prints_a_table_and_a_verdict(folders, capsys):
  assert main(["doctor", str(folders / "wrong")]) == 1
  out = capsys.readouterr().out
  marked = [line for line in out.splitlines() if line.endswith("<--")]
  assert len(marked) == 1 and "attention_scale sqrt_head_dim instead of one" in marked[0]
  assert out.splitlines()[-1].startswith("verdict: attention scale: ")


def test_the_verb_prints_json(folders, capsys):
  arguments = ["doctor", str(folders / "wrong"), "--against", str(folders / "right"), "--json"]
  assert main(arguments) == 1
  facts = json.loads(capsys.readouterr().out)
  assert facts["disagreement"]["activation"] == "layers/0/mixed"
  assert facts["culprit"]["kind"] == "attention scale" and not facts["is_healthy"]


def test_the_verb_takes_a_text_or_ids(folders, tmp_path, capsys):
  (tmp_path / "text.txt").write_text(TEXT[:200])
  assert main(["doctor", str(folders / "right"), "--text", str(tmp_path / "text.txt")]) == 0
  assert "verdict: healthy" in capsys.readouterr().out
  (tmp_path / "ids.txt").write_text(" ".join(map(str, IDS)))
  assert main(["doctor", str(folders / "bare"), "--text", str(tmp_path / "ids.txt")]) == 0
  assert "verdict: healthy" in capsys.readouterr().out
  assert main(["doctor", str(folders / "bare"), "--text", str(tmp_path / "text.txt")]) == 2
  assert "no tokenizer, so --text" in capsys.readouterr().err
  assert main(["doctor", str(folders / "right"), "--text", str(tmp_path / "none.txt")]) == 2
  assert "none.txt" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_say_the_builtin_text_is_noted(tmp_path, capsys):
  config = make_config("gpt2", vocab_multiple=128)
  save_hf(tmp_path / "model", config, make_params(config), make_char_tokenizer(["abc"]))
  assert main(["doctor", str(tmp_path / "model")]) == 0
  output = capsys.readouterr()
  assert "give --text" in output.err and "only a text could tell" in output.out
