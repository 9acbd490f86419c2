"""Perplexity against the float64 reference: windows, denominators, errors, resuming, refusals."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scored_models import END_TOKEN, make_loaded, make_scorer, make_text, reference_nats

from gptjax.errors import ConfigError, DataError, UserError
from gptjax.evaluate import perplexity
from gptjax.evaluate.perplexity import measure_perplexity, progress_path, score_windows
from gptjax.evaluate.protocol import PROTOCOLS, Protocol
from gptjax.evaluate.statistics import error_of_mean, independent_units, standard_error
from gptjax.evaluate.texts import Corpus, read_corpus, read_texts
from gptjax.evaluate.windows import cut_windows, score_tokens

TOLERANCE = 1e-5
TEXT = make_text(150)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  """Progress goes to a folder of the test's own."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache/gptjax/scores"


@pytest.fixture(scope="module")
def model():
  return make_loaded()


@pytest.fixture(scope="module")
def scorer(model):
  return make_scorer(model)


def write(folder, text=TEXT, name="text.txt"):
  path = folder / name
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return str(path)


def expected_nats(model, ids, context, stride):
  """Scores ids by the windows of transformers' recipe, written down once more: (nats, tokens)."""
  nats, tokens, end_before = 0.0, 0, 0
  for begin in range(0, len(ids), stride):
    end = min(begin + context, len(ids))
    of_window = reference_nats(model, ids[begin:end]) if end - begin > 1 else np.zeros(0)
    new = of_window[-min(end - end_before, len(of_window)) :] if len(of_window) else of_window
    nats, tokens, end_before = nats + new.sum(), tokens + len(new), end
    if end == len(ids):
      break
  return nats, tokens


@pytest.mark.parametrize(
  ("context", "stride", "tokens"),
  [
    (24, 12, 149),
    (24, 24, 143),
    (24, -1, 149),
    (24, None, 149),
    pytest.param(10, 3, 149, marks=pytest.mark.slow),
  ],
)
def test_every_figure_equals_the_reference(model, scorer, tmp_path, context, stride, tokens):
  protocol = Protocol(context=context, stride=stride)
  found = measure_perplexity([write(tmp_path)], model, scorer, protocol, say=str)
  stride = protocol.resolve(model.config).stride
  nats, count = expected_nats(model, model.tokenizer.encode(TEXT), context, stride)
  assert found["tokens"] == count == tokens
  close = {
    "nats_per_token": nats / count,
    "token_perplexity": math.exp(nats / count),
    "word_perplexity": math.exp(nats / len(TEXT.split())),
    "bits_per_byte": nats / math.log(2) / len(TEXT),
    "bits_per_character": nats / math.log(2) / len(TEXT),
  }
  for name, value in close.items():
    assert found[name] == pytest.approx(value, rel=TOLERANCE), name
  assert found["counts"]["tokens_not_scored"] == len(TEXT) - tokens
  assert found["protocol"] == dataclasses.asdict(protocol) | {"stride": stride}


def test_a_window_too_many_is_noticed(model, scorer, tmp_path):
  """Companion: another stride gives another figure, far outside the tolerance."""
  found = measure_perplexity([write(tmp_path)], model, scorer, Protocol(stride=7), say=str)
  nats, tokens = expected_nats(model, model.tokenizer.encode(TEXT), 24, 12)
  assert abs(found["nats_per_token"] / (nats / tokens) - 1) > 50 * TOLERANCE


def test_a_start_token_lets_the_first_token_be_scored(model, scorer, tmp_path):
  found = measure_perplexity([write(tmp_path)], model, scorer, Protocol(start="end"), say=str)
  ids = [model.tokenizer.end_id, *model.tokenizer.encode(TEXT)]
  nats, tokens = expected_nats(model, ids, 24, 12)
  assert found["tokens"] == tokens == len(TEXT)
  assert found["nats_per_token"] == pytest.approx(nats / tokens, rel=TOLERANCE)


def test_bytes_and_characters_part_where_text_is_not_ascii(model, scorer, tmp_path):
  found = measure_perplexity([write(tmp_path, "abé日 本 a\n" * 4)], model, scorer, Protocol(), str)
  assert found["counts"]["bytes"] == 56 and found["counts"]["characters"] == 36
  assert found["counts"]["words"] == 12
  ratio = found["bits_per_character"] / found["bits_per_byte"]
  assert ratio == pytest.approx(56 / 36)


def test_documents_are_scored_apart(model, scorer, tmp_path):
  texts = [make_text(length, seed=length) for length in (1, 30, 9, 41)]
  lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
  path = write(tmp_path, lines, "texts.jsonl")
  protocol = Protocol(text_column="body")
  found = measure_perplexity([path], model, scorer, protocol, say=str)
  parts = [expected_nats(model, model.tokenizer.encode(text), 24, 12) for text in texts]
  nats, tokens = map(sum, zip(*parts))
  assert found["nats_per_token"] == pytest.approx(nats / tokens, rel=TOLERANCE)
  assert found["counts"]["documents"] == 4 and found["tokens"] == 77
  # The first of each document, and so all of that of one token.
  assert found["counts"]["tokens_not_scored"] == 4 and found["counts"]["characters"] == 81


