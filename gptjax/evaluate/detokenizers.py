"""Detokenizers: text that was parted for word models, put back as people write it.

A language model of raw text finds ` , ` and ` @-@ ` unlikely. What is put back could be parted
again, so the probability of the text stays that of the original (Radford et al. 2019, section
3.1), and the words that a score is divided by are still those of the original.

A detokenizer is a list of (pattern, replacement), applied in order. OpenAI's are not published;
these are ours.
"""

import re

from gptjax.errors import check_choice

_BEFORE = r"(?=[ \n]|$)"
_CLITICS = (rf" '(s|t|m|d|re|ve|ll){_BEFORE}", r"'\1")
_NEGATIONS = (rf" n't{_BEFORE}", "n't")
_STOPS = (rf" ([.,;:!?]+|\.\.\.){_BEFORE}", r"\1")
_BRACKETS = [(r"([(\[]) ", r"\1"), (r" ([)\]])", r"\1")]
_DOUBLE_QUOTES = (r'(?<![^ \n(\[])" ([^"\n]*?) "(?![^ \n.,;:!?)\]])', r'"\1"')
_ENDS_OF_LINES = [(r"(?m)^ +", ""), (r"(?m) +$", "")]
# The Penn Treebank's quotes and brackets, as LAMBADA and the Children's Book Test have them.
_TREEBANK = [
  _NEGATIONS,
  _CLITICS,
  _STOPS,
  (r"(?i)-lrb- ", "("),
  (r"(?i) -rrb-", ")"),
  (r"(?i)-lsb- ", "["),
  (r"(?i) -rsb-", "]"),
  (r"`` ", '"'),
  (r" ''", '"'),
  (r"` ", "'"),
  (rf" '{_BEFORE}", "'"),
]

DETOKENIZERS: dict[str, list[tuple[str, str]]] = {
  "none": [],
  "wikitext": [
    (r" @([-,.])@ ", r"\1"),
    (r"= (?==)", "="),
    _CLITICS,
    _STOPS,
    *_BRACKETS,
    (r"([$£]) (?=[\d<])", r"\1"),
    (r"(?<=\d) %", "%"),
    (r" / ", "/"),
    (r"(?<=\d) – (?=\d)", "–"),
    _DOUBLE_QUOTES,
    *_ENDS_OF_LINES,
  ],
  "ptb": [_NEGATIONS, _CLITICS, (r"\$ (?=N)", "$"), (r"(?<=N) %", "%"), *_ENDS_OF_LINES],
  "1bw": [_NEGATIONS, _CLITICS, _STOPS, *_BRACKETS, (r"([$£]) (?=\d)", r"\1"), _DOUBLE_QUOTES],
  "treebank": _TREEBANK,
}


def detokenize(text: str, name: str) -> str:
  """Puts a text back together; "none" returns it as it is."""
  check_choice("detokenizer", name, DETOKENIZERS)
  for pattern, replacement in DETOKENIZERS[name]:
    text = re.sub(pattern, replacement, text)
  return text
