#!/usr/bin/env bash
# The same as launch/tpu_vm.sh on every host of a TPU pod slice at once; the processes find each
# other. WORKDIR must be one that all hosts see, such as gs://my-bucket/run.
#
#   ACCELERATOR_TYPE=v5litepod-16 launch/tpu_pod.sh NAME ZONE WORKDIR CONFIG [--config.KEY=VALUE ...]
#   ... --config.train.mode=mesh --config.train.mesh_fsdp=16       (models larger than one chip)
#
# Not yet run: see docs/launch.md.
set -euo pipefail
if (($# >= 3)) && [[ $3 != *://* ]]; then
  echo "WORKDIR is \"$3\"; the hosts of a slice share no disk: use a gs:// folder" >&2
  exit 2
fi
export ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-16}
export WORKER=all
exec "$(dirname "$0")/tpu_vm.sh" "$@"
