"""Compiled programs, kept between processes."""

import os
import sys
import tempfile
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
  """Keeps compiled programs between processes, under ~/.cache; GPTJAX_CACHE=off switches it off."""
  if os.environ.get("GPTJAX_CACHE") == "off":
    return
  home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  folder = Path(home, "gptjax", "programs")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    print(f"compiled programs are not kept: {error}", file=sys.stderr)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
