"""What `import gptjax` gives: models of every kind load, compute, refuse and save."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import foreign_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import make_config, make_params, make_tokens, relative_error

import gptjax
from gptjax import api
from gptjax.checkpoint.models import load_model, save_run
from gptjax.checkpoint.reference import reference_activations
from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.errors import ConfigError, DataError, UserError

TEXT = "the cat sat on the mat."
# float32 sums against float64's; a wrong formula is off by more than 1e-3.
TOLERANCE = 1e-5


def make_folder(path, family="gpt2", with_tokenizer=True, **changes):
  """Writes a folder in the Hugging Face layout; returns (path, config, params)."""
  config = make_config(family, vocab_multiple=128, **changes)
  params = make_params(config)
  tensors = foreign_files.tensors_of(config, params)
  foreign_files.write_folder(path, foreign_files.config_of(config), tensors)
  if with_tokenizer:
    make_char_tokenizer([TEXT], "<|endoftext|>").save(path / "tokenizer.json")
  return path, config, params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_folder(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def model(folder):
  return gptjax.load(folder[0])


def test_importing_gptjax_imports_no_jax():
  code = "import gptjax, sys; print('jax' in sys.modules, 'load' in dir(gptjax))"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.split() == ["False", "True"]
  with pytest.raises(AttributeError, match="no attribute 'laod'"):
    gptjax.laod  # noqa: B018


@pytest.mark.parametrize("family", ["gpt1", "gptj", "gptneox"])
def test_logits_and_features_equal_the_reference(tmp_path, family):
  path, config, params = make_folder(tmp_path / "model", family, with_tokenizer=False)
  model = gptjax.load(path)
  tokens = make_tokens(config)
  expected = reference_activations(params, config, tokens)
  logits = model(tokens.tolist())
  assert logits.shape == (*tokens.shape, config.vocab_size) and logits.dtype == jnp.float32
  assert relative_error(logits, expected["logits"]) < TOLERANCE
  last = expected.get("final_norm", expected["layers/1/output"])
  assert relative_error(model.hidden_states(tokens), last) < TOLERANCE
  states = model.hidden_states(tokens, all_layers=True)
  for found, wanted in zip(
    states, [expected["embedding"], expected["layers/0/output"], last], strict=True
  ):
    assert relative_error(found, wanted) < TOLERANCE


def test_another_weight_gives_other_logits(folder, model):
  _, config, params = folder
  tokens = make_tokens(config)
  params["decoder"]["layers"]["mlp"]["up"]["kernel"][0, 0, 0] += 1
  expected = reference_activations(params, config, tokens)["logits"]
  params["decoder"]["layers"]["mlp"]["up"]["kernel"][0, 0, 0] -= 1
  assert relative_error(model(tokens), expected) > 10 * TOLERANCE


def test_a_text_is_one_row(model):
  ids = model.tokenizer.encode("the cat")
  np.testing.assert_array_equal(model("the cat"), model(np.array([ids])))
  assert model.tokenizer.decode(ids) == "the cat"


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    ([[0, 61]], "token id 61 is not in the vocabulary; ids are 0 to 60"),
    ([[-1]], "token id -1"),
    ([0, 1], r"shape \[2\]; they must be \[rows, length\]"),
    ([[]], r"shape \[1, 0\]"),
    ([[0, 1], [2]], "one length"),
    ([[0.5]], "float64; they must be integers"),
    ([[1] * 25], "25 tokens, and the context of the model is 24"),
    ("the dog", "character 'd'"),
  ],
)
def test_bad_tokens_are_refused_in_one_line(model, tokens, message):
  with pytest.raises(UserError, match=message) as caught:
    model(tokens)
  assert "\n" not in str(caught.value)
  with pytest.raises(UserError, match=message):
    model.hidden_states(tokens)


def test_the_whole_context_is_accepted_and_compiled_once(model):
  tokens = make_tokens(model.config, num_rows=1, length=24)
  assert model(tokens).shape == (1, 24, 61)
  count = api.model._logits._cache_size()
  model(tokens[:, ::-1])
  assert api.model._logits._cache_size() == count
  model(tokens[:, :23])
  assert api.model._logits._cache_size() == count + 1


def test_without_tokenizer_text_is_refused(tmp_path):
  path, *_ = make_folder(tmp_path / "model", with_tokenizer=False)
  model = gptjax.load(path)
  assert model.tokenizer is None
  assert model([[1, 2]]).shape == (1, 2, 61)
  with pytest.raises(UserError, match="no tokenizer; give token ids"):
    model("text")
  with pytest.raises(DataError, match="bos_token is given, but the model has no tokenizer"):
    gptjax.load(path, bos_token="[BOS]")


def test_an_unknown_kind_of_tokenizer_is_none(tmp_path):
  path, *_ = make_folder(tmp_path / "model", with_tokenizer=False)
  (path / "vocab.xml").write_text("<vocabulary/>")
  assert gptjax.load(path).tokenizer is None


def test_special_tokens_by_keyword(folder):
  model = gptjax.load(folder[0], pad_token="[PAD]", eos_token="<|endoftext|>")
  assert model.tokenizer.pad_id == model.tokenizer.vocab_size - 1
  with pytest.raises(ConfigError, match='did you mean "pad_token"'):
    gptjax.load(folder[0], pad_toekn="[PAD]")
  with pytest.raises(ConfigError, match="load has no option 'dytpe'; did you mean \"dtype\""):
    gptjax.load(folder[0], dytpe="float32")


@pytest.mark.parametrize(("family", "mesh"), [("gpt2", None), ("gptj", {"fsdp": 2, "tensor": 2})])
def test_special_tokens_beyond_the_vocabulary_get_rows(tmp_path, family, mesh, capsys):
  # As many ids as the tokenizer, so that the new ones are the model's first beyond.
  size = make_char_tokenizer([TEXT], "<|endoftext|>").vocab_size
  path, *_ = make_folder(tmp_path / "model", family, vocab_size=size)
  plain = gptjax.load(path)
  assert "grows" not in capsys.readouterr().err
  model = gptjax.load(path, bos_token="[BOS]", pad_token="[PAD]", mesh=mesh)
  said = capsys.readouterr().err
  assert f"has {size} ids, and [BOS], [PAD] come after" in said and "N(0, 0.02)" in said
  assert model.config.vocab_size == model.tokenizer.vocab_size == size + 2
  rows = np.asarray(model.params["decoder"]["token_embedding"]["embedding"])
  assert rows[size : size + 2].any(axis=1).all() and not rows[size + 2 :].any()
  tokens = make_tokens(plain.config)
  assert relative_error(model(tokens)[..., :size], plain(tokens)) < TOLERANCE
  ids = model.tokenizer.encode("[BOS]the cat", parse_special_tokens=True)
  assert ids[0] == size and model([ids]).shape[-1] == size + 2
  for format in ("hf", "gptjax"):
    model.save(tmp_path / format, format=format)
    again = gptjax.load(tmp_path / format)
    assert relative_error(again([ids]), model([ids])) < TOLERANCE
    assert again.tokenizer.bos_id == size


def test_a_token_that_only_a_file_adds_gets_no_row(tmp_path, capsys):
  """As in transformers: the model is the file's, and so is the shape of its logits."""
  size = make_char_tokenizer([TEXT], "<|endoftext|>").vocab_size
  path, *_ = make_folder(tmp_path / "model", vocab_size=size)
  (path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
  model = gptjax.load(path)
  assert model.tokenizer.pad_id == model.config.vocab_size == size
  assert "the model refuses the others" in capsys.readouterr().err
  (path / "tokenizer_config.json").write_text(json.dumps({"pad_token": 5}))
  with pytest.raises(DataError, match=r"special token of tokenizer_config\.json is 5"):
    gptjax.load(path)


def test_a_tokenizer_from_elsewhere(folder, tmp_path):
  make_char_tokenizer(["xyz"]).save(tmp_path / "tokenizer.json")
  for path in (tmp_path, tmp_path / "tokenizer.json"):
    assert gptjax.load(folder[0], tokenizer=path).tokenizer.decode([0, 2]) == "xz"
  with pytest.raises(ConfigError, match=r'tokenizer is "gpt1-papr".*did you mean "gpt1-paper"'):
    gptjax.load(folder[0], tokenizer="gpt1-papr")
  with pytest.raises(UserError, match="gpt1-paper is not for it"):
    gptjax.load(folder[0], tokenizer="gpt1-paper")
  path, *_ = make_folder(tmp_path / "bare", with_tokenizer=False)
  with pytest.raises(DataError, match="tokenizer is given, but the model has no tokenizer"):
    gptjax.load(path, tokenizer="gpt1-hf")


@pytest.mark.parametrize(("mode", "expected"), [("gpt1-paper", [3, 5, 4]), ("gpt1-hf", [3, 4])])
def test_gpt1s_text_is_handled_as_asked(tmp_path, mode, expected):
  path, *_ = make_folder(tmp_path / "model", "gpt1", with_tokenizer=False)
  pieces = ["<unk>", "a", "b", "a</w>", "b</w>", "\n</w>", "ab</w>"]
  vocab = {piece: index for index, piece in enumerate(pieces)}
  (path / "vocab.json").write_text(json.dumps(vocab))
  (path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
  tokenizer = gptjax.load(path, tokenizer=mode).tokenizer
  assert tokenizer.encode("A\nb") == expected


def test_default_ids_out_of_the_vocabulary_are_ignored_with_a_note(tmp_path, capsys):
  path, *_ = make_folder(tmp_path / "model", with_tokenizer=False)
  fields = json.loads((path / "config.json").read_text())
  fields |= {"bos_token_id": 50256, "eos_token_id": 7, "pad_token_id": None}
  (path / "config.json").write_text(json.dumps(fields))
  loaded = load_model(path)
  assert loaded.token_ids == {"bos": (), "eos": (7,), "pad": ()}
  assert "bos_token_id is 50256, out of the vocabulary of 61; ignored" in capsys.readouterr().err
  make_char_tokenizer([TEXT], "<|endoftext|>").save(path / "tokenizer.json")
  loaded = load_model(path, special_tokens={"eos_token": "t", "pad_token": "[PAD]"})
  assert loaded.token_ids["eos"] == (loaded.tokenizer.end_id,)
  assert loaded.token_ids["pad"] == (loaded.tokenizer.pad_id,)


def test_more_ids_than_the_model_has_are_noted(tmp_path, capsys):
  path, *_ = make_folder(tmp_path / "model", vocab_size=4)
  assert gptjax.load(path).tokenizer is not None
  assert "the model 4; the model refuses the others" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_dtypes(folder, model, dtype):
  other = gptjax.load(folder[0], dtype=dtype)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(other.params)} == {dtype or "float32"}
  tokens = make_tokens(model.config)
  error = relative_error(other(tokens), model(tokens))
  # Weights of 8 or 11 bits, over two layers.
  assert {"bfloat16": 1e-3, "float16": 1e-5, None: -1}[dtype] < error < 0.1
  assert other(tokens).dtype == jnp.float32


def test_unknown_options_are_refused(folder):
  with pytest.raises(ConfigError, match='dtype is "float23"; did you mean "float32"'):
    gptjax.load(folder[0], dtype="float23")
  with pytest.raises(ConfigError, match='axis "tensr"; did you mean "tensor"'):
    gptjax.load(folder[0], mesh={"tensr": 2})
  with pytest.raises(UserError, match="no such folder"):
    gptjax.load(folder[0] / "nothing")


@pytest.mark.parametrize("kind", ["sizes", "jax"])
def test_a_mesh_splits_the_parameters(folder, model, kind):
  sizes = {"fsdp": 2, "tensor": 2}
  mesh = sizes if kind == "sizes" else jax.make_mesh((2, 2), ("fsdp", "tensor"))
  split = gptjax.load(folder[0], mesh=mesh)
  kernel = split.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
  tokens = make_tokens(model.config)
  assert relative_error(split(tokens), model(tokens)) < TOLERANCE


@pytest.mark.parametrize("format", ["hf", "gptjax"])
def test_a_saved_model_is_the_same_model(tmp_path, model, format):
  model.save(tmp_path / "saved", format=format)
  again = gptjax.load(tmp_path / "saved")
  tokens = make_tokens(model.config)
  np.testing.assert_array_equal(again(tokens), model(tokens))
  assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
  assert again.config == model.config
  with pytest.raises(UserError, match="is not empty"):
    model.save(tmp_path / "saved", format=format)
  with pytest.raises(ConfigError, match='format is "onnx"'):
    model.save(tmp_path / "other", format="onnx")


def test_a_bfloat16_model_is_saved_as_such(tmp_path, folder):
  gptjax.load(folder[0], dtype="bfloat16").save(tmp_path / "saved", format="gptjax")
  kept = gptjax.load(tmp_path / "saved", dtype=None)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(kept.params)} == {"bfloat16"}
  assert gptjax.load(tmp_path / "saved").params["decoder"]["final_norm"]["scale"].dtype == "float32"


