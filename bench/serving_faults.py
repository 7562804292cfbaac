"""A server under faults of every kind: python -m bench.serving_faults [--requests 100000].

Callers of all three APIs, streaming and not, some of which leave or send rubbish, before a mock provider that fails at random
at every stage (``FAULTS``). At the end is checked that

- every request ended in an answer or an error that a client of its API understands;
- what the ledger says was spent is the sum of the log's costs; for requests whose usage the provider told, it is the provider's
  bill to 1e-9; of the others, whose cost is an estimate, both sums are shown, and how often the ledger is below the bill;
- nothing is left: reservations, tasks, connections; the server's memory grew by less than 50 MB after the first tenth; its log
  has no exception; it stops when it is told to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console

from bench.load import servers
from bench.load.callers import APIS, Crowd, Ended, run
from bench.load.checkpoint import write_tiny
from bench.load.process import Process, free_port
from bench.machine import machine
from bench.setting import positive
from bench.setting import run as run_main

MOST_GROWTH = 50.0  # MB
TOLERANCE = 1e-9  # USD
PARTS = 10
WARM = 2_000  # requests after which the server's caches are full, at least
TIMEOUTS = {"connect": 1, "first_byte": 0.5, "whole": 0.5, "idle": 0.5, "total": 5}
# Faults and how often they happen, relative to each other; those that make clients wait are rare.
FAULTS: tuple[tuple[float, dict[str, Any]], ...] = (
    *((1.0, {"fault": name}) for name in ("close", "reset", "cut", "cut_close", "cut_reset", "error_event", "html")),
    *((1.0, {"fault": name, "half": True, "tokens": 5}) for name in ("cut", "cut_close", "cut_reset")),
    *((1.0, {"fault": name, "tokens": 0}) for name in ("cut", "cut_close", "cut_reset", "error_event")),
    *((0.3, {"fault": name}) for name in ("silent", "headers_only", "stall")),
    *((1.0, {"fault": name}) for name in ("invalid_json", "invalid_utf8", "error_body", "first_event_error", "redirect")),
    *((1.0, {"fault": name}) for name in ("empty_choices", "usage_with_choices", "no_usage", "usage_in_every_chunk")),
    *((1.0, {"fault": name}) for name in ("burst", "crlf", "comments", "no_space", "no_done", "gzip", "leave", "until_close")),
    *((1.0, {"fault": name}) for name in ("chunked", "content_length", "context_length")),
    *((1.0, {"fault": "split", "size": size}) for size in (1, 7)),
    *((0.5, {"fault": "status", "status": status}) for status in (400, 401, 403, 404, 408, 413, 422, 500, 502, 503, 529)),
    (1.0, {"fault": "status", "status": 429, "retry_after": 0.01}),
    (1.0, {"fault": "status", "status": 429, "retry_after": 1, "retry_date": True}),
    (1.0, {"fault": "status", "status": 429, "code": "insufficient_quota"}),
    (0.3, {"fault": "slow_first_byte", "seconds": 0.7}),
    (1.0, {"fault": "slow_first_byte", "seconds": 0.05}),
    (1.0, {"fault": "slow_tokens", "seconds": 0.005}),
    (0.1, {"fault": "endless", "size": 3 << 20}),
    (0.1, {"fault": "endless_events"}),
    (0.3, {"fault": "large_headers"}),
    (1.0, {"fault": "refuse"}),
)  # fmt: skip


@dataclass
class Books:
    """What three sides say of the money, in USD.

    exact, estimated: log and bill of requests whose usage was told, and of the others; requests: how many. kinds: of the
    others, by what happened: how many, log, bill. below: how many of a kind the log has below the bill, deficit: by how much.
    wrong: exact ones whose cost is not the bill's. strays: billed for requests that the log does not have.
    """

    ledger: Fraction = Fraction(0)
    reserved: Fraction = Fraction(0)
    logged: float = 0.0
    billed: Fraction = Fraction(0)
    exact: tuple[float, Fraction] = (0.0, Fraction(0))
    estimated: tuple[float, Fraction] = (0.0, Fraction(0))
    requests: tuple[int, int] = (0, 0)
    below: Counter[str] = field(default_factory=Counter)
    deficit: float = 0.0
    wrong: list[str] = field(default_factory=list)
    kinds: dict[str, list[float]] = field(default_factory=dict)
    strays: Fraction = Fraction(0)
    examples: list[str] = field(default_factory=list)  # of those below


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=positive, default=100_000)
    parser.add_argument("--callers", type=positive, default=48, help="that ask at the same time")
    parser.add_argument("--faults", type=float, default=0.25, help="share of the provider's answers that fail")
    parser.add_argument("--leave", type=float, default=0.08, help="share of requests whose client leaves")
    parser.add_argument("--rubbish", type=float, default=0.03, help="share of requests that are none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="write the server's log here")
    parser.add_argument("--settle", type=float, default=70.0, help="seconds that idle connections may stay open; 0: any")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory() as name:
        problems = soak(arguments, Path(name), console)
    for problem in problems:
        console.print(f"[bold]wrong[/bold]: {problem}", highlight=False)
    if problems:
        sys.exit(1)
    console.print("nothing was wrong")


def soak(arguments: argparse.Namespace, folder: Path, console: Console) -> list[str]:
    """Everything; returns what was wrong."""
    models = write_tiny(folder / "tiny", 3)
    store, problems = folder / "serve.sqlite", list[str]()
    console.print(f"{machine()}; load average {os.getloadavg()[0]:.1f}")
    with contextlib.ExitStack() as stack:
        mock = stack.enter_context(servers.provider(folder, models, tokens_out=12, first_byte=0.002, per_token=0.001))
        _control(mock.port, {"rules": list(rules(arguments.faults))})
        config = servers.config(
            mock.port, models, APIS, store=str(store), limits=[{"amount": 1e6}], timeouts=TIMEOUTS, token_margin=2.0,
            retries={"attempts": 4, "backoff": 0.005, "most": 0.05}, cooldown={"seconds": 0.001, "most": 0.01},
            queue={"most": 256}, sessions={"most": 2000}, answer_mb=1,
        )  # fmt: skip
        for model in config["models"].values():
            model["accepts"] = ["text", "tools", "image", "json_schema"]
        server = stack.enter_context(_watched(folder, config))
        ended, memory = _ask(arguments, server, console)
        problems += _how_they_ended(ended, console)
        problems += _what_is_left(server, memory, arguments.settle, console)
        bill = json.loads(_get(mock.port, "/_bill"))
    if arguments.log is not None:
        arguments.log.write_text(server.log, encoding="utf-8")
    if server.process.returncode != 0:
        problems.append(f"the server ended with status {server.process.returncode}")
    problems += _its_log(server.log, console)
    problems += _compare(books(store, bill["entries"]), console)
    return problems


def rules(share: float) -> Iterator[dict[str, Any]]:
    """The mock's rules: of all answers, ``share`` meet one."""
    whole, before = sum(weight for weight, _ in FAULTS), 0.0
    for weight, rule in FAULTS:
        probability = share * weight / whole
        yield {**rule, "probability": probability / (1 - before)}  # of those that met none before
        before += 0.0 if rule["fault"] == "refuse" else probability


