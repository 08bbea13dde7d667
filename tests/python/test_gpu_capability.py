"""What the registry says on a GPU that can do less than some kernels need, by a CUDA library made for the test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvpack._native import _library_path

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++")
LIBRARY = """
#include "dispatch/cuda_library.h"
using namespace kvpack;
static void nothing() {}
extern "C" __attribute__((visibility("default"))) const CudaLibrary* kvpack_cuda_library() {
  constexpr DeviceKind kCuda = DeviceKind::kCuda;
  static const Implementation rows[] = {{Operation::kAttendTile64, "cuda", kCuda, 0, nothing, 80},
                                        {Operation::kKronQuantize, "cuda_plain", kCuda, 0, nothing},
                                        {Operation::kKronQuantize, "cuda_mma", kCuda, 0, nothing, 80}};
  static const CudaLibrary library{kCudaLibraryVersion, 1, 75, "an old GPU", rows, 3};
  return &library;
}
"""
QUESTIONS = """
from kvpack import ops
print(ops.explain("attend_tile64", "cuda"))
print(ops.explain("kron_quantize", "cuda"))
ops.force_implementation("cuda_mma")
print(ops.explain("kron_quantize", "cuda"))
"""


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler named c++")
@pytest.mark.skipif(not (ROOT / "src").is_dir(), reason="needs the sources beside the tests")
def test_rows_beyond_the_gpu_are_refused_with_both_capabilities(tmp_path):
    (tmp_path / "library.cpp").write_text(LIBRARY)
    folders = [f"-I{ROOT / folder}" for folder in ("include", "src")]
    target = tmp_path / "libkvpack_cuda.so"
    flags = ["-std=c++20", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, *folders, tmp_path / "library.cpp", "-o", target], check=True)
    shutil.copy(_library_path(), tmp_path / "libkvpack.so")
    environment = {**os.environ, "KVPACK_LIBRARY_DIR": str(tmp_path), "KVPACK_IMPL": ""}
    answer = subprocess.run(
        [sys.executable, "-c", QUESTIONS], env=environment, capture_output=True, text=True, check=True
    )
    lines = answer.stdout.splitlines()
    here = "the least capable GPU here has compute capability 7.5 (loaded: an old GPU)"
    assert lines[0] == (f"attend_tile64 on cuda cannot run: attend_tile64 on cuda needs compute capability 8.0; {here}")
    assert lines[2].startswith("kron_quantize on cuda runs cuda_plain")
    assert f'kron_quantize on cuda cannot run: forced "cuda_mma" needs compute capability 8.0; {here}' in lines