def make_run(path, ema_decay):
  """Writes a run with parameters of 1 and an average of 2."""
  config = make_config("gpt2")
  save_run(path, config, make_params(config))
  run = RunDirectory(path)
  fields = run.read_config() | {"optimizer": {"ema_decay": ema_decay}}
  run.config_path.write_text(json.dumps(fields))
  params = jax.tree.map(jnp.asarray, make_params(config))
  ones, twos = (jax.tree.map(lambda x, n=n: jnp.full_like(x, n), params) for n in (1, 2))
  with CheckpointStore(run.checkpoints_path) as store:
    store.save(3, {"params": ones, "ema": twos if ema_decay else None})
  return run


@pytest.mark.parametrize(("ema_decay", "value"), [(0.0, 1), (0.9, 2)])
def test_a_run_gives_its_average_where_it_kept_one(tmp_path, ema_decay, value):
  run = make_run(tmp_path / "run", ema_decay)
  leaves = jax.tree.leaves(gptjax.load(run.path).params)
  assert all((np.asarray(leaf) == value).all() for leaf in leaves)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, ema_decay, capsys):
  run = make_run(tmp_path / "run", ema_decay)
  shutil.copytree(run.checkpoints_path / "3", run.checkpoints_path / "5")
  files = [path for path in Path(run.checkpoints_path / "5" / "state").rglob("*") if path.is_file()]
  max(files, key=lambda path: path.stat().st_size).write_bytes(b"damaged")
  gptjax.load(run.path)
  assert "checkpoint 5 skipped" in capsys.readouterr().err
  assert (run.checkpoints_path / "5").exists()


