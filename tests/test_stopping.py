"""Stop strings end a row exactly at the token with which decoding first shows them."""

import io
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from gptjax.data.gpt1_tokenizer import make_gpt1_backend
from gptjax.data.sentencepiece_model import make_sentencepiece_backend, read_sentencepiece
from gptjax.data.tokenizer import Tokenizer, load_tokenizer, make_char_tokenizer, train_bpe
from gptjax.errors import UserError
from gptjax.generate.stopping import (
  StopStrings,
  advance,
  count_undecided,
  cut_at_stop,
  token_text,
)

SHARED = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"

CORPUS = [
  "吾輩は猫である。名前はまだ無い。猫猫 abab 猫",
  "the quick brown fox jumps over the lazy dog, and the dog sleeps\n\nUser: hello 😀👍🏽",
  "a b aa aab aaab abab ababab. The end. The end",
] * 4


def _bpe():
  return train_bpe(CORPUS, 330)


def _characters():
  return make_char_tokenizer(CORPUS, "<end>")


def _sentencepiece(tmp_path, **options):
  with warnings.catch_warnings():
    # Its compiled part has types without a module, of which newer Pythons warn.
    warnings.simplefilter("ignore")
    spm = pytest.importorskip("sentencepiece", reason="needs the sentencepiece package")
  model = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS),
    model_writer=model,
    hard_vocab_limit=False,
    minloglevel=2,
    **options,
  )
  file = tmp_path / "spiece.model"
  file.write_bytes(model.getvalue())
  return Tokenizer(make_sentencepiece_backend(read_sentencepiece(file)), "</s>")


def _gpt1():
  pieces = ["<unk>", *"abn猫", *(c + "</w>" for c in "abn猫."), "an", "ab</w>", "aba"]
  return Tokenizer(make_gpt1_backend({piece: i for i, piece in enumerate(pieces)}, []))


def _metaspace():
  pieces = ["<s>", "▁", "▁▁", "a", "b", "▁a", "▁ab", "ba", "猫", "▁猫", "."]
  backend = Backend(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<s>"))
  backend.pre_tokenizer = pre_tokenizers.Metaspace()
  backend.decoder = decoders.Metaspace()
  backend.add_special_tokens(["<s>"])
  return Tokenizer(backend)


def _shared(name):
  if not (SHARED / name).is_dir():
    pytest.skip("needs ../shared/data")
  return load_tokenizer(SHARED / name)


KINDS = {
  "bytes": lambda path: _bpe(),
  "characters": lambda path: _characters(),
  "unigram": lambda path: _sentencepiece(path, vocab_size=110),
  "fallback": lambda path: _sentencepiece(
    path, vocab_size=350, byte_fallback=True, character_coverage=0.98
  ),
  "gpt1": lambda path: _gpt1(),
  "metaspace": lambda path: _metaspace(),
  **{
    f"shared {name}": lambda path, name=name: _shared(name)
    for name in ("gpt2", "gpt1", "gptj", "rinna_ja")
  },
}


# The real ones take most of a minute.
@pytest.fixture(
  scope="module",
  params=[
    pytest.param(kind, marks=pytest.mark.slow) if kind.startswith("shared ") else kind
    for kind in KINDS
  ],
)
def tokenizer(request, tmp_path_factory):
  return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


def _new_text(tokenizer, prompt, new):
  """What decoding shows of new tokens, whole characters only."""
  before = tokenizer.decode(prompt, skip_special_tokens=True)
  text = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
  assert text.startswith(before)
  return text[len(before) :]


def _stop_by_decoding(tokenizer, prompt, new, stops):
  """The number of tokens with which a stop string is first shown, or None."""
  for size in range(1, len(new) + 1):
    text = _new_text(tokenizer, prompt, new[:size])
    if any(stop in text for stop in stops):
      return size
  return None


def _maker(tokenizer, more_ids=0, **options):
  return StopStrings(tokenizer, tokenizer.vocab_size + more_ids, **options)


def _stops_by_automaton(tokenizer, prompts, news, stops_of_rows):
  # Logits may have more ids than the tokenizer.
  stops, state_RZ = _maker(tokenizer, 7).make(stops_of_rows, prompts)
  step = jax.jit(advance)
  found = [None] * len(news)
  for place in range(max(map(len, news))):
    token_R = np.array([new[min(place, len(new) - 1)] for new in news], np.int32)
    state_RZ, is_stopped_R = step(state_RZ, token_R, stops)
    for row in np.flatnonzero(is_stopped_R):
      if found[row] is None and place < len(news[row]):
        found[row] = place + 1
  return found


def _prompts(tokenizer, random):
  """Texts of ids; of none, of special ones, and such that end in different contexts."""
  known = [*tokenizer._known_ids]
  special = [i for i in known if not tokenizer.decode([i], skip_special_tokens=True)]
  return [[], special[:1], *([int(i)] for i in random.choice(known, 6)), [known[-1], *special[:1]]]


def _valid(tokenizer, prompt, new):
  """Whether all is whole characters: bytes that are none are shown in other ways."""
  texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *new]))
  return not any("\ufffd" in text for text in texts)


