"""What it costs to start: CPU seconds of fresh processes, and their ratio to ``import torch`` in the same run.

    python -m bench.startup

Each row is a separate process; the processes run in turns, for several rounds, after a warm-up round that is not counted. The
table shows the median CPU time (user and system, of the process and its children), its ratio to the median of the row
``import torch``, and the wall time: machines are shared, so read the ratios.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.machine import machine

TORCH = "import torch"
FIRST_DECISION = (
    "from p2l_engine import Catalog, Engine, Router; e = Engine.from_pretrained(); "
    "r = Router(e, Catalog.from_yaml(e.folder / 'catalog.yaml')); print(r.route('What is 17 * 23?', budget=0.0005).model)"
)


class Subject(NamedTuple):
    """A process to start; limit: the ratio that it is held to (None: no limit); status: its expected exit status."""

    name: str
    arguments: tuple[str, ...]
    limit: float | None = None
    status: int = 0


SUBJECTS = (
    Subject(TORCH, ("-c", TORCH)),
    Subject("p2l-engine --help", ("-m", "p2l_engine", "--help"), 0.2),
    Subject("p2l-engine --version", ("-m", "p2l_engine", "--version"), 0.2),
    Subject("p2l-engine route --bugdet 1 (mistyped)", ("-m", "p2l_engine", "route", "hello", "--bugdet", "1"), 0.2, 2),
    Subject("from p2l_engine import Catalog, routing", ("-c", "from p2l_engine import Catalog, routing"), 0.3),
    Subject("from p2l_engine import Engine, Router", ("-c", "from p2l_engine import Engine, Router"), 1.3),
    Subject("fresh process to its first decision", ("-c", FIRST_DECISION), 2.0),
)


class Cost(NamedTuple):
    """CPU and wall seconds of one process."""

    cpu: float
    wall: float


def cost(subject: Subject) -> Cost:
    """Starts the process and waits for it. Raises RuntimeError where it does not exit as expected."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *subject.arguments], capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != subject.status:
        raise RuntimeError(
            f"{subject.name}: expected exit status {subject.status}, got {done.returncode}: {done.stderr[-2000:]}"
        )
    return Cost(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall)


def measure(subjects: tuple[Subject, ...], rounds: int, console: Console) -> dict[str, list[Cost]]:
    """The costs of every subject, in turns."""
    found: dict[str, list[Cost]] = {subject.name: [] for subject in subjects}
    with console.status("starting processes"):
        for turn in range(rounds + 1):
            for subject in subjects:
                spent = cost(subject)
                if turn:  # the first round reads files from the disk
                    found[subject.name].append(spent)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured starts of each process (default 5)")
    parser.add_argument("--only", nargs="*", metavar="TEXT", help="only the rows whose name holds one of these texts")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    subjects = tuple(
        s for s in SUBJECTS if s.name == TORCH or not arguments.only or any(text in s.name for text in arguments.only)
    )
    found = measure(subjects, arguments.rounds, Console(stderr=True))
    torch_cpu = statistics.median(spent.cpu for spent in found[TORCH])
    table = Table(title=f"{machine()}; {os.cpu_count()} CPUs", title_justify="left")
    for column in ("process", "CPU s", "ratio", "limit", "wall s"):
        table.add_column(column, justify="left" if column == "process" else "right")
    rows = []
    for subject in subjects:
        cpu, wall = (statistics.median(column) for column in zip(*found[subject.name], strict=True))
        limit = "" if subject.limit is None else f"{subject.limit:.1f}"
        rows.append((subject.name, f"{cpu:.3f}", f"{cpu / torch_cpu:.3f}", limit, f"{wall:.3f}"))
        table.add_row(*rows[-1])
    Console().print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("process", "cpu_seconds", "ratio_to_import_torch", "limit", "wall_seconds", "machine"))
            writer.writerows((*row, machine()) for row in rows)


if __name__ == "__main__":
    main()
