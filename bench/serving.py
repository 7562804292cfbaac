"""Time and CPU that a routing server adds to a request: python -m bench.serving.

Mock provider, server and load generator are processes of their own on the same two cores. Requests come at a fixed rate,
whatever becomes of those before, and are timed from when they were due. ``direct`` goes to the provider itself; the columns
p50, p95 and p99 are the milliseconds at that percentile beyond those of ``direct`` at the same rate in the same run, to the
first byte of the body and to its end. CPU: milliseconds of the server's processes for each request, user and system. Subjects
take turns. A server that answers less than nine tenths of the requests within their time and three seconds, or half of them a
second late, is not asked at higher rates.

Peers: LiteLLM's proxy (one worker; requests name a model, it does not choose) in an environment of its own, and the design that
lmarena/p2l publishes (``bench.published_server``), which computes each prompt anew.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.load import servers
from bench.load.checkpoint import use
from bench.load.generator import Job, Timed, run
from bench.load.process import Process
from bench.load.prompts import New
from bench.load.servers import Subject
from bench.machine import machine
from bench.setting import positive
from bench.setting import run as run_main

KNOWN = 200  # prompts whose coefficients are cached
WARM = 20  # requests to each server before the first that count
PEERS = ("p2l-engine", "p2l-engine, log and limit", "LiteLLM proxy", "published design")

Percentiles = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """One subject under one load. Milliseconds; added: beyond direct. late_p99: of the generator. generator, provider, load:
    CPUs that were busy with the generator and the provider, and the machine's load average."""

    subject: str
    coefficients: str
    streamed: bool
    rate: float
    requests: int
    answered: int
    answered_per_s: float
    others: str
    first_p50_added: float
    first_p95_added: float
    first_p99_added: float
    end_p50_added: float
    end_p95_added: float
    end_p99_added: float
    end_p50: float
    end_p99: float
    cpu_ms: float
    mib: float
    late_p99: float
    generator: float
    provider: float
    load: float


@dataclass
class Cell:
    """What was measured of one subject under one load, in several turns."""

    timed: list[Timed]
    cpu: float = 0.0
    provider: float = 0.0

    def add(self, timed: Timed, cpu: float, provider: float) -> None:
        """One turn."""
        self.timed.append(timed)
        self.cpu += cpu
        self.provider += provider

    def percentiles(self, name: str) -> Percentiles:
        """Milliseconds at 50, 95 and 99%; NaN without answers."""
        found = np.concatenate([getattr(timed, name) for timed in self.timed])
        p50, p95, p99 = (float(1e3 * x) for x in np.percentile(found, [50, 95, 99])) if len(found) else [float("nan")] * 3
        return p50, p95, p99

    def total(self, name: str) -> float:
        """Of all turns."""
        return float(sum(getattr(timed, name) for timed in self.timed))

    @property
    def statuses(self) -> dict[str, int]:
        """Answers by status."""
        names = sorted({name for timed in self.timed for name in timed.statuses})
        return {name: sum(timed.statuses.get(name, 0) for timed in self.timed) for name in names}


