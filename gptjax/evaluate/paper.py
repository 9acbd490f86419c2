"""Published scores, by the preset they were published for.

Sources: Radford et al. 2019, table 3; for GPT-3, Brown et al. 2020, section 3.1, zero-shot.
"""

from typing import Any

from gptjax.model.config import ModelConfig
from gptjax.model.recipe import nearest_recipe

_COLUMNS = (
  ("lambada", "perplexity"),
  ("lambada", "accuracy_without_stop_words"),
  ("cbt-cn", "accuracy"),
  ("cbt-ne", "accuracy"),
  ("wikitext2", "word_perplexity"),
  ("ptb", "word_perplexity"),
  ("enwik8", "bits_per_byte"),
  ("text8", "bits_per_character"),
  ("wikitext103", "word_perplexity"),
  ("1bw", "word_perplexity"),
)
# Accuracies are fractions here.
_ROWS = {
  "gpt2": (35.13, 0.4599, 0.8765, 0.834, 29.41, 65.85, 1.16, 1.17, 37.50, 75.20),
  "gpt2-medium": (15.60, 0.5548, 0.9235, 0.871, 22.76, 47.33, 1.01, 1.06, 26.37, 55.72),
  "gpt2-large": (10.87, 0.6012, 0.9345, 0.880, 19.93, 40.31, 0.97, 1.02, 22.05, 44.575),
  "gpt2-xl": (8.63, 0.6324, 0.9330, 0.8905, 18.34, 35.76, 0.93, 0.98, 17.48, 42.16),
}
PUBLISHED: dict[str, dict[tuple[str, str], float]] = {
  preset: dict(zip(_COLUMNS, row, strict=True)) for preset, row in _ROWS.items()
}
PUBLISHED["gpt3-175b"] = {
  ("lambada", "perplexity"): 3.00,
  ("lambada", "accuracy"): 0.762,
  ("ptb", "word_perplexity"): 20.5,
}
# What makes a model another one than the preset, beside its weights.
_SIZES = ("vocab_size", "context_length", "num_layers", "model_dim", "num_heads")


def compare_with_paper(
  protocol: str, figures: dict[str, Any], config: ModelConfig
) -> list[dict[str, Any]]:
  """Puts figures beside those that were published for the nearest preset.

  Args:
    protocol: name of a benchmark.
    figures: {name: value}.
    config: of the model.

  Returns:
    For each figure with a published counterpart: {"figure", "model", "is_same_size", "published",
    "difference" (ours less theirs)}; nothing where the preset's paper has none.
  """
  recipe = nearest_recipe(config)
  is_same_size = not set(_SIZES).intersection(recipe.differences)
  return [
    {
      "figure": figure,
      "model": recipe.name,
      "is_same_size": is_same_size,
      "published": value,
      "difference": figures[figure] - value,
    }
    for (benchmark, figure), value in PUBLISHED.get(recipe.name, {}).items()
    if benchmark == protocol and figures.get(figure) is not None
  ]
