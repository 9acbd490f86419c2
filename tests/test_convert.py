"""Other people's checkpoints load exactly, go back exactly, and are refused by name."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import foreign_files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from families import ODD_SHAPES, make_batch, make_config, make_params, relative_error
from safetensors.numpy import load_file

from gptjax.checkpoint import convert
from gptjax.checkpoint.convert import load_foreign
from gptjax.checkpoint.export import foreign_tensors, save_hf
from gptjax.checkpoint.lazy_tensor import TensorSource, whole
from gptjax.checkpoint.reference import reference_activations
from gptjax.checkpoint.resolve import resolve_model
from gptjax.checkpoint.tensors import open_tensors
from gptjax.data.tokenizer import load_tokenizer, make_char_tokenizer
from gptjax.errors import CheckpointError
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_logits
from gptjax.model.parameters import SHARDING_RULES
from gptjax.parallel import make_parallel
from gptjax.tree import map_named, named_leaves

NANO_SORT = Path(__file__).parents[2] / "shared/data/models/gpt_nano_sort"
HF_FAMILIES = ("gpt1", "gpt2", "gptj", "gptneo", "gptneox")


def without_padding(params, config):
  """Sets the rows that pad the vocabulary to zero, as loading does, and cuts none off."""

  def clear(name, leaf):
    is_vocabulary = "token_embedding" in name or "lm_head" in name
    leaf = np.array(leaf)
    if is_vocabulary:
      leaf[config.vocab_size :] = 0
    return leaf

  return map_named(clear, params)


def assert_same(found, expected):
  """Asserts that two trees have the same leaves, bit for bit."""
  found, expected = named_leaves(found), named_leaves(expected)
  assert found.keys() == expected.keys()
  for name, leaf in expected.items():
    np.testing.assert_array_equal(np.asarray(found[name]), leaf, err_msg=name)
    assert found[name].dtype == leaf.dtype


def make_model(family, **changes):
  """Returns (config, params, their config.json, their tensors); 128 rows, as loading pads to."""
  config = make_config(family, vocab_multiple=128, **changes)
  params = without_padding(make_params(config), config)
  fields = foreign_files.config_of(config)
  return config, params, fields, foreign_files.tensors_of(config, params)


def silent(line):
  raise AssertionError(f"an unexpected note: {line}")


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_every_family_loads_and_goes_back(tmp_path, family):
  _, params, fields, tensors = make_model(family)
  folder = foreign_files.write_folder(tmp_path / "theirs", fields, tensors)
  found_config, found = load_foreign(folder, report=silent)
  assert_same(found, params)
  assert isinstance(jax.tree.leaves(found)[0], jax.Array)
  save_hf(tmp_path / "ours", found_config, found)
  written = load_file(tmp_path / "ours/model.safetensors")
  assert written.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(written[name], tensor)
  again_config, again = load_foreign(tmp_path / "ours", report=silent)
  assert_same(again, params)
  assert again_config == found_config


@pytest.mark.parametrize(
  "name",
  [
    n
    for n in ODD_SHAPES
    if not n.startswith("gpt3") and n not in ("gpt2-wide-heads", "gptj-narrow-heads")
  ],
)
def test_odd_shapes_compute_the_same_after_a_round_trip(tmp_path, name):
  """Biases that transformers has and we have not come back as zeros."""
  config = ODD_SHAPES[name]
  params = make_params(config)
  save_hf(tmp_path / "hf", config, params)
  found_config, found = load_foreign(tmp_path / "hf", report=silent)
  tokens = np.arange(10, dtype=np.int32).reshape(2, 5) % config.vocab_size
  expected = reference_activations(params, config, tokens)["logits"]
  logits = reference_activations(found, found_config, tokens)["logits"]
  # muP's scales go into parameters, which are float32.
  tolerance = 1e-5 if config.mup_base_dim else 1e-12
  np.testing.assert_allclose(logits, expected, rtol=tolerance, atol=tolerance)


def test_a_layout_taken_for_another_is_noticed(tmp_path):
  """The companion of the round trips: thirds by head are not thirds side by side."""
  _, params, fields, tensors = make_model("gptneox")
  attention = foreign_files.take(params["decoder"]["layers"], 0)["attention"]
  wrong = foreign_files.side_by_side(attention)["kernel"].T
  tensors["gpt_neox.layers.0.attention.query_key_value.weight"] = np.ascontiguousarray(wrong)
  _, found = load_foreign(foreign_files.write_folder(tmp_path / "x", fields, tensors))
  key = named_leaves(found)["decoder/layers/attention/key/kernel"]
  assert not np.array_equal(key, params["decoder"]["layers"]["attention"]["key"]["kernel"])


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_base_models_without_a_prefix(tmp_path, family):
  _, params, fields, tensors = make_model(family)
  prefix = re.compile(r"^(transformer|gpt_neox)\.")
  bare = {prefix.sub("", name): tensor for name, tensor in tensors.items()}
  _, found = load_foreign(foreign_files.write_folder(tmp_path / "x", fields, bare), report=silent)
  assert_same(found, params)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gptneo"])
def test_flax_folders(tmp_path, family):
  _, params, fields, tensors = make_model(family)
  folder = foreign_files.write_flax(tmp_path / "x", fields, tensors)
  _, found = load_foreign(folder, report=silent)
  assert_same(found, params)


def test_buffers_of_old_versions_are_passed_over(tmp_path):
  for family, names in {
    "gpt2": ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    "gptneo": ["transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"],
    "gptneox": [
      "gpt_neox.layers.0.attention.bias",
      "gpt_neox.layers.0.attention.masked_bias",
      "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
      "gpt_neox.rotary_emb.inv_freq",
    ],
  }.items():
    _, params, fields, tensors = make_model(family)
    tensors |= {name: np.ones((1, 1, 4, 4), np.uint8) for name in names}
    folder = foreign_files.write_folder(tmp_path / family, fields, tensors)
    assert_same(load_foreign(folder, report=silent)[1], params)


def test_heads_of_other_tasks_are_left_out_and_said(tmp_path):
  _, params, fields, tensors = make_model("gpt2")
  tensors["qa_outputs.weight"] = np.ones((1, 24), np.float32)
  notes = []
  folder = foreign_files.write_folder(tmp_path / "x", fields, tensors)
  assert_same(load_foreign(folder, report=notes.append)[1], params)
  assert len(notes) == 1
  assert "qa_outputs" in notes[0]


def test_tied_heads(tmp_path):
  """Saved twice is checked; saved once is enough, unless untied."""
  _, params, fields, tensors = make_model("gpt2")
  embedding = tensors["transformer.wte.weight"]
  twice = tensors | {"lm_head.weight": embedding.copy()}
  assert_same(load_foreign(foreign_files.write_folder(tmp_path / "a", fields, twice))[1], params)
  twice["lm_head.weight"][5, 5] += 1
  folder = foreign_files.write_folder(tmp_path / "b", fields, twice)
  with pytest.raises(CheckpointError, match=r'"lm_head.weight" that differs from "wte.weight"'):
    load_foreign(folder)
  by_the_head = {name: t for name, t in tensors.items() if name != "transformer.wte.weight"}
  by_the_head["lm_head.weight"] = embedding
  folder = foreign_files.write_folder(tmp_path / "e", fields, by_the_head)
  assert_same(load_foreign(folder, report=silent)[1], params)
  fields["tie_word_embeddings"] = False
  folder = foreign_files.write_folder(tmp_path / "c", fields, tensors)
  with pytest.raises(CheckpointError, match=r'lacks the tensor "lm_head.weight".*tie_word'):
    load_foreign(folder)
  config, untied = load_foreign(foreign_files.write_folder(tmp_path / "d", fields, twice))
  np.testing.assert_array_equal(
    untied["lm_head"]["kernel"][: config.vocab_size], twice["lm_head.weight"]
  )


def test_unknown_missing_and_misshapen_tensors(tmp_path):
  _, _, fields, tensors = make_model("gpt2")
  name = "transformer.h.1.mlp.c_fc.weight"

  def load(changed, **more):
    load_foreign(foreign_files.write_folder(tmp_path / "x", fields | more, changed))

  with pytest.raises(
    CheckpointError, match=r'has the tensor "h.1.mlp.c_gate.weight".*did you mean'
  ):
    load(tensors | {"transformer.h.1.mlp.c_gate.weight": tensors[name]})
  with pytest.raises(CheckpointError, match=r'lacks the tensor "h.1.mlp.c_fc.weight"'):
    load({k: v for k, v in tensors.items() if k != name})
  with pytest.raises(
    CheckpointError, match=r"shape \[96, 24\], and its config makes it \[24, 96\]"
  ):
    load(tensors | {name: np.ascontiguousarray(tensors[name].T)})
  with pytest.raises(CheckpointError, match=r"dtype int8; only floating point"):
    load(tensors | {name: tensors[name].astype(np.int8)})
  with pytest.raises(CheckpointError, match="twice, with and without a prefix"):
    load(tensors | {name.removeprefix("transformer."): tensors[name]})


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("n_layer", 1, "has the layers 1 to 1, and its config says 1 layers"),
    ("n_layer", 3, 'lacks the tensor "h.2'),
    ("n_layer", 10**9, "has 28 tensors, and its config says 1000000000 layers"),
    ("n_embd", 48, r"shape \[24\], and its config makes it \[48\]"),
    ("n_inner", 100, r"shape \[96, 24\], and its config makes it \[100, 24\]"),
    ("n_positions", 25, r"shape \[24, 24\], and its config makes it \[25, 24\]"),
    ("vocab_size", 60, r"shape \[61, 24\], and its config makes it \[60, 24\]"),
  ],
)
def test_a_config_that_contradicts_the_weights(tmp_path, field, value, message):
  _, _, fields, tensors = make_model("gpt2")
  folder = foreign_files.write_folder(tmp_path / "x", fields | {field: value}, tensors)
  with pytest.raises(CheckpointError, match=message):
    load_foreign(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_dtypes(tmp_path, dtype, stored):
  _, params, fields, tensors = make_model("gptj")
  tensors = {name: tensor.astype(stored) for name, tensor in tensors.items()}
  folder = foreign_files.write_folder(tmp_path / "x", fields, tensors)
  config, found = load_foreign(folder, dtype)
  wanted = np.dtype(dtype or stored)
  assert_same(found, jax.tree.map(lambda leaf: leaf.astype(stored).astype(wanted), params))
  save_hf(tmp_path / "y", config, found)
  assert open_tensors(tmp_path / "y")["lm_head.bias"].dtype == wanted
  assert json.loads((tmp_path / "y/config.json").read_text())["torch_dtype"] == wanted.name
  assert_same(load_foreign(tmp_path / "y", None)[1], found)


def test_an_unknown_dtype_is_refused(tmp_path):
  with pytest.raises(CheckpointError, match='dtype is "flaot32"; did you mean "float32"'):
    load_foreign(tmp_path, "flaot32")


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gptneox"])
@pytest.mark.parametrize("mode", ["pmap", "mesh"])
def test_straight_onto_devices(tmp_path, family, mode):
  """Each device gets its part, also where the parts cut through heads and padded rows."""
  _, params, fields, tensors = make_model(family, model_dim=32, num_heads=2)
  folder = foreign_files.write_folder(tmp_path / "x", fields, tensors)
  sizes = {"mesh_fsdp": 2, "mesh_tensor": 4, "mesh_data": 1} if mode == "mesh" else {}
  parallel = make_parallel(mode, sharding_rules=SHARDING_RULES, **sizes)
  _, found = load_foreign(folder, parallel=parallel)
  assert_same(parallel.to_host(found), params)
  kernel = found["decoder"]["layers"]["mlp"]["up"]["kernel"]
  parts = {shard.data.shape for shard in kernel.addressable_shards}
  assert parts == ({(2, 16, 32)} if mode == "mesh" else {(2, 32, 128)})


@pytest.mark.parametrize("mode", [None, "pmap", "mesh"])
def test_parameters_may_be_donated_and_overwritten(tmp_path, mode):
  """On CPU jax takes our memory as it is, several devices the same; a step must not mix them."""
  _, params, fields, tensors = make_model("gpt2")
  sizes = {"mesh_fsdp": 2} if mode == "mesh" else {}
  parallel = make_parallel(mode, sharding_rules=SHARDING_RULES, **sizes) if mode else None
  folder = foreign_files.write_folder(tmp_path / "x", fields, tensors)
  _, found = load_foreign(folder, parallel=parallel)
  kept = load_foreign(folder, parallel=parallel)[1] if parallel else found

  def double(tree, batch, *, axis_name):
    return jax.tree.map(lambda leaf: 2 * leaf, tree), {}

  if parallel is None:
    doubled = jax.jit(lambda tree: double(tree, None, axis_name=None)[0], donate_argnums=0)(found)
    del kept
  else:
    step = parallel.compile_step(double)
    batch = parallel.shard_batch(np.zeros((8, 1), np.float32), 1)
    doubled, _ = step(found, batch)
    doubled, _ = step(doubled, batch)
    doubled = jax.tree.map(lambda leaf: leaf / 2, parallel.to_host(doubled))
    assert_same(parallel.to_host(kept), params)
  assert_same(doubled, jax.tree.map(lambda leaf: 2 * leaf, params))


@pytest.mark.parametrize("library", ["nanogpt", "mingpt"])
def test_karpathys_models(tmp_path, monkeypatch, library):
  """Named as transformers', transposed, tied in nanoGPT and not in minGPT."""
  is_nano = library == "nanogpt"
  config = make_config("gpt2", tie_embeddings=is_nano, vocab_multiple=128)
  params = without_padding(make_params(config), config)
  layers = [foreign_files.take(params["decoder"]["layers"], i) for i in range(config.num_layers)]
  embedding = params["decoder"]["token_embedding"]["embedding"][: config.vocab_size]
  tensors = foreign_files.gpt2_tensors(config, params["decoder"], layers, embedding, True)
  head = embedding if is_nano else params["lm_head"]["kernel"][: config.vocab_size]
  tensors |= {"lm_head.weight": head, "transformer.h.0.attn.bias": np.ones((1, 1, 24, 24), bool)}
  fields = {"n_layer": 2, "n_head": 3, "n_embd": 24, "vocab_size": 61, "block_size": 24}
  source = TensorSource(
    {name: whole(tensor.shape, tensor, "ckpt.pt") for name, tensor in tensors.items()},
    {"model_args" if is_nano else "config": fields, "iter_num": 5},
    "ckpt.pt",
    "torch" if is_nano else "mingpt",
  )
  monkeypatch.setattr(convert, "open_tensors", lambda path: source)
  notes = []
  found_config, found = load_foreign(tmp_path / "ckpt.pt", report=notes.append)
  assert_same(found, params)
  assert ["which gelu" in note for note in notes] == [True] * is_nano
  assert found_config.activation == ("gelu" if is_nano else "gelu_tanh")


