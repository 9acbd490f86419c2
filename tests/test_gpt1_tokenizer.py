"""GPT-1's text: cleaned as OpenAI did, parted as spaCy does, or as transformers does now."""

import itertools
import json
from pathlib import Path

import pytest

from gptjax.data.english import split_english
from gptjax.data.gpt1_tokenizer import clean, paper_words
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
GPT1 = SHARED / "tokenizers" / "gpt1"
needs_shared = pytest.mark.skipif(not GPT1.is_dir(), reason="needs ../shared/data")
MERGES = [("t", "h"), ("th", "e</w>"), ("d", "o"), ("n", "'"), ("n'", "t</w>"), ("1", "0</w>")]


@pytest.fixture
def folder(tmp_path):
  """Files in the form of OpenAI's, with our own few merges."""
  letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()] + ["\n"]
  pieces = [*letters, *(letter + "</w>" for letter in letters), *map("".join, MERGES)]
  vocab = {"<unk>": 0} | {piece: i for i, piece in enumerate(pieces, 1)}
  (tmp_path / "encoder_bpe_40000.json").write_text(json.dumps(vocab))
  merges = "\n".join(" ".join(pair) for pair in MERGES)
  (tmp_path / "vocab_40000.bpe").write_text(f"#version: 0.2\n{merges}\n")
  return tmp_path


# What spaCy 3.8.18's blank("en") gives.
@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("I can't, won't; don't!", "I ca n't , wo n't ; do n't !"),
    ("you're she'd've They'll cannot", "you 're she 'd 've They 'll can not"),
    ("Emma's dogs' 'tis o'clock ma'am 'em", "Emma 's dogs ' ' tis o'clock ma'am 'em"),
    ("Mr. Weston met Dr. Who. vs. etc.", "Mr. Weston met Dr. Who . vs. etc ."),
    ("at 5p.m. in the U.S. OK. I.", "at 5 p.m. in the U.S. OK . I."),
    ("$5.50 US$3 10km 3% 20£", "$ 5.50 US$ 3 10 km 3 % 20 £"),
    ("well-known and/or (brackets)", "well - known and / or ( brackets )"),
    ("wait...what? end.Then calm.Don't", "wait ... what ? end . Then calm . Don't"),
    ("www.Site.com a@b.org x:y 3:30 #tag", "www.Site.com a@b.org x : y 3:30 # tag"),
    ("wed id hell were its", "we d i d hell were its"),
    ("C++ 1+1 a.m. <3", "C + + 1 + 1 a.m. <3"),
  ],
)
def test_words_are_spacys(text, words):
  assert list(split_english(clean(text))) == words.split()


def test_text_is_cleaned_as_openai_did():
  # Mojibake, a curly quote, dashes, an ellipsis, spaces, and newlines that stay.
  assert clean("âœ” “Hi”—yes…  (no)\n\n \tend ") == '✔ " Hi " - yes... ( no ) \n end'


def test_newlines_are_words_and_words_are_lower_case():
  assert paper_words("The END.\n\nNow") == ["the", "end", ".", "\n", "now"]


