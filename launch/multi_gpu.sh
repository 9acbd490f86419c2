#!/usr/bin/env bash
# Trains on every GPU of this host: one process drives them all. The same command again resumes.
#
#   launch/multi_gpu.sh WORKDIR CONFIG [--config.GROUP.KEY=VALUE ...]
#   launch/multi_gpu.sh runs/gpt2 experiments/gpt2.py                              # pmap
#   launch/multi_gpu.sh runs/gpt2 experiments/gpt2.py \
#     --config.train.mode=mesh --config.train.mesh_fsdp=8            # a model larger than one GPU
#
# CUDA_VISIBLE_DEVICES chooses among the GPUs. Not yet run: see docs/launch.md.
set -euo pipefail
if (($# < 2)); then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
workdir=$1 config=$2
shift 2
cd "$(dirname "$0")/.."
make setup ACCELERATOR=cuda
exec .venv/bin/gptjax pretrain --config "$config" --workdir "$workdir" "$@"
