"""SentencePiece models read without the package give the ids that the package gives."""

import io
import warnings
from pathlib import Path

import pytest

from gptjax.data.sentencepiece_model import read_sentencepiece
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import DataError, UnknownTokenizerError

with warnings.catch_warnings():
  # Its compiled part has types without a module, of which newer Pythons warn.
  warnings.simplefilter("ignore")
  spm = pytest.importorskip("sentencepiece", reason="needs the sentencepiece package")

SHARED = Path(__file__).parents[2] / "shared" / "data"
RINNA = SHARED / "tokenizers" / "rinna_ja"
needs_shared = pytest.mark.skipif(not RINNA.is_dir(), reason="needs ../shared/data")

CORPUS = [
  "吾輩は猫である。名前はまだ無い。",
  "どこで生れたかとんと見当がつかぬ。",
  "The quick brown fox jumps over the lazy dog.",
  "the dog sleeps, the fox and the cat do not",
] * 5
TEXTS = [
  *CORPUS,
  "",
  " ",
  "  the  猫 \n\t dog  ",
  "ＡＢＣ１２３ ㍻ ﬁ が",
  "<s>the</s> <unk> [SEP]猫[SEP]",
  "<sep>猫<sep> the",
  "<0x41>▁▁the",
  "😀 zzz QQQ",
]


def _train(tmp_path, **options):
  """Trains a model, and returns its file and the package's own reading of it."""
  model = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS),
    model_writer=model,
    vocab_size=350 if options.get("byte_fallback") else 90,
    hard_vocab_limit=False,
    character_coverage=0.98,
    minloglevel=2,
    **options,
  )
  file = tmp_path / "spiece.model"
  file.write_bytes(model.getvalue())
  return file, spm.SentencePieceProcessor(model_proto=model.getvalue())


OPTIONS = {
  "plain": {},
  "bytes": {"byte_fallback": True},
  "as_is": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
  "no_prefix": {"add_dummy_prefix": False, "normalization_rule_name": "nfkc_cf"},
  "control": {"control_symbols": ["[SEP]"], "pad_id": 3, "bos_id": -1},
  "phrases": {"split_by_whitespace": False},
}


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("name", OPTIONS)
def test_ids_and_texts_are_the_packages(tmp_path, kind, name):
  file, theirs = _train(tmp_path, model_type=kind, **OPTIONS[name])
  ours = load_tokenizer(file)
  for text in TEXTS:
    ids = theirs.encode(text)
    assert ours.encode(text) == ids, text
    # An unknown piece is shown as a mark there, and has no text here.
    assert ours.decode(ids, skip_special_tokens=True).strip() == (
      theirs.decode(ids).replace(" \u2047 ", "").strip()
    )
  assert ours.vocab_size == theirs.vocab_size()
  named = [ours.bos_id, ours.end_id, ours.unk_id, ours.pad_id]
  theirs_named = [theirs.bos_id(), theirs.eos_id(), theirs.unk_id(), theirs.pad_id()]
  assert named == [None if index < 0 else index for index in theirs_named]


def test_user_defined_symbols_are_whole(tmp_path):
  file, theirs = _train(tmp_path, model_type="unigram", user_defined_symbols=["<sep>"])
  ours = load_tokenizer(file)
  assert theirs.piece_to_id("<sep>") in ours.encode("<sep>猫")
  assert [ours.encode(text) for text in TEXTS] == theirs.encode(TEXTS)


def test_another_models_ids_differ(tmp_path):
  ours = load_tokenizer(_train(tmp_path, model_type="unigram")[0])
  _, theirs = _train(tmp_path, model_type="bpe")
  assert [ours.encode(text) for text in TEXTS] != theirs.encode(TEXTS)


def test_a_saved_model_is_the_same(tmp_path):
  tokenizer = load_tokenizer(_train(tmp_path, model_type="unigram")[0], pad_token="[PAD]")
  tokenizer.save(tmp_path / "tokenizer.json")
  loaded = load_tokenizer(tmp_path)
  assert loaded.fingerprint == tokenizer.fingerprint
  assert (loaded.end_id, loaded.pad_id) == (tokenizer.end_id, tokenizer.vocab_size - 1)
  assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_lower_case_is_a_files_or_a_callers_word(tmp_path):
  file, _ = _train(tmp_path, model_type="unigram")
  plain = load_tokenizer(file)
  assert plain.encode("THE") != plain.encode("the")
  assert load_tokenizer(file, do_lower_case=True).encode("THE") == plain.encode("the")
  (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
  assert load_tokenizer(tmp_path).encode("THE") == plain.encode("the")


def test_what_is_no_model_is_refused(tmp_path):
  file, _ = _train(tmp_path, model_type="unigram")
  whole = file.read_bytes()
  for content in (whole[: len(whole) // 2 + 1], b"", b"\xff" * 40, b"{}"):
    file.write_bytes(content)
    with pytest.raises(UnknownTokenizerError):
      load_tokenizer(tmp_path)
  for options in (
    {"model_type": "char"},
    {"model_type": "unigram", "treat_whitespace_as_suffix": True},
    {"model_type": "bpe", "user_defined_symbols": ["<sep>"]},
  ):
    file, _ = _train(tmp_path, **options)
    with pytest.raises(DataError, match="SentencePiece"):
      load_tokenizer(file)


@needs_shared
def test_rinnas_japanese_model():
  ours = load_tokenizer(RINNA, pad_token="[PAD]")
  theirs = spm.SentencePieceProcessor(model_file=str(RINNA / "google_sp.model"))
  assert [len(read_sentencepiece(RINNA / "google_sp.model").pieces), ours.pad_id] == [32000, 3]
  texts = TEXTS[:]
  for name in ("ja/miyazawa", "parallel_manual/ja", "en/tinystories_sample", "ko/reviews"):
    texts += (SHARED / f"corpora/{name}.txt").read_text().split("\n")[:3000]
  pairs = list(zip(ours.encode_batch(texts), theirs.encode(texts), strict=True))
  other = [pair for pair in pairs if pair[0] != pair[1]]
  # `....` is `...` `.` or `.` `...`: equal scores, told apart by rounding.
  assert len(other) <= len(pairs) // 1000
  assert all(sorted(a) == sorted(b) for a, b in other)
  for _, ids in pairs:
    assert ours.decode(ids, True) == theirs.decode(ids).replace(" \u2047 ", "")