def _reference_ids(folder, texts):
  """Byte pairs as GPT-1 applied them: the best-ranked pair first, until none is left."""
  vocab = json.loads((folder / "encoder_bpe_40000.json").read_text())
  lines = (folder / "vocab_40000.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
  rank = {tuple(line.split()): i for i, line in enumerate(lines)}

  def pieces(word):
    parts = [*word[:-1], word[-1] + "</w>"]
    while ranked := [pair for pair in itertools.pairwise(parts) if pair in rank]:
      best, joined = min(ranked, key=rank.get), []
      for part in parts:
        if joined and (joined[-1], part) == best:
          joined[-1] += part
        else:
          joined.append(part)
      parts = joined
    return parts

  words_of = [paper_words(text) for text in texts]
  return [[vocab.get(part, 0) for word in words for part in pieces(word)] for words in words_of]


TEXT = "Do the dogs thethe don't\n do 10 —日本?"


def test_ids_are_the_best_ranked_pairs_and_unknown_is_0(folder):
  tokenizer = load_tokenizer(folder)
  ids = tokenizer.encode(TEXT)
  assert [ids] == _reference_ids(folder, [TEXT])
  assert ids.count(0) == 2
  assert tokenizer.unk_id == 0
  assert tokenizer.end_id is None
  assert tokenizer.decode(tokenizer.encode("The END\n isn't")) == "the end \n is n't"


def test_both_modes_come_back_from_one_file(folder, tmp_path):
  paper = load_tokenizer(f"gpt1-paper:{folder}", pad_token="<pad>")
  hf = load_tokenizer(f"gpt1-hf:{folder}")
  assert paper.encode("don't") != hf.encode("don't")
  for tokenizer in (paper, hf):
    tokenizer.save(tmp_path / "saved.json")
    loaded = load_tokenizer(tmp_path / "saved.json")
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert (loaded.fingerprint, loaded.pad_id) == (tokenizer.fingerprint, tokenizer.pad_id)
  assert paper.pad_id == paper.vocab_size - 1
  again = load_tokenizer(f"gpt1-paper:{tmp_path / 'saved.json'}")
  assert again.encode(TEXT) == paper.encode(TEXT)


def test_special_tokens_are_parsed_only_when_asked(folder):
  tokenizer = load_tokenizer(folder, eos_token="<end>")
  plain = tokenizer.encode("do<end>")
  assert tokenizer.end_id not in plain
  parsed = tokenizer.encode("do<end>", parse_special_tokens=True)
  assert parsed == [*tokenizer.encode("do"), tokenizer.end_id]


def test_what_a_mode_cannot_do_is_said(folder, tmp_path):
  with pytest.raises(DataError, match="rewrites text"):
    load_tokenizer(folder).byte_spans("the")
  (tmp_path / "encoder_bpe_40000.json").rename(tmp_path / "encoder.json")
  (tmp_path / "vocab_40000.bpe").rename(tmp_path / "vocab.bpe")
  (tmp_path / "encoder.json").write_text('{"a": 0, "b": 1}')
  (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
  with pytest.raises(ConfigError, match="gpt1-paper is not for it"):
    load_tokenizer(f"gpt1-paper:{tmp_path}")


@needs_shared
def test_openais_own_vocabulary():
  tokenizer = load_tokenizer(GPT1)
  assert tokenizer.vocab_size == 40478
  lines = (SHARED / "corpora/en/austen-emma.txt").read_text().split("\n\n")[:60]
  texts = [*lines, "naïve — “Quoted” 日本"]
  assert tokenizer.encode_batch(texts) == _reference_ids(GPT1, texts)
  assert tokenizer.decode(tokenizer.encode(lines[3])) == " ".join(paper_words(lines[3]))


@needs_shared
def test_words_are_spacys_on_whole_texts():
  spacy = pytest.importorskip("spacy", reason="needs spacy, which is no dependency")
  parse = spacy.blank("en")
  for name in ("tinystories_sample", "austen-sense"):
    texts = (SHARED / f"corpora/en/{name}.txt").read_text().split("\n\n")[:500]
    for text in map(clean, texts):
      # spaCy gives a newline with the space after it.
      assert list(split_english(text)) == [token.text.rstrip(" ") for token in parse(text)]


@pytest.mark.hf
@needs_shared
@pytest.mark.filterwarnings("ignore")
def test_gpt1_hf_is_transformers():
  from transformers import OpenAIGPTTokenizer

  theirs = OpenAIGPTTokenizer(
    *(str(GPT1 / name) for name in ("encoder_bpe_40000.json", "vocab_40000.bpe"))
  )
  ours, paper = load_tokenizer(f"gpt1-hf:{GPT1}"), load_tokenizer(GPT1)
  texts = ["Don't — é\u0301 İ 日本語 ok", " a\n\n\tb ", "", "<unk> x", "½ ﬁ ẞ 😀"]
  for name in ("en/austen-emma", "en/tinystories_sample", "ja/miyazawa", "ko/reviews"):
    texts += (SHARED / f"corpora/{name}.txt").read_text().split("\n")[:500]
  expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
  assert [ours.encode(text, parse_special_tokens=True) for text in texts] == expected
  assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected]
  # The paper's text handling differs, so the comparison can fail.
  assert [paper.encode(text) for text in texts] != expected
