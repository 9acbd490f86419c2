"""Tokenizers: lossless, text is only text, ids outside the vocabulary are refused."""

import itertools
import json

import numpy as np
import pytest

from gptjax.data.tokenizer import cut_text, load_tokenizer, make_char_tokenizer, train_bpe
from gptjax.errors import DataError

TEXT = "The quick brown fox, isn't it?\n\n  the lazy dog's 42 bones.\r\n" * 20
MANY = "日本語の文章。\n한국어 문장\t中文句子,é 😀👩‍👩‍👧 \u3000\u00a0x\x1c y  \n\n <|endoftext|>"


@pytest.fixture(scope="module")
def bpe():
  return train_bpe([TEXT], 290)


@pytest.fixture
def gpt2_folder(tmp_path, bpe):
  """A folder in the form of GPT-2's, with our own small merges."""
  model = json.loads(bpe.backend.to_str())["model"]
  tokens = [token for token in model["vocab"] if token != "<|endoftext|>"]
  vocab = {token: index for index, token in enumerate([*tokens, "<|endoftext|>"])}
  (tmp_path / "encoder.json").write_text(json.dumps(vocab))
  merges = "\n".join(" ".join(merge) for merge in model["merges"])
  (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{merges}\n")
  return tmp_path


@pytest.mark.parametrize("text", [TEXT, MANY, "", "\n", "😀"])
def test_bpe_is_lossless_and_counts_bytes(bpe, text):
  ids = bpe.encode(text)
  assert bpe.decode(ids) == text
  assert bpe.bytes_of_token[ids].sum() == len(text.encode())


def test_bpe_has_the_size_asked_for_and_shortens_text(bpe):
  assert bpe.vocab_size == 290
  assert len(bpe.encode(TEXT)) < 0.7 * len(TEXT)
  assert train_bpe([TEXT], 290).fingerprint == bpe.fingerprint


def test_bpe_below_the_bytes_is_refused():
  with pytest.raises(DataError, match="at least 257"):
    train_bpe([TEXT], 256)


def test_text_that_spells_the_end_token_is_text(bpe, gpt2_folder):
  char = make_char_tokenizer([TEXT + "<|>"], "<|endoftext|>")
  for tokenizer in (bpe, char, load_tokenizer(gpt2_folder)):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.end_id]) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.end_id], skip_special_tokens=True) == ""


def test_end_token_that_a_file_calls_ordinary_is_still_never_read_from_text(bpe, tmp_path):
  spec = json.loads(bpe.backend.to_str())
  spec["added_tokens"][0]["special"] = False
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  tokenizer = load_tokenizer(tmp_path, "<|endoftext|>")
  assert tokenizer.end_id not in tokenizer.encode("<|endoftext|>")


def test_characters_are_the_vocabulary():
  tokenizer = make_char_tokenizer(["ba\n"], "")
  assert tokenizer.vocab_size == 3
  assert tokenizer.end_id is None
  assert tokenizer.encode("\nab") == [0, 1, 2]
  assert tokenizer.decode([2, 1, 0]) == "ba\n"


def test_characters_agree_with_the_saved_tokenizer_json(tmp_path):
  tokenizer = make_char_tokenizer([MANY], "<|endoftext|>")
  tokenizer.save(tmp_path / "tokenizer.json")
  loaded = load_tokenizer(tmp_path)
  backend_ids = loaded.backend.encode(MANY, add_special_tokens=False).ids
  assert tokenizer.encode(MANY) == loaded.encode(MANY) == backend_ids
  assert loaded.decode(backend_ids) == MANY
  assert (loaded.fingerprint, loaded.end_id) == (tokenizer.fingerprint, tokenizer.end_id)


def test_unknown_character_is_named():
  with pytest.raises(DataError, match="'é'"):
    make_char_tokenizer(["abc"]).encode("bcé")


def test_gpt2_files(gpt2_folder, bpe):
  tokenizer = load_tokenizer(gpt2_folder)
  assert tokenizer.end_id == tokenizer.vocab_size - 1
  # The same merges with all ids one lower, since the end token is last and not first.
  assert [index + 1 for index in tokenizer.encode(TEXT)] == bpe.encode(TEXT)


def test_ids_outside_the_vocabulary_are_refused(bpe):
  for index in (290, -1):
    with pytest.raises(DataError, match="not in the vocabulary"):
      bpe.decode([5, index])


def test_missing_damaged_and_unfitting_tokenizers_are_one_line(bpe, tmp_path):
  with pytest.raises(DataError, match="no tokenizer in"):
    load_tokenizer(tmp_path)
  bpe.save(tmp_path / "tokenizer.json")
  with pytest.raises(DataError, match='did you mean "<'):
    load_tokenizer(tmp_path, "<|endoftex|>")
  assert load_tokenizer(tmp_path, "").end_id is None
  (tmp_path / "tokenizer.json").write_text('{"model":')
  with pytest.raises(DataError, match="cannot be read"):
    load_tokenizer(tmp_path)


def test_parts_are_tokenised_as_the_whole(bpe):
  def words(text):
    return [word for word, _ in bpe.backend.pre_tokenizer.pre_tokenize_str(text)]

  random = np.random.default_rng(0)
  alphabet = [*"ab1'.,!s \n\t\r\u3000\u00a0\x1c日é", "\r\n", "  ", "n't", "😀"]
  for _ in range(200):
    text = "".join(random.choice(alphabet, 60))
    parts = list(cut_text(text, 5, bpe.cuts))
    assert "".join(parts) == text
    assert list(itertools.chain(*map(words, parts))) == words(text)
    assert list(itertools.chain(*bpe.encode_batch(parts))) == bpe.encode(text)


def test_a_cut_inside_a_word_would_show(bpe):
  assert bpe.encode("the") != bpe.encode("th") + bpe.encode("e")
  assert bpe.cuts == "before_space"
  assert list(cut_text("the end", 2, "nowhere")) == ["the end"]


def test_byte_spans_cover_the_text(bpe):
  text = "日本 é x"
  spans = bpe.byte_spans(text)
  assert len(spans) == len(bpe.encode(text))
  assert spans[0, 0] == 0
  assert spans[-1, 1] == len(text.encode())
  np.testing.assert_array_equal(make_char_tokenizer([text]).byte_spans("é日"), [[0, 2], [2, 5]])
