"""GPT-1's text handling in two named modes, over its byte-pair vocabulary with `</w>`.

`gpt1-paper` is what GPT-1 was trained with: ftfy, dashes and quotes made plain, punctuation set
apart, newlines kept as tokens, words parted as spaCy does, each lower-cased. Its first step is
Python, so the tokenizer.json holds the vocabulary, and a note (`special_tokens`) that says which
text handling goes before it. `gpt1-hf` is what transformers 5 does, all in the tokenizer.json.
The paper's weights give other results with the second: prefer the first for them.
"""

import re

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gptjax.data.english import split_english
from gptjax.data.special_tokens import write_notes

MODES = ("gpt1-paper", "gpt1-hf")
WORD_END = "</w>"
UNKNOWN = "<unk>"
TEXT_NOTE = "text"

_PLAIN = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
_SET_APART = re.compile(r"(-+|~+|!+|\"+|;+|\?+|\++|,+|\)+|\(+|\\+|/+|\*+|\[+|\]+|\}+|\{+|\|+|_+)")
_AROUND_NEWLINE = re.compile(r"\s*\n\s*")
_OTHER_SPACE = re.compile(r"[^\S\n]+")


def clean(text: str) -> str:
  """Returns text repaired and made plain: single spaces, punctuation and newlines set apart.

  Source: openai/finetune-transformer-lm, text_utils.py, `text_standardize` after ftfy's `fix_text`.
  """
  # Imported here because this mode alone needs it.
  from ftfy import fix_text

  text = fix_text(text).translate(_PLAIN)
  text = _SET_APART.sub(r" \1 ", text)
  text = _AROUND_NEWLINE.sub(" \n ", text)
  return _OTHER_SPACE.sub(" ", text).strip()


def paper_words(text: str) -> list[str]:
  """Returns the lower-cased words, and newlines, that `gpt1-paper` gives to its byte pairs."""
  return [word.lower() for word in split_english(clean(text))]


def make_gpt1_backend(
  vocab: dict[str, int], merges: list[tuple[str, str]], mode: str = "gpt1-paper"
) -> Backend:
  """Makes the `tokenizers.Tokenizer` of a mode; for `gpt1-paper` it takes `paper_words`.

  Args:
    vocab: {piece: id}, of which `<unk>` stands for what is in no other.
    merges: pairs in order of rank.
    mode: one of `MODES`.
  """
  model = models.BPE(
    vocab=vocab,
    merges=merges,
    unk_token=UNKNOWN,
    end_of_word_suffix=WORD_END,
    continuing_subword_prefix="",
    fuse_unk=False,
  )
  backend = Backend(model)
  if mode == "gpt1-hf":
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  else:
    write_notes(backend, {TEXT_NOTE: mode})
  backend.decoder = decoders.BPEDecoder(suffix=WORD_END)
  if UNKNOWN in vocab:
    backend.add_special_tokens([AddedToken(UNKNOWN, special=True, normalized=False)])
  return backend
