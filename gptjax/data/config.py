"""DataConfig: which text, which tokenizer, how it is cut into rows."""

import dataclasses
import re
from collections.abc import Mapping

from gptjax.errors import ConfigError, check_choice


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
  """Where one corpus comes from: text files, token files, or a `datasets` hub name.

  Attributes:
    files: training text: paths and globs of txt, jsonl, jsonl.gz, csv, parquet. A txt file is
      one document; each record of the others is one.
    token_files: training tokens already made: nanoGPT's raw uint16 .bin or llm.c's format.
    hub: a `datasets` hub name, "name" or "name:configuration", streamed.
    hub_split, hub_valid_split: its splits; no validation split means valid_fraction of documents.
    text_column: the field of jsonl, csv, parquet and hub records that holds the text.
    valid_files, valid_token_files: held-out counterparts of files and token_files.
    valid_fraction: without held-out files, this fraction of the documents is drawn for
      validation; of a single document, its last part.
    weight: share of this corpus in a mixture.
  """

  files: tuple[str, ...] = ()
  token_files: tuple[str, ...] = ()
  hub: str = ""
  hub_split: str = "train"
  hub_valid_split: str = ""
  text_column: str = "text"
  valid_files: tuple[str, ...] = ()
  valid_token_files: tuple[str, ...] = ()
  valid_fraction: float = 0.1
  weight: float = 1.0

  def __post_init__(self):
    if not 0 <= self.valid_fraction < 1:
      raise ConfigError(f"data.valid_fraction is {self.valid_fraction}; it must be in [0, 1)")
    if self.weight < 0:
      raise ConfigError(f"data weight is {self.weight}; it must not be negative")

  @property
  def is_empty(self) -> bool:
    return not (self.files or self.token_files or self.hub)


@dataclasses.dataclass(frozen=True)
class DataConfig(CorpusConfig):
  """One corpus (its own fields) or a mixture of them, with a tokenizer and a row format.

  Attributes:
    mixture: {name: CorpusConfig}; used instead of this config's own corpus fields.
    tokenizer: "char", "bpe" (trained on the corpus), or a path: a tokenizer.json, a SentencePiece
      .model, or a folder with one of them or with GPT-2's or GPT-1's own files. For GPT-1's,
      "gpt1-paper:PATH" or "gpt1-hf:PATH" says how text is handled; see `load_tokenizer`.
    vocab_size: entries of a "bpe" tokenizer to train, end token included.
    end_token: text of the token that ends each document, which a tokenizer given by path must
      have; "" joins documents without one.
    rows: "stream" cuts rows from documents joined by the end token (GPT-3); "packed" puts whole
      documents (or context-long pieces) side by side, with segment ids that attention respects.
    cache_dir: where token files are built, one folder per fingerprint.
    build_processes: processes that tokenize, 0 for this one alone; None is one per core, or this
      one where there is little to do.
  """

  mixture: Mapping[str, CorpusConfig] = dataclasses.field(default_factory=dict)
  tokenizer: str = "bpe"
  vocab_size: int = 4096
  end_token: str = "<|endoftext|>"
  rows: str = "stream"
  cache_dir: str = "data/tokens"
  build_processes: int | None = None

  def __post_init__(self):
    super().__post_init__()
    check_choice("data.rows", self.rows, ("stream", "packed"))
    for name in self.mixture:
      if not re.fullmatch(r"\w[\w -]*", name):
        raise ConfigError(
          f'data.mixture has the name "{name}", which also names a folder; make it of letters,'
          " digits, _ and -"
        )
    if self.vocab_size >= 2**31:
      raise ConfigError(f"data.vocab_size is {self.vocab_size}; it must be below 2^31")
    if not self.cache_dir:
      raise ConfigError("data.cache_dir is empty; name a folder for the token files")
    if self.build_processes is not None and self.build_processes < 0:
      raise ConfigError(f"data.build_processes is {self.build_processes}; it must be at least 0")
    if self.mixture and not self.is_empty:
      raise ConfigError("data.mixture and data.files/token_files/hub are both set; keep one")
    if not self.mixture and self.weight != 1:
      raise ConfigError(f"data.weight is {self.weight}, which has no effect without data.mixture")
    corpus_fields = dataclasses.fields(CorpusConfig) if self.mixture else ()
    stray = [f"data.{f.name}" for f in corpus_fields if getattr(self, f.name) != f.default]
    if stray:
      raise ConfigError(
        f"{', '.join(stray)} has no effect beside data.mixture; set it in the mixture's corpora"
      )

  @property
  def corpora(self) -> Mapping[str, CorpusConfig]:
    """The corpora to build by name: the mixture, or this config itself as "corpus"."""
    return self.mixture or {"corpus": self}
