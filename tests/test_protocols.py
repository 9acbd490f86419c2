"""Benchmarks: detokenizers, counts, LAMBADA, the Children's Book Test, published numbers.

WikiText-2 and LAMBADA are tried on their real development files; the others on lines written here
in their formats.
"""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scored_models import make_loaded, make_scorer, make_text, reference_nats

from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError, DataError
from gptjax.evaluate import lambada
from gptjax.evaluate.childrens_book import PROTOCOLS as BOOKS
from gptjax.evaluate.childrens_book import measure_childrens_book, parse
from gptjax.evaluate.detokenizers import DETOKENIZERS, detokenize
from gptjax.evaluate.lambada import STOP_WORDS, measure_lambada
from gptjax.evaluate.paper import PUBLISHED, compare_with_paper
from gptjax.evaluate.perplexity import measure_perplexity
from gptjax.evaluate.protocol import PROTOCOLS, protocol
from gptjax.evaluate.scoring import Scores
from gptjax.evaluate.texts import read_corpus
from gptjax.model.presets import PRESETS

SHARED = Path(__file__).parents[2] / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
WIKITEXT = SHARED / "corpora/eval_dev/wiki.valid.tokens"
LAMBADA = SHARED / "corpora/eval_dev/lambada_development_plain_text.txt"

DETOKENIZED = {
  "wikitext": [
    (" = = Early life = = \n", "== Early life ==\n"),
    ('the " lobster red " , or ( 24 in ) .\n', 'the "lobster red", or (24 in).\n'),
    ("weigh 0 @.@ 7 – 2 @.@ 2 kg , 1 @,@ 000 built @-@ in", "weigh 0.7–2.2 kg, 1,000 built-in"),
    ("the band 's km / h , 5 % of $ 25 ; didn 't", "the band's km/h, 5% of $25; didn't"),
    ("a <unk> ( <unk> ) : b", "a <unk> (<unk>): b"),
  ],
  "ptb": [
    (
      " mr. <unk> is n't chairman of n.v. 's N % stake \n",
      "mr. <unk> isn't chairman of n.v.'s N% stake\n",
    ),
    (" it was $ N billion \n", "it was $N billion\n"),
  ],
  "1bw": [
    ('" It is , " he said ( twice ) .', '"It is," he said (twice).'),
    ("The bank 's loss was $ 5 million .", "The bank's loss was $5 million."),
  ],
  "treebank": [
    ("`` oh , it wo n't , '' said max", '"oh, it won\'t," said max'),
    ("` he 's here , ' she said -lrb- twice -rrb- .", "'he's here,' she said (twice)."),
    ("`` did you try the face , izzy", '"did you try the face, izzy'),
  ],
  "none": [(" a , b @-@ c ", " a , b @-@ c ")],
}


@pytest.fixture(scope="module")
def model():
  return make_loaded()


@pytest.fixture(scope="module")
def scorer(model):
  return make_scorer(model)


@pytest.fixture(autouse=True)
def no_progress_files(monkeypatch):
  monkeypatch.setenv("GPTJAX_CACHE", "off")


def write(folder, text, name="text"):
  path = folder / name
  path.write_text(text, encoding="utf-8")
  return str(path)


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_text_is_put_back_as_people_write_it(name):
  for parted, whole in DETOKENIZED[name]:
    assert detokenize(parted, name) == whole


@needs_shared
@pytest.mark.parametrize(
  ("path", "name"),
  [
    (WIKITEXT, "wikitext"),
    pytest.param(LAMBADA, "treebank", marks=pytest.mark.slow),
  ],
)
def test_nothing_is_lost_by_a_detokenizer(path, name):
  """Different lines stay different, and no letter or digit goes: so the parted text is known."""
  lines = [line for line in path.read_text().split("\n") if line.strip()]
  whole = [detokenize(line, name) for line in lines]
  assert len(set(whole)) == len({line.strip() for line in lines})
  brackets = re.compile(r"-[lr][rs]b-")
  for line, put_back in zip(lines, whole):
    kept = [re.sub(r"[\W_]", "", brackets.sub("", text)) for text in (line, put_back)]
    assert kept[0] == kept[1]
  assert sum(map(len, whole)) < 0.97 * sum(map(len, lines))


@pytest.mark.slow
@needs_shared
def test_wikitext_2_has_the_words_it_is_said_to_have():
  """217,646 tokens with the end of each line, as the data set's own paper counts (table 1)."""
  tokenizer = load_tokenizer(SHARED / "tokenizers/gpt2")
  loaded = dataclasses.replace(
    make_loaded(), config=PRESETS["gpt2"], tokenizer=tokenizer, params=None
  )
  corpus = read_corpus([str(WIKITEXT)], loaded, PROTOCOLS["wikitext2"])
  assert corpus.words == 217_646 and corpus.bytes == WIKITEXT.stat().st_size
  assert len(corpus.documents) == 1
  # Detokenized, GPT-2 needs 1.1 to 1.2 tokens a word; as it is, more.
  parted = read_corpus([str(WIKITEXT)], loaded, protocol("plain"))
  assert 1.08 < len(corpus.documents[0]) / corpus.words < len(parted.documents[0]) / corpus.words


