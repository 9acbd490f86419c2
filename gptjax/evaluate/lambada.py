"""LAMBADA: the last word of a passage, its perplexity and how often it is the likeliest.

Source: Paperno et al. 2016; Radford et al. 2019, section 3.3. A word is right where greedy search
writes all of its tokens. The paper's accuracy (table 3) is with a filter that no predicted word is
a stop word, since a passage does not end in one. Its list is not published. Here the first token of
the word is the likeliest of those that are no stop word and have a letter or a digit; the others
are as before.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.checkpoint.models import Loaded, to_stderr
from gptjax.data.building import show_progress
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError
from gptjax.evaluate.detokenizers import detokenize
from gptjax.evaluate.paper import compare_with_paper
from gptjax.evaluate.protocol import TextProtocol
from gptjax.evaluate.receipt import identify, make_receipt
from gptjax.evaluate.scoring import Scorer, Scores, continuation_row
from gptjax.evaluate.statistics import error_of_mean, perplexity_of
from gptjax.evaluate.texts import (
  TokenTexts,
  encode_pairs,
  hash_documents,
  need_tokenizer,
  read_texts,
  start_ids,
)

PROTOCOL = TextProtocol("lambada", documents="lines", detokenizer="treebank")

# How many of the likeliest tokens are looked through for one that is no stop word.
_CANDIDATES = 64
# Articles, determiners and pronouns; auxiliary verbs; prepositions; conjunctions and adverbs of
# degree, time and place; and what clitics leave behind.
_FUNCTION_WORDS = """
a an the this that these those each every any some all both no such own same other another
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself
she her hers herself it its itself they them their theirs themselves who whom whose which what one

am is are was were be been being have has had having do does did doing will would shall should can
could may might must ought

of at by for with about against between into through during before after above below to from up
down in out on off over under upon within without toward towards among

and but or nor if because as until while than so though although when where why how then once here
there again further just only very too more most much many few also not now even still

s t d ll m re ve n't 's 't 'd 'll 'm 're 've
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


def measure_lambada(
  data: Sequence[str],
  model: Loaded,
  scorer: Scorer,
  protocol: TextProtocol = PROTOCOL,
  say: Callable[[str], None] = to_stderr,
) -> dict[str, Any]:
  """Scores the last words of passages and returns the receipt.

  Args:
    data: as `read_texts` takes it: text files with a passage a line, or records.
    model, scorer: what scores.
    protocol: how the passages are read.
    say: takes lines about what a reader of the figures should know.

  Raises:
    DataError: nothing there, or a passage of one word.
  """
  tokenizer, start = need_tokenizer(model), start_ids(model, protocol.start)
  texts = read_texts(data, protocol.documents, protocol.text_column)
  pairs = [_part(text, protocol.detokenizer) for text in texts]
  limit = model.config.context_length
  encoded = encode_pairs(pairs, model)
  rows = [continuation_row([*start, *context], word, limit) for context, word in encoded]
  num_cut = sum(len(start) + len(context) + len(word) > limit + 1 for context, word in encoded)
  if num_cut:
    say(f"{num_cut} passages are longer than the context of the model and lose their beginnings")
  with show_progress("scoring", len(rows), "passages") as advance:
    scores = scorer.score(rows, min(_CANDIDATES, model.config.vocab_size), advance)
  found = figures(scores, [word for _, word in encoded], tokenizer)
  found["published"] = compare_with_paper(protocol.name, found, model.config)
  return make_receipt(
    "lambada",
    identify(model),
    found,
    protocol=dataclasses.asdict(protocol),
    data_hash=hash_documents(text.encode() for text in texts),
  )


def _part(passage: str, detokenizer: str) -> tuple[str, str]:
  """Parts the last word, with the space before it if there is one."""
  passage = passage.rstrip()
  before, _, word = passage.rpartition(" ")
  if not before.strip():
    raise DataError(f"the passage {passage!r} has one word; there must be some before the last")
  text = detokenize(passage, detokenizer)
  if not text.endswith(word):
    # The detokenizer spells it in another way.
    both = zip(text, detokenize(before, detokenizer))
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
    word = text[shared:].lstrip(" ")
  context = text.removesuffix(word)
  return context.rstrip(" "), " " * context.endswith(" ") + word


def figures(
  scores: Sequence[Scores], words: Sequence[np.ndarray], tokenizer: Tokenizer
) -> dict[str, Any]:
  """Computes perplexity and accuracies of last words.

  Returns:
    perplexity: exp of nats_per_word; accuracy; accuracy_without_stop_words; standard errors of
    nats_per_word and of both accuracies, over passages.
  """
  nats = np.array([-found.logprob for found in scores])
  right = np.array([found.is_greedy for found in scores], float)
  pick = _Picker(tokenizer)
  filtered = np.array(
    [
      pick(found.alternatives_SX[0]) == word[0] and all(found.is_greedy_S[1:])
      for found, word in zip(scores, words, strict=True)
    ],
    float,
  )
  return {
    "perplexity": perplexity_of(nats.mean()),
    "accuracy": right.mean(),
    "accuracy_without_stop_words": filtered.mean(),
    "nats_per_word": nats.mean(),
    "standard_error": error_of_mean(nats),
    "accuracy_standard_error": error_of_mean(right),
    "accuracy_without_stop_words_standard_error": error_of_mean(filtered),
    "counts": {"passages": len(nats), "tokens": sum(map(len, words))},
  }


class _Picker:
  """Finds the first token that may begin a last word; remembers which may."""

  def __init__(self, tokenizer: Tokenizer):
    self._texts = TokenTexts(tokenizer)
    self._may_begin: dict[int, bool] = {}

  def __call__(self, ids: np.ndarray) -> int | None:
    for index in ids.tolist():
      if index not in self._may_begin:
        text = self._texts(index).strip().lower()
        self._may_begin[index] = text not in STOP_WORDS and any(map(str.isalnum, text))
      if self._may_begin[index]:
        return index
    return None
