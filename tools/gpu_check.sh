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

# The small cases: one of each operation, axis and layout. Without torch's caching allocator, so that memcheck sees every
# allocation's end; initcheck takes few, since it follows torch's own kernels too (a kernel filter would hide their writes).
sanitize() {
  local tool=$1 cases=$2
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 99 \
    "$python" -m pytest -q -m gpu tests/python/test_cuda.py -k "$cases" \
    2>&1 | tee "$results/compute-sanitizer-$tool-$gpu.log" | tail -4
}

step "compute-sanitizer on small cases"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do sanitize "$tool" "${GPU_CASES:-finite or ranks or groups_of_two or fraction or batch or tied or every_kind}"; done
  sanitize initcheck "${GPU_CASES:-groups_of_two or ranks_5 or fraction_of or tied}"
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
