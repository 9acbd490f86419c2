"""Heat maps join to their text, carry the surprise of the reference, and are one offline file."""

import json
import math
import re

import numpy as np
import pytest
from scored_models import make_loaded, make_scorer, reference_nats

from gptjax.cli.main import main
from gptjax.data.tokenizer import train_bpe
from gptjax.errors import DataError
from gptjax.evaluate.heatmap import Cell, Token, _place, make_heatmap
from gptjax.evaluate.heatmap_view import most_surprising, render_page, terminal_text
from gptjax.evaluate.protocol import Protocol

TEXT = "the <b>日本</b> & \n\n a bad cab"
TEXT = TEXT.replace("&", "_").replace("/", "-")


@pytest.fixture(scope="module")
def model():
  return make_loaded()


@pytest.fixture(scope="module")
def scorer(model):
  return make_scorer(model)


@pytest.fixture(scope="module")
def cells(model, scorer):
  return make_heatmap(TEXT, model, scorer, Protocol(stride=24), 3)


def test_cells_join_to_the_text_with_the_surprise_of_the_reference(model, cells):
  assert "".join(cell.text for cell in cells) == TEXT
  bits = [cell.bits for cell in cells]
  expected = reference_nats(model, model.tokenizer.encode(TEXT)[:24]) / math.log(2)
  assert bits[0] is None
  np.testing.assert_allclose(bits[1:24], expected, rtol=1e-4)
  for cell in cells[1:24]:
    probabilities = [probability for _, probability in cell.tokens[0].alternatives]
    assert len(probabilities) == 3 and probabilities == sorted(probabilities, reverse=True)
    assert probabilities[0] >= 2**-cell.bits - 1e-6


def test_only_so_many_tokens(model, scorer):
  cells = make_heatmap(TEXT, model, scorer, Protocol(), 3, num_tokens=9)
  assert "".join(cell.text for cell in cells) == TEXT[:9]


def test_a_start_token_lets_the_first_token_be_known(model, scorer):
  cells = make_heatmap("ab", model, scorer, Protocol(start="end"), 3)
  assert [cell.bits is None for cell in cells] == [False, False]
  with pytest.raises(DataError, match="the text has one token"):
    make_heatmap("a", model, scorer, Protocol(), 3)


def test_tokens_of_one_character_share_a_cell():
  """Byte-level tokens are parts of characters, and other tokenizers leave bytes out."""
  text = "a日本 😀x"
  tokenizer = train_bpe([text], 257)
  ids = tokenizer.encode(text)
  tokens = [Token(tokenizer.decode([index]), 1.0, ()) for index in ids]
  cells = _place(tokens, tokenizer.byte_spans(text), text.encode())
  assert [cell.text for cell in cells] == list(text)
  assert [len(cell.tokens) for cell in cells] == [1, 3, 3, 1, 4, 1]
  assert cells[1].bits == 3.0
  spans = np.array([[1, 2], [4, 6]])
  cells = _place(tokens[:2], spans, b"(a, bc)")
  assert [(cell.text, len(cell.tokens)) for cell in cells] == [
    ("(", 0),
    ("a", 1),
    (", ", 0),
    ("bc", 1),
    (")", 0),
  ]


def test_the_page_is_one_offline_file_whose_text_is_only_text(cells):
  page = render_page("a < b", cells)
  assert "a &lt; b" in page and "<b>日本" not in page
  assert not re.search(r"(src|href)=[\"'](?!data:)", page) and "http" not in page
  shown = re.search(r"<pre>(.*?)</pre>", page, re.DOTALL).group(1)
  assert len(re.findall("<span", shown)) == len(cells)
  (data,) = re.findall(r'role="status"></div><script type="application/json">(.*?)</script>', page)
  cards = json.loads(data)
  assert len(cards) == len(cells)
  assert cards[5][0][1] == pytest.approx(cells[5].bits, abs=1e-3)


def test_a_terminal_shows_the_text_and_colours_surprise(cells):
  text = terminal_text(cells)
  assert text.plain == TEXT
  coloured = {TEXT[span.start : span.end] for span in text.spans}
  assert coloured and len(text.spans) < len(cells)
  known = [Cell("a", (Token("a", 0.1, ()),)), Cell("b", (Token("b", 11.0, (("c", 0.5),)),))]
  assert [span.start for span in terminal_text(known).spans] == [1]
  assert most_surprising(known, 1) == [("a", "b", 11.0, "“c” 50%")]


def test_what_the_command_line_refuses(capsys, tmp_path):
  flags = ["evaluate", "heatmap", "--model", "none"]
  assert main(flags) == 2
  assert main([*flags, "--text", "a", "--data", "b"]) == 2
  assert main([*flags, "--text", ""]) == 2
  assert main([*flags, "--text", "a", "--tokens", "0"]) == 2
  assert capsys.readouterr().err.splitlines() == [
    "gptjax: give one of --data and --text",
    "gptjax: give one of --data and --text",
    "gptjax: --text is empty; there is nothing to score",
    "gptjax: --tokens is 0; it must be at least 1",
  ]
