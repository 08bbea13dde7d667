#!/usr/bin/env python3
"""Builds (with --build) and checks the environment: versions, GPU, libkvpack, every old import.

Ends with 0 if all is well.

python compat/check_environment.py            # checks
python compat/check_environment.py --build    # `make build` first, then checks what it built
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OLD_NAMES = {
    "kernel.compression": ("convert_key_batched", "convert_value_batched"),
    "mustafar_package": ("mustafar_key_formulation", "mustafar_value_formulation"),
    "kernel_quant.compression_quant": ("convert_key_batched_quant", "convert_value_batched_quant"),
    "mustafar_package_quant": ("mustafar_key_formulation_quant", "mustafar_value_formulation_quant"),
    "mustafar_quant_reference": (
        "dequantize_tile", "reconstruct_sparse_key_matrix_quant", "sparse_matmul_reference_quant",
    ),
    "quant_ops": ("flatquant_dynamic_quantize", "dequantize_int4", "get_decompose_dim"),
}  # fmt: skip


def build() -> None:
    """Runs `make build`, then this check again with what it built."""
    subprocess.run(["make", "build"], cwd=ROOT, check=True)
    python = ROOT / ".venv" / "bin" / "python"
    paths = [str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "KVPACK_LIBRARY_DIR": str(ROOT / "build" / "dev"),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    executable = str(python) if python.is_file() else sys.executable
    sys.exit(subprocess.run([executable, __file__], env=environment, check=False).returncode)


def compiler_version() -> str:
    """What nvcc says about itself."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "nvcc not found (needed to build the CUDA side only)"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.strip() for line in text.splitlines() if "release" in line), "nvcc says nothing")


def show(name: str, text: str) -> None:
    """One aligned line."""
    print(f"{name:<16} {text}", flush=True)


def check_torch() -> bool:
    """Versions of PyTorch and CUDA, and the GPUs."""
    try:
        import torch
    except ImportError as error:
        show("PyTorch", f"FAILED: {error}")
        return False
    show("PyTorch", torch.__version__)
    show("CUDA of PyTorch", torch.version.cuda or "none: this build is for CPUs")
    show("CUDA compiler", compiler_version())
    if not torch.cuda.is_available():
        show("GPU", "not present: everything runs on the CPU")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        show("GPU", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    return True


def check_kvpack() -> bool:
    """The native library, and what of it would run."""
    try:
        import kvpack
        from kvpack import ops

        rows = kvpack.list_implementations()
        selected = sorted({f"{row['device']}: {row['name']}" for row in rows if row["selected"]})
        show("kvpack", f"{kvpack.__version__}, {', '.join(selected)}")
        show("CUDA side", ops.cuda_status())
    except Exception as error:  # whatever it is, it is what the reader has to know
        show("kvpack", f"FAILED: {type(error).__name__}: {error}")
        show("", "build it: python compat/check_environment.py --build, or pip install .")
        return False
    return True


def check_old_names() -> bool:
    """Every name of the old interfaces can be imported from compat/."""
    sys.path.insert(0, str(HERE))
    works = True
    for module, names in OLD_NAMES.items():
        try:
            found = importlib.import_module(module)
            missing = [name for name in names if not hasattr(found, name)]
        except Exception as error:
            show("import", f"FAILED: {module}: {type(error).__name__}: {error}")
            works = False
            continue
        show("import", f"{module}: " + (f"FAILED: lacks {', '.join(missing)}" if missing else "works"))
        works = works and not missing
    return works


def main() -> int:
    """Prints one line a finding; 0 when everything works."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", action="store_true", help="run `make build` first")
    if parser.parse_args().build:
        build()
    show("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    works = check_torch() and check_kvpack() and check_old_names()
    print("environment: ok" if works else "environment: NOT ok")
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
