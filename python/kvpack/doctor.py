"""What `kvpack doctor` says: versions, processor, GPU, and which implementation of each operation would run.

Looks and never fails: what is optional and missing is said, and so is a library that cannot be loaded.
"""

from __future__ import annotations

import platform
from typing import Any

from kvpack.evaluate.machine import available_cores, cpu_name, gpu_name, installed_version, memory_bytes

_PACKAGES = {
    "numpy": "tensors",
    "torch": "models, torch tensors",
    "transformers": "models",
    "gguf": "GGUF files",
    "accelerate": "GGUF files",
    "safetensors": "model folders",
    "datasets": "wikitext2, ptb, c4",
}


def examine() -> dict[str, Any]:
    """Looks at the machine and the installation.

    Returns:
        `versions` (package -> version or what is missed without it), `cpu`, `features`, `cores`, `memory_gib`, `gpu`
        (name or None), `cuda` (status in words), `implementations` (rows of kvpack.ops.list_implementations), and
        `problem`, None or why the native library cannot be used.
    """
    found: dict[str, Any] = {
        "versions": _versions(),
        "cpu": cpu_name(),
        "cores": available_cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "gpu": _gpu(),
        "features": "unknown",
        "cuda": "unknown",
        "implementations": [],
        "problem": None,
    }
    try:
        from kvpack import ops

        found["features"] = ops.cpu_features()
        found["cuda"] = ops.cuda_status()
        found["implementations"] = ops.list_implementations()
    except (ImportError, OSError, AttributeError) as error:
        # No library at all, one for another machine, or one that lacks a function this package knows.
        found["problem"] = f"the native library cannot be used: {error}"
    return found


def _versions() -> dict[str, str]:
    import kvpack

    versions = {"kvpack": kvpack.__version__, "python": platform.python_version()}
    for package, used_for in _PACKAGES.items():
        versions[package] = installed_version(package) or f"not installed (for {used_for})"
    return versions


def _gpu() -> str | None:
    try:
        return gpu_name()
    except Exception as error:
        # A torch that cannot start its CUDA side is what a doctor is asked about, not a reason to stop.
        return f"torch cannot say: {error}"
