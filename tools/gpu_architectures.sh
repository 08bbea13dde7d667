#!/usr/bin/env bash
# Prints what to compile libkvpack_cuda for on this machine: its GPUs, or, where none answers, the one that kvpack is tuned
# on. A wheel takes all of KVPACK_CUDA_ARCHITECTURES's default instead (CMakeLists.txt), which takes several times as long.
set -euo pipefail

capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '. ' | sort -u) || capabilities=
architectures=()
for capability in ${capabilities:-90}; do
  case $capability in
    9[0-9] | 1[0-9][0-9]) architectures+=("${capability}a-real") ;;  # "a": with what only this generation has
    *) architectures+=("$capability-real") ;;
  esac
done
(IFS=';' && echo "${architectures[*]}")
