"""`gptjax convert`: a model of any kind, written as a Hugging Face folder or a run directory."""

import sys

import gptjax


def convert(source: str, destination: str, format: str, dtype: str | None) -> None:
  """Loads a model and writes it again; by default in the dtype of its files."""
  gptjax.load(source, dtype=dtype).save(destination, format=format)
  print(f"{source} is now also {destination} ({format})", file=sys.stderr)
