#!/usr/bin/env bash
# Builds, tests, sanitizes and benches the CUDA side on a machine with a GPU; leaves JSON and logs in benches/results/
# (each benches/bench_*_cuda.py writes its own).
# PYTHON names the Python whose packages (torch, numpy, pytest) are used as they are; nothing is downloaded.
# GOOGLETEST_SOURCE names a folder of GoogleTest's sources where the system has no package of it.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly python=${PYTHON:-python3}
readonly build=build/cuda results=benches/results

fail() { printf 'gpu-check: %s\n' "$*" >&2; exit 1; }
step() { printf '\n== gpu-check: %s (%s s)\n' "$*" "$SECONDS"; }

nvidia-smi -L >/dev/null 2>&1 || fail "no GPU answers: nvidia-smi -L says: $(nvidia-smi -L 2>&1 | tail -1)"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr -cs '[:alnum:]\n' '-' | tr '[:upper:]' '[:lower:]')
readonly gpu
mkdir -p "$results"

step "build for $gpu"
cmake --preset cuda ${GOOGLETEST_SOURCE:+"-DKVPACK_GOOGLETEST_SOURCE=$GOOGLETEST_SOURCE"}
cmake --build --preset cuda

step "C++ tests"
ctest --preset cuda --parallel "$(nproc)"

step "Python tests"
export KVPACK_LIBRARY_DIR=$PWD/$build PYTHONPATH=$PWD/python
"$python" -m pytest -m gpu

step "compute-sanitizer on the C++ tests' CUDA cases"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 99 "$build/kvpack_tests" --gtest_filter="${GPU_CASES:-*[Cc]uda*}" \
      2>&1 | tee "$results/compute-sanitizer-$tool-$gpu.log" | tail -3
  done
else
  echo "skipped: compute-sanitizer is not on PATH"
fi

step "benches"
shopt -s nullglob
ran=0
for bench in benches/bench_*_cuda.py; do
  "$python" "$bench"
  ran=$((ran + 1))
done
step "done: $ran benches"
