"""Room 7, what `import gptjax` gives: a thin face of pure functions."""

from gptjax.api.model import Model, load, set_seed
from gptjax.api.pipelines import pipeline

__all__ = ["Model", "load", "pipeline", "set_seed"]
