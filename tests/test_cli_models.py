"""`gptjax info` and `gptjax convert` as a user types them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from families import make_tokens
from test_api import make_folder

import gptjax
from gptjax.checkpoint.export_config import write_foreign_config
from gptjax.cli.info import describe
from gptjax.cli.main import main
from gptjax.model.parameters import count_parameters
from gptjax.model.presets import PRESETS
from gptjax.model.recipe import nearest_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path, *_ = make_folder(tmp_path_factory.mktemp("hf") / "model", "gptj")
  return path


def test_info_json_is_one_object_and_nothing_else(folder, capsys):
  assert main(["info", str(folder), "--json"]) == 0
  facts = json.loads(capsys.readouterr().out)
  assert facts["family"] == "gptj"
  assert facts["vocab_size"] == 61 and facts["context_length"] == 24
  params = gptjax.load(folder).params
  embedding, head = params["decoder"]["token_embedding"]["embedding"], params["lm_head"]["kernel"]
  assert embedding.shape == head.shape == (128, 24)
  elements = sum(leaf.size for leaf in jax.tree.leaves(params))
  padding = 67 * (24 + 24 + 1)
  assert facts["parameters"] == elements - padding
  assert facts["memory_bytes"]["bfloat16"] == 2 * elements
  assert facts["recipe"] == "gptj-6b"
  assert facts["differences"]["rotary_dim"] == {"model": 4, "recipe": 64}
  assert "activation" not in facts["differences"]


def leaves(tree):
  return (
    [leaf for child in tree.values() for leaf in leaves(child)]
    if isinstance(tree, dict)
    else [tree]
  )


def test_info_is_for_people_too(folder, capsys):
  assert main(["info", str(folder)]) == 0
  text = capsys.readouterr().out
  assert "nearest is gptj-6b, which has" in text
  assert "num_layers 28, and this 2" in text


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_own_recipe(name):
  facts = describe(PRESETS[name])
  assert facts["recipe"] == name
  assert facts["differences"] == {}
  assert facts["parameters"] == count_parameters(PRESETS[name])


def test_the_downloaded_gpt2_differs_in_dropout_alone(tmp_path, capsys):
  fields = write_foreign_config(PRESETS["gpt2"])
  rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
  (tmp_path / "config.json").write_text(json.dumps(fields | rates))
  assert main(["info", str(tmp_path), "--json"]) == 0
  facts = json.loads(capsys.readouterr().out)
  assert facts["parameters"] == 124_439_808
  assert [name.split("_")[-1] for name in facts["differences"]] == ["dropout"] * 3


def test_a_field_that_leaves_the_recipe_is_named():
  changed = dataclasses.replace(PRESETS["gpt2-medium"], norm_epsilon=1e-6, ffw_dim=100)
  recipe = nearest_recipe(changed)
  assert recipe.name == "gpt2-medium"
  assert recipe.differences == {"norm_epsilon": (1e-6, 1e-5), "ffw_dim": (100, 4096)}
  assert nearest_recipe(dataclasses.replace(PRESETS["gpt2"], ffw_dim=3072)).differences == {}


def test_convert_there_and_back(folder, tmp_path, capsys):
  assert main(["convert", str(folder), str(tmp_path / "run"), "--to", "gptjax"]) == 0
  assert main(["convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf"]) == 0
  assert capsys.readouterr().out == ""
  first, last = gptjax.load(folder), gptjax.load(tmp_path / "hf")
  tokens = make_tokens(first.config)
  np.testing.assert_array_equal(first(tokens), last(tokens))
  assert main(["info", str(tmp_path / "run"), "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["family"] == "gptj"


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (["info"], "model"),
    (["info", "/no/such/folder"], "no such folder or file"),
    (["info", "x", "--jsno"], 'did you mean "--json"'),
    (["convert", "a", "b"], "--to"),
    (["convert", "a", "b", "--to", "onnx"], "onnx"),
    (["convert", "FOLDER", "FOLDER", "--to", "hf"], "is not empty"),
    (["convert", "FOLDER", "b", "--to", "hf", "--dtype", "float8"], 'dtype is "float8"'),
    (["doctor", "/no/such/folder"], "no such folder or file"),
    (["doctor", "FOLDER", "--txt", "x"], 'did you mean "--text"'),
  ],
)
def test_mistakes_are_one_line_and_status_2(arguments, expected, folder, capsys):
  arguments = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
  assert main(arguments) == 2
  error = capsys.readouterr().err.strip().splitlines()
  assert len(error) == 1 and error[0].startswith("gptjax: ")
  assert expected in error[0]