def test_openai_gpt1(tmp_path):
  config = make_config("gpt1", model_dim=128, num_heads=2, vocab_multiple=128)
  params = without_padding(make_params(config), config)
  folder = foreign_files.write_openai(tmp_path / "x", config, params)
  notes = []
  found_config, found = load_foreign(folder, report=notes.append)
  assert len(notes) == 1
  assert "taken as 64" in notes[0]
  assert_same(found, params)
  assert (found_config.family, found_config.num_heads) == ("gpt1", 2)
  assert found_config.context_length == config.context_length
  fields = foreign_files.config_of(dataclasses.replace(config, num_heads=4))
  (folder / "config.json").write_text(json.dumps(fields))
  found_config, found = load_foreign(folder, report=notes.append)
  assert_same(found, params)
  assert found_config.num_heads == 4 and len(notes) == 1


def test_sharded_export(tmp_path):
  config, params, _, tensors = make_model("gpt2")
  save_hf(tmp_path / "x", config, params, max_shard_bytes=20_000)
  index = json.loads((tmp_path / "x/model.safetensors.index.json").read_text())
  assert index["weight_map"].keys() == tensors.keys()
  files = sorted(set(index["weight_map"].values()))
  assert len(files) > 3
  assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
  assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
  largest = max(tensor.nbytes for tensor in tensors.values())
  for file in files:
    assert sum(t.nbytes for t in load_file(tmp_path / "x" / file).values()) <= max(20_000, largest)
  assert_same(load_foreign(tmp_path / "x")[1], params)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
  config, params, _, _ = make_model("gpt2")
  (tmp_path / "x").mkdir()
  (tmp_path / "x/notes.txt").write_text("mine")
  with pytest.raises(CheckpointError, match="not empty; choose another folder"):
    save_hf(tmp_path / "x", config, params)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]
  (tmp_path / "x/notes.txt").unlink()
  save_hf(tmp_path / "x", config, params)
  assert (tmp_path / "x/model.safetensors").is_file()


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
  config, params, _, _ = make_model("gpt2")
  monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space")))
  with pytest.raises(CheckpointError, match="cannot be written: No space"):
    save_hf(tmp_path / "x", config, params)
  assert list(tmp_path.iterdir()) == []


