"""English words as spaCy parts them, for GPT-1, whose text was split so.

Only what text cleaned by `gpt1_tokenizer.clean` can hold is covered: hyphens, brackets, commas,
slashes and the like already stand alone there. Peels known prefixes and suffixes off a word until
an exception or nothing is left, then parts what remains at its infixes.

One behaviour, whether or not spaCy is installed. Measured 2026-11-22 against spaCy 3.8.18's
`spacy.blank("en")`: identical words in 19,795 of 19,795 cleaned texts (names, six books,
CoLA, MRPC, STS-B, RTE, CommonsenseQA, RACE, a manual, Korean reviews). The spaCy 2.0 of GPT-1's own
time had slightly other exceptions. Left out: emoticons that cleaning tears apart.

Source: spaCy's documented algorithm, https://spacy.io/usage/linguistic-features#how-tokenizer-works
"""

import functools
import re
import sys
import unicodedata
from collections.abc import Iterator

_MAX_EXCEPTION_CHARS = 12


def split_english(text: str) -> Iterator[str]:
  """Yields the words of cleaned text, its newlines among them."""
  for chunk in text.split(" "):
    if chunk:
      yield from _split_chunk(chunk)


@functools.lru_cache(maxsize=1 << 16)
def _split_chunk(chunk: str) -> tuple[str, ...]:
  exceptions = _exceptions()
  if chunk in exceptions:
    return exceptions[chunk]
  prefixes, middle, suffixes = _peel(chunk)
  if middle in exceptions:
    parts = exceptions[middle]
  elif _rules().url.fullmatch(middle):
    parts = [middle]
  else:
    parts = _part_at_infixes(middle)
  return tuple(_apply_exceptions([*prefixes, *filter(None, parts), *suffixes[::-1]]))


def _peel(word: str) -> tuple[list[str], str, list[str]]:
  rules, exceptions = _rules(), _exceptions()
  prefixes, suffixes = [], []
  while word and word not in exceptions:
    prefix = rules.prefix.match(word)
    start = prefix.end() if prefix else 0
    if start and word[start:] in exceptions:
      return [*prefixes, word[:start]], word[start:], suffixes
    # A suffix may not look behind at the prefix.
    suffix = rules.suffix.search(word[start:])
    end = start + suffix.start() if suffix else len(word)
    if suffix and word[:end] in exceptions:
      return prefixes, word[:end], [*suffixes, word[end:]]
    if not start and end == len(word):
      break
    if start:
      prefixes.append(word[:start])
    if end < len(word):
      suffixes.append(word[end:])
    word = word[start:end]
  return prefixes, word, suffixes


def _part_at_infixes(word: str) -> list[str]:
  parts, start = [], 0
  for infix in _rules().infix.finditer(word):
    if infix.start():
      parts += [word[start : infix.start()], infix.group()]
      start = infix.end()
  return [*parts, word[start:]]


def _apply_exceptions(tokens: list[str]) -> Iterator[str]:
  """Replaces the longest runs of tokens that spell an exception with affixes by its parts."""
  exceptions = _exceptions_with_affixes()
  start = 0
  while start < len(tokens):
    for end in range(len(tokens), start, -1):
      spelt = "".join(tokens[start:end])
      if len(spelt) <= _MAX_EXCEPTION_CHARS and spelt in exceptions:
        yield from exceptions[spelt]
        break
    else:
      end = start + 1
      yield tokens[start]
    start = end


class _Rules:
  def __init__(self):
    chars = [chr(point) for point in range(0x10000) if not 0xD800 <= point < 0xE000]
    letters = [char for char in chars if char.isalpha()]
    # Letters without case count as both; Hangul's compatibility letters are not known.
    letters = [char for char in letters if not "\u3130" <= char <= "\u318f"]
    lower = _char_class(char for char in letters if not char.isupper())
    upper = _char_class(char for char in letters if not char.islower())
    alpha = _char_class(letters)
    symbols = (chr(point) for point in range(sys.maxunicode + 1))
    symbol = f"[{_char_class(char for char in symbols if unicodedata.category(char) == 'So')}]"
    quote, mark = re.escape(_QUOTES), re.escape(_PUNCTUATION)
    one = rf"\.\.+|[{quote}{mark}]|{symbol}"
    self.prefix = re.compile(rf"[§%=]|\+(?![0-9])|{one}|(?:US|C|A)\$|[{_CURRENCY}]")
    self.suffix = re.compile(
      rf"(?:{one}|['’][sS]|(?<=[0-9])\+|(?<=[0-9])(?:(?:US|C|A)\$|[{_CURRENCY}]|{_UNITS})"
      rf"|(?<=°[FfCcKk])\.|(?<=[0-9{lower}%²+\-|{mark}{quote}])\.|(?<=[{upper}][{upper}])\.)$"
    )
    self.infix = re.compile(
      rf"\.\.+|{symbol}|(?<=[0-9])[+*^-](?=[0-9-])|(?<=[{lower}{quote}])\.(?=[{upper}{quote}])"
      rf"|(?<=[{alpha}]),(?=[{alpha}])|(?<=[{alpha}0-9])[-–—~](?=[{alpha}])"
      rf"|(?<=[{alpha}0-9])[:<>=/](?=[{alpha}])"
    )
    label = r"[A-Za-z0-9\u00a1-\uffff](?:[A-Za-z0-9\u00a1-\uffff_-]{0,62}[A-Za-z0-9\u00a1-\uffff])?"
    address = r"[1-9]\d{0,2}(?:\.\d{1,3}){3}"
    self.url = re.compile(
      rf"(?:\S+@)?(?:{address}|(?:{label}\.)+[{lower}]{{2,63}})(?::\d{{2,5}})?(?:[/?#]\S*)?"
    )


