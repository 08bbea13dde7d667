#!/usr/bin/env bash
# Builds, tests, sanitizes and benches the CUDA side on a machine with a GPU; leaves JSON and logs in benches/results/
# (each benches/bench_*_cuda.py writes its own). What to set for a part of it: docs/gpu.md.
#
#   PYTHON              the Python whose packages (torch, numpy, pytest) are used as they are; nothing is downloaded
#   GOOGLETEST_SOURCE   folder of GoogleTest's sources, where the system has no package of it
#   KVPACK_LIBRARY_DIR  folder of libraries (and kvpack_tests) built elsewhere: nothing is built here
#   GPU_CHECK_STEPS     some of "build tests sanitize bench"; the default is all
#   GPU_ARCHITECTURES   what to build for; the default is the GPU at hand
#   GPU_CASES           pytest -k of the cases to sanitize
#   GPU_SANITIZE_SECONDS  limit of one tool of compute-sanitizer, 240
#   BENCH_FLAGS         handed to each bench, such as --quick
set -euo pipefail
cd "$(dirname "$0")/.."

readonly python=${PYTHON:-python3}
readonly steps=${GPU_CHECK_STEPS:-build tests sanitize bench}
readonly results=benches/results
export KVPACK_LIBRARY_DIR=${KVPACK_LIBRARY_DIR:-} PYTHONPATH=$PWD/python

fail() { printf 'gpu-check: %s\n' "$*" >&2; exit 1; }
step() { printf '\n== gpu-check: %s (%s s)\n' "$*" "$SECONDS"; }
wants() { [[ " $steps " == *" $1 "* ]]; }

for name in $steps; do
  [[ " build tests sanitize bench " == *" $name "* ]] ||
    fail "GPU_CHECK_STEPS names \"$name\"; there are build, tests, sanitize, bench"
done
nvidia-smi -L >/dev/null 2>&1 || fail "no GPU answers: nvidia-smi -L says: $(nvidia-smi -L 2>&1 | tail -1)"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr -cs '[:alnum:]\n' '-' | tr '[:upper:]' '[:lower:]')
readonly gpu
mkdir -p "$results"

if [ -z "$KVPACK_LIBRARY_DIR" ]; then
  KVPACK_LIBRARY_DIR=$PWD/build/cuda
  if wants build; then
    architectures=${GPU_ARCHITECTURES:-$(tools/gpu_architectures.sh)}
    step "build for $gpu ($architectures)"
    cmake --preset cuda -DKVPACK_CUDA_ARCHITECTURES="$architectures" \
      ${GOOGLETEST_SOURCE:+"-DKVPACK_GOOGLETEST_SOURCE=$GOOGLETEST_SOURCE"}
    cmake --build --preset cuda
  fi
else
  KVPACK_LIBRARY_DIR=$(cd "$KVPACK_LIBRARY_DIR" && pwd)
  step "libraries of $KVPACK_LIBRARY_DIR, nothing is built"
fi
[ -f "$KVPACK_LIBRARY_DIR/libkvpack_cuda.so" ] || fail "$KVPACK_LIBRARY_DIR has no libkvpack_cuda.so; run the step build"

if wants tests; then
  step "C++ tests"
  if [ "$KVPACK_LIBRARY_DIR" = "$PWD/build/cuda" ]; then
    ctest --preset cuda --parallel "$(nproc)"
  elif [ -x "$KVPACK_LIBRARY_DIR/kvpack_tests" ]; then
    "$KVPACK_LIBRARY_DIR/kvpack_tests" --gtest_brief=1
  else
    echo "skipped: $KVPACK_LIBRARY_DIR has no kvpack_tests"
  fi
  step "Python tests"
  "$python" -m pytest -m gpu
fi

readonly small_cases="small or (test_cuda.py and (finite or ranks or groups_of_two or fraction or batch or tied or every_kind))"
readonly initcheck_cases="(small and (64 or hostile)) or (test_cuda.py and (groups_of_two or ranks_5 or fraction_of or tied))"

# The small cases: one of each kernel and layout. Without torch's caching allocator, so that memcheck sees every
# allocation's end. Only our kernels are instrumented, but for initcheck, which must see what torch's kernels write.
sanitize() {
  local tool=$1 cases=$2 log=$results/compute-sanitizer-$1-$gpu.log
  local -a ours=()
  if [ "$tool" != initcheck ] && [[ $(compute-sanitizer --help 2>&1) == *--kernel-regex* ]]; then
    ours=(--kernel-regex kns=kvpack)
  fi
  echo "-- $tool ($SECONDS s)"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${GPU_SANITIZE_SECONDS:-240}" \
    compute-sanitizer --tool "$tool" --error-exitcode 99 "${ours[@]}" \
    "$python" -m pytest -q -m gpu tests/python/test_cuda*.py -k "$cases" 2>&1 | tee "$log" | tail -4 ||
    fail "$tool found something or took longer than ${GPU_SANITIZE_SECONDS:-240} s: $log"
}

if wants sanitize; then
  step "compute-sanitizer on small cases"
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
      sanitize "$tool" "${GPU_CASES:-$small_cases}"
    done
    sanitize initcheck "${GPU_CASES:-$initcheck_cases}"
  else
    echo "skipped: compute-sanitizer is not on PATH"
  fi
fi

if wants bench; then
  step "benches"
  shopt -s nullglob
  ran=0
  for bench in benches/bench_*_cuda.py; do
    # Flags are words of one variable on purpose.
    # shellcheck disable=SC2086
    "$python" "$bench" ${BENCH_FLAGS:-}
    ran=$((ran + 1))
  done
  echo "$ran benches"
fi
step "done: $steps"