def test_parameters_of_another_model_are_refused(tmp_path):
  config, params, _, _ = make_model("gpt2")
  with pytest.raises(CheckpointError, match=r"final_norm/bias is absent, and its config makes it"):
    save_hf(tmp_path / "x", make_config("gpt2", vocab_multiple=128), {"decoder": {}})
  with pytest.raises(CheckpointError, match=r"value_head/kernel is \[2\], .* makes it absent"):
    save_hf(tmp_path / "x", config, params | {"value_head": {"kernel": np.ones(2, np.float32)}})
  assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_goes_along(tmp_path):
  config, params, _, _ = make_model("gpt2")
  tokenizer = make_char_tokenizer(["abc"], "<end>")
  save_hf(tmp_path / "x", config, params, tokenizer)
  assert load_tokenizer(tmp_path / "x").fingerprint == tokenizer.fingerprint
  for name in ("config.json", "generation_config.json"):
    assert json.loads((tmp_path / "x" / name).read_text())["eos_token_id"] == 3
  large = make_char_tokenizer([chr(i) for i in range(200, 300)])
  with pytest.raises(CheckpointError, match="the tokenizer has 100 ids and the model 61"):
    save_hf(tmp_path / "y", config, params, large)


def test_tokens_added_beyond_the_model_are_written_and_not_named_as_its_ids(tmp_path):
  config, params, _, _ = make_model("gpt2")
  make_char_tokenizer([chr(i) for i in range(200, 260)], "<end>").save(tmp_path / "tokenizer.json")
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json", pad_token="[PAD]")
  assert tokenizer.pad_id == config.vocab_size
  save_hf(tmp_path / "x", config, params, tokenizer)
  fields = json.loads((tmp_path / "x/config.json").read_text())
  assert (fields["eos_token_id"], fields["pad_token_id"]) == (60, None)
  assert load_tokenizer(tmp_path / "x").pad_id == config.vocab_size


