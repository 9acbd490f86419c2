"""gptjax: the GPT family in JAX/Flax.

Array names end in their shape, one letter a dimension (Shazeer 2024, "Shape Suffixes"):

| letter | meaning | | letter | meaning |
|---|---|---|---|---|
| B | rows of a batch (per device inside the step) | | K | width of one head |
| L | query positions | | F | feed-forward width |
| M | positions attended to (memory, cache) | | V | vocabulary |
| D | model width | | C | classes or answer choices of a head |
| H | heads | | N | layers (stacked axis) |
| T | tokens of a batch, flattened (B * L) | | A | accumulation micro-batches |
| P | local devices (pmap axis, always first) | | 1 | broadcast |

Scalars and pytrees carry no suffix. Losses are nats per token unless the name says otherwise.
"""

from typing import Any

from gptjax._version import __version__

# Found in gptjax.api when first used, so that `import gptjax` does not wait for jax.
_LAZY = ("Model", "load", "pipeline", "set_seed")

__all__ = ["Model", "__version__", "load", "pipeline", "set_seed"]


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    from gptjax import api

    return getattr(api, name)
  raise AttributeError(f"module 'gptjax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_LAZY])
