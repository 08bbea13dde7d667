"""What a result has to say about where it was computed: processor, memory, versions, implementations."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

_VERSIONED = ("torch", "transformers", "tokenizers", "numpy")


def describe_machine() -> dict[str, Any]:
    """The machine: cpu, cores (usable by this process), memory_gib, gpu (name or None), features."""
    from kvpack import ops

    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "gpu": gpu_name(),
        "features": ops.cpu_features(),
    }


def cpu_name() -> str:
    """Model name of the processor, as well as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model"):
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def available_cores() -> int:
    """Cores this process may run on; containers often get fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def available_memory_bytes(device: str = "cpu") -> int:
    """Memory of a device that can be had.

    Args:
        device: "cpu" or a CUDA device. On the CPU without swapping, within this process's control group; half of all
            where unknown.
    """
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    available = memory_bytes() // 2
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) * 1024
    except OSError:
        pass
    group = _control_group_headroom()
    return available if group is None else min(available, group)


def _control_group_headroom() -> int | None:
    """What a container's limit leaves (version 2 control groups), None without a limit."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current", encoding="utf-8") as file:
            return max(0, limit - int(file.read()))
    except (OSError, ValueError):
        return None


def gpu_name() -> str | None:
    """Name of the first CUDA device, None without one or without torch."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def installed_version(package: str) -> str | None:
    """Version of an installed package, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_versions() -> dict[str, str | None]:
    """Versions of kvpack, Python and the packages that results depend on."""
    import kvpack

    versions = {"kvpack": kvpack.__version__, "python": platform.python_version()}
    return versions | {package: installed_version(package) for package in _VERSIONED}


def describe_implementations(device: str) -> dict[str, str]:
    """Which implementation of each operation would run on a device, by the registry."""
    from kvpack import ops

    rows = ops.list_implementations()
    return {row["operation"]: row["name"] for row in rows if row["device"] == device and row["selected"]}
