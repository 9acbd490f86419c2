"""Perplexity with a sliding window: every token of a text, each scored once, and the figures.

An evaluation that is cut off continues from the windows it has scored.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checkpoint.models import Loaded, to_stderr
from gptjax.data.building import show_progress
from gptjax.evaluate.paper import compare_with_paper
from gptjax.evaluate.protocol import Protocol
from gptjax.evaluate.receipt import identify, make_receipt
from gptjax.evaluate.scoring import BATCH_TOKENS, Row, Scorer
from gptjax.evaluate.statistics import independent_units, perplexity_of, standard_error
from gptjax.evaluate.texts import Corpus, read_corpus
from gptjax.evaluate.windows import Windows, cut_windows

# Windows are scored, and written down, so many batches at a time.
_BATCHES_A_BLOCK = 8


def measure_perplexity(
  data: Sequence[str],
  model: Loaded,
  scorer: Scorer,
  protocol: Protocol,
  say: Callable[[str], None] = to_stderr,
) -> dict[str, Any]:
  """Scores texts and returns the receipt.

  Args:
    data: as `read_corpus` takes it.
    model, scorer: what scores.
    protocol: need not be resolved.
    say: takes lines about what a reader of the figures should know.

  Raises:
    UserError: as `read_corpus`, or a protocol that the model has no room for.
  """
  protocol = protocol.resolve(model.config)
  corpus = read_corpus(data, model, protocol)
  windows = cut_windows(corpus, protocol)
  _remark(corpus, windows, protocol, say)
  asked = {"protocol": dataclasses.asdict(protocol), "data_hash": corpus.data_hash}
  identity = identify(model)
  path = progress_path(identity | asked)
  with show_progress("scoring", int(windows.scored_W.sum()), "tokens") as advance:
    nats_W = score_windows(windows, scorer, path, advance, say)
  found = figures(nats_W, windows, corpus)
  found["score"] = {"name": protocol.score, "value": found[protocol.score]}
  found["published"] = compare_with_paper(protocol.name, found, model.config)
  return make_receipt("perplexity", identity, found, **asked)


def _remark(
  corpus: Corpus, windows: Windows, protocol: Protocol, say: Callable[[str], None]
) -> None:
  longest = max(map(len, corpus.documents))
  if longest < protocol.context:
    say(f"the longest document has {longest} tokens, fewer than the {protocol.context} of a window")
  total = sum(map(len, corpus.documents))
  share = 1 - windows.scored_W.sum() / total
  # What a start token adds is scored nowhere, and is no loss.
  if protocol.start == "none" and share > 1e-3:
    say(
      f"{share:.1%} of the tokens have nothing before them and are not scored, so figures by words,"
      " bytes and characters are too low by as much; a start token or a smaller stride mends it"
    )


def score_windows(
  windows: Windows,
  scorer: Scorer,
  progress_file: Path | None = None,
  advance: Callable[[int], None] = lambda num_tokens: None,
  say: Callable[[str], None] = to_stderr,
) -> np.ndarray:
  """Scores windows, going on from what a progress file holds, which is removed at the end.

  Args:
    windows: what to score.
    scorer: of the model.
    progress_file: named by `progress_path`; None keeps nothing.
    advance: called with the number of tokens scored, as they are.
    say: told how much of it was scored before.

  Returns:
    float64 [W], the nats of each window: minus the sum of its log-likelihoods.
  """
  done = [] if progress_file is None else _read_progress(progress_file)
  done = done[: len(windows.rows)]
  scored_W = windows.scored_W
  if done:
    say(f"{len(done)} of {len(windows.rows)} windows were scored before; going on from there")
  advance(int(scored_W[: len(done)].sum()))
  with _progress_log(progress_file, say) as write:
    write(done)
    for block in _blocks(windows.rows, len(done)):
      nats = [-scores.logprob for scores in scorer.score(block)]
      done += nats
      write(nats)
      advance(sum(row.num_scored for row in block))
  return np.array(done, np.float64)


def _blocks(rows: list[Row], start: int) -> Iterator[list[Row]]:
  block, num_tokens = [], 0
  for row in rows[start:]:
    block.append(row)
    num_tokens += len(row.tokens)
    if num_tokens >= _BATCHES_A_BLOCK * BATCH_TOKENS:
      yield block
      block, num_tokens = [], 0
  if block:
    yield block


def progress_path(identity: dict[str, Any]) -> Path | None:
  """Names where an evaluation writes what it has scored; GPTJAX_CACHE=off switches it off.

  Args:
    identity: JSON of all that decides the nats: model, tokenizer, data, protocol.
  """
  if os.environ.get("GPTJAX_CACHE") == "off":
    return None
  home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
  return Path(home, "gptjax", "scores", f"{name[:32]}.jsonl")


def _read_progress(path: Path) -> list[float]:
  if not path.is_file():
    return []
  nats = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      nats += json.loads(line)
    except ValueError:
      break
  return nats


@contextlib.contextmanager
def _progress_log(
  path: Path | None, say: Callable[[str], None]
) -> Iterator[Callable[[list[float]], None]]:
  """Gives what writes nats down, for as long as not all are known; or what writes nothing."""
  file = None
  if path is not None:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      # Anew, since the last line of a file that was cut off may be half a line.
      file = path.open("w", encoding="utf-8")
    except OSError as error:
      say(f"what is scored is not kept, and cannot be gone on from: {error}")
  if file is None:
    yield lambda nats: None
    return

  def write(nats: list[float]) -> None:
    # Python writes the shortest text that reads back as the same number.
    file.write(json.dumps(nats) + "\n")
    file.flush()

  with file:
    yield write
  path.unlink(missing_ok=True)


def figures(nats_W: np.ndarray, windows: Windows, corpus: Corpus) -> dict[str, Any]:
  """Computes every figure of a scored corpus.

  A perplexity that is no float, such as that of a word where none are parted, is None.

  Returns:
    nats_per_token; its standard_error, and what it is over ("documents" or "windows", taken as
    independent); token_perplexity; word_perplexity, bits_per_byte, bits_per_character: all nats
    divided by the words, bytes and characters of the original text, None where it is not known;
    transformers_perplexity, the same log-likelihoods as transformers' recipe weighs them, which
    counts a token less in every window after the first; tokens (scored); counts.
  """
  nats, scored_W = math.fsum(nats_W), windows.scored_W
  tokens = int(scored_W.sum())
  in_documents = sum(map(len, corpus.documents))
  unit, units = independent_units(windows.document_W)
  bits = nats / math.log(2)
  return {
    "token_perplexity": perplexity_of(nats / tokens),
    "word_perplexity": perplexity_of(nats / corpus.words) if corpus.words else None,
    "bits_per_byte": bits / corpus.bytes if corpus.bytes else None,
    "bits_per_character": bits / corpus.characters if corpus.characters else None,
    "nats_per_token": nats / tokens,
    "standard_error": standard_error(nats_W, scored_W, units),
    "standard_error_over": unit,
    "tokens": tokens,
    "transformers_perplexity": _transformers_perplexity(nats_W, windows),
    "counts": {
      "documents": len(corpus.documents),
      "windows": len(windows.rows),
      "tokens_not_scored": in_documents - tokens,
      "words": corpus.words,
      "bytes": corpus.bytes,
      "characters": corpus.characters,
    },
  }


def _transformers_perplexity(nats_W: np.ndarray, windows: Windows) -> float | None:
  weights_W = windows.new_W - 1
  if not weights_W.sum():
    return None
  means_W = nats_W / windows.scored_W
  return perplexity_of(float(means_W @ weights_W / weights_W.sum()))