FIXTURES = {
  "wikitext2": (" = abc = \n \n a @-@ b , c ( d ) . \n", "=abc=", 3),
  "wikitext103": (" a b , c . \n", "a b, c.", 1),
  "ptb": (" ab is n't N \n cd 's ad \n", "isn't", 2),
  "1bw": ("ab 's a .\nbc n't d .\n", "ab's a.", 2),
  "enwik8": ("<a>ab = b</a>\n".replace("/", "-"), "<a>", 1),
  "text8": (" ab cd ab", " ab cd ab", 0),
}


@pytest.mark.parametrize(
  "name",
  [name if name == "1bw" else pytest.param(name, marks=pytest.mark.slow) for name in FIXTURES],
)
def test_a_benchmark_divides_by_the_original(model, scorer, tmp_path, name):
  """Fixture: lines in the format of the benchmark, since its files are not here."""
  original, expected, newlines = FIXTURES[name]
  asked = PROTOCOLS[name]
  put_back = detokenize(original, asked.detokenizer)
  assert expected.replace("=abc=", "= abc =") in put_back
  found = measure_perplexity([write(tmp_path, original)], model, scorer, asked, say=str)
  parts = put_back.splitlines(True) if asked.documents == "lines" else [put_back]
  start = [model.tokenizer.end_id] if asked.start == "end" else []
  nats = sum(_nats(model, [*start, *model.tokenizer.encode(part)]) for part in parts)
  counted = {
    "word_perplexity": lambda: math.exp(nats / (len(original.split()) + newlines)),
    "bits_per_byte": lambda: nats / math.log(2) / len(original.encode()),
    "bits_per_character": lambda: nats / math.log(2) / len(original),
  }
  assert found["score"]["name"] == asked.score
  assert found["score"]["value"] == pytest.approx(counted[asked.score](), rel=1e-5)


def _nats(model, ids):
  """Scores all ids but the first in windows of 24 tokens that share one."""
  return sum(
    reference_nats(model, ids[start : start + 24]).sum() for start in range(0, len(ids) - 1, 23)
  )