@contextlib.contextmanager
def _watched(folder: Path, config: Mapping[str, Any]) -> Iterator[Process]:
    file, port = folder / "serve.yaml", free_port()
    file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    command = [sys.executable, "-m", "bench.load.watched", "--config", str(file), "--checkpoint", str(folder / "tiny")]
    with Process([*command, "--port", str(port)], port, "/readyz") as process:
        yield process


def _ask(arguments: argparse.Namespace, server: Process, console: Console) -> tuple[list[Ended], list[float]]:
    """All requests, a tenth at a time; memory and CPU after each."""
    found, memory, part = list[Ended](), list[float](), max(WARM, math.ceil(arguments.requests / PARTS))
    texts = tuple(f"{i} " + "what is the answer to this " * (1 + i % 9) for i in range(500))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for first in range(0, arguments.requests, part):
            count = min(part, arguments.requests - first)
            crowd = Crowd(
                "127.0.0.1", server.port, first, count, arguments.callers, texts, arguments.seed, arguments.leave,
                rubbish=arguments.rubbish,
            )  # fmt: skip
            start, cpu = time.perf_counter(), server.cpu()
            some, own = pool.apply(run, (crowd,))
            seconds, cpu = time.perf_counter() - start, server.cpu() - cpu
            found += some
            memory.append(server.memory() * 2**20 / 1e6)
            console.print(
                f"{len(found)} requests: {len(some) / seconds:.0f}/s, server {1e3 * cpu / len(some):.2f} ms of CPU each, "
                f"clients {1e3 * own / len(some):.2f} ms, {memory[-1]:.1f} MB",
                highlight=False,
            )
    return found, memory


