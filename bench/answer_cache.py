"""What an answer from the cache costs: python -m bench.answer_cache [--redis URL].

A server with a tiny checkpoint before a mock provider gets the same fifty requests again and again at a fixed rate: without a
cache (coefficients known, the provider asked each time), and with answers in memory, in an SQLite file and in redis. Rows have
milliseconds from when a request was due to the end of its answer, and of the server's CPU time for each.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import subjects
from bench.load import servers
from bench.load.checkpoint import write_tiny
from bench.load.generator import Job, run
from bench.machine import machine
from bench.setting import positive

PROMPTS = 50


class Row(NamedTuple):
    """Milliseconds. hits: share of the requests that the cache answered."""

    store: str
    stream: bool
    requests: int
    hits: float
    p50: float
    p99: float
    cpu: float


def rows(store: str, subject: servers.Subject, rate: float, count: int) -> list[Row]:
    """Of a running server, whole answers and streams."""
    found, prompts = [], tuple(subjects.prompts(PROMPTS))
    for stream in (False, True):
        run(Job("127.0.0.1", subject.port, subject.model, prompts, 50, 1, stream, warm=4))
        before, hits = subject.cpu(), _hits(subject)
        timed = run(Job("127.0.0.1", subject.port, subject.model, prompts, rate, count, stream))
        if timed.statuses != {"200": count}:
            raise RuntimeError(f"expected {count} answers, got {timed.statuses}")
        p50, p99 = 1e3 * np.percentile(timed.end, [50, 99])
        found.append(
            Row(store, stream, count, (_hits(subject) - hits) / count, p50, p99, 1e3 * (subject.cpu() - before) / count)
        )
    return found


def _hits(subject: servers.Subject) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{subject.port}/v1/status") as response:
        cache = json.loads(response.read())["answer_cache"]
    return 0 if cache is None else int(cache["hits"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.answer_cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second (default 200)")
    parser.add_argument("--requests", type=positive, default=2000, help="of each row (default 2000)")
    parser.add_argument("--redis", metavar="URL", help="also in this redis: redis://HOST:PORT/0")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    found = list[Row]()
    with tempfile.TemporaryDirectory() as name, Console(stderr=True).status("asking"):
        folder = Path(name)
        models = write_tiny(folder / "tiny")
        stores = {"none": None, "memory": "memory", "SQLite": str(folder / "answers.sqlite"), "redis": arguments.redis}
        with servers.provider(folder, models) as mock:
            for store, place in stores.items():
                if store != "none" and place is None:
                    continue
                settings = servers.config(mock.port, models, cache=None if place is None else {"store": place})
                with servers.ours(store, folder, settings, str(folder / "tiny")) as subject:
                    found += rows(store, subject, arguments.rate, arguments.requests)
    title = f"{machine()}; load average {os.getloadavg()[0]:.1f}; {arguments.rate:g} requests/s"
    table = Table("store", "stream", "hits, %", "p50, ms", "p99, ms", "CPU, ms", title=title, title_justify="left")
    for row in found:
        figures = (f"{100 * row.hits:.1f}", f"{row.p50:.2f}", f"{row.p99:.2f}", f"{row.cpu:.2f}")
        table.add_row(row.store, "yes" if row.stream else "no", *figures)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow((*Row._fields, "machine"))
            writer.writerows((*row, title) for row in found)


if __name__ == "__main__":
    main()