def _sequences(tokenizer, random, num):
  """Random ids, and the ids of random pieces of real text in other segmentations."""
  known = np.array(sorted(tokenizer._known_ids))
  short = [i for i in known if len(tokenizer.decode([int(i)], skip_special_tokens=True)) <= 2]
  characters = tokenizer.encode("ab") and [t for c in "ab a猫. " for t in _try(tokenizer, c)]
  for i in range(num):
    pool = (known, short, characters or short)[i % 3]
    yield [int(token) for token in random.choice(pool, random.integers(3, 14))]


def _try(tokenizer, text):
  try:
    return tokenizer.encode(text)
  except UserError:
    return []


def _some_stops(text, random):
  """Pieces of a text, and pieces of it that are continued otherwise."""
  for _ in range(3):
    start = int(random.integers(0, max(1, len(text))))
    size = int(random.integers(1, 7))
    if piece := text[start : start + size]:
      yield piece
  yield from ("abab", "aab", "猫", " a", "👍🏽", "。名", "a ", "\n\n")


def test_stops_where_decoding_shows_the_string(tokenizer):
  random = np.random.default_rng(0)
  prompts, news, stops_of_rows, wanted = [], [], [], []
  for new in _sequences(tokenizer, random, 300 if tokenizer.vocab_size < 1000 else 40):
    prompt = _prompts(tokenizer, random)[len(news) % 9]
    if not _valid(tokenizer, prompt, new):
      continue
    pool = list(_some_stops(_new_text(tokenizer, prompt, new), random))
    stops = [str(stop) for stop in random.choice(pool, random.integers(1, 4))]
    prompts.append(prompt)
    news.append(new)
    stops_of_rows.append(stops)
    wanted.append(_stop_by_decoding(tokenizer, prompt, new, stops))
  assert _stops_by_automaton(tokenizer, prompts, news, stops_of_rows) == wanted
  found = [size for size in wanted if size]
  # The sample is of use: rows that stop early, late, and not at all.
  assert len(news) >= 15 and min(found) < 3 < max(found) and None in wanted


def test_new_text_is_what_it_adds_to_the_prompts(tokenizer):
  random = np.random.default_rng(2)
  prompts = _prompts(tokenizer, random)
  compared = 0
  for place, new in enumerate(_sequences(tokenizer, random, 120)):
    prompt = prompts[place % len(prompts)]
    if _valid(tokenizer, prompt, new):
      assert tokenizer.decode_after(prompt, new) == _new_text(tokenizer, prompt, new)
      compared += 1
  assert compared > 10


def test_text_in_parts_of_characters_stops():
  """CJK and emoji are several tokens each here, and the borders fall inside of them."""
  tokenizer = train_bpe(["ab"], 257)
  text = "x吾輩は猫である👍🏽 end"
  for stop in ("猫", "は猫で", "👍🏽", "🏽 e", "d"):
    new = tokenizer.encode(text)
    [found] = _stops_by_automaton(tokenizer, [[]], [new], [[stop]])
    assert found == len(text[: text.index(stop)].encode()) + len(stop.encode())
    assert cut_at_stop(tokenizer.decode(new[:found]), [stop]) == text[: text.index(stop)]
  # Companion: characters that share bytes with it are not it.
  assert _stops_by_automaton(tokenizer, [[]], [tokenizer.encode("独狆" * 3)], [["猫"]]) == [None]


def test_a_string_that_overlaps_itself_is_found():
  tokenizer = _characters()
  new = tokenizer.encode("aabaaabab")
  rows = [["aaab"], ["abab"], ["aabaaab"], ["baa", "aaa"], ["bb"]]
  assert _stops_by_automaton(tokenizer, [[]] * 5, [new] * 5, rows) == [7, 9, 7, 5, None]