def test_published_numbers_are_put_beside_the_figures_of_their_model():
  figures = {"word_perplexity": 30.41, "token_perplexity": 20.0}
  (entry,) = compare_with_paper("wikitext2", figures, PRESETS["gpt2"])
  assert entry == {
    "figure": "word_perplexity",
    "model": "gpt2",
    "is_same_size": True,
    "published": 29.41,
    "difference": pytest.approx(1.0),
  }
  wide = dataclasses.replace(PRESETS["gpt2-medium"], num_layers=23)
  (entry,) = compare_with_paper("wikitext2", figures, wide)
  assert (entry["model"], entry["is_same_size"]) == ("gpt2-medium", False)
  assert compare_with_paper("plain", figures, PRESETS["gpt2"]) == []
  assert compare_with_paper("wikitext2", figures, PRESETS["gptj-6b"]) == []
  assert set(PUBLISHED) <= set(PRESETS)
  # Larger models of one paper are better at everything but one of the cloze tests.
  rows = [PUBLISHED[name] for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")]
  for key in rows[0]:
    values = [row[key] for row in rows]
    falls = "perplexity" in key[1] or "bits" in key[1]
    assert values == sorted(values, reverse=falls) or key == ("cbt-cn", "accuracy")


def test_an_unknown_protocol_is_refused_with_the_nearest():
  with pytest.raises(ConfigError, match='protocol is "wikitext-2"; did you mean "wikitext2"'):
    protocol("wikitext-2")


PASSAGES = [
  f"{make_text(14, seed).strip()} {word}" for seed, word in enumerate(["cab", "bad", "d"])
]
PASSAGES = [passage.replace("\n", " ") for passage in PASSAGES]


def test_the_perplexity_of_last_words(model, scorer, tmp_path):
  path = write(tmp_path, "\n".join(PASSAGES) + "\n\n")
  asked = dataclasses.replace(lambada.PROTOCOL, detokenizer="none")
  found = measure_lambada([path], model, scorer, asked, say=str)
  nats, right = [], []
  for passage in PASSAGES:
    size = len(passage.rpartition(" ")[2]) + 1
    nats.append(reference_nats(model, model.tokenizer.encode(passage))[-size:].sum())
  assert found["nats_per_word"] == pytest.approx(np.mean(nats), rel=1e-5)
  assert found["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
  assert found["standard_error"] == pytest.approx(np.std(nats, ddof=1) / math.sqrt(3), rel=1e-4)
  assert found["counts"] == {"passages": 3, "tokens": 4 + 4 + 2}
  assert found["task"] == "lambada" and found["accuracy"] == 0.0 and not right


class Letters:
  """Stands for a tokenizer: the text of a token by its id."""

  TEXTS = (" the", " cat", ",", " dog", " Of", " 7th", "…")

  def decode(self, ids):
    return "".join(self.TEXTS[index] for index in ids)


def make_scores(alternatives, greedy):
  size = len(greedy)
  ranked = np.tile(np.array(alternatives, np.int32), (size, 1))
  return Scores(np.full(size, -1.0, np.float32), np.array(greedy), ranked, ranked * 0.0)


@pytest.mark.parametrize(
  ("alternatives", "greedy", "word", "plain", "filtered"),
  [
    ([1, 0, 3], [True], [1], 1, 1),  # the likeliest, and no stop word
    ([0, 4, 2, 6, 1], [False], [1], 0, 1),  # behind stop words and punctuation alone
    ([0, 3, 1], [False], [1], 0, 0),  # behind another word
    ([0, 1], [False, True], [1, 3], 0, 1),  # the rest of a word must be greedy
    ([0, 1], [False, False], [1, 3], 0, 0),
    ([0], [True], [0], 1, 0),  # a stop word itself
    ([5], [True], [5], 1, 1),
    ([0, 2], [False], [1], 0, 0),  # not among the candidates
  ],
)
def test_the_stop_word_filter(alternatives, greedy, word, plain, filtered):
  scores = [make_scores(alternatives, greedy)]
  found = lambada.figures(scores, [np.array(word)], Letters())
  assert found["accuracy"] == plain and found["accuracy_without_stop_words"] == filtered
  assert {"the", "of", "n't", "themselves"} < STOP_WORDS and "cat" not in STOP_WORDS


def test_lambada_says_what_it_cannot_do(model, scorer, tmp_path):
  with pytest.raises(DataError, match="the passage 'word' has one word"):
    measure_lambada([write(tmp_path, "word\n")], model, scorer)
  said = []
  measure_lambada([write(tmp_path, "abc " * 9)], model, scorer, say=said.append)
  assert said == ["1 passages are longer than the context of the model and lose their beginnings"]


@pytest.mark.slow
@needs_shared
def test_the_passages_of_lambada_are_parted_at_their_last_word():
  lines = LAMBADA.read_text().splitlines()
  assert len(lines) == 4869
  for line in lines:
    context, word = lambada._part(line, "treebank")
    assert word.strip() == line.split()[-1] and len(context.split()) > 3
    assert context + word == detokenize(line, "treebank")
  assert lambada._part("he said `` noted", "treebank") == ('he said "', "noted")
  # A last word that the detokenizer writes in another way is not there twice.
  assert lambada._part("he said so ''", "treebank") == ("he said so", '"')


BOOK = """1 ab cd .
2 the bad `` cab '' .
21 a XXXXX is bad .\tcab\t\tcab|dad|bed

1 da .
21 ba XXXXX .\tdad\t\tbed|dad
"""


def test_a_book_is_read_as_its_questions():
  first, second = parse(BOOK)
  assert first.passage == "ab cd . the bad `` cab '' ." and first.sentence == "a XXXXX is bad ."
  assert first.choices == ("cab", "dad", "bed") and first.answer == 0
  assert (second.passage, second.answer) == ("da .", 1)


@pytest.mark.slow
def test_the_choice_is_the_sentence_that_the_reference_finds_likeliest(model, scorer, tmp_path):
  wide = make_loaded(dataclasses.replace(model.config, context_length=64))
  found = measure_childrens_book([write(tmp_path, BOOK)], wide, make_scorer(wide), BOOKS["cbt-ne"])
  right = 0
  for question in parse(BOOK):
    passage = detokenize(question.passage, "treebank")
    nats = []
    for choice in question.choices:
      sentence = " " + detokenize(question.sentence.replace("XXXXX", choice), "treebank")
      ids = wide.tokenizer.encode(passage + sentence)
      nats.append(reference_nats(wide, ids)[-len(sentence) :].sum())
    right += int(np.argmin(nats)) == question.answer
  assert found["accuracy"] == right / 2 and found["counts"] == {"questions": 2, "choices": 5}
  assert found["protocol"]["name"] == "cbt-ne" and found["task"] == "cbt"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("1 ab .\n2 cd .\n", "is no question of the Children's Book Test"),
    ("1 ab .\n2 a XXXXX\tcab\t\tbed|dad\n", "the answer 'cab' is not among the choices"),
    ("21 a XXXXX\tcab\t\tcab|dad\n", "is no question"),
  ],
)
def test_another_format_is_refused(text, message):
  with pytest.raises(DataError, match=message):
    parse(text)
