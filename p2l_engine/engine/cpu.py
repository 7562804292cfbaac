"""The CPUs that this process may use, and what they can compute in hardware."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware: AMX or AVX512-BF16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(
        probe() for probe in (torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported)
    )


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


def limit_threads() -> None:
    """Limits torch to as many threads as there are CPUs for this process.

    torch counts the machine's CPUs: in a container with a quota of two on a machine of sixty-four, its threads would wait for
    each other. OMP_NUM_THREADS, and a smaller number of threads set before, are kept.
    """
    threads = available()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > threads:
        logger.info("torch: %d threads instead of %d, the CPUs that this process may use", threads, torch.get_num_threads())
        torch.set_num_threads(threads)
