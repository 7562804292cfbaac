"""What a server does with ten times its rated load: python -m bench.overload.

Every request has a prompt that no request had before, so that the engine is what is short. The rated load is the highest of a
row of rates, each 1.4 times the one before, at which all requests are answered and half of them within twice the time that they
take at the first rate (or ``--rated``). At ``--times`` (10) times that, requests that cannot be served should get 503 with
Retry-After at once, and those that are served should not wait: their p99 is compared with the p99 at the rated load. Both are
measured ``--rounds`` times in turn, and percentiles are those of all rounds together: what else the machine does falls on both.
When an overload begins it may be a burst, whose last prompts are served late; that is part of the rows.
Times are milliseconds from when a request was due; provider, server and load generator are on the same two cores. Where a row's
"late p99" is not far below them, the load generator was short, and the row says nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.load import servers
from bench.load.checkpoint import use
from bench.load.generator import Job, Timed, run
from bench.load.prompts import New
from bench.machine import machine
from bench.setting import positive
from bench.setting import run as run_main

START, STEP, STEPS = 4.0, 1.4, 20


@dataclass(frozen=True)
class Row:
    """One rate. p50, p99: of requests that were served; refused_p50, refused_p99: of 503s; without_retry_after: of these."""

    what: str
    rate: float
    requests: int
    served: int
    served_per_s: float
    refused: int
    others: str
    p50: float
    p99: float
    refused_p50: float
    refused_p99: float
    without_retry_after: int
    cpus: float  # that the server kept busy
    late_p99: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder or name, instead of a tiny one with random weights")
    parser.add_argument("--rated", type=float, help="requests per second; measured without it")
    parser.add_argument("--times", type=float, default=10.0, help="the rated load (10)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each rate (20); at most 2 while it is sought")
    parser.add_argument("--rounds", type=positive, default=1, help="of the rated load and of its multiple (1)")
    parser.add_argument("--queue", type=positive, help="serve.queue.most; the default without it")
    parser.add_argument("--words", type=positive, help="of each prompt at most; without it, as long as Chatbot Arena's")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    console = Console(width=None if sys.stdout.isatty() else 160)
    title = f"{machine()}; load average {os.getloadavg()[0]:.1f}"
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        checkpoint, models = use(arguments.checkpoint, folder)
        mock = stack.enter_context(servers.provider(folder, models))
        config = servers.config(mock.port, models)
        if arguments.queue is not None:
            config["serve"]["queue"] = {"most": arguments.queue}
        server = stack.enter_context(servers.ours("overload", folder, config, checkpoint))
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(1))
        prompts = New(arguments.words)

        def measure(what: str, rate: float, seconds: float) -> tuple[Timed, float]:
            count, before = max(10, round(rate * seconds)), server.cpu()
            timed = pool.apply(run, (Job("127.0.0.1", server.port, server.model, prompts(count), rate, count, False),))
            cpu = server.cpu() - before
            row = _row(what, rate, [(timed, cpu)])
            console.print(f"{what}, {rate:.1f}/s: served {row.served} of {row.requests}, p99 {row.p99:.1f} ms", highlight=False)
            return timed, cpu

        def sought(rate: float) -> Row:
            return _row("sought", rate, [measure("sought", rate, min(2.0, arguments.seconds))])

        measure("warm-up", START, 2.0)
        rated = arguments.rated or _rated(sought)
        high, multiple = arguments.times * rated, f"{arguments.times:g} times"
        normal_rounds, high_rounds = list[tuple[Timed, float]](), list[tuple[Timed, float]]()
        for _ in range(arguments.rounds):
            normal_rounds.append(measure("rated", rated, arguments.seconds))
            high_rounds.append(measure(multiple, high, arguments.seconds))
        after = [measure("rated, after it", rated, arguments.seconds)]
        rows = [
            _row("rated", rated, normal_rounds), _row(multiple, high, high_rounds), _row("rated, after it", rated, after)
        ]  # fmt: skip
    console.print(table(title, rows))
    beyond, times = rows[1], rows[1].p99 / rows[0].p99
    console.print(
        f"p99 of the served: {times:.2f} times its value at the rated load (to reach: under 2); {beyond.refused} refused, "
        f"within {beyond.refused_p99:.1f} ms (p99), {beyond.without_retry_after} without Retry-After",
        highlight=False,
    )
    if arguments.csv:
        with arguments.csv.open("w", encoding="utf-8", newline="") as file:
            file.write(f"# {title}\n")
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)


def _rated(sought: Callable[[float], Row]) -> float:
    """The highest rate of the row that is served well."""
    first = sought(START)
    rate = START
    for _ in range(STEPS):
        row = sought(rate * STEP)
        if row.served < row.requests or row.p50 > 2 * first.p50:
            break
        rate *= STEP
    return rate


def _row(what: str, rate: float, rounds: list[tuple[Timed, float]]) -> Row:
    """Of all rounds together. rounds: each with the CPU seconds that it cost the server."""
    timed = [one for one, _ in rounds]
    statuses = sum((Counter(one.statuses) for one in timed), Counter[str]())
    served, refused = statuses.pop("200", 0), statuses.pop("503", 0)
    others = "; ".join(f"{name}: {count}" for name, count in sorted(statuses.items()))
    wall, cpu = sum(one.wall for one in timed), sum(cpu for _, cpu in rounds)
    end, back, late = (np.concatenate([getattr(one, name) for one in timed]) for name in ("end", "refused", "late"))
    return Row(
        what, rate, sum(one.sent for one in timed), served, served / wall, refused, others,
        *_percentiles(end), *_percentiles(back), sum(one.without_retry for one in timed), cpu / wall, _percentiles(late)[1],
    )  # fmt: skip


def _percentiles(seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    """Milliseconds at 50 and 99%; NaN of nothing."""
    if not len(seconds):
        return float("nan"), float("nan")
    p50, p99 = (float(1e3 * x) for x in np.percentile(seconds, [50, 99]))
    return p50, p99


def table(title: str, rows: list[Row]) -> Table:
    """Rates, one a line."""
    shown = Table(title=title, title_justify="left")
    columns = (
        "",
        "rate/s",
        "requests",
        "served",
        "served/s",
        "p50",
        "p99",
        "503s",
        "503 p50",
        "503 p99",
        "CPUs",
        "late p99",
        "others",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column in ("", "others") else "right")
    for r in rows:
        shown.add_row(
            r.what, f"{r.rate:.1f}", str(r.requests), str(r.served), f"{r.served_per_s:.1f}", f"{r.p50:.1f}", f"{r.p99:.1f}",
            str(r.refused), f"{r.refused_p50:.1f}", f"{r.refused_p99:.1f}", f"{r.cpus:.2f}", f"{r.late_p99:.1f}", r.others,
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    run_main(main)
