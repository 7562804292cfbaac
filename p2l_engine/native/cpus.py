"""The CPUs that this process may use. Loads neither torch nor the native core."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUP, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available(cgroup: Path = CGROUP, own: Path = OWN) -> int:
    """The number of CPUs that this process may use: its affinity, and the lowest quota of its container or service and of those
    around it (cgroup v2 or v1), rounded up. cgroup: where control groups are mounted; own: says which one is the process's."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups(cgroup, own):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            try:
                numbers = " ".join((folder / file).read_text(encoding="ascii") for file in files).split()
            except OSError:
                continue  # the other cgroup version, or a group that says nothing of CPUs
            if len(numbers) == 2 and numbers[0] not in ("max", "-1"):
                cpus = min(cpus, math.ceil(int(numbers[0]) / int(numbers[1])))
    return max(1, cpus)


def _groups(cgroup: Path, own: Path) -> Iterator[Path]:
    """The folders of all groups that the process is in. A container's own group is often the root of what it sees."""
    yield from (cgroup, cgroup / "cpu")
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = cgroup if not controllers else cgroup / "cpu"
        parts = Path(path).parts[1:]
        if (not controllers or "cpu" in controllers.split(",")) and ".." not in parts:
            yield from (root.joinpath(*parts[:n]) for n in range(1, len(parts) + 1))
