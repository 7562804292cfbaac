"""Measurements: rows of a table, medians, the machine, and what a stage costs in a process of its own."""

from __future__ import annotations

import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cvxpy as cp
import highspy
import numpy as np
import scipy

from p2l_engine.native import binding

REPEATS = 5  # the median counts


@dataclass(frozen=True)
class Row:
    """One measurement. seconds: per prompt; gap: largest difference of the result to ours (absolute), or to the optimum where
    the solver is ours and not exact; gib: the most memory that its process held; last: of a section of the table."""

    models: int
    stage: str
    solver: str
    prompts: int
    seconds: float
    times_slower: float
    gap: float | None
    gib: float | None = None
    last: bool = False


def measure(run: Callable[[], Any], prompts: int, repeats: int = REPEATS) -> tuple[float, Any]:
    """Median seconds per prompt, and the result."""
    run_times, result = [], run()
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        run_times.append(time.perf_counter() - start)
    return float(np.median(run_times)) / prompts, result


def once(run: Callable[[], Any], prompts: int) -> tuple[float, Any]:
    """The same for a slow peer: one run after a warm-up of the libraries by the caller."""
    start = time.perf_counter()
    result = run()
    return (time.perf_counter() - start) / prompts, result


def apart(run: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """``run`` in a fresh process: its figures, and ``gib``, the most memory that the process ever held."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_with_memory, (run, arguments))


def _with_memory(run: Callable[..., dict[str, float]], arguments: tuple[Any, ...]) -> dict[str, float]:
    figures = run(*arguments)
    return figures | {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def machine() -> str:
    """CPU, instruction set of the native core, and versions."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}, cvxpy {cp.__version__}"
    return f"{cpu}, {binding.isa()}; {versions}, highspy {highspy.Highs().version()}"
