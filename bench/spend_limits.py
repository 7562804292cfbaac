"""What a spend limit costs a request: python -m bench.spend_limits [--postgres URL].

Milliseconds of ``reserve`` and ``settle`` by wall clock, under three limits that hold at once (total, a day of each key, a
rolling hour). One process of one thread is alone on the store; more of them want the same rows all the time, which is the worst
case: a service's requests wait seconds for their model between the two calls.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.pool import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.machine import machine
from bench.setting import positive
from p2l_engine.routing import Limit, SpendLimit

LIMITS = (Limit(10**6), Limit(10**6, "day", each_key=True), Limit(10**6, timedelta(hours=1)))
PROCESSES = 4
READY = 3.0  # seconds in which all processes have started


class Load(NamedTuple):
    """Spenders on one store."""

    store: str
    fsync: bool
    processes: int
    threads: int
    requests: int  # of each thread


def spend(load: Load, start: float) -> list[tuple[float, float]]:
    """Seconds of reserve and settle of every request of one process, which begins at a time of the wall clock."""
    with SpendLimit(LIMITS, load.store, fsync=load.fsync, on_notice=lambda notice: None) as limit:

        def one() -> tuple[float, float]:
            begin = time.perf_counter()
            token = limit.reserve(0.002, "key")
            middle = time.perf_counter()
            limit.settle(token, 0.001)
            return middle - begin, time.perf_counter() - middle

        for _ in range(20):
            one()
        time.sleep(max(0.0, start - time.time()))
        with ThreadPoolExecutor(load.threads) as pool:
            found = pool.map(lambda _: [one() for _ in range(load.requests)], range(load.threads))
            return [times for thread in found for times in thread]


def measure(load: Load, pool: Pool) -> tuple[float, ...]:
    """Requests per second; median and 99th percentile of reserve and of settle in milliseconds."""
    start = time.time() + (READY if load.processes > 1 else 0)  # so that no process takes two of the jobs
    spent = pool.starmap(spend, [(load, start)] * load.processes, chunksize=1)
    found = 1000 * np.array([times for process in spent for times in process])
    seconds = found.sum() / 1000 / (load.processes * load.threads)  # the mean over the threads, which wait for nothing else
    percentiles = np.percentile(found, [50, 99], axis=0).T.ravel()
    return len(found) / seconds, *map(float, percentiles)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.spend_limits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=positive, default=2000, help="requests of each row (default 2000)")
    parser.add_argument("--postgres", metavar="URL", help="also on this database: postgresql+psycopg://...")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    table = Table(title=f"{machine()}; {os.cpu_count()} CPUs", title_justify="left")
    columns = ("store", "processes", "threads", "requests/s", "reserve p50, ms", "p99", "settle p50, ms", "p99")
    for column in columns:
        table.add_column(column, justify="left" if column == "store" else "right")
    rows = []
    with (
        multiprocessing.get_context("spawn").Pool(PROCESSES) as pool,
        tempfile.TemporaryDirectory() as folder,
        Console(stderr=True).status("spending"),
    ):
        stores = [("SQLite", f"{folder}/normal", False), ("SQLite, fsync", f"{folder}/full", True)]
        stores += [("PostgreSQL", arguments.postgres, False)] if arguments.postgres else []
        for name, store, fsync in stores:
            for processes, threads in ((1, 1), (1, 16), (PROCESSES, 16)):
                load = Load(store, fsync, processes, threads, max(1, arguments.requests // (processes * threads)))
                speed, *times = measure(load, pool)
                rows.append((name, processes, threads, f"{speed:.0f}", *(f"{t:.2f}" for t in times)))
                table.add_row(*map(str, rows[-1]))
    Console().print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            names = (f"{call}_p{percentile}_ms" for call in ("reserve", "settle") for percentile in (50, 99))
            writer.writerow(("store", "processes", "threads", "requests_per_second", *names, "machine"))
            writer.writerows((*row, machine()) for row in rows)


if __name__ == "__main__":
    main()
