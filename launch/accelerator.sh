#!/usr/bin/env bash
# Prints the jax build this machine needs: cpu, cuda12, cuda13 or tpu. Uses no network.
# Usage: launch/accelerator.sh [auto|cpu|cuda|tpu] [ROOT]
#   ROOT stands before /dev and /sys; tests set it.
set -euo pipefail
wanted=${1:-auto}
root=${2:-}

# PCI device ids of TPU v3, v4, v5p, v5e, v6e and v7x; Google's network cards share the vendor id.
tpu_pci_ids=" 0x0027 0x0056 0x005e 0x0062 0x0063 0x006f 0x0076 "

has_tpu() {
  # Up to v4 a chip is /dev/accel0; a directory /dev/accel/ belongs to other makers.
  compgen -G "$root/dev/accel[0-9]*" >/dev/null && return
  local device
  for device in "$root"/sys/bus/pci/devices/*; do
    [[ -r $device/vendor && $(<"$device/vendor") == 0x1ae0 ]] || continue
    [[ $tpu_pci_ids == *" $(<"$device/device") "* ]] && return
  done
  # A TPU newer than the list. TPU_NAME alone may be set on a laptop that drives a TPU elsewhere.
  [[ -n ${TPU_NAME:-}${TPU_WORKER_ID:-}${TPU_ACCELERATOR_TYPE:-} ]] &&
    compgen -G "$root/dev/vfio/[0-9]*" >/dev/null
}

has_nvidia() {
  # nvcc or the CUDA toolkit without a GPU is not enough, hence -L, which lists devices.
  [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]
}

# CUDA 13 needs driver 580 and compute capability 7.5 (Turing); CUDA 12 runs on all since driver 525.
cuda_build() {
  local driver="" capability=""
  IFS=", " read -r driver capability < <(
    nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null
  ) || true
  if [[ $driver =~ ^[0-9]+\. && $capability =~ ^[0-9]+\.[0-9]+$ ]] &&
    ((${driver%%.*} >= 580 && ${capability/./} >= 75)); then
    echo cuda13
  else
    echo cuda12
  fi
}

case $wanted in
  cpu | tpu) echo "$wanted" ;;
  cuda) cuda_build ;;
  auto) if has_tpu; then echo tpu; elif has_nvidia; then cuda_build; else echo cpu; fi ;;
  *)
    echo "ACCELERATOR is \"$wanted\"; it must be auto, cpu, cuda or tpu" >&2
    exit 2
    ;;
esac
