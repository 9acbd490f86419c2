"""Finds what is wrong with a checkpoint: our decoder against the NumPy reference, piece by piece.

The two share the parameters, so a checkpoint that was converted wrongly makes them agree on
nonsense. What tells then is text: the known mistakes are undone in the reference one at a time,
and the one whose undoing makes the text likelier, by more than chance would, is named.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint.compare import (
  WHOLE_TOLERANCE,
  Comparison,
  compare,
  decoder_logits,
  relative_error,
)
from gptjax.checkpoint.mistakes import Suspect, known_mistakes
from gptjax.checkpoint.reference import Activations, reference_activations
from gptjax.errors import CheckpointError, DataError
from gptjax.model.config import ModelConfig
from gptjax.model.recipe import nearest_recipe
from gptjax.tree import named_leaves

PyTree = Any

# Of the loss on a text, nats a token, and in standard errors of the difference.
MARGIN = 0.02
MARGIN_ERRORS = 4
# Enough where the change also restores what was published.
MARGIN_PUBLISHED = 0.001
MARGIN_ERRORS_PUBLISHED = 2
# And the model without the mistake must know the language: its loss as a part of chance's.
KNOWS_LANGUAGE = 0.9
_RANDOM_TOKENS = 16
_TEXT_TOKENS = 128
_ROW_TOKENS = 64

# Everyday English, so that any English model finds it likely.
TEXT = (
  "It was raining when they left the house, and by the time they reached the station the streets"
  " were full of water. The train was late, as it often was in the winter, so they sat down in a"
  " small cafe across the road and ordered two cups of tea. An old man at the next table was"
  " reading a newspaper. He looked up, smiled at them, and said that the weather would be better"
  " in the morning. Nobody believed him, but it was a kind thing to say, and when they woke up the"
  " next day the sun was shining and there was not a cloud in the sky."
)


@dataclasses.dataclass(frozen=True)
class Trial:
  """A known mistake undone in the reference.

  Attributes:
    kind, change: of the mistake.
    is_published: it leads towards the nearest published recipe.
    error: of the reference's logits against our decoder's; None where they agree anyway.
    repairs: it makes the reference agree with our decoder, which it did not.
    loss, gain, gain_error: nats a token on the text, what was gained, and its standard error; None
      without a text.
  """

  kind: str
  change: str
  is_published: bool
  error: float | None
  repairs: bool
  loss: float | None
  gain: float | None
  gain_error: float | None

  @property
  def is_likelier(self) -> bool:
    """Whether it makes the text likelier by a clear margin."""
    if self.gain is None:
      return False
    published = max(MARGIN_PUBLISHED, MARGIN_ERRORS_PUBLISHED * self.gain_error)
    if self.is_published and self.gain > published:
      return True
    return self.gain > max(MARGIN, MARGIN_ERRORS * self.gain_error)

  @property
  def is_unlikelier(self) -> bool:
    """Whether it makes the text less likely by a clear margin."""
    return self.gain is not None and -self.gain > max(MARGIN, MARGIN_ERRORS * self.gain_error)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """What the doctor found.

  Attributes:
    comparisons: in the order of computation.
    trials: one for each known mistake.
    not_finite: parameters with values that are not numbers.
    loss: of the text, nats a token; None without one.
    chance: loss of a model that knows nothing.
    recipe: the published model that the config is nearest to.
  """

  comparisons: list[Comparison]
  trials: list[Trial]
  not_finite: list[str]
  loss: float | None
  chance: float
  recipe: str

  @property
  def disagreement(self) -> Comparison | None:
    """The first activation in which decoder and reference differ."""
    return next((found for found in self.comparisons if not found.agrees), None)

  @property
  def culprit(self) -> Trial | None:
    """The mistake that explains what is wrong, if something is and one does."""
    if self.not_finite:
      return None
    if self.disagreement is not None:
      return min((t for t in self.trials if t.repairs), key=lambda t: t.error, default=None)
    likelier = [t for t in self.trials if t.is_likelier and t.loss < KNOWS_LANGUAGE * self.chance]
    most = max((trial.gain for trial in likelier), default=0.0)
    # Of those the text cannot tell apart, what was published.
    near = [trial for trial in likelier if trial.gain > most - MARGIN]
    return max(near, key=lambda trial: (trial.is_published, trial.gain), default=None)

  @property
  def suspicions(self) -> list[Trial]:
    """What leaves the published recipe, where the text is too short or absent to judge it."""
    return [
      trial
      for trial in self.trials
      if trial.is_published and not trial.is_likelier and not trial.is_unlikelier
    ]

  @property
  def is_faulty(self) -> bool:
    """Whether something is wrong with the checkpoint, and was found."""
    return bool(self.not_finite or self.disagreement or self.culprit)

  @property
  def is_healthy(self) -> bool:
    """Whether nothing wrong was found, and the model knows the text, if there is one."""
    return not self.is_faulty and (self.loss is None or self.loss < self.chance)

  @property
  def verdict(self) -> str:
    """What is wrong, in a sentence."""
    culprit, place = self.culprit, self.disagreement
    if self.not_finite:
      return f"values that are not finite, first in {self.not_finite[0]}"
    if place is not None:
      why = f"{culprit.kind}: {culprit.change} repairs it" if culprit else "no known mistake"
      return f"the decoder leaves the reference first at {place.describe()}; {why}"
    if culprit is not None:
      return (
        f"{culprit.kind}: {culprit.change} lowers the loss of the text from {self.loss:.4f} to"
        f" {culprit.loss:.4f} nats a token"
      )
    return self._without_culprit() + "".join(
      f"; but {trial.kind}: {trial.change} is what {self.recipe} has, and no text told them apart"
      for trial in self.suspicions
    )

  def _without_culprit(self) -> str:
    if self.loss is None:
      return "the decoder equals the reference; only a text could tell if the weights are right"
    if self.loss >= self.chance:
      return (
        f"the loss of the text, {self.loss:.4f} nats a token, is no better than chance"
        f" ({self.chance:.4f}), and no known mistake explains it: weights that are not trained,"
        " or a text or tokenizer that is not the model's"
      )
    return "healthy: the decoder equals the reference, and no known mistake makes the text likelier"


def examine(
  params: PyTree,
  config: ModelConfig,
  text_ids: list[int] | None = None,
  reference: tuple[PyTree, ModelConfig] | None = None,
  seed: int = 0,
) -> Diagnosis:
  """Examines a model.

  Args:
    params, config: what our decoder runs, in float32.
    text_ids: token ids of a text the model should find likely, or None.
    reference: another (params, config) for the reference, such as the same model from another
      file; None is the same.
    seed: of the random tokens that decoder and reference are compared on.

  Raises:
    DataError: the text is too short or has ids that are not in the vocabulary.
    CheckpointError: the reference is of another architecture.
  """
  config = dataclasses.replace(config, compute_dtype="float32")
  other_params, other_config = reference or (params, config)
  _check_same_architecture(config, other_config, params, other_params)
  suspect = Suspect(jax.device_get(other_params), other_config)
  not_finite = [n for n, leaf in named_leaves(params).items() if not jnp.isfinite(leaf).all()]
  text = None
  if text_ids is not None and not not_finite:
    text = _Text(text_rows(text_ids, config), suspect)
  rng = np.random.default_rng(seed)
  # The last place stays free for the offsets.
  length = max(1, min(_RANDOM_TOKENS, config.context_length - 1))
  tokens_BL = rng.integers(0, config.vocab_size, (1, length)).astype(np.int32)
  comparisons = compare(params, config, _run(suspect, tokens_BL), tokens_BL)
  ours_BLV = None
  if not not_finite and not all(found.agrees for found in comparisons):
    ours_BLV = decoder_logits(params, config, tokens_BL)
  return Diagnosis(
    comparisons,
    _try_mistakes(suspect, tokens_BL, ours_BLV, text),
    not_finite,
    None if text is None else float(text.losses_T.mean()),
    math.log(config.vocab_size),
    nearest_recipe(other_config).name,
  )


def text_rows(ids: list[int], config: ModelConfig) -> np.ndarray:
  """Cuts the start of a text into rows [B, L + 1], about as much as the reference can take."""
  ids = np.asarray(ids, np.int32)
  outside = ids[(ids < 0) | (ids >= config.vocab_size)]
  if outside.size:
    raise DataError(
      f"the text has the token id {outside[0]}, and the model's are 0 to {config.vocab_size - 1}"
    )
  # The last place stays free for the offsets.
  length = min(_ROW_TOKENS, config.context_length - 1, len(ids) - 1)
  if length < 1:
    raise DataError(f"the text has {len(ids)} tokens; the doctor needs some more")
  num_rows = min(len(ids) // (length + 1), max(1, _TEXT_TOKENS // length))
  return ids[: num_rows * (length + 1)].reshape(num_rows, length + 1)


def _try_mistakes(
  suspect: Suspect, tokens_BL: np.ndarray, ours_BLV: np.ndarray | None, text: "_Text | None"
) -> list[Trial]:
  """Undoes each known mistake; against our decoder's logits, and on the text, if there are."""

  def error_of(suspect):
    return relative_error(ours_BLV, _run(suspect, tokens_BL)["logits"])

  before = None if ours_BLV is None else error_of(suspect)
  num_differences = _num_differences(suspect)
  trials = []
  for mistake in known_mistakes(suspect):
    error = None if ours_BLV is None else error_of(mistake.undone)
    is_small = error is not None and error <= WHOLE_TOLERANCE
    measured = (None,) * 3 if text is None else text.measure(mistake.undone)
    trials.append(
      Trial(
        mistake.kind,
        mistake.change,
        _num_differences(mistake.undone) < num_differences,
        error,
        # A mistake that was small already is not repaired by every other change.
        is_small and not error > before / 2,
        *measured,
      )
    )
  return trials


