"""One prompt's forward pass by its length, of the engine in several dtypes and of its peers: ``bench.latency --lengths``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from bench import peers, subjects
from bench.peers.batches import Batch
from bench.peers.decoder import Decoder
from bench.peers.expected import Expected
from bench.peers.peer import Peer
from bench.peers.transformers import Transformers
from p2l_engine import Engine
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.engine.device import DTYPES
from p2l_engine.prompts.encode import PromptEncoder

LENGTHS = (8, 16, 32, 64, 128, 256, 700)  # tokens
REST = 0.2  # seconds before each call, until the threads of the one before have stopped waiting for more work


@dataclass(frozen=True)
class Row:
    """One path at one length, beside so many busy processes. Milliseconds: median and least, and the median of CPU time, of all
    threads.

    times_float32, times_fastest: the median over that of the engine in float32, and in whichever dtype is fastest here;
    off: of theta, as in ``peers.expected``.
    """

    model: str
    path: str
    precision: str
    threads: int
    busy: int
    tokens: int
    calls: int
    p50: float
    least: float
    cpu_p50: float
    times_float32: float
    times_fastest: float
    off: float


class EnginePath:
    """The engine as a Peer."""

    name = "engine"

    def __init__(self, loaded: Checkpoint, dtype: str) -> None:
        self.precision, self.engine = dtype, Engine(loaded, "cpu", dtype)
        self.engine.warmup()

    def run(self, batches: Sequence[Batch]) -> list[npt.NDArray[np.float32]]:
        """See Peer."""
        return [self.engine.forward(batch) for batch in batches]


def measured(
    name: str, loaded: Checkpoint, dtypes: Sequence[str], lengths: Sequence[int], threads: Sequence[int],
    others: Sequence[str], calls: int | None, busy: Sequence[int], rest: float, console: Console,
) -> list[Row]:  # fmt: skip
    """The rows of all paths. dtypes: the engine's, besides float32; others: peers besides transformers; calls: of each path at
    each length, None: 5 to 15; busy: numbers of processes that compute meanwhile; rest: seconds before each call. Raises
    ValueError for a path whose theta is another model's."""
    every, rows = list(dict.fromkeys(["float32", *dtypes])), []
    floats = [dtype for dtype in every if dtype in DTYPES]
    decoder = Decoder.of(loaded) if others else None
    kept = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for count in threads:
                torch.set_num_threads(count)
                engines = [EnginePath(loaded, dtype) for dtype in every]
                paths: list[Peer] = [*engines, *(Transformers(loaded, torch.device("cpu"), DTYPES[dtype]) for dtype in floats)]
                if decoder is not None:
                    paths += peers.start(others, decoder, count, False, Path(folder))
                prompts = {n: prompts_of(engines[0].engine.encoder, n, calls or min(15, max(5, 640 // n))) for n in lengths}
                console.print(f"{name}: {len(paths)} paths on {count} threads")
                expected = Expected.of(engines[0].engine)
                off = [expected.off(path) for path in paths]
                for beside in busy:
                    with busy_processes(beside):
                        found = of_paths(name, paths, prompts, count, beside, rest, off)
                    around = f"{count} threads, {beside} busy processes, {rest:g} s of rest"
                    title = f"{name}, {around}, p50 in ms, and times the engine's in float32"
                    console.print(table(title, found))
                    rows += found
    finally:
        torch.set_num_threads(kept)
    return rows


def prompts_of(encoder: PromptEncoder, tokens: int, count: int) -> list[npt.NDArray[np.int32]]:
    """Token ids of ``count`` prompts of ``tokens`` tokens: random text without the template's beginning, which the engine would
    not compute, and the CLS token."""
    around = len(encoder.prefix())
    encoded = encoder.encode(subjects.prompts(32))
    text = np.concatenate([ids[around:-1] for ids in encoded])
    starts = np.random.default_rng(tokens).integers(0, len(text) - tokens, count)
    return [np.append(text[start : start + tokens - 1], encoded[0][-1]).astype(np.int32) for start in starts]


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes beside this one that compute without pause."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def of_paths(
    name: str, paths: Sequence[Peer], prompts: dict[int, list[npt.NDArray[np.int32]]], threads: int, busy: int, rest: float,
    off: list[float],
) -> list[Row]:  # fmt: skip
    """The paths in turns, one call each, so that other load on the machine slows all alike; the first is the engine's in
    float32."""
    rows = []
    for tokens, some in prompts.items():
        wall, cpu = np.empty((2, len(paths), len(some)))
        for call, ids in enumerate([some[0], *some], -1):  # the first, at -1, warms up and is overwritten
            for i, path in enumerate(paths):
                time.sleep(rest)
                start, used = time.perf_counter(), time.process_time()
                path.run([[ids]])
                wall[i, call], cpu[i, call] = time.perf_counter() - start, time.process_time() - used
        p50, least, cpu_p50 = 1e3 * np.median(wall, 1), 1e3 * wall.min(1), 1e3 * np.median(cpu, 1)
        fastest = min(p50[i] for i, path in enumerate(paths) if path.name == "engine")
        rows += [
            Row(
                name, path.name, path.precision, threads, busy, tokens, len(some), float(p50[i]), float(least[i]),
                float(cpu_p50[i]), float(p50[i] / p50[0]), float(p50[i] / fastest), off[i],
            )
            for i, path in enumerate(paths)
        ]  # fmt: skip
    return rows


def table(title: str, rows: list[Row]) -> Table:
    """A line for each path, a column for each length."""
    shown = Table(title=title, title_justify="left", box=None)
    for column in ("", *dict.fromkeys(str(row.tokens) for row in rows), "off"):
        shown.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for path in dict.fromkeys((row.path, row.precision) for row in rows):
        some = [row for row in rows if (row.path, row.precision) == path]
        shown.add_row(" ".join(path), *(f"{r.p50:,.1f} {r.times_float32:.2f}" for r in some), f"{some[0].off:.1e}")
    return shown