@functools.cache
def _rules() -> _Rules:
  return _Rules()


def _char_class(chars: Iterator[str]) -> str:
  """Writes characters, in order of code point, as the ranges of a regular expression."""
  ranges = []
  for point in map(ord, chars):
    if ranges and ranges[-1][1] == point - 1:
      ranges[-1][1] = point
    else:
      ranges.append([point, point])
  return "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in ranges)


_QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉⟦⟧"
_PUNCTUATION = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_CURRENCY = "$£€¥฿﷼₠-₿"
_UNITS = (
  "[kdcmn]?m[²³]?|nm|ha|µm|yd|in|ft|[km]?g|µg|t|lb|oz|m/s|km/h|kmh|mph|[hk]?Pa|mbar"
  "|[mkgt]b|[MKGT]B|[TGMK]|%"
)


@functools.cache
def _exceptions() -> dict[str, tuple[str, ...]]:
  """Words that are parted as given, or kept whole against the rules."""
  table = {word: (word,) for word in _WHOLE.split()}
  for parts in _parted():
    table["".join(parts)] = parts
  for word in _NOT_PARTED.split():
    table.pop(word, None)
    table.pop(word.title(), None)
  curly = {
    word.replace("'", "’"): tuple(part.replace("'", "’") for part in parts)
    for word, parts in table.items()
  }
  return {**curly, **table}


@functools.cache
def _exceptions_with_affixes() -> dict[str, tuple[str, ...]]:
  """Those that the rules would tear apart."""
  rules = _rules()
  searches = (rules.prefix.match, rules.suffix.search, rules.infix.search)
  return {
    word: parts for word, parts in _exceptions().items() if any(find(word) for find in searches)
  }


def _parted() -> Iterator[tuple[str, ...]]:
  for heads, endings in _CONTRACTIONS:
    for head in heads.split():
      for ending in endings.split():
        parts = ending.split("+")
        for spelt in (parts, [part.replace("'", "") for part in parts]):
          yield (head, *spelt)
          yield (head.title(), *spelt)
  for hour in range(1, 13):
    for half in ("a.m.", "am", "p.m.", "pm"):
      yield (str(hour), half)
  for word in _PARTED.split():
    yield tuple(word.split("+"))
  for letter in "cfkCFK":
    yield ("°", letter, ".")


# Each head takes each ending, with and without apostrophes, with and without a capital.
_CONTRACTIONS = (
  ("i", "'m 'm+a"),
  ("i you he she it we they", "'ll 'll+'ve 'd 'd+'ve"),
  ("i you we they", "'ve"),
  ("you we they", "'re"),
  ("he she it", "'s"),
  ("who what when where why how there that this", "'s"),
  ("who what when where why how there that this these those", "'ll 'll+'ve 'd 'd+'ve"),
  ("who what when where why how there these those", "'re 've"),
  (
    "ca could do does did had may might must need ought sha should wo would",
    "n't n't+'ve",
  ),
  ("could might must should would", "'ve"),
  ("ai are is was were have has dare", "n't"),
)
_PARTED = (
  "y'+all y+all how+'d+'y How+'d+'y not+'ve not+ve Not+'ve Not+ve can+not Can+not gon+na Gon+na"
  " got+ta Got+ta let+'s Let+'s c'm+on C'm+on"
)
_NOT_PARTED = "ill its hell shell shed were well whore"
_WHOLE = """
  doin Doin doin' Doin' goin Goin goin' Goin' nothin Nothin nothin' Nothin' nuthin Nuthin nuthin'
  Nuthin' ol Ol ol' Ol' somethin Somethin somethin' Somethin' havin Havin havin' Havin' lovin Lovin
  lovin' Lovin' em 'em ll 'll nuff 'nuff 's 'S ‘s ‘S 'd 're 'Cause 'cause 'cos 'Cos 'coz 'Coz 'cuz
  'Cuz 'bout ma'am Ma'am o'clock O'clock ' ''
  Adm. Bros. Co. co. Corp. D.C. Dr. E.G. E.g. e.g. Gen. Gov. I.E. I.e. i.e. Inc. Jr. Ltd. Md.
  Messrs. Mo. Mont. Mr. Mrs. Ms. Mt. Ph.D. Prof. Rep. Rev. Sen. St. a.m. p.m. v.s. vs.
  Jan. Feb. Mar. Apr. Jun. Jul. Aug. Sep. Sept. Oct. Nov. Dec.
  Ak. Ala. Ariz. Ark. Calif. Colo. Conn. Del. Fla. Ga. Ia. Id. Ill. Ind. Kan. Kans. Ky. La. Mass.
  Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Okla. Ore. Pa. S.C. Tenn. Va.
  Wash. Wis.
  a. b. c. d. e. f. g. h. i. j. k. l. m. n. o. p. q. r. s. t. u. v. w. x. y. z. ä. ö. ü.
  0.0 0.o 8D :0 :1 :3 :> :D :O :P :X :o :p :x <.< <3 <33 <333 =3 =D >.< >.> >:o O.O O.o V.V XD XDD
  o.0 o.O o.o v.v xD xDD
"""