@dataclass(frozen=True)
class Bench:
    """One load after the other. prompts: makes so many that no server has seen."""

    pool: Pool
    mock: Process
    seconds: float
    turns: int
    prompts: Callable[[int], tuple[str, ...]]

    def rows(self, running: list[Subject], coefficients: str, rates: list[float], streams: list[bool]) -> Iterator[Row]:
        """All subjects at each rate, ``direct`` first."""
        known = self.prompts(KNOWN)
        for subject in running[1:]:
            warm = known if subject.model == "auto" and coefficients == "cached" else known[:WARM]
            if subject.name == PEERS[3]:  # it remembers nothing
                warm = known[:WARM]
            self._apply(subject, Job("127.0.0.1", subject.port, subject.model, warm, 10, 1, False, warm=4))
        slow = set[str]()
        for rate in rates:
            for stream in streams:
                asked = [subject for subject in running if subject.name not in slow]
                cells = {subject.name: Cell([]) for subject in asked}
                for _ in range(self.turns):
                    for subject in asked:
                        count = max(1, round(rate * self.seconds))
                        prompts = known if coefficients == "cached" else self.prompts(count)
                        job = Job("127.0.0.1", subject.port, subject.model, prompts, rate, count, stream)
                        cells[subject.name].add(*self._apply(subject, job))
                for subject in asked:
                    row = self._row(subject, coefficients, rate, stream, cells[subject.name], cells["direct"])
                    if row.answered < 0.9 * row.requests or row.end_p50 > 1000:
                        slow.add(subject.name)
                    yield row

    def _apply(self, subject: Subject, job: Job) -> tuple[Timed, float, float]:
        before, provider = subject.cpu(), self.mock.cpu()
        timed = self.pool.apply(run, (job,))
        if timed.statuses.get("200") != timed.sent:
            _rest(subject)
        return timed, subject.cpu() - before, self.mock.cpu() - provider

    def _row(self, subject: Subject, coefficients: str, rate: float, stream: bool, cell: Cell, direct: Cell) -> Row:
        first, end = cell.percentiles("first"), cell.percentiles("end")
        before = direct.percentiles("first"), direct.percentiles("end")
        sent, wall = int(cell.total("sent")), cell.total("wall")
        statuses = cell.statuses
        answered = statuses.pop("200", 0)
        late = np.concatenate([timed.late for timed in cell.timed])
        return Row(
            subject.name, coefficients, stream, rate, sent, answered, answered / wall,
            "; ".join(f"{name}: {count}" for name, count in statuses.items()),
            *_beyond(first, before[0]), *_beyond(end, before[1]), end[0], end[2],
            1e3 * cell.cpu / sent, subject.memory(), float(1e3 * np.percentile(late, 99)),
            cell.total("cpu") / wall, cell.provider / wall, os.getloadavg()[0],
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder or name, instead of a tiny one with random weights")
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 50, 200, 500, 1000], help="requests per second")
    parser.add_argument("--coefficients", choices=("cached", "new", "both"), default="cached")
    parser.add_argument("--new-rates", type=float, nargs="+", help="rates for prompts that are not cached (the same)")
    parser.add_argument("--streams", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--per-token", type=float, default=0.0, help="seconds between the tokens of a stream (0: all at once)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--turns", type=positive, default=2)
    parser.add_argument("--litellm", type=Path, metavar="ENVIRONMENT", help="with LiteLLM's proxy of this virtual environment")
    parser.add_argument("--only", nargs="+", choices=PEERS, help="these servers alone")
    parser.add_argument("--words", type=positive, help="of each prompt at most; without it, as long as Chatbot Arena's")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    console = Console(width=None if sys.stdout.isatty() else 190)
    title = f"{machine()}; load average {os.getloadavg()[0]:.1f}"
    if arguments.litellm is not None:
        title += f"; LiteLLM {servers.litellm_version(arguments.litellm)}"
    rows = list[Row]()
    streams = {"no": [False], "yes": [True], "both": [False, True]}[arguments.streams]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        checkpoint, models = use(arguments.checkpoint, folder)
        mock = stack.enter_context(servers.provider(folder, models, per_token=arguments.per_token))
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(1))
        running = list(_start(arguments, folder, checkpoint, models, mock, stack))
        bench = Bench(pool, mock, arguments.seconds, arguments.turns, New(arguments.words))
        for kind in ("cached", "new") if arguments.coefficients == "both" else (arguments.coefficients,):
            rates = arguments.new_rates if kind == "new" and arguments.new_rates else arguments.rates
            for row in bench.rows(running, kind, rates, streams):
                console.print(_line(row))
                rows.append(row)
    console.print(table(title, rows))
    if arguments.csv:
        _write(arguments.csv, rows, title)


def _beyond(found: Percentiles, base: Percentiles) -> Percentiles:
    return found[0] - base[0], found[1] - base[1], found[2] - base[2]


def _rest(subject: Subject, most: float = 30.0) -> None:
    """Waits until a server has worked off what its clients gave up, so that the next one has the machine to itself."""
    until, before = time.monotonic() + most, subject.cpu()
    while time.monotonic() < until:
        time.sleep(0.5)
        now = subject.cpu()
        if now - before < 0.05:
            return
        before = now


def _start(
    arguments: argparse.Namespace,
    folder: Path,
    checkpoint: str | None,
    models: tuple[str, ...],
    mock: Process,
    stack: contextlib.ExitStack,
) -> Iterator[Subject]:
    """The servers that are asked for, ``direct`` first."""
    yield servers.direct(mock, models)
    wanted = arguments.only or PEERS
    plain = servers.config(mock.port, models)
    kept = servers.config(mock.port, models, store=str(folder / "serve.sqlite"), limits=[{"amount": 1e6}])
    for name, settings in ((PEERS[0], plain), (PEERS[1], kept)):
        if name in wanted:
            yield stack.enter_context(servers.ours(name, folder, settings, checkpoint))
    if PEERS[2] in wanted and arguments.litellm is not None:
        yield stack.enter_context(servers.litellm(folder, arguments.litellm, mock.port, models))
    if PEERS[3] in wanted:
        yield stack.enter_context(servers.published(folder, checkpoint, mock.port, models))


def _line(row: Row) -> str:
    kind = "stream" if row.streamed else "whole"
    return (
        f"{row.subject}, {row.coefficients}, {kind}, {row.rate:g}/s: p50 {row.end_p50_added:+.2f}, "
        f"p99 {row.end_p99_added:+.2f}, CPU {row.cpu_ms:.2f} ms, answered {row.answered} of {row.requests}"
    )


def table(title: str, rows: list[Row]) -> Table:
    """Added milliseconds."""
    shown = Table(title=title, title_justify="left")
    columns = ("server", "coefficients", "answer", "rate/s", "answered", "first p50", "p95", "p99", "end p50", "p95", "p99")
    for column in (*columns, "CPU ms", "MiB", "late p99", "others"):
        shown.add_column(column, justify="left" if column in ("server", "coefficients", "answer", "others") else "right")
    for r in rows:
        firsts = (r.first_p50_added, r.first_p95_added, r.first_p99_added)
        ends = (r.end_p50_added, r.end_p95_added, r.end_p99_added)
        shown.add_row(
            r.subject, r.coefficients, "stream" if r.streamed else "whole", f"{r.rate:g}", f"{r.answered / r.requests:.1%}",
            *(f"{x:.2f}" for x in (*firsts, *ends)), f"{r.cpu_ms:.3f}", f"{r.mib:.0f}", f"{r.late_p99:.2f}", r.others,
        )  # fmt: skip
    return shown


def _write(path: Path, rows: list[Row], title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {title}\n")
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


if __name__ == "__main__":
    run_main(main)
