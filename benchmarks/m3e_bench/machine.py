"""What a record says of the machine and of the code that ran."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from m3e import __version__
from m3e.cpu import available_threads

# What decides which matrix kernels a library picks.
_FEATURES = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Processor, instruction sets, quota, memory, system."""
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, separator, value = line.partition(":")
        if separator:
            info.setdefault(key.strip(), value.strip())
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "isa": [name for name in _FEATURES if name in flags],
        "host_cpus": os.cpu_count(),
        "available_cpus": available_threads(),
        "cgroup_cpu_max": _cgroup_cpu_max(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def describe_code() -> dict[str, Any]:
    """Version and commit of this project, and versions of what it stands on."""
    return {
        "version": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len((_git("status", "--porcelain", "--untracked-files=no") or "").splitlines()),
        "packages": {name: metadata.version(name) for name in ("numpy", "onnxruntime", "tokenizers", "onnx")},
    }


def _cgroup_cpu_max() -> str | None:
    """The quota as the kernel writes it (cgroup v2, cpu.max), or None where there is no such file."""
    try:
        return Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _git(*arguments: str) -> str | None:
    """Git's answer about the checkout that this file is in; None where it is in none."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