def _num_differences(suspect: Suspect) -> int:
  return len(nearest_recipe(suspect.config).differences)


class _Text:
  """Rows of text and the loss of each of its tokens before anything is undone, nats [T]."""

  def __init__(self, rows_BL: np.ndarray, suspect: Suspect):
    self._rows_BL = rows_BL
    self.losses_T = _token_losses(suspect, rows_BL)

  def measure(self, suspect: Suspect) -> tuple[float, float, float]:
    """Returns (loss, gain, standard error of the gain), nats a token."""
    losses_T = _token_losses(suspect, self._rows_BL)
    gains_T = self.losses_T - losses_T
    error = gains_T.std(ddof=1) / math.sqrt(gains_T.size) if gains_T.size > 1 else math.inf
    return float(losses_T.mean()), float(gains_T.mean()), float(error)


def _run(suspect: Suspect, tokens_BL: np.ndarray) -> Activations:
  places = np.arange(tokens_BL.shape[1]) + suspect.position_offset
  places = places.clip(0, suspect.config.context_length - 1)
  positions_BL = np.tile(places, (tokens_BL.shape[0], 1))
  return reference_activations(suspect.params, suspect.config, tokens_BL, positions_BL)


def _token_losses(suspect: Suspect, text_BL: np.ndarray) -> np.ndarray:
  """Returns the loss of each token after the first of its row, nats [T]."""
  logits_BLV = _run(suspect, text_BL[:, :-1])["logits"]
  shifted = logits_BLV - logits_BLV.max(axis=-1, keepdims=True)
  log_sum_BL = np.log(np.exp(shifted).sum(axis=-1))
  target_BL = np.take_along_axis(shifted, text_BL[:, 1:, None], axis=-1)[..., 0]
  return (log_sum_BL - target_BL).ravel()


def _check_same_architecture(
  config: ModelConfig, other: ModelConfig, params: PyTree, other_params: PyTree
) -> None:
  for field in ("norm_position", "parallel_residual", "shared_norm", "positions", "num_heads"):
    if getattr(config, field) != getattr(other, field):
      raise CheckpointError(
        f"{field} is {getattr(config, field)} and {getattr(other, field)}; the doctor compares"
        " models of one architecture"
      )
  ours, theirs = named_leaves(params), named_leaves(other_params)
  for name in [*ours, *theirs]:
    shapes = [leaves[name].shape if name in leaves else None for leaves in (ours, theirs)]
    if shapes[0] != shapes[1]:
      raise CheckpointError(
        f"{name} is {shapes[0]} and {shapes[1]}; the doctor compares models of one architecture"
      )