def _how_they_ended(ended: list[Ended], console: Console) -> list[str]:
    counts = Counter(one.end for one in ended)
    console.print(", ".join(f"{end}: {count}" for end, count in counts.most_common()), highlight=False)
    bad = [one for one in ended if one.end.startswith(("broken", "closed"))]
    return [f"request {one.number} ({one.api}, stream {one.stream}) ended in {one.end}" for one in bad[:20]] + (
        [f"{len(bad)} requests ended in neither an answer nor an error"] if bad else []
    )


def _what_is_left(server: Process, memory: list[float], settle: float, console: Console) -> list[str]:
    """After the last request: memory, tasks, connections."""
    problems = list[str]()
    if len(memory) == PARTS:
        if (growth := memory[-1] - memory[0]) >= MOST_GROWTH:
            problems.append(f"the server's memory grew by {growth:.1f} MB after the first tenth")
    else:
        console.print(f"memory: not judged, the caches are not full; from {PARTS * WARM} requests on it is", highlight=False)
    until, connections = time.monotonic() + settle, 0 if settle == 0 else -1
    while time.monotonic() < until and connections != 0:
        time.sleep(0.5)
        found = psutil.Process(server.process.pid).net_connections("tcp")
        connections = sum(one.status != psutil.CONN_LISTEN for one in found)
    if connections > 0:
        problems.append(f"{connections} connections are open {settle:g} s after the last request")
    server.process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    lines = [line for line in server.log.splitlines() if line.startswith('{"tasks"')]
    held = json.loads(lines[-1])
    console.print(f"left: {held}, {connections} connections", highlight=False)
    usual = {"Server.serve", "Server._serve", "LifespanOn.main", "Runtime._sweep", "Runtime._watch"}
    if extra := {name: count for name, count in held["tasks"].items() if name not in usual or count > 1}:
        problems.append(f"tasks are left: {extra}")
    if held["running"]:
        problems.append(f"{held['running']} requests are still under way")
    return problems


def _its_log(log: str, console: Console) -> list[str]:
    lines = [line for line in log.splitlines() if not line.startswith('{"tasks"')]
    shown = Counter(line.split(":", 2)[-1][:100] for line in lines)
    for line, count in shown.most_common(8):
        console.print(f"log: {count} times {line}", highlight=False, markup=False)
    marks = ("Traceback", "Exception", "Error:", "never retrieved", "was destroyed")
    bad = [i for i, line in enumerate(lines) if any(mark in line for mark in marks)]
    first = "\n".join(lines[bad[0] - 1 : bad[0] + 30]) if bad else ""
    return [f"the server's log has {len(bad)} lines of exceptions, the first:\n{first}"] if bad else []