def test_a_run_on_a_mesh(tmp_path):
  run = make_run(tmp_path / "run", 0.9)
  model = gptjax.load(run.path, mesh={"fsdp": 2})
  kernel = model.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
  assert kernel.addressable_shards[0].data.size * 2 == kernel.size


def lines_of_the_guide():
  """Yields the right-hand column of docs/from_transformers.md that runs now."""
  guide = Path(__file__).parent.parent / "docs" / "from_transformers.md"
  for line in guide.read_text(encoding="utf-8").splitlines():
    cells = [cell.strip() for cell in line.split(" | ")]
    if len(cells) == 3 and cells[1].startswith("`") and "not run" not in cells[2]:
      yield cells[1].strip("`")


def test_the_guide_from_transformers_runs(tmp_path):
  make_folder(tmp_path / "gpt2")
  kogpt, config, _ = make_folder(tmp_path / "kogpt", "gptj")
  roles = [f"[{name}]" for name in ("BOS", "EOS", "UNK", "PAD", "MASK")]
  tokenizer = make_char_tokenizer([TEXT], "<|endoftext|>")
  tokenizer.backend.add_special_tokens(roles)
  tokenizer.save(kogpt / "tokenizer.json")
  names = {"gptjax": gptjax, "text": TEXT, "prompt": "[BOS]the cat", "path": tmp_path / "saved"}
  hub = {"gpt2": tmp_path / "gpt2", "MrBananaHuman/kogpt_6b_fp16": kogpt}
  lines = list(lines_of_the_guide())
  assert len(lines) == 16
  for line in lines:
    for name, path in hub.items():
      line = line.replace(f'"{name}"', repr(str(path)))
    # The tiny models have contexts of 24.
    exec(re.sub("max_length=[0-9]+", "max_length=24", line), names)
  gptjax.set_seed(None)
  assert names["features"].shape == (1, len(TEXT), 24)
  np.testing.assert_array_equal(names["layers"][-1], names["features"])
  assert names["logits"].shape == (1, len(TEXT), 61)
  assert (tmp_path / "saved" / "model.safetensors").exists()
  assert names["generated"] == "[BOS]the cat"
  assert names["model"].tokenizer.pad_id in names["model"].tokenizer.encode(
    "[PAD]", parse_special_tokens=True
  )
  assert config.family == "gptj" and names["model"](names["tokens"]).shape[-1] == 61
