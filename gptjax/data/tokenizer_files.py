"""Finding and reading tokenizer files of every kind that gptjax knows."""

from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from gptjax.data import special_tokens
from gptjax.data.gpt1_tokenizer import MODES, WORD_END, make_gpt1_backend
from gptjax.data.sentencepiece_model import make_sentencepiece_backend, read_sentencepiece
from gptjax.errors import ConfigError, DataError, UnknownTokenizerError

_OPENAI_GPT1 = ("encoder_bpe_40000.json", "vocab_40000.bpe")
_MAX_IDS = 1 << 24
_BERT = "vocab.txt"
_BERT_ROLES = {
  "unk_token": "[UNK]",
  "sep_token": "[SEP]",
  "pad_token": "[PAD]",
  "cls_token": "[CLS]",
  "mask_token": "[MASK]",
}
_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), _OPENAI_GPT1)


def split_mode(path: str | Path) -> tuple[str | None, Path]:
  """Parts `gpt1-paper:FOLDER` into the mode and the path."""
  mode, colon, rest = str(path).partition(":")
  if colon and mode in MODES:
    return mode, Path(rest).expanduser()
  return None, Path(path).expanduser()


def read_backend(
  path: Path, mode: str | None, do_lower_case: bool | None
) -> tuple[Backend, dict[str, str]]:
  """Reads a tokenizer of any kind, with the tokens that its folder adds.

  Returns:
    The tokenizer, and {role: token} where the files other than tokenizer.json say it.

  Raises:
    UnknownTokenizerError: there is none, or none of a known kind.
    ConfigError: do_lower_case or a GPT-1 mode for a tokenizer that cannot have it.
  """
  folder = path if path.is_dir() else path.parent
  roles, others = special_tokens.read_roles(folder)
  file = path / "tokenizer.json" if path.is_dir() else path
  pair = next((p for p in _PAIRS if all((folder / name).is_file() for name in p)), None)
  has_pairs = (file.is_file() and file.suffix != ".model") or (path.is_dir() and pair)
  sentencepiece = None if has_pairs else _sentencepiece_file(path)
  is_bert = not has_pairs and not sentencepiece and (path / _BERT).is_file()
  if do_lower_case and not (is_bert or sentencepiece):
    raise ConfigError(
      "do_lower_case is for SentencePiece models and BERT's vocab.txt, and"
      f' "{path}" says itself whether it lower-cases'
    )
  if mode and (is_bert or sentencepiece):
    raise ConfigError(f'"{path}" has no byte pairs, so {mode} is not for it')
  if file.is_file() and file.suffix != ".model":
    backend = _read_tokenizer_json(file, mode)
  elif path.is_dir() and pair:
    backend = _read_pair(folder, pair, mode)
  elif sentencepiece:
    if do_lower_case is None:
      config = special_tokens.read_json(folder / "tokenizer_config.json")
      do_lower_case = bool(config.get("do_lower_case"))
    model = read_sentencepiece(sentencepiece)
    backend = make_sentencepiece_backend(model, do_lower_case)
    roles = model.roles | roles
  elif is_bert:
    backend, bert_roles = _read_bert(folder, roles, do_lower_case)
    roles = bert_roles | roles
  else:
    raise UnknownTokenizerError(
      f'no tokenizer in "{path}" that gptjax knows; give "char", "bpe", a tokenizer.json, a'
      " SentencePiece .model, or a folder with one, with encoder.json and vocab.bpe, or with BERT's"
      " vocab.txt"
    )
  if path.is_dir():
    special_tokens.add_listed_tokens(backend, folder, {*roles.values(), *others})
    special_tokens.add_special(backend, others)
  return backend, roles


def byte_level(model: models.Model, add_prefix_space: bool = False) -> Backend:
  """Makes a tokenizer that works on UTF-8 bytes, parted as GPT-2 does."""
  backend = Backend(model)
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
  backend.decoder = decoders.ByteLevel()
  return backend


def _read_tokenizer_json(file: Path, mode: str | None) -> Backend:
  text = file.read_text(encoding="utf-8")
  content = special_tokens.read_json(file)
  model = content.get("model") or {}
  vocab, merges = model.get("vocab"), model.get("merges")
  if isinstance(vocab, dict):
    _check_ids(vocab, file)
  if not (isinstance(vocab, dict) and isinstance(merges, list)):
    if mode:
      raise ConfigError(f'"{file}" has no byte pairs, so {mode} is not for it')
    return Backend.from_str(text)
  # Older files write a pair as one text.
  pairs = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in merges]
  _check_merges(vocab, pairs, model.get("continuing_subword_prefix") or "", file)
  return _gpt1(file, vocab, pairs, mode) if mode else Backend.from_str(text)


