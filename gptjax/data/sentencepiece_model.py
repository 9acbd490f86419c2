"""SentencePiece .model files, read without the sentencepiece package.

The file is a protocol buffer of which we want few fields; a reader of them is shorter than the
schema. The pieces become a `tokenizers` Unigram or BPE model, so that it saves as tokenizer.json.

Ids are sentencepiece's, with two known exceptions: two ways of equal score to part a text (`....`
as `...` `.` or `.` `...`) may be told apart by rounding, which is in float32 there and in float64
here; and `tokenizers` applies the character map to whole user-perceived characters, so that a
letter with a separate combining mark may be composed differently. Decoding writes control and
unknown pieces by name unless told to skip special tokens; sentencepiece drops the former.

Source: google/sentencepiece, sentencepiece_model.proto (field numbers), unigram_model.cc.
"""

import dataclasses
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gptjax.errors import UnknownTokenizerError

SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
# The score of pieces that text may not spell, below any other way to part the same letters.
_NEVER = -1e4
# Makes float32 log-probabilities of 2 and more whole.
_SCALE = 1 << 22


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
  """What a .model file says.

  Attributes:
    pieces: (text, score, type) of each id.
    model_type: 1 is unigram, 2 is BPE.
    roles: {role: piece} of the special pieces that it has.
  """

  pieces: list[tuple[str, float, int]]
  model_type: int
  charsmap: bytes
  add_dummy_prefix: bool
  remove_extra_whitespaces: bool
  escape_whitespaces: bool
  space_is_suffix: bool
  byte_fallback: bool
  roles: dict[str, str]

  @property
  def unknown_id(self) -> int:
    return next(i for i, (_, _, kind) in enumerate(self.pieces) if kind == _UNKNOWN)


def read_sentencepiece(file: Path) -> SentencePieceModel:
  """Reads a .model file.

  Raises:
    UnknownTokenizerError: it is no SentencePiece model, or is damaged.
  """
  try:
    fields = list(_read_fields(file.read_bytes()))
    pieces = [_read_piece(value) for number, value in fields if number == 1]
    trainer = _only(fields, 2)
    normalizer = _only(fields, 3)
  except (IndexError, struct.error, ValueError, TypeError) as error:
    raise UnknownTokenizerError(
      f'"{file}" is not a SentencePiece model, or is damaged; give the .model file of the trainer'
    ) from error
  kinds = {kind for _, _, kind in pieces}
  if _UNKNOWN not in kinds:
    raise UnknownTokenizerError(f'"{file}" is no SentencePiece model: it has no unknown piece')
  names = {"unk_token": (45, "<unk>"), "bos_token": (46, "<s>"), "eos_token": (47, "</s>")}
  names["pad_token"] = (48, "<pad>")
  special = {text for text, _, kind in pieces if kind in (_CONTROL, _UNKNOWN)}
  said = {role: trainer.get(key, name.encode()).decode() for role, (key, name) in names.items()}
  return SentencePieceModel(
    pieces=pieces,
    model_type=trainer.get(3, _UNIGRAM),
    charsmap=normalizer.get(2, b""),
    add_dummy_prefix=bool(normalizer.get(3, 1)),
    remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    escape_whitespaces=bool(normalizer.get(5, 1)),
    space_is_suffix=bool(trainer.get(24, 0)),
    byte_fallback=bool(trainer.get(35, 0)),
    roles={role: piece for role, piece in said.items() if piece in special},
  )


def make_sentencepiece_backend(model: SentencePieceModel, lower_case: bool = False) -> Backend:
  """Makes the `tokenizers.Tokenizer` of a SentencePiece model.

  Args:
    lower_case: lower-case text first, as Japanese GPT-2s' `do_lower_case` wants.

  Raises:
    UnknownTokenizerError: it is neither unigram nor BPE, or needs what `tokenizers` lacks.
  """
  if not model.escape_whitespaces or model.space_is_suffix:
    option = "treat_whitespace_as_suffix" if model.space_is_suffix else "escape_whitespaces=false"
    raise UnknownTokenizerError(f"the SentencePiece model was trained with {option}")
  if model.model_type == _UNIGRAM:
    backend = Backend(_unigram(model))
  elif model.model_type == _BPE:
    backend = Backend(_bpe(model))
  else:
    raise UnknownTokenizerError("the SentencePiece model is neither unigram nor BPE")
  backend.normalizer = normalizers.Sequence(list(_normalizers(model, lower_case)))
  backend.pre_tokenizer = pre_tokenizers.Sequence(list(_splits(model)))
  backend.decoder = decoders.Sequence(list(_decoders(model)))
  special = [text for text, _, kind in model.pieces if kind in (_UNKNOWN, _CONTROL)]
  backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
  return backend


