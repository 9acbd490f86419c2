"""The one batch struct that pretraining, fine-tuning and scoring share."""

from typing import Any

import jax
from flax import struct

Array = Any  # numpy on the host, jax on a device


@struct.dataclass
class Batch:
  """Rows of tokens with what to predict.

  Attributes:
    tokens_BL: int32 inputs.
    targets_BL: int32, the token to predict at each position; ignored where the weight is 0.
    weights_BL: float32 >= 0; 0 marks padding and prompt positions.
    positions_BL: int32 position of each token in its document, or None for 0 .. L-1.
    segment_ids_BL: int32, tokens attend only within one id, 0 marks padding; or None when each
      row is one segment without padding.
    labels_B: int32 or float32 task labels, one for each example, or None. An example may be several
      rows, which are neighbours: B is then fewer than there are rows.
  """

  tokens_BL: Array
  targets_BL: Array
  weights_BL: Array
  positions_BL: Array | None = None
  segment_ids_BL: Array | None = None
  labels_B: Array | None = None

  @property
  def num_rows(self) -> int:
    return self.tokens_BL.shape[0]

  def map(self, function) -> "Batch":
    """Applies `function` to every array that is present."""
    return jax.tree.map(function, self)
