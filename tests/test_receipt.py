"""Receipts: hashes of what is scored and of nothing else, the same score again, and the verb."""

import dataclasses
import json

import pytest
from scored_models import make_loaded, make_text

from gptjax.checkpoint.export import save_hf
from gptjax.checkpoint.models import load_model, save_run
from gptjax.cli.evaluate.arguments import doubt_tokenizer
from gptjax.cli.main import main
from gptjax.evaluate.receipt import differences, hash_model

TEXT = make_text(90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The same model as a Hugging Face folder and as a run; another one; and texts."""
  folder = tmp_path_factory.mktemp("receipts")
  model, other = make_loaded(), make_loaded(seed=1)
  save_hf(folder / "hf", model.config, model.params, model.tokenizer)
  save_run(folder / "run", model.config, model.params, model.tokenizer)
  save_run(folder / "other", other.config, other.params, other.tokenizer)
  (folder / "text.txt").write_text(TEXT)
  (folder / "copy.tokens").write_text(TEXT)
  (folder / "other.txt").write_text(TEXT.replace("a", "b"))
  return folder


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
  monkeypatch.setenv("GPTJAX_CACHE", "off")


def run(capsys, *arguments):
  """Returns (status, standard output, standard error) of a task of `gptjax evaluate`."""
  status = main(["evaluate", *map(str, arguments)])
  return status, *capsys.readouterr()


def test_a_hash_is_of_parameters_and_architecture_alone(folder):
  model = make_loaded()
  expected = hash_model(model)
  for name in ("hf", "run"):  # padded to other multiples, in other formats
    assert hash_model(load_model(folder / name)) == expected
  unrolled = dataclasses.replace(model.config, scan_layers=False, attention_dropout=0.5)
  assert hash_model(dataclasses.replace(model, config=unrolled)) == expected
  changed = dataclasses.replace(model.config, norm_epsilon=1e-6)
  assert hash_model(dataclasses.replace(model, config=changed)) != expected
  model.params["decoder"]["final_norm"]["bias"][3] += 1e-6
  assert hash_model(model) != expected
  assert len(hash_model(load_model(folder / "run", dtype="bfloat16"))) == 64


def test_the_command_prints_a_receipt_that_can_be_repeated(folder, capsys, tmp_path):
  status, out, _ = run(
    capsys, "perplexity", "--model", folder / "hf", "--data", folder / "text.txt", "--stride", 24,
    "--start", "end", "--json",
  )  # fmt: skip
  receipt = json.loads(out)
  assert status == 0 and out.count("\n") == 1
  assert {
    "token_perplexity",
    "word_perplexity",
    "bits_per_byte",
    "bits_per_character",
    "nats_per_token",
    "standard_error",
    "tokens",
    "protocol",
    "model_hash",
    "tokenizer_hash",
    "data_hash",
    "versions",
  } <= receipt.keys()
  assert receipt["protocol"]["context"] == 24 and receipt["protocol"]["start"] == "end"
  (tmp_path / "receipt.json").write_text(out)
  again = ["receipt", "--receipt", tmp_path / "receipt.json"]
  same = run(capsys, *again, "--model", folder / "run", "--data", folder / "copy.tokens",
             "--batch-size", 1)  # fmt: skip
  assert same[:2] == (0, "equal\n")
  # What is not given is what the receipt tells.
  status, out, _ = run(capsys, *again, "--model", folder / "other", "--json")
  found = json.loads(out)
  assert status == 1 and not found["is_equal"]
  assert found["differences"][0].startswith("the parameters are not the same")
  assert any(line.startswith("nats_per_token was") for line in found["differences"])
  assert found["receipt"]["data_hash"] == receipt["data_hash"]
  status, out, _ = run(capsys, *again, "--data", folder / "other.txt")
  assert status == 1 and out.splitlines()[1].startswith("the data is not the same")


def test_the_table_has_every_figure_with_its_protocol(folder, capsys):
  flags = ["--model", folder / "hf", "--data", folder / "text.txt", "--protocol", "text8"]
  flags += ["--weights", "int8"]
  status, out, _ = run(capsys, "perplexity", *flags)
  assert status == 0
  for words in (
    "token perplexity",
    "bits per character",
    "(over windows)",
    "which has other sizes",
    "stride 23",
    f"{'weights':<30}int8",
    "jaxlib",
  ):
    assert words in out


def test_small_differences_are_none_and_versions_explain_others():
  old = {"model_hash": "a", "nats_per_token": 2.0, "tokens": 5, "versions": {"jax": "1"}}
  new = old | {"nats_per_token": 2.0 + 1e-6, "versions": {"jax": "2"}}
  assert differences(old, new) == []
  new["nats_per_token"] = 2.001
  assert differences(old, new) == ["jax was 1 and is 2", "nats_per_token was 2 and is 2.001"]
  assert differences(old, old | {"model_hash": "b"}) == [
    "the parameters are not the same (a, now b)"
  ]


REFUSED = {
  "no task": ([], "give a task: gptjax evaluate perplexity|"),
  "misspelt task": (["perplexty"], 'TASK is "perplexty"; did you mean "perplexity"?'),
  "misspelt flag": (
    ["perplexity", "--model", "m", "--data", "d", "--strid", "3"],
    'unknown argument "--strid"; did you mean "--stride"?',
  ),
  "misspelt protocol": (
    ["perplexity", "--model", "m", "--data", "d", "--protocol", "wikitext3"],
    '--protocol is "wikitext3"; did you mean "wikitext',
  ),
  "batch size": (
    ["perplexity", "--model", "m", "--data", "d", "--batch-size", "0"],
    "--batch-size is 0; it must be at least 1",
  ),
  "no model": (["lambada", "--model", "/none", "--data", "d"], "/none"),
  "no receipt": (
    ["receipt", "--model", "m", "--data", "d", "--receipt", "/none"],
    'receipt "/none" cannot be read',
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_in_a_line(case, capsys):
  arguments, message = REFUSED[case]
  status, out, err = run(capsys, *arguments)
  assert (status, out) == (2, "")
  assert message in err and err.startswith("gptjax: ") and err.count("\n") == 1


def test_files_that_are_no_receipts_are_refused(folder, capsys, tmp_path):
  path = tmp_path / "receipt.json"
  flags = ["receipt", "--model", "m", "--data", "d", "--receipt", path]
  for content, message in (
    ("[1]", "is no receipt"),
    ('{"task": "perplexity", "protocol": {"strid": 3}}', "strid"),
    ('{"task": "dance", "protocol": {}}', 'is a receipt of "dance"'),
  ):
    path.write_text(content)
    status, _, err = run(capsys, *flags)
    assert status == 2 and message in err


def test_a_receipt_that_does_not_tell_where_things_lie_needs_flags(capsys, tmp_path):
  path = tmp_path / "receipt.json"
  for told, message in (
    ("", "the receipt has no model; give --model"),
    (', "model": "m"', "the receipt has no data; give --data"),
    (', "model": "m", "weights": "int4"', 'weights is "int4"'),
  ):
    path.write_text('{"task": "perplexity", "protocol": {}' + told + "}")
    status, _, err = run(capsys, "receipt", "--receipt", path)
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_tokenizer_with_far_fewer_ids_than_the_model_is_doubted(capsys):
  model = make_loaded()
  for spare, is_doubted in ((1024, False), (1025, True)):
    config = dataclasses.replace(model.config, vocab_size=model.config.vocab_size + spare)
    doubt_tokenizer(dataclasses.replace(model, config=config))
    assert ("the figures mean nothing" in capsys.readouterr().err) == is_doubted
