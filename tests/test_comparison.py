"""Comparisons: units, intervals that cover as often as they say, verdicts, other tokenizers."""

import dataclasses
import itertools

import numpy as np
import pytest
from scored_models import CHARACTERS, CONFIG, make_loaded, make_scorer, make_text, reference_nats

from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.errors import DataError
from gptjax.evaluate.comparison import Units, compare, judge, part
from gptjax.evaluate.comparison_view import render_page, to_text
from gptjax.evaluate.protocol import Protocol

TEXT = make_text(120, seed=5)


@pytest.fixture(scope="module")
def sides():
  models = {"first": make_loaded(), "second": make_loaded(seed=1)}
  return [(name, model, make_scorer(model)) for name, model in models.items()]


@pytest.fixture
def path(tmp_path):
  (tmp_path / "text.txt").write_text(TEXT)
  return str(tmp_path / "text.txt")


@pytest.fixture
def short_segments(monkeypatch):
  monkeypatch.setattr("gptjax.evaluate.comparison._SEGMENT_BYTES", 20)


def test_the_difference_is_that_of_the_reference(sides, path, short_segments):
  comparison = compare([path], sides, Protocol(stride=24))
  found = comparison.receipt
  ids = sides[0][1].tokenizer.encode(TEXT)
  nats = [
    sum(reference_nats(model, ids[start : start + 24]).sum() for start in range(0, len(ids), 24))
    for _, model, _ in sides
  ]
  expected = (nats[0] - nats[1]) / np.log(2) / len(TEXT)
  assert found["difference"] == pytest.approx(expected, rel=1e-4)
  assert found["units"] == "segments" and found["counts"]["units"] > 3
  assert "".join(comparison.texts) == TEXT
  assert [side["tokens"] for side in found["models"]] == [115, 115]
  low, high = found["interval"]
  assert low < found["difference"] < high
  assert found["protocol"]["stride"] == 24 and len(found["data_hash"]) == 64


def test_a_model_is_equal_to_itself(sides, path, short_segments):
  found = compare([path], [sides[0], sides[0]], Protocol()).receipt
  assert found["verdict"] == "equal" and found["difference"] == 0


def test_models_with_other_tokenizers_are_compared_by_bytes(sides, path, short_segments):
  """The same model with its ids in another order, and another tokenizer to match, is equal."""
  _, model, _ = sides[0]
  turned = make_char_tokenizer([CHARACTERS.replace("z", "Z")], "<|end|>")
  vocab, others = (t.backend.get_vocab() for t in (model.tokenizer, turned))
  order = np.arange(64)
  for character, index in others.items():
    order[index] = vocab[character if character != "Z" else "z"]
  decoder = model.params["decoder"]
  embedding = {"embedding": decoder["token_embedding"]["embedding"][order]}
  params = {"decoder": decoder | {"token_embedding": embedding}}
  other = dataclasses.replace(model, params=params, tokenizer=turned)
  found = compare([path], [sides[0], ("turned", other, make_scorer(other))], Protocol()).receipt
  first, second = found["models"]
  assert first["tokenizer_hash"] != second["tokenizer_hash"]
  assert found["difference"] == pytest.approx(0, abs=1e-5)
  assert second["bits_per_byte"] == pytest.approx(first["bits_per_byte"], rel=1e-5)


def test_the_interval_covers_as_often_as_it_says_and_the_verdict_follows():
  """Units of uneven size from a known difference: 95 % of intervals hold it."""
  rng = np.random.default_rng(0)
  covered, trials = 0, 1000
  for _ in range(trials):
    sizes = rng.integers(200, 2000, 40)
    units = Units("segments", [np.concatenate([[0], np.cumsum(sizes)])])
    shared = sizes * rng.normal(2, 0.3, 40)  # pairing takes away what both find hard
    found = judge(shared + sizes * rng.normal(0.01, 0.05, 40), shared, units)
    low, high = found["interval"]
    covered += low < 0.01 < high
    sign = "second" if low > 0 else "first"
    undecided = low <= 0 <= high
    assert found["verdict"] == ("not distinguishable" if undecided else f"the {sign} is better")
  assert abs(covered / trials - 0.95) < 0.025


def test_one_unit_decides_nothing():
  units = Units("segments", [np.array([0, 10])])
  found = judge(np.array([3.0]), np.array([2.0]), units)
  assert found["verdict"] == "not distinguishable" and found["interval"] == [None, None]


def test_units_are_documents_where_there_are_many_and_else_segments_at_breaks():
  assert part(["ab"] * 30).kind == "documents"
  lines = "word " * 30 + "\n"
  units = part([lines * 40, "short"])
  assert units.kind == "segments" and list(units.bounds[1]) == [0, 5]
  bounds = units.bounds[0]
  assert bounds[-1] == len(lines * 40)
  assert all((lines * 40)[cut] == "\n" for cut in bounds[1:-1])
  # Without spaces it is characters that are not cut.
  text = "日" * 2000
  data, bounds = text.encode(), part([text]).bounds[0]
  parts = [data[start:end].decode() for start, end in itertools.pairwise(bounds)]
  assert "".join(parts) == text and len(parts) > 3


def test_the_page_and_the_lines_say_the_verdict(sides, path, short_segments):
  comparison = compare([path], sides, Protocol())
  page = render_page(comparison)
  assert comparison.receipt["verdict"] in page and "http" not in page
  assert "first" in page and "second" in page
  assert to_text(comparison.receipt).splitlines()[-1].endswith(comparison.receipt["verdict"])


def test_nothing_to_compare_is_refused(sides, tmp_path):
  (tmp_path / "text.txt").write_text("a")
  with pytest.raises(DataError, match="every document has one token"):
    compare([str(tmp_path / "text.txt")], sides, Protocol())
  assert CONFIG.context_length == 24
