"""Measurements: rows of a table, medians, and what a stage costs in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPEATS = 5  # of which the median is reported


@dataclass(frozen=True)
class Row:
    """One measurement. seconds: per prompt; gap: largest difference of the result to ours (absolute), or to the optimum where
    the solver is ours and not exact; gib: peak memory of its process."""

    models: int
    stage: str
    solver: str
    prompts: int
    seconds: float
    times_slower: float
    gap: float | None
    gib: float | None = None


def measure(run: Callable[[], Any], prompts: int, repeats: int = REPEATS) -> tuple[float, Any]:
    """Median seconds per prompt, and the result."""
    run_times, result = [], run()
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        run_times.append(time.perf_counter() - start)
    return float(np.median(run_times)) / prompts, result


def once(run: Callable[[], Any], prompts: int) -> tuple[float, Any]:
    """Seconds per prompt of a single run, and the result; the caller has warmed up the libraries."""
    start = time.perf_counter()
    result = run()
    return (time.perf_counter() - start) / prompts, result


def apart(run: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """The figures of ``run`` in a fresh process, and ``gib``, the peak memory of that process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_with_memory, (run, arguments))


def _with_memory(run: Callable[..., dict[str, float]], arguments: tuple[Any, ...]) -> dict[str, float]:
    figures = run(*arguments)
    return figures | {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


class Peak(threading.Thread):
    """The highest figure that ``probe`` gives within a with statement, sampled every 20 ms; first: the one at its beginning."""

    def __init__(self, probe: Callable[[], float]) -> None:
        super().__init__(daemon=True)
        self.probe, self.first, self.most, self._done = probe, 0.0, 0.0, threading.Event()

    def __enter__(self) -> Peak:
        self.first = self.most = self.probe()
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, self.probe())


def resident() -> float:
    """Resident memory in GiB."""
    return _pages(1)


def own() -> float:
    """Resident memory in GiB, less the files that are mapped."""
    return resident() - _pages(2)


def nameless_files() -> float:
    """The size, in GiB, of mapped files that are in no folder any more."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = (line.split()[0].split("-") for line in lines if line.endswith("(deleted)"))
    return sum(int(end, 16) - int(begin, 16) for begin, end in ranges) / 2**30


def _pages(field: int) -> float:
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize() / 2**30