def _normalizers(model: SentencePieceModel, lower_case: bool) -> Iterator[normalizers.Normalizer]:
  if lower_case:
    yield normalizers.Lowercase()
  if model.charsmap:
    yield normalizers.Precompiled(model.charsmap)
  if model.remove_extra_whitespaces:
    yield normalizers.Replace(Regex(r"\A +| +\z"), "")
    yield normalizers.Replace(Regex(" {2,}"), " ")
  normal = _normal_pieces(model)
  for text, _, kind in model.pieces:
    # Of only unknown letters: one of them gives the one unknown token that all of them give.
    if kind in (_UNKNOWN, _CONTROL) and not model.byte_fallback and not normal & set(text):
      yield normalizers.Replace(text, text[0])
  yield normalizers.Replace(" ", SPACE)
  if model.add_dummy_prefix:
    yield normalizers.Prepend(SPACE)


def _normal_pieces(model: SentencePieceModel) -> set[str]:
  return {text for text, _, kind in model.pieces if kind in (_NORMAL, _USER_DEFINED)}


def _splits(model: SentencePieceModel) -> Iterator[pre_tokenizers.PreTokenizer]:
  if not any(SPACE in text[1:] for text, _, _ in model.pieces):
    # No piece reaches over a space, so words may be looked at, and remembered, one by one.
    yield pre_tokenizers.Split(SPACE, "merged_with_next")
  if unspellable := list(_cuts_in_special_pieces(model)):
    yield pre_tokenizers.Split(Regex("|".join(unspellable)), "merged_with_previous")


def _cuts_in_special_pieces(model: SentencePieceModel) -> Iterator[str]:
  """Yields patterns after which to cut, so that text which spells a special piece is only text.

  The piece's low score says so already, unless some of its letters are unknown, which scores lower
  still. No normal piece crosses from a known letter to an unknown one, so a cut there is harmless.
  """
  normal = _normal_pieces(model)
  for text, _, kind in model.pieces:
    is_known = [char in normal for char in text]
    cut = next((i for i in range(1, len(text)) if is_known[i - 1] != is_known[i]), None)
    if not any(is_known) and model.byte_fallback:
      cut = 1
    if kind in (_UNKNOWN, _CONTROL, _BYTE) and cut:
      yield f"{re.escape(text[:cut])}(?={re.escape(text[cut:])})"


def _decoders(model: SentencePieceModel) -> Iterator[decoders.Decoder]:
  yield decoders.Replace(SPACE, " ")
  if model.byte_fallback:
    yield decoders.ByteFallback()
  yield decoders.Fuse()
  if model.add_dummy_prefix:
    yield decoders.Strip(" ", 1, 0)


def _unigram(model: SentencePieceModel) -> models.Unigram:
  highest = max((score for _, score, kind in model.pieces if kind == _NORMAL), default=0.0)

  def score_of(text: str, score: float, kind: int) -> float:
    if kind == _USER_DEFINED:
      return len(text.encode()) * highest - 0.1
    return score if kind == _NORMAL else _NEVER

  # Whole numbers, since tokenizer.json does not read long fractions back exactly; which path is
  # best does not depend on the scale.
  vocab = [(text, float(round(score_of(text, *rest) * _SCALE))) for text, *rest in model.pieces]
  return models.Unigram(vocab, model.unknown_id, model.byte_fallback)


def _bpe(model: SentencePieceModel) -> models.BPE:
  if any(kind == _USER_DEFINED for _, _, kind in model.pieces):
    raise UnknownTokenizerError("a SentencePiece model of type BPE with user-defined symbols")
  scores = {text: score for text, score, kind in model.pieces if kind == _NORMAL}
  merges = []
  for text, score in scores.items():
    for cut in range(1, len(text)):
      left, right = text[:cut], text[cut:]
      if left in scores and right in scores:
        merges.append((-score, -scores[left], -scores[right], left, right))
  return models.BPE(
    vocab={text: index for index, (text, _, _) in enumerate(model.pieces)},
    merges=[(left, right) for *_, left, right in sorted(merges)],
    unk_token=model.pieces[model.unknown_id][0],
    fuse_unk=True,
    byte_fallback=model.byte_fallback,
  )


def _read_piece(data: bytes) -> tuple[str, float, int]:
  fields = dict(_read_fields(data))
  return fields[1].decode(), fields.get(2, 0.0), fields.get(3, _NORMAL)


def _only(fields: list[tuple[int, bytes]], number: int) -> dict[int, bytes | int | float]:
  """Fields of a message that occurs once; of repeated ones, none of which we want, the last."""
  return dict(_read_fields(next((value for key, value in fields if key == number), b"")))


def _read_fields(data: bytes) -> Iterator[tuple[int, bytes | int | float]]:
  """Yields (field number, value) of a protocol buffer message."""
  position = 0
  while position < len(data):
    key, position = _read_varint(data, position)
    kind = key & 7
    if kind == 0:
      value, position = _read_varint(data, position)
    elif kind == 2:
      size, position = _read_varint(data, position)
      value, position = data[position : position + size], position + size
      if len(value) != size:
        raise ValueError("cut short")
    elif kind == 5:
      value, position = struct.unpack_from("<f", data, position)[0], position + 4
    elif kind == 1:
      value, position = struct.unpack_from("<d", data, position)[0], position + 8
    else:
      raise ValueError(f"wire type {kind}")
    yield key >> 3, value


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[position]
    value |= (byte & 0x7F) << shift
    position, shift = position + 1, shift + 7
    if byte < 0x80:
      return value, position
