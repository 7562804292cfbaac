"""The CPUs that this process may use. Loads neither torch nor the native core."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available(cgroup: Path = CGROUP) -> int:
    """The number of CPUs that this process may use: its affinity, and its container's quota (cgroup v2 or v1), rounded up."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            numbers = " ".join((cgroup / file).read_text(encoding="ascii") for file in files).split()
        except OSError:
            continue  # the other cgroup version
        if len(numbers) == 2 and numbers[0] not in ("max", "-1"):
            cpus = min(cpus, math.ceil(int(numbers[0]) / int(numbers[1])))
    return max(1, cpus)
