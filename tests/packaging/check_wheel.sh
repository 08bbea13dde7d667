#!/usr/bin/env bash
# Builds a wheel, looks into it, installs it into a new environment and prunes a row with it. The build is that of
# `make install`, whose objects it makes or takes; KVPACK_CUDA from the environment is the Makefile's.
# Usage: check_wheel.sh PYTHON
set -euo pipefail
readonly python=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
readonly root work
trap 'rm -rf "$work"' EXIT

cd "$root"
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --config-settings=build-dir=build/package "--config-settings=cmake.define.KVPACK_CUDA=${KVPACK_CUDA:-AUTO}" \
  "--config-settings=cmake.define.KVPACK_CUDA_ARCHITECTURES=$(tools/gpu_architectures.sh)" -w "$work" .
"$python" - "$work"/*.whl <<'PYTHON'
import sys, zipfile
from pathlib import Path

(wheel,) = sys.argv[1:]
if "-py3-none-" not in Path(wheel).name:
    sys.exit(f"{wheel}: the tag should be py3-none-<platform>: the binding is ctypes")
names = zipfile.ZipFile(wheel).namelist()
strangers = [name for name in names if not name.startswith("kvpack/") and ".dist-info/" not in name]
if strangers or "kvpack/lib/libkvpack.so" not in names:
    sys.exit(f"{wheel} should hold kvpack/ with its lib/ alone, but holds {names}")
print(f"{Path(wheel).name}: {len(names)} files")
PYTHON

"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -c "$root/requirements/constraints.txt" "$work"/*.whl
cd "$work"  # away from the tree, whose kvpack must not be found
"$work/venv/bin/python" - <<'PYTHON'
import numpy as np

from kvpack import ops

pruned, _ = ops.prune_magnitude(np.array([[1.0, -3.0, 2.0, 0.5]], dtype=np.float32), sparsity=0.5)
assert pruned.tolist() == [[0.0, -3.0, 2.0, 0.0]], pruned
PYTHON
# The command line needs the extra `eval`; without it, it says so.
help=$("$work/venv/bin/kvpack" --help 2>&1) || [[ $help != *Traceback* ]] || { echo "$help"; exit 1; }
echo "the wheel installs and runs in an environment of its own"