def test_names_of_tensors(tmp_path):
  config, params, _, tensors = make_model("gptneo")
  found = foreign_tensors(config, params)
  assert found.keys() == tensors.keys()
  assert all(np.array_equal(found[name], tensors[name]) for name in tensors)


def test_what_a_model_argument_is(tmp_path, monkeypatch):
  _, _, fields, tensors = make_model("gpt2")
  folder = foreign_files.write_folder(tmp_path / "x", fields, tensors)
  assert resolve_model(folder).kind == "foreign"
  run = tmp_path / "run"
  run.mkdir()
  (run / "config.json").write_text(json.dumps({"model": {"num_layers": 2}}))
  assert resolve_model(run).kind == "run"
  (run / "config.json").write_text("[" * 100_000)
  assert resolve_model(run).kind == "foreign"
  with pytest.raises(CheckpointError, match="there is no such folder or file"):
    resolve_model(str(tmp_path / "y"))
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
  with pytest.raises(CheckpointError, match="no local folder, and the Hugging Face hub cannot be"):
    resolve_model("gpt2-that-nobody-has", report=silent)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-here/x", "", "a\0b", "http://x.y/z"])
def test_names_that_nothing_can_have_are_refused(name):
  with pytest.raises(CheckpointError, match=r"no model|cannot be read"):
    resolve_model(name, report=silent)


