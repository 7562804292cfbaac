"""What it takes to load a checkpoint on a CPU, in seconds and memory, with and without the file of packed weights: python -m
bench.loading.

Fresh processes, in turns, for --rounds rounds: ``without`` the file, ``first`` (which makes it), and ``later``, which finds it
while the process of ``first`` still has it. Each loads a tiny checkpoint first, so that all modules are imported; then it is
timed. Memory is counted from the bare import of the engine on. ``private`` is what no other process shares (USS, of
smaps_rollup): after loading, after a single prompt, and after a batch of --batch tokens, whose buffers every process has.
``mapped`` is what files have of the memory, which processes share; the process of ``first`` is the only one that has the file
when it is measured, so that it counts as private there. Medians.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.setting import dtypes, positive, run, write_rows

PROMPT = "Write a short story about a lighthouse keeper who finds a letter in a bottle, and decides to answer it."


class Figures(NamedTuple):
    """Of one process: wall and CPU seconds of loading, and MiB of memory."""

    seconds: float
    cpu_s: float
    private_mib: float
    private_prompt_mib: float
    private_batch_mib: float
    mapped_mib: float


@dataclass(frozen=True)
class Row:
    """Medians over the rounds, see ``Figures``. path: without, first or later."""

    checkpoint: str
    dtype: str
    path: str
    seconds: float
    cpu_s: float
    private_mib: float
    private_prompt_mib: float
    private_batch_mib: float
    mapped_mib: float


def memory() -> tuple[float, float]:
    """MiB of memory that no other process shares, and of files that are mapped."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    found = {name.rstrip(":"): int(size) / 1024 for name, size, *_ in lines}
    return found["Private_Clean"] + found["Private_Dirty"], found["Rss"] - found["Anonymous"]


def load(checkpoint: str, tiny: str, dtype: str, batch: int, connection: Connection) -> None:
    """Sends what loading takes, and ends when it is told to."""
    from p2l_engine import Engine

    before, files = memory()
    Engine.from_pretrained(tiny, "cpu", dtype).coefficients([PROMPT])  # imports what is imported on first use
    start, cpu = time.perf_counter(), time.process_time()
    engine = Engine.from_pretrained(checkpoint, "cpu", dtype)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    loaded = memory()[0] - before
    engine.coefficients([PROMPT])
    prompt = memory()[0] - before
    engine.coefficients([PROMPT] * max(1, batch // len(engine.encoder.encode([PROMPT])[0])))
    private, mapped = memory()
    connection.send(Figures(seconds, cpu, loaded, prompt, private - before, mapped - files))
    connection.recv()


@contextmanager
def process(checkpoint: str, tiny: str, dtype: str, batch: int) -> Iterator[Figures]:
    """The figures of a process, which lives as long as the context."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=load, args=(checkpoint, tiny, dtype, batch, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        yield ours.recv()
        ours.send(None)
    except EOFError:
        raise ValueError("a process ended before it had loaded the checkpoint; its error is above") from None
    finally:
        ours.close()
        child.join()


def measured(checkpoint: str, dtype: str, batch: int, rounds: int, work: Path) -> list[Row]:
    """The rows of one dtype; work: a folder that has a tiny checkpoint, for the packed weights."""
    what = (checkpoint, str(work / "tiny"), dtype, batch)
    found: dict[str, list[Figures]] = {"without": [], "first": [], "later": []}
    for turn in range(rounds):
        os.environ["P2L_ENGINE_WEIGHT_CACHE"] = "off"
        with process(*what) as without:
            found["without"].append(without)
        os.environ["P2L_ENGINE_WEIGHT_CACHE"] = str(work / f"{dtype}-{turn}")
        with process(*what) as first, process(*what) as later:
            found["first"].append(first)
            found["later"].append(later)
    return [
        Row(checkpoint, dtype, path, *Figures._make(statistics.median(column) for column in zip(*each, strict=True)))
        for path, each in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="default", help="folder or name (default)")
    parser.add_argument("--dtype", nargs="+", help="one after the other (the CPU's natural one)")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--batch", type=positive, default=512, help="tokens of the batch (512)")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    import torch

    from bench.load.checkpoint import write_tiny

    device, rows = torch.device("cpu"), list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        write_tiny(Path(folder, "tiny"))
        for dtype in dtypes(arguments, device):
            rows += measured(arguments.checkpoint, dtype, arguments.batch, arguments.rounds, Path(folder))
            if arguments.csv:
                write_rows(arguments.csv, rows, device)
    Console(width=None if sys.stdout.isatty() else 120).print(table(arguments.checkpoint, rows))


def table(title: str, rows: list[Row]) -> Table:
    shown = Table(title=f"{title}: loading, seconds and MiB", title_justify="left")
    shown.add_column("dtype")
    shown.add_column("path")
    for name in ("wall s", "CPU s", "private", "a prompt", "a batch", "mapped"):
        shown.add_column(name, justify="right")
    for row in rows:
        values = [getattr(row, name) for name in Figures._fields]
        shown.add_row(row.dtype, row.path, *(f"{v:.3f}" for v in values[:2]), *(f"{v:.1f}" for v in values[2:]))
    return shown


if __name__ == "__main__":
    run(main)
