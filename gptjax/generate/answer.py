"""What `generate` answers: texts, tokens and figures of finished rows."""

import dataclasses

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.generate import sampling
from gptjax.generate.beams import LENGTH as BEAMS_LENGTH
from gptjax.generate.finished import FinishedRows
from gptjax.generate.options import DecodingOptions, is_sampled
from gptjax.generate.stopping import cut_at_stop

REASONS = {
  sampling.END_TOKEN: "stop",
  sampling.STOP_STRING: "stop",
  sampling.LENGTH: "length",
  BEAMS_LENGTH: "length",
  sampling.RUNNING: "length",  # a beam that the rules left empty
}


@dataclasses.dataclass(frozen=True)
class Generation:
  """What was generated; the rows of one prompt stand together.

  Attributes:
    prompts: token ids of each prompt.
    texts: new text of each row, without end token and stop text; None without a tokenizer.
    tokens: int32 [rows, length], prompts included, padded at the end.
    logprobs: float32 [rows, new], in nats, under the model before any rule or warping; 0 after the
      end of a row.
    finish_reasons: "stop" (an end token or a stop text) or "length" of each row.
    num_new: int32 [rows], new tokens of each row, the end token included.
    scores: float32 [rows] of beams: summed scores / length ** length_penalty; else None.
    top_tokens, top_logprobs: [rows, new, n], the likeliest at each place, if asked for.
    seed: of the draws; None where nothing was drawn.
    num_rounds: int32 [rows] where tokens were guessed: how often the model read guesses of the row,
      which it does once a token without.
  """

  prompts: list[list[int]]
  texts: list[str] | None
  tokens: np.ndarray
  logprobs: np.ndarray
  finish_reasons: list[str]
  num_new: np.ndarray
  scores: np.ndarray | None = None
  top_tokens: np.ndarray | None = None
  top_logprobs: np.ndarray | None = None
  seed: int | None = None
  num_rounds: np.ndarray | None = None


def make_generation(
  ids: list[list[int]],
  rows: FinishedRows,
  options: DecodingOptions,
  seed: int,
  tokenizer: Tokenizer | None,
  padding: int,
) -> Generation:
  """Puts together what was asked for.

  Args:
    ids: of each prompt.
    rows: of one prompt side by side.
    options: all looked up.
    seed: of the draws.
    tokenizer: None gives no texts.
    padding: the id that fills rows after their end.
  """
  new_R = rows.length_R - rows.prompt_length_R
  # Places of the new tokens, [R, new]; those after a row's end are marked.
  steps_N = np.arange(max(int(new_R.max()), 1))
  is_new_RN = steps_N[None] < new_R[:, None]
  place_RN = np.minimum(rows.prompt_length_R[:, None] + steps_N[None], rows.tokens_RS.shape[1] - 1)
  width = int(rows.length_R.max())
  is_token_RL = np.arange(width)[None] < rows.length_R[:, None]
  top_tokens = top_logprobs = None
  if rows.alternatives is not None:
    at = np.arange(len(new_R))[:, None], place_RN
    top_tokens = np.where(is_new_RN[..., None], rows.alternatives.ids_RSX[at], 0)
    top_logprobs = np.where(is_new_RN[..., None], rows.alternatives.logprobs_RSX[at], 0)
  return Generation(
    prompts=ids,
    texts=None if tokenizer is None else _texts(rows, options, tokenizer),
    tokens=np.where(is_token_RL, rows.tokens_RS[:, :width], padding),
    logprobs=np.where(is_new_RN, np.take_along_axis(rows.logprobs_RS, place_RN, axis=1), 0),
    finish_reasons=[REASONS[int(code)] for code in rows.finish_R],
    num_new=new_R,
    scores=rows.scores_R,
    top_tokens=top_tokens,
    top_logprobs=top_logprobs,
    seed=int(seed) if is_sampled(options) else None,
    num_rounds=rows.num_rounds_R,
  )


def _texts(rows: FinishedRows, options: DecodingOptions, tokenizer: Tokenizer) -> list[str]:
  texts = []
  lines = zip(rows.tokens_RS, rows.prompt_length_R, rows.length_R, rows.finish_R)
  for tokens_S, prompt_length, length, finish in lines:
    last = length - (finish == sampling.END_TOKEN)
    ids = tokens_S[:last].tolist()
    # Spare rows of a vocabulary have ids that no tokenizer knows.
    new = [i for i in ids[prompt_length:] if i < tokenizer.vocab_size]
    text = tokenizer.decode_after(ids[:prompt_length], new)
    texts.append(cut_at_stop(text, options.stop))
  return texts