nano_sort = pytest.mark.skipif(not NANO_SORT.is_dir(), reason=f"no {NANO_SORT}")


@nano_sort
def test_nano_sort_reproduces_its_recorded_activations():
  """Every activation minGPT recorded in float32, to 1e-5 of the float64 reference."""
  config, params = load_foreign(NANO_SORT, report=silent)
  recorded = open_tensors(NANO_SORT / "gpt-nano-sort-t0-partials.json")
  recorded = {name: recorded[name].read() for name in recorded}
  found = reference_activations(params, config, recorded["idx"].astype(int))
  rows, length = recorded["idx"].shape

  def by_head(name):
    return found[f"layers/0/{name}"].swapaxes(1, 2)

  ours = {
    "x": found["embedding"],
    "ln1": found["layers/0/attention_norm"],
    "q": by_head("query"),
    "k": by_head("key"),
    "v": by_head("value"),
    "y": found["layers/0/mixed"].reshape(rows, length, -1),
    "yProj": found["layers/0/attention"],
    "attnResid": found["layers/0/residual"],
    "ln2": found["layers/0/mlp_norm"],
    "gelu": found["layers/0/mlp_up"],
    "mlp": found["layers/0/mlp"],
    "mlpResid": found["layers/0/output"],
    "block0": found["layers/0/output"],
    "block1": found["layers/1/output"],
    "block2": found["layers/2/output"],
    "ln_f": found["final_norm"],
    "lm_head": found["logits"],
  }
  for name, array in ours.items():
    np.testing.assert_allclose(array, recorded[name], rtol=1e-5, atol=1e-5, err_msg=name)
  logits = lm_logits(
    params,
    hidden_states(
      params["decoder"], make_batch(np.pad(recorded["idx"].astype(int), ((0, 0), (0, 1)))), config
    ),
    config,
  )
  assert relative_error(logits, recorded["lm_head"]) < 1e-5


