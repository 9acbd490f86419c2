"""The Makefile, launch/ and setup.cfg keep what the README and docs/launch.md promise."""

import configparser
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import gptjax

ROOT = Path(__file__).parent.parent
PROMISED_TARGETS = {"setup", "data", "pretrain", "test", "test-hf", "lint", "ci"} | {
  "bench",
  "prove-resume",
  "golden",
}
SCRIPTS = [*sorted((ROOT / "launch").iterdir()), ROOT / ".ci" / "run"]


@pytest.fixture
def checkout(tmp_path):
  """The files that make reads, alone in a folder: no .venv, nothing built."""
  for name in ("Makefile", "setup.cfg", "pyproject.toml"):
    shutil.copy(ROOT / name, tmp_path)
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  return tmp_path


def run(*command, cwd=ROOT, path_first=None, **variables):
  # make hands its variables to the commands it starts, so inside `make test` they would leak here.
  leaked = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "JAX_PLATFORMS", "ACCELERATOR", "CONFIG", "WORKDIR"}
  environment = {name: value for name, value in os.environ.items() if name not in leaked}
  environment = {
    name: value for name, value in environment.items() if not name.startswith("TPU_")
  } | variables
  if path_first:
    environment["PATH"] = f"{path_first}{os.pathsep}{environment['PATH']}"
  return subprocess.run(
    [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
  )


def install_fake(folder, name, body):
  folder.mkdir(parents=True, exist_ok=True)
  script = folder / name
  script.write_text(f"#!/bin/sh\n{body}\n")
  script.chmod(script.stat().st_mode | stat.S_IXUSR)
  return folder


def fake_nvidia_smi(folder, driver, capability):
  return install_fake(
    folder,
    "nvidia-smi",
    f'case "$1" in -L) echo "GPU 0: Fake (UUID: GPU-0)";; *) echo "{driver}, {capability}";; esac',
  )


def no_gpu(folder):
  # As on a machine with the driver's tools and no card.
  return install_fake(folder, "nvidia-smi", 'echo "NVIDIA-SMI has failed" >&2; exit 9')


def accelerator(tmp_path, *args, **kwargs):
  result = run(ROOT / "launch" / "accelerator.sh", *(args or ("auto", tmp_path)), **kwargs)
  assert result.returncode == 0, result.stderr
  return result.stdout.strip()


def read_setup_cfg():
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg", encoding="utf-8")
  return parser


def requirements(text):
  lines = [line.strip() for line in text.splitlines()]
  return [line for line in lines if line and not line.startswith("#")]


def test_bare_make_lists_the_promised_targets(checkout):
  listed = re.findall(r"^  ([a-z-]+) {2,}\S", run("make", cwd=checkout).stdout, re.MULTILINE)
  assert not PROMISED_TARGETS - set(listed)


def test_every_target_is_phony_and_has_a_comment():
  text = (ROOT / "Makefile").read_text()
  phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())
  documented = set(re.findall(r"^([a-z-]+):.*## \w", text, re.MULTILINE))
  assert phony == documented


def test_pretrain_sets_up_fetches_the_default_corpus_and_trains(checkout):
  plan = run("make", "-n", "pretrain", "ACCELERATOR=cpu", cwd=checkout).stdout
  steps = ["-m venv .venv", "-e '.'", "-m gptjax.data.shakespeare", "gptjax pretrain"]
  places = [plan.index(step) for step in steps]
  assert places == sorted(places)
  assert "--config 'experiments/shakespeare.py' --workdir 'runs/shakespeare'" in plan


@pytest.mark.parametrize(
  ("config", "wants_data"),
  [
    ("experiments/shakespeare.py:tiny", True),
    ("experiments/gpt2.py:medium,tiny", True),
    ("experiments/shakespeare_char.py", False),
    ("experiments/gpt2.py:size=medium", False),
  ],
)
def test_pretrain_passes_its_variables_on(checkout, config, wants_data):
  variables = (f"CONFIG={config}", "WORKDIR=a b", "ARGS=--config.seed=3", "ACCELERATOR=cpu")
  plan = run("make", "-n", "pretrain", *variables, cwd=checkout).stdout
  assert f"gptjax pretrain --config '{config}' --workdir 'a b' --config.seed=3" in plan
  assert ("gptjax.data.shakespeare" in plan) == wants_data


