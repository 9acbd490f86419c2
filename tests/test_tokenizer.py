"""Tokenizers: lossless, text is only text, ids outside the vocabulary are refused."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from gptjax.data.tokenizer import cut_text, load_tokenizer, make_char_tokenizer, train_bpe
from gptjax.errors import ConfigError, DataError, UnknownTokenizerError

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
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


def test_half_a_character_is_named(gpt2_folder):
  tokenizer = load_tokenizer(gpt2_folder)
  for options in ({}, {"parse_special_tokens": True}):
    with pytest.raises(DataError, match="half of a character"):
      tokenizer.encode("a\ud800", **options)


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


def test_special_tokens_by_role_are_found_or_added(gpt2_folder, tmp_path):
  plain = load_tokenizer(gpt2_folder)
  assert (plain.bos_id, plain.unk_id, plain.pad_id) == (plain.end_id, plain.end_id, None)
  tokenizer = load_tokenizer(
    gpt2_folder,
    bos_token="[BOS]",
    pad_token="[PAD]",
    unk_token="<|endoftext|>",
    additional_special_tokens=["<u>"],
  )
  size = plain.vocab_size
  assert tokenizer.added_tokens == {"[BOS]": size, "[PAD]": size + 1, "<u>": size + 2}
  assert [tokenizer.bos_id, tokenizer.pad_id, tokenizer.end_id] == [size, size + 1, plain.end_id]
  assert tokenizer.encode("a b") == plain.encode("a b")
  tokenizer.save(tmp_path / "saved.json")
  saved = load_tokenizer(tmp_path / "saved.json")
  assert (saved.roles, saved.fingerprint) == (tokenizer.roles, tokenizer.fingerprint)
  assert saved.added_tokens == {}


def test_misspelt_and_contradicting_special_tokens_are_refused(gpt2_folder):
  with pytest.raises(ConfigError, match='did you mean "pad_token"'):
    load_tokenizer(gpt2_folder, pad_toekn="[PAD]")
  with pytest.raises(ConfigError, match="must be a list"):
    load_tokenizer(gpt2_folder, additional_special_tokens="<u>")
  with pytest.raises(ConfigError, match="one thing"):
    load_tokenizer(gpt2_folder, "<|endoftext|>", eos_token="</s>")
  with pytest.raises(ConfigError, match="do_lower_case"):
    load_tokenizer(gpt2_folder, do_lower_case=True)


def test_text_is_parsed_for_special_tokens_only_when_asked(gpt2_folder, bpe):
  text = "ab<|endoftext|>[PAD]c"
  tokenizer = load_tokenizer(gpt2_folder, pad_token="[PAD]")
  ids = tokenizer.encode(text, parse_special_tokens=True)
  middle = [tokenizer.end_id, tokenizer.pad_id]
  assert ids == [*tokenizer.encode("ab"), *middle, *tokenizer.encode("c")]
  assert not set(middle) & set(tokenizer.encode(text))
  char = make_char_tokenizer(["abc"], "<|endoftext|>")
  assert char.encode("a<|endoftext|>b", parse_special_tokens=True) == [0, 3, 1]


def test_what_the_files_of_a_folder_say_is_honoured(gpt2_folder, bpe):
  size = load_tokenizer(gpt2_folder).vocab_size
  (gpt2_folder / "added_tokens.json").write_text(json.dumps({"<y>": size + 1, "<x>": size}))
  (gpt2_folder / "special_tokens_map.json").write_text('{"eos_token": "a", "pad_token": "<x>"}')
  config = {"eos_token": {"content": "<y>"}, "cls_token": "<c>"}
  (gpt2_folder / "tokenizer_config.json").write_text(json.dumps(config))
  tokenizer = load_tokenizer(gpt2_folder)
  assert (tokenizer.pad_id, tokenizer.end_id) == (size, size + 1)
  assert tokenizer.added_tokens == {"<c>": size + 2}
  (gpt2_folder / "added_tokens.json").write_text(json.dumps({"<x>": size + 7}))
  with pytest.raises(DataError, match=f"the id {size + 7}"):
    load_tokenizer(gpt2_folder)
  (gpt2_folder / "added_tokens.json").write_text("[1]")
  with pytest.raises(DataError, match="must be a JSON object"):
    load_tokenizer(gpt2_folder)


def test_what_a_post_processor_adds_is_added_when_asked(bpe, tmp_path):
  spec = json.loads(bpe.backend.to_str())
  end = {"id": "<|endoftext|>", "ids": [bpe.end_id], "tokens": ["<|endoftext|>"]}
  first, text = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"id": "A", "type_id": 0}
  spec["post_processor"] = {
    "type": "TemplateProcessing",
    "single": [first, {"Sequence": text}, first],
    "pair": [{"Sequence": text}, {"Sequence": text | {"id": "B"}}],
    "special_tokens": {"<|endoftext|>": end},
  }
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  tokenizer = load_tokenizer(tmp_path)
  ids = bpe.encode("the dog")
  assert tokenizer.encode("the dog") == ids
  assert tokenizer.encode("the dog", add_special_tokens=True) == [bpe.end_id, *ids, bpe.end_id]
  # Roles that are noted change nothing of it; the last ones count.
  for token in ("a", "b"):
    tokenizer = load_tokenizer(tmp_path, pad_token=token)
    assert tokenizer.encode("the dog", add_special_tokens=True) == [bpe.end_id, *ids, bpe.end_id]
    tokenizer.save(tmp_path / "tokenizer.json")
  assert load_tokenizer(tmp_path).roles["pad_token"] == "b"


def test_no_tokenizer_of_a_known_kind(tmp_path):
  (tmp_path / "vocab").write_text("the\n")
  with pytest.raises(UnknownTokenizerError, match="that gptjax knows"):
    load_tokenizer(tmp_path)
  (tmp_path / "vocab.txt").write_text("the\n")
  with pytest.raises(UnknownTokenizerError, match=r"it has no \[UNK\]"):
    load_tokenizer(tmp_path)


def write_bert(folder):
  pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] the The ##re ##é cafe caf 东 北 大 学 , . a ##b"
  (folder / "vocab.txt").write_text(pieces.replace(" ", "\n") + "\n")


def test_word_pieces_of_bert(tmp_path):
  write_bert(tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  ids = tokenizer.encode("There, 东北x 大学. [SEP] café")
  assert ids[:3] == [5, 7, 15] and ids[-1] == 9 and 3 not in ids
  assert tokenizer.decode([5, 7, 15, 11, 12, 9]) == "there, 东 北 cafe"
  assert tokenizer.encode("ab", add_special_tokens=True) == [2, 17, 18, 3]
  assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.end_id) == (0, 1, None)
  assert load_tokenizer(tmp_path, do_lower_case=False).encode("The café") == [6, 10, 8]
  tokenizer.save(tmp_path / "tokenizer.json")
  assert load_tokenizer(tmp_path).encode("There, 东北x 大学. [SEP] café") == ids
  (tmp_path / "tokenizer.json").unlink()
  with pytest.raises(ConfigError, match="gpt1-hf is not for it"):
    load_tokenizer(f"gpt1-hf:{tmp_path}")


@pytest.mark.hf
@needs_shared
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [{}, {"do_lower_case": False, "strip_accents": True}])
def test_word_pieces_are_transformers(tmp_path, config):
  from transformers import BertTokenizer

  write_bert(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  theirs, ours = BertTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
  texts = [*_texts(), "There, 东北x 大学. [SEP] café The"]
  expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
  assert [ours.encode(text, parse_special_tokens=True) for text in texts] == expected
  assert [ours.decode(ids) for ids in expected] == theirs.batch_decode(expected)
  assert ours.encode("a", add_special_tokens=True) == theirs("a")["input_ids"]


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_stream_never_gives_half_a_character(bpe, cut):
  ids = bpe.encode("x 日本 😀 the")
  ids = ids[: len(ids) - len(bpe.encode(" the")) - cut] if cut else ids
  stream = bpe.decode_stream()
  pieces = [stream.step(index) for index in ids]
  assert not any("\ufffd" in piece for piece in pieces)
  end = stream.finish()
  assert "".join(pieces) + end == bpe.decode(ids)
  assert ("\ufffd" in end) == (cut > 0)


def _texts():
  texts = [
    "",
    " ",
    "  a\n\n\t x \r\n",
    "😀👩‍👩‍👧 e\u0301\u3000\xa0",
    "<|extratoken_3|>x[PAD]",
    "don't I'LL",
  ]
  for name in ("ja/miyazawa", "zh/xiyouji", "ko/reviews", "en/tinystories_sample"):
    texts += (SHARED / f"corpora/{name}.txt").read_text(encoding="utf-8").split("\n")[:200]
  return [*texts, "\n".join(texts)]


@pytest.mark.hf
@needs_shared
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", [{}, {"bos_token": "[BOS]", "pad_token": "[PAD]"}])
@pytest.mark.parametrize("files", ["tokenizer.json", "merges.txt"])
def test_gptj_is_transformers(tmp_path, files, given):
  from transformers import AutoTokenizer

  for file in (SHARED / "tokenizers/gptj").iterdir():
    if files == "tokenizer.json" or file.name != "tokenizer.json":
      (tmp_path / file.name).write_bytes(file.read_bytes())
  theirs, ours = AutoTokenizer.from_pretrained(tmp_path, **given), load_tokenizer(tmp_path, **given)
  texts = _texts()
  expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
  assert [ours.encode(text, parse_special_tokens=True) for text in texts] == expected
  assert ours.encode_batch(texts[6:-1]) == expected[6:-1]
  assert [ours.decode(ids) for ids in expected] == theirs.batch_decode(expected)
  named = [theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id]
  assert [ours.bos_id, ours.end_id, ours.unk_id, ours.pad_id] == named
  # The same tokenizer without parsing differs, so the comparison can fail.
  assert [ours.encode(text) for text in ["[PAD]", "<|endoftext|>"]] != [
    theirs(text)["input_ids"] for text in ["[PAD]", "<|endoftext|>"]
  ]


@pytest.mark.hf
@needs_shared
@pytest.mark.filterwarnings("ignore")
def test_gpt2_is_transformers():
  from transformers import GPT2Tokenizer

  folder = SHARED / "tokenizers/gpt2"
  theirs = GPT2Tokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
  ours, texts = load_tokenizer(folder), _texts()
  expected = [theirs(text)["input_ids"] for text in texts]
  assert ours.encode_batch(texts) == expected
  assert [text for text, ids in zip(texts, expected, strict=True) if ours.decode(ids) != text] == []
  assert ours.encode_batch(texts[::-1]) != expected


@pytest.mark.parametrize("form", ["files", "json", "json of pairs"])
@pytest.mark.parametrize("pair", [("ab", "c"), ("abcd", "efgh"), ("x", "a")])
def test_merges_that_make_no_token_are_refused(tmp_path, form, pair, capfd):
  """Some of them end the process in the library."""
  vocab = {token: index for index, token in enumerate(["a", "b", "c", "abcd", "efgh", "ab"])}
  merges = [("a", "b"), pair]
  if form == "files":
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges))
  else:
    listed = [list(p) if form.endswith("pairs") else " ".join(p) for p in merges]
    model = {"type": "BPE", "vocab": vocab, "merges": listed}
    content = {"version": "1.0", "added_tokens": [], "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(DataError, match=f"merges '{pair[0]}' and '{pair[1]}', and has no token"):
    load_tokenizer(tmp_path)
  assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
  ("vocab", "message"), [({}, "no tokens"), ({"a": 2**32 - 5}, "id 4294967291")]
)
def test_ids_are_of_a_sane_size(tmp_path, vocab, message):
  model = {"type": "BPE", "vocab": vocab, "merges": []}
  content = {"version": "1.0", "added_tokens": [], "model": model}
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(DataError, match=f"has .*{message}; ids must be 0 to 16777215"):
    load_tokenizer(tmp_path)
