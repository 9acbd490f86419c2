"""The command line's own manners: verbs, unknown flags, overrides, exit status."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gptjax import __version__
from gptjax.cli.arguments import split_overrides
from gptjax.cli.compilation import enable_compilation_cache
from gptjax.cli.main import main
from gptjax.errors import ConfigError

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def test_version_is_quick_and_imports_no_jax():
  code = "import sys; from gptjax.cli.main import main\ntry: main(['--version'])\nfinally: "
  code += "print('jax' in sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.split() == ["gptjax", __version__, "False"]


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (["--verison"], 'did you mean "--version"?'),
    (["pretrian"], 'did you mean "pretrain"?'),
    (["pretrain", "--config", "x.py", "--wrkdir", "d"], "--workdir"),
    (["pretrain", "--workdir", "d"], "--config"),
    (["pretrain", "--config", "x.py", "--workdir", "my", "run"], '"run" belongs to no flag'),
    (["pretrain", "--config", "experiments/none.py", "--workdir", "d"], "experiments/none.py"),
    (["pretrain", "--config", "experiments/gpt2.py", "--workdir", ""], "--workdir is empty"),
    (["data", "--config.seed=1"], "--config"),
    ([], "give a verb"),
    (["data", "hide", "--config", "x.py", "--step", "1"], "show"),
  ],
)
def test_mistakes_are_one_line_and_status_2(arguments, expected, capsys):
  assert main(arguments) == 2
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert line.startswith("gptjax: ")
  assert expected in line


def test_overrides_are_taken_out_of_the_arguments():
  rest, overrides = split_overrides(
    ["pretrain", "--config.a.b=1=2", "--config", "f.py", "--config.seed", "3"]
  )
  assert rest == ["pretrain", "--config", "f.py"]
  assert overrides == {"a.b": "1=2", "seed": "3"}


def test_an_override_without_value_is_refused():
  with pytest.raises(ConfigError, match=r"--config\.seed has no value"):
    split_overrides(["--config.seed"])


def test_every_compiled_program_is_kept_between_processes(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("GPTJAX_CACHE", raising=False)
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = [getattr(jax.config, name) for name in names]
  # jax decides once in a process whether and where it keeps programs; others may have compiled.
  compilation_cache.reset_cache()
  try:
    enable_compilation_cache()
    jax.jit(lambda x: x * 3)(jnp.arange(5))  # far below jax's own threshold of a second
    assert list((tmp_path / "gptjax" / "programs").glob("jit__lambda*"))
  finally:
    for name, value in zip(names, before):
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_data_show_prints_one_object(tmp_path, capsys):
  file = tmp_path / "own.txt"
  file.write_text("\n".join(map(str, range(999))))
  arguments = ["data", "show", "--config", f"{EXPERIMENTS}/shakespeare.py:tiny", "--step", "3"]
  arguments += [f"--config.data.files=['{file}']", f"--config.data.cache_dir={tmp_path}/tokens"]
  assert main([*arguments, "--json"]) == 0
  (span,) = json.loads(capsys.readouterr().out)["spans"]
  assert span["path"] == str(file)
  assert file.read_bytes()[span["start_byte"] : span["end_byte"]].decode() == span["text"]
  assert main(arguments) == 0
  shown = capsys.readouterr().out
  assert shown.startswith(f"--- {file} bytes {span['start_byte']}-{span['end_byte']} of the file")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
  """`gptjax data show ... | head -1`, with more text than a pipe holds."""
  file = tmp_path / "own.txt"
  file.write_text("x" * 200_000)
  arguments = [f"--config.data.files=['{file}']", f"--config.data.cache_dir={tmp_path}/tokens"]
  arguments += ["--config.data.tokenizer=char", "--config.model.context_length=150000"]
  arguments += ["--config.data.end_token=", "--config.data.valid_fraction=0"]
  command = [sys.executable, "-m", "gptjax", "data", "show", "--step", "1", *arguments]
  command += ["--config", f"{EXPERIMENTS}/shakespeare.py:tiny"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    assert process.stdout.read(4) == b"--- "
    process.stdout.close()
    assert process.stderr.read() == b""
  assert process.returncode == 141