def test_ci_runs_everything_in_order_and_can_be_planned(checkout):
  plan = run("make", "-n", "ci", "ACCELERATOR=cpu", cwd=checkout).stdout
  steps = [
    "ruff check",
    "test_imports.py",
    "pytest -m slow",
    "pytest -m hf",
    "runs/smoke/own.txt bytes",
  ]
  places = [plan.index(step) for step in steps]
  assert places == sorted(places)


@pytest.mark.parametrize("target", ["setup", "pretrain", "test", "lint", "bench"])
def test_only_test_hf_installs_pytorch(checkout, target):
  assert "[test-hf]" not in run("make", "-n", target, cwd=checkout).stdout
  assert "-e '.[test-hf]'" in run("make", "-n", "test-hf", cwd=checkout).stdout


def test_set_up_happens_once_until_setup_cfg_changes(checkout):
  log = checkout / "log"
  # Stands for python3: makes a "virtual environment" whose python logs what it is asked to do.
  python = 'case "$*" in *" venv "*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;'
  python += f' touch .venv/bin/pip;; *) echo "$*" >> {log};; esac'
  fake = install_fake(checkout / "bin", "python3", python)
  command = ("make", "setup", "ACCELERATOR=cpu")

  assert run(*command, cwd=checkout, path_first=fake).returncode == 0
  first = log.read_text()
  assert "pip install" in first
  run(*command, cwd=checkout, path_first=fake)
  assert log.read_text() == first
  later = (checkout / ".venv" / "installed-cpu").stat().st_mtime + 10
  os.utime(checkout / "setup.cfg", (later, later))
  run(*command, cwd=checkout, path_first=fake)
  assert log.read_text().count("pip install") == 2


@pytest.mark.parametrize(("version", "accepted"), [("3, 10", 0), ("3, 11", 1), ("3, 14", 0)])
def test_python_out_of_range_is_refused_by_name(checkout, version, accepted):
  # Runs make's own check under a version of our choice; any other command fails.
  check = f'{sys.executable} -c "import sys; sys.version_info = ({version}, 0)\n$2"'
  fake = install_fake(
    checkout / "bin", "oldpython", f'case "$2" in *version_info*) {check};; *) exit 7;; esac'
  )
  result = run("make", "setup", "PYTHON=oldpython", cwd=checkout, path_first=fake)
  assert result.returncode == 2
  message = f"oldpython is Python {version.replace(', ', '.')}; gptjax needs 3.11, 3.12 or 3.13"
  assert (message not in result.stderr) == bool(accepted)


@pytest.mark.parametrize("value", ["gpu", "CUDA", "cpu tpu"])
def test_a_wrong_accelerator_is_refused_in_one_line(checkout, value):
  result = run("make", "-n", "setup", f"ACCELERATOR={value}", cwd=checkout)
  expected = f'ACCELERATOR is "{value}"; it must be auto, cpu, cuda or tpu'
  assert expected in result.stderr
  script = run(ROOT / "launch" / "accelerator.sh", value)
  assert (script.returncode, script.stderr) == (2, expected + "\n")


def test_accelerator_is_cpu_where_nothing_is_found(tmp_path):
  assert accelerator(tmp_path, path_first=no_gpu(tmp_path / "bin")) == "cpu"


@pytest.mark.parametrize(
  ("driver", "capability", "build"),
  [
    ("580.65.06", "9.0", "cuda13"),
    ("595.10", "12.0", "cuda13"),
    ("580.65.06", "7.0", "cuda12"),
    ("550.54.14", "9.0", "cuda12"),
    ("[N/A]", "", "cuda12"),
  ],
)
def test_cuda_build_follows_driver_and_gpu(tmp_path, driver, capability, build):
  path = fake_nvidia_smi(tmp_path / "bin", driver, capability)
  assert accelerator(tmp_path, path_first=path) == build
  assert accelerator(tmp_path, "cpu", path_first=path) == "cpu"


