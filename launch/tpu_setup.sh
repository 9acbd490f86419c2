#!/usr/bin/env bash
# Run on a TPU VM by launch/tpu_vm.sh: Python 3.12, gptjax, and what a gs:// WORKDIR needs.
# The Ubuntu 22.04 of the TPU images has Python 3.10, which jax no longer supports.
set -euo pipefail
workdir=${1:-}
if ! python3.12 -c 'import ensurepip' 2>/dev/null; then
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  sudo apt-get update -q
  sudo DEBIAN_FRONTEND=noninteractive apt-get install -qy python3.12 python3.12-venv
fi
make setup ACCELERATOR=tpu PYTHON=python3.12
if [[ $workdir == *://* ]]; then
  .venv/bin/pip install -qq --prefer-binary -e '.[cloud]'
fi
