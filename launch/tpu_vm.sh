#!/usr/bin/env bash
# Creates one TPU VM if it is not there, copies this checkout (its HEAD) to it, and trains there.
# Run it from your own machine. The same command again resumes the run.
#
#   launch/tpu_vm.sh NAME ZONE WORKDIR CONFIG [--config.GROUP.KEY=VALUE ...]
#   launch/tpu_vm.sh gpt2 us-west4-a gs://my-bucket/gpt2 experiments/gpt2.py
#
# ACCELERATOR_TYPE and RUNTIME_VERSION (of the TPU) default to eight v5e chips, SPOT=1 asks for a
# spot machine. launch/tpu_pod.sh is the same for a slice of several hosts.
# Not yet run: see docs/launch.md.
set -euo pipefail
if (($# < 4)); then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 workdir=$3 config=$4
shift 4
here=$(dirname "$0")
on_tpu=(gcloud compute tpus tpu-vm)
where=(--zone="$zone")
workers=("${where[@]}" --worker="${WORKER:-0}")

if ! "${on_tpu[@]}" describe "$name" "${where[@]}" >/dev/null 2>&1; then
  "${on_tpu[@]}" create "$name" "${where[@]}" ${SPOT:+--spot} \
    --accelerator-type="${ACCELERATOR_TYPE:-v5litepod-8}" \
    --version="${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}"
fi

archive=$(mktemp -d)/gptjax.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD
"${on_tpu[@]}" scp "$archive" "$name:gptjax.tar.gz" "${workers[@]}"

# nohup: training goes on when the connection breaks; stop it with SIGTERM, which saves first.
train=$(printf '%q ' .venv/bin/gptjax pretrain --config "$config" --workdir "$workdir" "$@")
"${on_tpu[@]}" ssh "$name" "${workers[@]}" --command="
set -e
mkdir -p gptjax && tar -xzf gptjax.tar.gz -C gptjax && cd gptjax
bash launch/tpu_setup.sh $(printf %q "$workdir")
nohup $train >train.log 2>&1 </dev/null &
"
echo "Training. Follow it: ${on_tpu[*]} ssh $name ${where[*]} --command='tail -f gptjax/train.log'"