def test_cuda_without_a_driver_is_the_build_that_runs_on_most(tmp_path):
  assert accelerator(tmp_path, "cuda", path_first=no_gpu(tmp_path / "bin")) == "cuda12"


def test_tpus_are_found_by_device_file_and_by_pci_id(tmp_path):
  path = fake_nvidia_smi(tmp_path / "bin", "580.65.06", "9.0")
  v4 = tmp_path / "v4"
  (v4 / "dev").mkdir(parents=True)
  (v4 / "dev" / "accel0").touch()
  assert accelerator(tmp_path, "auto", v4, path_first=path) == "tpu"

  card = tmp_path / "v5e" / "sys/bus/pci/devices/0000:00:05.0"
  card.mkdir(parents=True)
  (card / "vendor").write_text("0x1ae0\n")
  (card / "device").write_text("0x0063\n")
  assert accelerator(tmp_path, "auto", tmp_path / "v5e", path_first=path) == "tpu"
  assert accelerator(tmp_path, "cuda", tmp_path / "v5e", path_first=path) == "cuda13"


def test_what_resembles_a_tpu_is_none(tmp_path):
  path = no_gpu(tmp_path / "bin")
  network_card = tmp_path / "sys/bus/pci/devices/0000:00:04.0"
  network_card.mkdir(parents=True)
  (network_card / "vendor").write_text("0x1ae0\n")
  (network_card / "device").write_text("0x0042\n")
  (tmp_path / "dev" / "accel").mkdir(parents=True)
  assert accelerator(tmp_path, path_first=path) == "cpu"
  # A laptop that names the TPU it drives, and a host that passes a card to a guest.
  assert accelerator(tmp_path, path_first=path, TPU_NAME="mine") == "cpu"
  (tmp_path / "dev" / "vfio").mkdir()
  (tmp_path / "dev" / "vfio" / "0").touch()
  assert accelerator(tmp_path, path_first=path) == "cpu"
  assert accelerator(tmp_path, path_first=path, TPU_NAME="mine") == "tpu"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_the_first_error(script):
  assert run("bash", "-n", script).stderr == ""
  text = script.read_text()
  assert text.startswith("#!/usr/bin/env bash\n")
  assert "\nset -euo pipefail\n" in text
  assert script.suffix == ".sbatch" or os.access(script, os.X_OK)


@pytest.mark.parametrize("name", ["tpu_vm.sh", "multi_gpu.sh", "processes.sh", "slurm.sbatch"])
def test_launch_scripts_without_arguments_say_how(name):
  result = run("bash", ROOT / "launch" / name)
  assert result.returncode == 2
  assert "WORKDIR CONFIG [--config.GROUP.KEY=VALUE ...]" in result.stderr


def test_tpu_pod_refuses_a_disk_that_hosts_do_not_share():
  result = run("bash", ROOT / "launch" / "tpu_pod.sh", "name", "zone", "runs/x", "config.py")
  assert result.returncode == 2
  assert result.stderr.count("\n") == 1 and '"runs/x"' in result.stderr


def test_tpu_pod_runs_one_command_on_every_worker(tmp_path):
  log = tmp_path / "log"
  fake = install_fake(tmp_path / "bin", "gcloud", f'echo "$*" >> {log}')
  arguments = ("pod", "zone-a", "gs://b/run", "experiments/gpt2.py", '--config.data.files=["a b"]')
  result = run("bash", ROOT / "launch" / "tpu_pod.sh", *arguments, path_first=fake)
  assert result.returncode == 0, result.stderr
  calls = log.read_text()
  assert "tpu-vm create" not in calls  # the fake says that it exists
  assert calls.count("--worker=all") == 2  # scp and ssh
  command = next(line for line in calls.splitlines() if line.startswith("nohup"))
  shown = run(
    "bash", "-c", command.replace("nohup .venv/bin/gptjax", "printf '%s\\n'").split(">")[0]
  )
  assert shown.stdout.splitlines()[-1] == '--config.data.files=["a b"]'