def _check_ids(vocab: dict[str, int], path: Path) -> None:
  """Raises DataError for no ids, or large ones: the library walks through all below them."""
  largest = max(vocab.values(), default=-1)
  if not 0 <= largest < _MAX_IDS:
    found = f"the id {largest}" if vocab else "no tokens"
    raise DataError(f'tokenizer "{path}" has {found}; ids must be 0 to {_MAX_IDS - 1}')


def _check_merges(
  vocab: dict[str, int], merges: list[tuple[str, str]], prefix: str, path: Path
) -> None:
  """Raises DataError for a pair that makes no token: the library aborts on some of them."""
  for first, second in merges:
    joined = first + second.removeprefix(prefix)
    for token in (first, second, joined):
      if token not in vocab:
        raise DataError(
          f'tokenizer "{path}" merges {first!r} and {second!r}, and has no token {token!r}; its'
          " files are damaged or of two tokenizers"
        )


def _read_pair(folder: Path, pair: tuple[str, str], mode: str | None) -> Backend:
  vocab, merges = models.BPE.read_file(str(folder / pair[0]), str(folder / pair[1]))
  _check_ids(vocab, folder)
  _check_merges(vocab, merges, "", folder)
  if mode or any(token.endswith(WORD_END) for token in vocab):
    default = "gpt1-paper" if pair == _OPENAI_GPT1 else "gpt1-hf"
    return _gpt1(folder, vocab, merges, mode or default)
  config = special_tokens.read_json(folder / "tokenizer_config.json")
  backend = byte_level(models.BPE(vocab, merges), bool(config.get("add_prefix_space")))
  if special_tokens.END_TOKEN in vocab:
    backend.add_special_tokens([special_tokens.END_TOKEN])
  return backend


def _read_bert(
  folder: Path, said: dict[str, str], do_lower_case: bool | None
) -> tuple[Backend, dict[str, str]]:
  """Reads BERT's word pieces, which Chinese GPT-2s have, and the roles that it gives by itself.

  Source: transformers, models/bert/tokenization_bert.py.
  """
  lines = (folder / _BERT).read_text(encoding="utf-8").split("\n")
  vocab = {token: index for index, token in enumerate(lines) if token}
  roles = {role: t for role, t in (_BERT_ROLES | said).items() if role in _BERT_ROLES}
  unknown = roles["unk_token"]
  if unknown not in vocab:
    raise UnknownTokenizerError(f'"{folder / _BERT}" is not BERT\'s: it has no {unknown}')
  config = special_tokens.read_json(folder / "tokenizer_config.json")
  if do_lower_case is None:
    do_lower_case = bool(config.get("do_lower_case", True))
  backend = Backend(models.WordPiece(vocab, unk_token=unknown))
  backend.normalizer = normalizers.BertNormalizer(
    handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    strip_accents=config.get("strip_accents"),
    lowercase=do_lower_case,
  )
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece("##")
  known = {role: token for role, token in roles.items() if token in vocab}
  backend.add_special_tokens(list(known.values()))
  if known.keys() >= {"cls_token", "sep_token"}:
    start, end = known["cls_token"], known["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
      single=f"{start} $A {end}",
      pair=f"{start} $A {end} $B:1 {end}:1",
      special_tokens=[(start, vocab[start]), (end, vocab[end])],
    )
  return backend, known


def _gpt1(path: Path, vocab: dict[str, int], merges: list[tuple[str, str]], mode: str) -> Backend:
  if not any(token.endswith(WORD_END) for token in vocab):
    raise ConfigError(f'"{path}" has no tokens that end in "{WORD_END}", so {mode} is not for it')
  return make_gpt1_backend(vocab, merges, mode)


def _sentencepiece_file(path: Path) -> Path | None:
  """The .model file meant by a path: itself, or the only one of a folder without tokenizer.json."""
  if path.suffix == ".model" and path.is_file():
    return path
  if not path.is_dir() or (path / "tokenizer.json").is_file():
    return None
  found = sorted(path.glob("*.model"))
  return found[0] if len(found) == 1 else None
