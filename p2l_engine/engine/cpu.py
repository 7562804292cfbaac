"""What the CPU computes in hardware, and the threads that torch may start on it."""

from __future__ import annotations

import logging
import os

import torch

from p2l_engine.native import cpus

logger = logging.getLogger(__name__)


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware: AMX or AVX512-BF16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(
        probe() for probe in (torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported)
    )


def limit_threads() -> None:
    """Limits torch to as many threads as there are CPUs for this process.

    torch counts the machine's CPUs: in a container with a quota of two on a machine of sixty-four, its threads would wait for
    each other. OMP_NUM_THREADS, and a smaller number of threads set before, are kept.
    """
    threads = cpus.available()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > threads:
        logger.info("torch: %d threads instead of %d, the CPUs that this process may use", threads, torch.get_num_threads())
        torch.set_num_threads(threads)
