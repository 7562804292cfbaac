"""What learning from feedback costs a server: CPU seconds and latency of requests, with serve.learn and without.

    python -m bench.online --csv bench/results/online.csv

Two servers run at once before one mock provider, with a log, and get blocks of the same requests in turn, one after the other;
every --every th is followed by one to a second model and a preference between the two answers, which one server learns from and
the other stores. Prompts are known to the servers' caches but for the first of each. CPU is that of the server's process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.load import servers
from bench.load.checkpoint import use
from bench.setting import positive, run, write_rows

PROMPTS = 50


@dataclass(frozen=True, slots=True)
class Row:
    """One server. cpu_ms: of a request, with its share of feedback and learning; p50_ms, p99_ms: of requests alone."""

    learning: str
    requests: int
    votes: int
    cpu_ms: float
    p50_ms: float
    p99_ms: float


class Client:
    """Asks one server, one request after the other."""

    def __init__(self, subject: servers.Subject, models: tuple[str, ...]) -> None:
        self.subject, self.models = subject, models
        self.seconds, self.cpu, self.given = list[float](), 0.0, 0

    def post(self, path: str, body: Any) -> tuple[str, Any]:
        """The decision's id, and the answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.subject.port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.headers.get("x-p2l-decision", ""), json.load(answer)

    def ask(self, prompt: str, model: str = "auto") -> str:
        """The id of the decision."""
        began = time.perf_counter()
        body = {"model": model, "max_tokens": 20, "messages": [{"role": "user", "content": prompt}]}
        found, _ = self.post("/v1/chat/completions", body)
        self.seconds.append(time.perf_counter() - began)
        return found

    def block(self, prompts: list[str], every: int) -> None:
        """Requests, and feedback on some of them."""
        before = self.subject.cpu()
        for i, prompt in enumerate(prompts, 1):
            self.ask(prompt)
            if i % every == 0:
                one, other = (self.ask(prompt, self.models[k]) for k in (i % 2, 2))
                self.given += 1
                self.post("/v1/feedback", {"id": one, "against": other, "preference": "this" if i % 3 else "other"})
        self.cpu += self.subject.cpu() - before

    def learned(self) -> int:
        """How many votes, once all feedback was looked at."""
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.subject.port}/v1/status", timeout=60) as answer:
                found = json.load(answer)["learning"]
            if found is None:
                return 0
            if found["learned"] + sum(found["skipped"].values()) >= self.given:
                return int(found["learned"])
            time.sleep(0.1)


def measured(folder: Path, given: argparse.Namespace) -> list[Row]:
    """Of the server that does not learn, and of the one that does."""
    checkpoint, models = use(given.checkpoint, folder)
    prompts = [f"question {i}, " + "please " * (i % 7) for i in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts), encoding="utf-8")
    learn = {"state": str(folder / "state"), "prompts": str(folder / "prompts.jsonl"), "refine": given.refine}
    with contextlib.ExitStack() as running:
        mock = running.enter_context(servers.provider(folder, models, tokens_out=5))
        clients = []
        settings: list[tuple[str, dict[str, Any]]] = [("off", {}), ("on", {"learn": learn})]
        for name, more in settings:
            config = servers.config(mock.port, models, ("chat",), store=str(folder / f"{name}.sqlite"), **more)
            subject = running.enter_context(servers.ours(name, folder, config, checkpoint))
            clients.append(Client(subject, models))
        for client in clients:
            for prompt in prompts:
                client.ask(prompt)
            client.seconds.clear()
        rng = np.random.default_rng(0)
        for _ in range(given.rounds):
            some = [prompts[i] for i in rng.integers(0, PROMPTS, given.requests)]
            for client in clients:
                client.block(some, given.every)
        last = [client.subject.cpu() for client in clients]
        votes = [client.learned() for client in clients]
        rows = []
        for name, client, before, count in zip(("off", "on"), clients, last, votes, strict=True):
            cpu = client.cpu + client.subject.cpu() - before  # what was learned after the last request, too
            n, latency = len(client.seconds), np.array(client.seconds) * 1000
            p50, p99 = np.quantile(latency, [0.5, 0.99]).tolist()
            rows.append(Row(name, n, count, 1000 * cpu / n, p50, p99))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder or name; left out: a tiny one")
    parser.add_argument("--rounds", type=positive, default=10, help="blocks of requests to each server")
    parser.add_argument("--requests", type=positive, default=200, help="of a block")
    parser.add_argument("--every", type=positive, default=10, help="requests for one piece of feedback")
    parser.add_argument("--refine", type=positive, default=100, help="votes between refinements")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Path(folder), given)
    table = Table("learning", "requests", "votes", "CPU ms", "p50 ms", "p99 ms")
    for row in rows:
        table.add_row(
            row.learning, str(row.requests), str(row.votes), *(f"{x:.2f}" for x in (row.cpu_ms, row.p50_ms, row.p99_ms))
        )
    Console().print(table)
    if given.csv is not None:
        write_rows(given.csv, rows, torch.device("cpu"))


if __name__ == "__main__":
    run(main)
