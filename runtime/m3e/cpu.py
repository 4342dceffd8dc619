"""How many processors this process may really use, and what they can do."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_SELF_CGROUP = Path("/proc/self/cgroup")
_CPUINFO = Path("/proc/cpuinfo")


def available_threads() -> int:
    """Count the processors this process may use: scheduling affinity, then the cgroup's CPU quota.

    onnxruntime looks at neither and counts the host's cores, which in a container means threads that fight
    for a small quota. A quota of 1.5 processors counts as two threads.

    Returns:
        At least 1.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return processors if quota is None else max(1, min(processors, math.ceil(quota)))


def cpu_features(cpuinfo: Path = _CPUINFO) -> frozenset[str] | None:
    """Tell what this processor offers of what graphs may need.

    ``vnni``: sums of 8-bit products do not saturate at 16 bits. x86 has it with AVX512-VNNI or AVX-VNNI; every ARM has
    it (onnxruntime's kernels widen first).

    Returns:
        The features, or None where the system does not say.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return frozenset({"vnni"})
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return None  # not Linux
    if flags is None:
        return None
    return frozenset({"vnni"} if {"avx512_vnni", "avx_vnni"} & set(flags[1].split()) else ())


def _cgroup_quota(root: Path = _CGROUP, membership: Path = _SELF_CGROUP) -> float | None:
    """Read the tightest CPU quota, in processors, over this process's cgroup and its ancestors.

    Source of the formats: Linux Documentation/admin-guide/cgroup-v2.rst (``cpu.max``: "$MAX $PERIOD") and
    Documentation/scheduler/sched-bwc.rst (``cpu.cfs_quota_us``, -1 for no limit; ``cpu.cfs_period_us``).
    """
    try:
        lines = membership.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None  # not Linux, or /proc is not mounted
    quotas = []
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            mount = root
        elif "cpu" in controllers.split(","):
            mount = root / "cpu"
        else:
            continue
        relative = Path(path.lstrip("/"))
        # Inside a container the path may name the host's tree; then only the mount itself exists.
        folders = [mount / relative, *(mount / parent for parent in relative.parents), mount]
        quotas += [quota for folder in folders if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None  # no such file here, or "max": no quota at this level
