"""How a text is scored, in full: what a number needs to be compared with another.

The protocols of the GPT-2 paper (Radford et al. 2019, table 3) are data, below. The paper states
detokenizers and what the loss is divided by (the tokens of the original; openai/gpt-2#78), but not
the stride: ours lets windows follow one another, with one token shared so that all are scored,
which is nearest to what others who reproduced the table describe (huggingface/transformers#483).
"""

import dataclasses

from gptjax.checkpoint.models import DTYPES
from gptjax.errors import ConfigError, check_choice
from gptjax.evaluate.detokenizers import DETOKENIZERS
from gptjax.model.config import ModelConfig

STARTS = ("none", "bos", "end")
DOCUMENTS = ("whole", "lines")
WORDS = ("spaces", "spaces_and_newlines")
# What may be quoted as the score of a text, and by what it divides.
SCORES = ("token_perplexity", "word_perplexity", "bits_per_byte", "bits_per_character")


@dataclasses.dataclass(frozen=True)
class TextProtocol:
  """How text becomes what a model is given; all that there is to say of a cloze test.

  Attributes:
    name: of the benchmark; "plain" for any other text.
    start: a token put before each document, so that its first token is scored too: "none", "bos",
      or "end" (the end token, as in training on joined documents).
    documents: "whole" files and records, or each of the "lines" of text files that is not blank.
    text_column: the field of jsonl, csv, parquet and hub records that holds the text.
    detokenizer: a key of DETOKENIZERS.
    dtype: of parameters and products.
  """

  name: str = "plain"
  start: str = "none"
  documents: str = "whole"
  text_column: str = "text"
  detokenizer: str = "none"
  dtype: str = "float32"

  def __post_init__(self):
    check_choice("start", self.start, STARTS)
    check_choice("documents", self.documents, DOCUMENTS)
    check_choice("detokenizer", self.detokenizer, DETOKENIZERS)
    check_choice("dtype", self.dtype, DTYPES)


@dataclasses.dataclass(frozen=True)
class Protocol(TextProtocol):
  """How perplexity is measured.

  Attributes:
    context: tokens of a window; None is the context of the model.
    stride: tokens from one window to the next. A window scores those that none before it has
      scored. None is half of the context; a negative one counts from the context: with -1 windows
      follow one another and share one token, so that all are scored. With the context itself the
      first token of each window has nothing before it and is not scored (transformers' recipe).
    words: what counts as a word of the original text: what lies between "spaces" (any white
      space), or also each newline ("spaces_and_newlines"), as in WikiText's counts.
    score: the figure to quote, one of SCORES. All are reported.
  """

  context: int | None = None
  stride: int | None = None
  words: str = "spaces"
  score: str = "token_perplexity"

  def __post_init__(self):
    super().__post_init__()
    check_choice("words", self.words, WORDS)
    check_choice("score", self.score, SCORES)

  def resolve(self, config: ModelConfig) -> "Protocol":
    """Puts numbers for what depends on the model.

    Raises:
      ConfigError: a window that the model has no room for, or a stride that skips tokens.
    """
    longest = config.context_length
    context = longest if self.context is None else self.context
    if not 2 <= context <= longest:
      raise ConfigError(
        f"context is {context}; it must be 2 to {longest}, the context of the model"
      )
    stride = context // 2 if self.stride is None else self.stride
    if stride < 0:
      stride += context
    if not 1 <= stride <= context:
      raise ConfigError(
        f"stride is {self.stride}, and context {context}; windows must move on by 1 to {context}"
        " tokens"
      )
    return dataclasses.replace(self, context=context, stride=stride)


_WORD_BENCHMARK = {
  "stride": -1,
  "words": "spaces_and_newlines",
  "score": "word_perplexity",
}
PROTOCOLS = {
  "plain": Protocol(),
  "wikitext2": Protocol("wikitext2", detokenizer="wikitext", **_WORD_BENCHMARK),
  "wikitext103": Protocol("wikitext103", detokenizer="wikitext", **_WORD_BENCHMARK),
  "ptb": Protocol("ptb", detokenizer="ptb", **_WORD_BENCHMARK),
  # Its sentences are shuffled, so each stands by itself; the end token gives it a beginning.
  "1bw": Protocol("1bw", detokenizer="1bw", documents="lines", start="end", **_WORD_BENCHMARK),
  "enwik8": Protocol("enwik8", stride=-1, score="bits_per_byte"),
  "text8": Protocol("text8", stride=-1, score="bits_per_character"),
}


def protocol(name: str) -> Protocol:
  """Returns a protocol by name. Raises ConfigError, with the nearest name, if there is none."""
  check_choice("protocol", name, PROTOCOLS)
  return PROTOCOLS[name]
