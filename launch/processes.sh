#!/usr/bin/env bash
# Starts N processes of one run on this machine, with the flags that hosts without SLURM or TPU
# metadata need; on several machines run one of the printed commands on each.
#
#   launch/processes.sh N WORKDIR CONFIG [--config.GROUP.KEY=VALUE ...]
set -euo pipefail
if (($# < 3)); then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
count=$1 workdir=$2 config=$3
shift 3
coordinator=${COORDINATOR:-127.0.0.1:8476}
cd "$(dirname "$0")/.."

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((id = 0; id < count; id++)); do
  command=(.venv/bin/gptjax pretrain --config "$config" --workdir "$workdir"
    --config.train.coordinator="$coordinator" --config.train.num_processes="$count"
    --config.train.process_id="$id" "$@")
  echo "${command[*]}" >&2
  "${command[@]}" &
  pids+=($!)
done

# A trapped signal ends `wait` before the process has saved and left: wait for it again.
status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do
    code=0
    wait "$pid" || code=$?
  done
  ((code == 0)) || status=$code
done
exit "$status"