def test_lines_are_documents_of_a_text_file_and_records_stay_whole(tmp_path):
  text = write(tmp_path, "one two\n\n three\r\nfour", "a.tokens")
  assert read_texts([text], "lines") == ["one two\n", " three\r\n", "four"]
  assert read_texts([text]) == ["one two\n\n three\r\nfour"]
  records = write(tmp_path, '{"text": "a\\nb"}\n', "a.jsonl")
  assert read_texts([records, text], "lines")[0] == "a\nb"


def test_a_long_text_is_read_whole(model, tmp_path):
  """Pieces that are read, and those that are tokenised, join to the ids of the text."""
  text = make_text(300_000)
  corpus = read_corpus([write(tmp_path, text)], model, Protocol())
  assert len(corpus.documents) == 1
  np.testing.assert_array_equal(corpus.documents[0], model.tokenizer.encode(text))


def test_token_files_give_the_figures_of_their_text(model, scorer, tmp_path):
  ids = np.array(model.tokenizer.encode(TEXT), np.uint16)
  tokens = write(tmp_path, ids.tobytes(), "tokens.bin")
  found = measure_perplexity([tokens], model, scorer, Protocol(), say=str)
  of_text = measure_perplexity([write(tmp_path)], model, scorer, Protocol(), say=str)
  assert found["data_hash"] != of_text["data_hash"]
  for name in ("token_perplexity", "word_perplexity", "bits_per_byte", "counts", "tokens"):
    assert found[name] == of_text[name]
  without = dataclasses.replace(model, tokenizer=None)
  bare = measure_perplexity([tokens], without, scorer, Protocol(), say=str)
  assert bare["token_perplexity"] == found["token_perplexity"]
  assert bare["word_perplexity"] is None and bare["bits_per_byte"] is None


def test_an_evaluation_that_was_cut_off_goes_on(monkeypatch, model, scorer, tmp_path, cache):
  monkeypatch.setattr(perplexity, "BATCH_TOKENS", 12)  # blocks of four windows
  path, protocol = write(tmp_path), Protocol()
  expected = measure_perplexity([path], model, scorer, protocol, say=str)
  assert list(cache.iterdir()) == []

  class Failing:
    """A scorer that is stopped in the third block."""

    calls = 0

    def score(self, rows):
      self.calls += 1
      if self.calls == 3:
        raise KeyboardInterrupt
      return scorer.score(rows)

  with pytest.raises(KeyboardInterrupt):
    measure_perplexity([path], model, Failing(), protocol, say=str)
  (file,) = cache.iterdir()
  # As if the machine had stopped in the middle of a line.
  file.write_text(file.read_text() + "[1.5, 2.")

  class Counting:
    rows = 0

    def score(self, rows):
      self.rows += len(rows)
      return scorer.score(rows)

  rest, said = Counting(), []
  found = measure_perplexity([path], model, rest, protocol, said.append)
  assert rest.rows == expected["counts"]["windows"] - 8
  assert said[-1] == "8 of 12 windows were scored before; going on from there"
  assert found == expected
  assert list(cache.iterdir()) == []


def test_progress_is_of_one_evaluation_alone(monkeypatch, cache):
  first, second = progress_path({"stride": 1}), progress_path({"stride": 2})
  assert first != second and first.parent == cache
  monkeypatch.setenv("GPTJAX_CACHE", "off")
  assert progress_path({"stride": 1}) is None


def test_tokens_of_documents_have_the_windows_of_perplexity(model, scorer):
  documents = [np.array(model.tokenizer.encode(make_text(n, n)), np.int32) for n in (40, 1, 25)]
  protocol = Protocol(stride=24).resolve(model.config)
  found = score_tokens(documents, protocol, scorer)
  windows = cut_windows(Corpus(documents, None, None, None, ""), protocol)
  nats_W = score_windows(windows, scorer, say=str)
  assert [int(np.isnan(scores.logprobs_S).sum()) for scores in found] == [2, 1, 2]
  total = -sum(np.nansum(scores.logprobs_S, dtype=np.float64) for scores in found)
  assert total == pytest.approx(nats_W.sum(), rel=TOLERANCE)
  whole = reference_nats(model, documents[2][:24])
  np.testing.assert_allclose(-found[2].logprobs_S[1:24], whole, rtol=1e-4, atol=1e-5)