def books(store: Path, entries: list[dict[str, Any]]) -> Books:
    """Reads the server's store and compares it with the provider's bill."""
    from p2l_engine.apis.ask import digest
    from p2l_engine.decision_log.store import LogStore, Selection
    from p2l_engine.routing import Limit, SpendLimit

    found = Books()
    with SpendLimit([Limit(1e6)], str(store), lifetime=None) as limit:
        (balance,) = limit.balances()
        found.ledger, found.reserved = Fraction(balance.spent), Fraction(balance.reserved)
    log = LogStore(str(store), create=False)
    records = {record.session: record for page in log.pages(Selection()) for record in page}
    log.close()
    billed = defaultdict[str, list[dict[str, Any]]](list)
    for entry in entries:
        billed[digest([b"", str(entry["user"] or "").removeprefix("u").encode()])].append(entry)
        found.billed += Fraction(entry["usd"])
    found.logged = math.fsum(record.cost or 0.0 for record in records.values())
    exact, estimated, counts = ([], []), ([], []), [0, 0]  # type: tuple[list[float], list[Fraction]], Any, list[int]
    for session, record in records.items():
        mine = billed.pop(session, [])
        own = sum((Fraction(entry["usd"]) for entry in mine), Fraction(0))
        cost = record.cost or 0.0
        told = all(entry["usage_told"] or entry["usd"] == "0" for entry in mine)
        side = estimated if record.estimated or not told else exact
        counts[side is estimated] += 1
        side[0].append(cost)
        side[1].append(own)
        if side is exact:
            if abs(cost - own) > TOLERANCE:
                found.wrong.append(
                    f"{record.id}: {record.outcome}, cost {cost:.9f}, billed {float(own):.9f}, {mine}, {record.attempts}"
                )
            continue
        what = " and ".join(sorted({f"{entry['fault'] or 'no fault'}, {entry['end']}" for entry in mine})) or "not billed"
        kind = found.kinds.setdefault(f"{record.outcome}: {what}", [0, 0.0, 0.0])
        kind[0] += 1
        kind[1] += cost
        kind[2] += float(own)
        if cost < own - Fraction(1, 10**12):
            found.below[f"{record.outcome}: {what}"] += 1
            found.examples.append(
                f"{record.api}, streamed {record.streamed}, {record.outcome}, {what}: tokens {record.tokens_in} in, "
                f"{record.tokens_out} out; billed {[(entry['tokens_in'], entry['tokens_out']) for entry in mine]}"
            )
            found.deficit += float(own) - cost
        if not record.estimated:
            found.wrong.append(f"{record.id}: its usage was not told, and its cost is not marked as an estimate: {mine}")
    found.strays = sum((Fraction(entry["usd"]) for rest in billed.values() for entry in rest), Fraction(0))
    found.exact = math.fsum(exact[0]), sum(exact[1], Fraction(0))
    found.estimated = math.fsum(estimated[0]), sum(estimated[1], Fraction(0))
    found.requests = counts[0], counts[1]
    return found


def _compare(found: Books, console: Console) -> list[str]:
    console.print(
        f"ledger {float(found.ledger):.9f} USD, log {found.logged:.9f}, bill {float(found.billed):.9f}; {found.requests[0]} "
        f"requests whose usage was told: log {found.exact[0]:.9f}, bill {float(found.exact[1]):.9f}; {found.requests[1]} "
        f"estimated: log {found.estimated[0]:.9f}, bill {float(found.estimated[1]):.9f}, {found.below.total()} of them below "
        f"the bill, by {found.deficit:.9f}",
        highlight=False,
    )
    for kind, (count, cost, own) in sorted(found.kinds.items(), key=lambda item: -item[1][0])[:20]:
        console.print(
            f"estimated: {kind}: {count:.0f}, log {cost:.6f}, bill {own:.6f}, below {found.below[kind]}",
            highlight=False,
            markup=False,
        )
    for example in found.examples[:10]:
        console.print(f"below the bill: {example}", highlight=False, markup=False)
    problems = found.wrong[:10] + ([f"{len(found.wrong)} costs differ from the bill"] if found.wrong else [])
    if abs(float(found.ledger) - found.logged) > TOLERANCE:
        problems.append(f"the ledger has {float(found.ledger)} USD, the log {found.logged}")
    if abs(found.exact[0] - float(found.exact[1])) > TOLERANCE:
        problems.append(f"told usage: the log has {found.exact[0]} USD, the bill {float(found.exact[1])}")
    if found.estimated[0] < float(found.estimated[1]):
        problems.append(f"estimates: the log has {found.estimated[0]} USD, the bill {float(found.estimated[1])}")
    if found.reserved:
        problems.append(f"{float(found.reserved)} USD are still reserved")
    if found.strays:
        problems.append(f"{float(found.strays)} USD were billed for requests that the log does not have")
    return problems


def _control(port: int, settings: Any) -> None:
    data = json.dumps(settings).encode()
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/_control", data, method="POST"), timeout=60):
        pass


def _get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        return bytes(answer.read())


if __name__ == "__main__":
    run_main(main)