def test_slurm_gives_each_task_all_gpus_of_its_node(tmp_path):
  fake = install_fake(tmp_path / "bin", "srun", 'echo "$JAX_LOCAL_DEVICE_IDS $*"')
  result = run(
    "bash",
    ROOT / "launch" / "slurm.sbatch",
    *("runs/x", "experiments/gpt2.py", "--config.seed=1"),
    path_first=fake,
    SLURM_GPUS_ON_NODE="4",
    SLURM_CPUS_PER_TASK="8",
    SLURM_SUBMIT_DIR="/home/me/gptjax",
  )
  assert result.stdout.startswith("0,1,2,3 --kill-on-bad-exit=1 --cpus-per-task=8")
  assert result.stdout.rstrip().endswith(
    "/home/me/gptjax/.venv/bin/gptjax pretrain --config experiments/gpt2.py"
    " --workdir runs/x --config.seed=1"
  )


def test_every_dependency_has_its_reason():
  text = (ROOT / "setup.cfg").read_text()
  block = re.search(r"^install_requires =\n((?:    .*\n)+)", text, re.MULTILINE).group(1)
  lines = [line.strip() for line in block.splitlines()]
  unexplained = [
    line
    for above, line in zip(["", *lines], lines)
    if not line.startswith("#") and not above.startswith("#")
  ]
  assert lines and not unexplained


def test_torch_and_transformers_are_needed_by_parity_alone():
  config = read_setup_cfg()
  extras = dict(config["options.extras_require"])
  parity = requirements(extras.pop("test-hf"))
  names = {re.match(r"[\w-]+", line).group() for line in parity}
  assert names >= {"torch", "transformers"}
  assert any(line.startswith("torch==") for line in parity)
  others = [config["options"]["install_requires"], *extras.values()]
  assert not [line for text in others for line in requirements(text) if line.startswith("torch")]
  assert not [line for text in others for line in requirements(text) if "transformers" in line]


def test_every_extra_that_is_asked_for_exists():
  extras = dict(read_setup_cfg()["options.extras_require"])
  # pip 23.2 installs nothing for test_hf, and says so only in a warning.
  assert [name for name in extras if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)] == []
  files = [ROOT / "Makefile", ROOT / "docs" / "launch.md", *SCRIPTS]
  asked = {name for file in files for name in re.findall(r"-e '\.\[([a-z-]+)\]'", file.read_text())}
  stamps = set(re.findall(r"/installed-(test[a-z-]*)", (ROOT / "Makefile").read_text()))
  assert stamps == {"test", "test-hf", "test-serve"}
  assert asked | stamps | {"cuda12", "cuda13", "tpu"} <= set(extras)


def test_every_folder_with_code_is_packaged():
  folders = {file.parent for file in (ROOT / "gptjax").rglob("*.py")}
  assert folders
  assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_every_dependency_is_bounded():
  config = read_setup_cfg()
  lines = requirements(config["options"]["install_requires"])
  assert [line for line in lines if not re.search(r">=[\d.]+,<[\d.]+$", line)] == []


def test_python_versions_agree_everywhere():
  config = read_setup_cfg()
  assert config["options"]["python_requires"] == ">=3.11,<3.14"
  named = re.findall(r"Python :: (3\.\d+)", config["metadata"]["classifiers"])
  assert named == ["3.11", "3.12", "3.13"]
  assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "Makefile").read_text()
  assert 'target-version = "py311"' in (ROOT / "pyproject.toml").read_text()


def test_licence_and_changelog_belong_to_this_version():
  assert "Apache License" in (ROOT / "LICENSE").read_text()
  assert read_setup_cfg()["metadata"]["license"] == "Apache-2.0"
  assert f"## {gptjax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
