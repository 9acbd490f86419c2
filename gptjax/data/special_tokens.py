"""Special tokens: which token has which role, as files and users say it, and as we keep it.

The roles are transformers': bos_token begins a text, eos_token ends it, and so on. A tokenizer.json
has no place for them, so those that cannot be told from the tokens themselves are noted in it: a
post-processor that adds nothing, and names tokens. Other programs read such a file as before.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from gptjax.errors import ConfigError, DataError, did_you_mean

ROLES = (
  "bos_token",
  "eos_token",
  "unk_token",
  "sep_token",
  "pad_token",
  "cls_token",
  "mask_token",
)
LISTS = ("additional_special_tokens", "extra_special_tokens")
END_TOKEN = "<|endoftext|>"
KNOWN_END_TOKENS = (END_TOKEN, "<|end_of_text|>", "</s>", "<eos>")
_NOTE = "gptjax."


def check_given(given: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
  """Parts special tokens given by keyword into ({role: token}, tokens without a role).

  Raises:
    ConfigError: no such role, or a value that is no token.
  """
  roles, others = {}, []
  for name, value in given.items():
    if name in ROLES and isinstance(value, str) and value:
      roles[name] = value
    elif name in LISTS and isinstance(value, Sequence) and not isinstance(value, str):
      others += [str(token) for token in value]
    elif name in (*ROLES, *LISTS):
      wanted = "a text that is not empty" if name in ROLES else "a list of texts"
      raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
    else:
      raise ConfigError(f"special tokens have no {name!r}{did_you_mean(name, ROLES + LISTS)}")
  return roles, others


def read_json(file: Path) -> dict[str, Any]:
  """Returns a JSON object, or nothing where there is no such file."""
  if not file.is_file():
    return {}
  content = json.loads(file.read_text(encoding="utf-8"))
  if not isinstance(content, dict):
    raise DataError(f'"{file}" must be a JSON object, and is a {type(content).__name__}')
  return content


def read_roles(folder: Path) -> tuple[dict[str, str], list[str]]:
  """Returns what tokenizer_config.json, or else special_tokens_map.json, says of special tokens."""
  said = read_json(folder / "special_tokens_map.json")
  said |= read_json(folder / "tokenizer_config.json")
  roles = {role: _content(said[role]) for role in ROLES if said.get(role)}
  others = [_content(token) for name in LISTS for token in _tokens(said.get(name))]
  return roles, others


def add_listed_tokens(backend: Backend, folder: Path, special: set[str]) -> None:
  """Adds the tokens of added_tokens.json and tokenizer_config.json, with the ids they have there.

  Raises:
    DataError: an id that the vocabulary leaves no room for.
  """
  listed = {
    index: AddedToken(token, special=token in special, normalized=token not in special)
    for token, index in read_json(folder / "added_tokens.json").items()
  }
  decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
  for index, token in decoder.items():
    flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
    listed[int(index)] = AddedToken(token["content"], **flags)
  for index, token in sorted(listed.items(), key=lambda item: item[0]):
    backend.add_tokens([token])
    if backend.token_to_id(token.content) != index:
      raise DataError(
        f'"{folder}" gives the added token "{token.content}" the id {index}, and the vocabulary'
        f" gives it {backend.token_to_id(token.content)}; restore the files it came with"
      )


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_special(backend: Backend, tokens: Sequence[str]) -> dict[str, int]:
  """Makes tokens special, and returns {token: id} of those that had no id before.

  New ids follow the largest one, in the order given.
  """
  known = backend.get_vocab(with_added_tokens=True)
  is_special = set(special_tokens(backend))
  wanted = [token for token in dict.fromkeys(tokens) if token not in is_special]
  backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in wanted])
  return {token: backend.token_to_id(token) for token in wanted if token not in known}


def special_tokens(backend: Backend) -> list[str]:
  """Returns the tokens marked as special, in order of id."""
  added = backend.get_added_tokens_decoder()
  return [token.content for _, token in sorted(added.items()) if token.special]


def usual_roles(backend: Backend) -> dict[str, str]:
  """Returns the roles that can be told from a tokenizer.json alone.

  The end token is the only special token, or a usual name among several. GPT-2's begins texts
  as well, and is named where transformers wants an unknown token.
  """
  special = special_tokens(backend)
  unknown = _unknown_token(backend)
  candidates = [token for token in special if token != unknown]
  end = next((token for token in KNOWN_END_TOKENS if token in candidates), None)
  if len(candidates) == 1:
    end = candidates[0]
  begin = "<s>" if "<s>" in candidates else end if end == END_TOKEN else None
  if unknown is None and end == END_TOKEN:
    unknown = end
  named = {"bos_token": begin, "eos_token": end, "unk_token": unknown}
  return {role: token for role, token in named.items() if token is not None}


def write_notes(backend: Backend, notes: Mapping[str, str]) -> None:
  """Keeps {name: text} in the tokenizer.json of a backend; it changes no ids."""
  earlier = backend.post_processor
  note = processors.TemplateProcessing(
    single="$A",
    pair="$A $B:1",
    special_tokens=[
      {"id": _NOTE + name, "ids": [backend.token_to_id(text) or 0], "tokens": [text]}
      for name, text in notes.items()
    ],
  )
  # First: a template after one that puts tokens at both ends would meet three parts, and panics.
  backend.post_processor = processors.Sequence([note, earlier]) if earlier else note


def read_notes(backend: Backend) -> dict[str, str]:
  """Returns the notes in the tokenizer.json of a backend; of roles, those noted last."""
  if backend.post_processor is None:
    return {}
  # Its state is its part of the tokenizer.json.
  processor = json.loads(backend.post_processor.__getstate__())
  notes = {}
  for step in processor.get("processors", [processor]):
    found = {
      name.removeprefix(_NOTE): token["tokens"][0]
      for name, token in (step.get("special_tokens") or {}).items()
      if name.startswith(_NOTE)
    }
    if notes.keys() & set(ROLES):
      found = {name: text for name, text in found.items() if name not in ROLES}
    notes |= found
  return notes


def known_roles(backend: Backend) -> dict[str, str]:
  """Returns the roles that the tokenizer.json of a backend notes, or else tells by itself."""
  noted = {name: text for name, text in read_notes(backend).items() if name in ROLES}
  return noted or usual_roles(backend)


def _unknown_token(backend: Backend) -> str | None:
  unknown = getattr(backend.model, "unk_token", None)
  if unknown is None and getattr(backend.model, "unk_id", None) is not None:
    unknown = backend.id_to_token(backend.model.unk_id)
  return unknown if unknown and backend.token_to_id(unknown) is not None else None


def _content(token: Any) -> str:
  text = token.get("content") if isinstance(token, dict) else token
  if not isinstance(text, str):
    raise DataError(f"a special token of tokenizer_config.json is {token!r}; it must be a text")
  return text


def _tokens(value: Any) -> list[Any]:
  """A list of tokens, or newer files' {name: token}."""
  return list(value.values()) if isinstance(value, dict) else list(value or [])