def test_the_standard_error_of_a_ratio():
  """For units of one size it is the textbook error of a mean, and it is what redrawing shows."""
  rng = np.random.default_rng(0)
  values = rng.normal(3, 1, 50)
  assert error_of_mean(values) == pytest.approx(values.std(ddof=1) / math.sqrt(50))
  sizes = rng.integers(1, 30, 400).astype(float)
  sums = sizes * rng.normal(2, 0.5, 400)
  drawn = rng.integers(0, 400, (4000, 400))
  spread = (sums[drawn].sum(1) / sizes[drawn].sum(1)).std()
  assert standard_error(sums, sizes, np.arange(400)) == pytest.approx(spread, rel=0.05)
  assert standard_error(np.ones(1), np.ones(1), np.zeros(1, int)) is None


def test_errors_are_over_documents_where_there_are_many():
  few, many = np.repeat(np.arange(3), 20), np.repeat(np.arange(40), 2)
  assert independent_units(few)[0] == "windows"
  kind, units = independent_units(many)
  assert kind == "documents" and list(units) == list(many)
  # A document without window is no unit.
  assert list(independent_units(2 * many)[1]) == list(many)
  assert independent_units(2 * few)[0] == "windows"


def test_what_is_worth_a_remark(model, scorer, tmp_path):
  said = []
  measure_perplexity([write(tmp_path, "abc")], model, scorer, Protocol(), said.append)
  assert "the longest document has 3 tokens, fewer than the 24 of a window" in said[0]
  assert "33.3% of the tokens have nothing before them" in said[1]
  said.clear()
  measure_perplexity([write(tmp_path, "abc")], model, scorer, Protocol(start="end"), said.append)
  assert len(said) == 1


def test_text_without_spaces_has_no_word_perplexity_and_all_else(model, scorer, tmp_path):
  found = measure_perplexity([write(tmp_path, "日本" * 90)], model, scorer, Protocol(), say=str)
  assert found["counts"]["words"] == 1 and found["word_perplexity"] is None
  assert found["bits_per_character"] == pytest.approx(3 * found["bits_per_byte"])


def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch, model, scorer, tmp_path):
  expected = measure_perplexity([write(tmp_path)], model, scorer, Protocol(), say=str)
  monkeypatch.setenv("XDG_CACHE_HOME", write(tmp_path, name="a_file"))
  said = []
  found = measure_perplexity([write(tmp_path)], model, scorer, Protocol(), said.append)
  assert found == expected and "what is scored is not kept" in said[-1]


REFUSED = {
  "empty": (b"", {}, "is empty; there is nothing to score"),
  "blank lines": (b"\n \n", {"documents": "lines"}, "is empty"),
  "one token": (b"a", {}, "has one token, and nothing comes before it"),
  "not UTF-8": (b"abc \xff\xfe", {}, "is not UTF-8 at byte 4"),
  "unknown character": ("abc ü".encode(), {}, "U\\+00FC"),
  "no start token": (b"abc", {"start": "bos"}, 'start is "bos", and the model has no such token'),
  "long window": (b"abc", {"context": 25}, "context is 25; it must be 2 to 24"),
  "short window": (b"abc", {"context": 1}, "context is 1"),
  "no stride": (b"abc", {"stride": 0}, "stride is 0, and context 24"),
  "long stride": (b"abc", {"stride": 25}, "stride is 25"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_is_said_in_a_line(model, scorer, tmp_path, case):
  data, fields, message = REFUSED[case]
  with pytest.raises(UserError, match=message):
    measure_perplexity([write(tmp_path, data)], model, scorer, Protocol(**fields), say=str)


def test_models_that_do_not_fit_the_data(model, scorer, tmp_path):
  with pytest.raises(DataError, match="no file matches"):
    read_corpus([str(tmp_path / "none.txt")], model, Protocol())
  with pytest.raises(DataError, match="the model has no tokenizer, and text needs one"):
    read_corpus([write(tmp_path)], dataclasses.replace(model, tokenizer=None), Protocol())
  small = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=20))
  with pytest.raises(DataError, match="the tokenizer is not the one it was trained with"):
    read_corpus([write(tmp_path)], small, Protocol())
  tokens = write(tmp_path, np.array([1, 2, 99], np.uint16).tobytes(), "tokens.bin")
  with pytest.raises(DataError, match="token id 99 is not in the vocabulary"):
    read_corpus([tokens], model, Protocol())
  with pytest.raises(ConfigError, match='detokenizer is "ptb", which has no effect on token'):
    read_corpus([tokens], model, Protocol(detokenizer="ptb"))
  with pytest.raises(DataError, match="is text, and others are token files"):
    read_corpus([write(tmp_path), tokens], model, Protocol())
  with pytest.raises(DataError, match="names no split"):
    read_corpus(["hub:wikitext"], model, Protocol())


def test_a_misspelt_protocol_is_refused_with_the_nearest_name():
  for field, value in (
    ("detokenizer", "wikitxt"),
    ("start", "eos"),
    ("words", "space"),
    ("score", "word_ppl"),
    ("documents", "line"),
    ("dtype", "float23"),
  ):
    with pytest.raises(ConfigError, match=f'{field} is "{value}"'):
      Protocol(**{field: value})
  assert END_TOKEN and set(PROTOCOLS) > {"plain", "wikitext2", "enwik8"}