def test_a_string_across_tokens_is_not_found_without_its_state():
  """Companion: the comparison with decoding fails where states are forgotten."""
  tokenizer = _characters()
  stops, start_RZ = _maker(tokenizer).make([["ab"]], [[]])
  new = tokenizer.encode("xab")
  assert _stops_by_automaton(tokenizer, [[]], [new], [["ab"]]) == [3]
  forgetful = [advance(start_RZ, np.array([token], np.int32), stops)[1].any() for token in new]
  assert not any(forgetful)


def test_only_new_text_counts():
  tokenizer = _bpe()
  prompt, new = tokenizer.encode("The en"), tokenizer.encode("d. The end")
  [found] = _stops_by_automaton(tokenizer, [prompt], [new], [["The end"]])
  assert found == len(new)


def test_special_tokens_add_nothing_unless_they_are_shown():
  tokenizer = _bpe()
  new = [*tokenizer.encode("ab"), tokenizer.end_id, *tokenizer.encode("ab")]
  rows = [["abab"], ["<|endoftext|>"]]
  assert _stops_by_automaton(tokenizer, [[]] * 2, [new] * 2, rows) == [len(new), None]
  shown = _maker(tokenizer, skip_special_tokens=False)
  stops, state_RZ = shown.make([["<|endoftext|>"]], [[]])
  assert advance(state_RZ, np.array([tokenizer.end_id], np.int32), stops)[1].tolist() == [True]


def test_the_space_that_begins_a_text_is_not_shown():
  tokenizer = _metaspace()
  ab, begin = (tokenizer.backend.token_to_id(token) for token in ("▁ab", "<s>"))
  prompts = [[], [begin], [begin, ab]]
  assert _stops_by_automaton(tokenizer, prompts, [[ab, ab]] * 3, [[" a"]] * 3) == [2, 2, 1]


def test_strings_of_like_length_share_a_program():
  tokenizer = _bpe()
  shapes = {
    jax.tree.map(np.shape, _maker(tokenizer).make([[*stops], []], [[], []])[0])
    for stops in (["User:"], ["\n\n"], ["Assistant:"])
  }
  assert len(shapes) == 1
  assert _maker(tokenizer).make([["a", "b", "c"]], [[]])[0].next_ZSV.shape[0] == 4


def test_no_stop_strings_are_nothing():
  tokenizer = _characters()
  assert _maker(tokenizer).make([[], []], [[], []]) == (None, None)
  with pytest.raises(UserError, match='a stop string is ""'):
    _maker(tokenizer).make([["a", ""]], [[]])


def test_token_text_spells_texts(tokenizer):
  """What tokens add, joined, is what decoding shows."""
  spelling = token_text(tokenizer)
  random = np.random.default_rng(3)
  checked = 0
  for ids in _sequences(tokenizer, random, 300):
    if _valid(tokenizer, [], ids):
      context, text = 0, b""
      for token in ids:
        text += spelling.bytes_of[context][token]
        after = spelling.context_after_V[token]
        context = context if after < 0 else after
      assert text.decode() == tokenizer.decode(ids, skip_special_tokens=True)
      checked += 1
  assert checked > 15


def test_tables_are_small_and_made_quickly():
  """50,257 tokens and a string of 20 characters: 2 MB, and well under a second."""
  tokenizer = _shared("gpt2")
  maker = _maker(tokenizer)
  maker.make([["warm"]], [[]])
  start = time.process_time()
  stops, _ = maker.make([["\n\nHuman and machine:"]], [[]])
  # A tenth of this on one idle core.
  assert time.process_time() - start < 0.9
  assert stops.next_ZSV.dtype == np.uint8 and stops.next_ZSV.nbytes < 2_000_000
  long, _ = maker.make([["x" * 300]], [[]])
  assert long.next_ZSV.dtype == np.uint16


@pytest.mark.parametrize(
  "text, stops, cut, undecided",
  [
    ("", ["a"], "", 0),
    ("some text", [], "some text", 0),
    ("one. two. three", [". ", "two"], "one", 0),
    ("ab猫cd", ["cd", "猫c"], "ab", 0),
    ("ababa", ["abac", "bab"], "a", 3),
    ("end\nUse", ["User:", "\n\n"], "end\nUse", 3),
    ("end\n", ["User:", "\n\n"], "end\n", 1),
  ],
)
def test_text_is_cut_at_the_first_stop(text, stops, cut, undecided):
  assert cut_at_stop(text, stops) == cut
  assert count_undecided(text, stops) == undecided