@nano_sort
def test_nano_sort_sorts_everything():
  config, params = load_foreign(NANO_SORT, report=silent)
  letters = np.array(list(itertools.product(range(3), repeat=6)), np.int32)
  tokens = np.concatenate([letters, np.zeros((len(letters), 6), np.int32)], axis=1)

  @jax.jit
  def next_tokens(params, tokens):
    batch = make_batch(tokens)
    logits = lm_logits(params, hidden_states(params["decoder"], batch, config), config)
    return jnp.argmax(logits, axis=-1)

  for place in range(6, 12):
    tokens[:, place] = next_tokens(params, tokens)[:, place - 1]
  assert (tokens[:, 6:] == np.sort(letters, axis=1)).all(axis=1).mean() > 0.99


MEASURE = """
import sys, threading, time
import jax
from gptjax.checkpoint import convert
from gptjax.checkpoint.convert import load_foreign

def anonymous():
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

load_foreign(sys.argv[1])
before, peak, done = anonymous(), 0, False
def watch():
  global peak
  while not done:
    peak = max(peak, anonymous())
    time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
_, params = load_foreign(sys.argv[2], sys.argv[3])
jax.block_until_ready(params)
done = True
thread.join()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(max(peak, anonymous()) - before, size)
"""


def measure_loading(tmp_path, dtype, **sizes):
  """Returns (growth of anonymous memory, bytes of the parameters) of loading a GPT-2 of zeros."""
  _, _, fields, tensors = make_model("gpt2")
  small = foreign_files.write_folder(tmp_path / "small", fields, tensors)
  D, N = sizes["n_embd"], sizes["n_layer"]
  shapes = {"transformer.wte.weight": (sizes["vocab_size"], D), "transformer.wpe.weight": (1024, D)}
  for layer in range(N):
    for name, shape in {
      **{"ln_1.weight": (D,), "ln_1.bias": (D,), "ln_2.weight": (D,), "ln_2.bias": (D,)},
      **{"attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,)},
      **{"attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,)},
      **{"mlp.c_fc.weight": (D, 4 * D), "mlp.c_fc.bias": (4 * D,)},
      **{"mlp.c_proj.weight": (4 * D, D), "mlp.c_proj.bias": (D,)},
    }.items():
      shapes[f"transformer.h.{layer}.{name}"] = shape
  shapes |= {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}
  large = tmp_path / "large"
  large.mkdir()
  (large / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 8} | sizes))
  header, stop = {}, 0
  for name, shape in shapes.items():
    start, stop = stop, stop + 4 * int(np.prod(shape))
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
  text = json.dumps(header).encode()
  with (large / "model.safetensors").open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + stop)
  result = subprocess.run(
    [sys.executable, "-c", MEASURE, str(small), str(large), dtype],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    capture_output=True,
    text=True,
    check=True,
  )
  grown, size = map(int, result.stdout.split()[-2:])
  return grown, size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_takes_little_more_memory_than_the_parameters(tmp_path):
  grown, size = measure_loading(tmp_path, "bfloat16", n_embd=512, n_layer=12, vocab_size=5000)
  assert size > 80e6
  assert size * 0.9 < grown < size * 1.25


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_a_gigabyte(tmp_path, dtype):
  grown, size = measure_loading(tmp_path, dtype, n_embd=1024, n_layer=20, vocab_size=50257)
  assert size >= (1.2e9 if dtype == "float32" else 0.6e9)
  assert size * 0.9 < grown < size * 1.25
