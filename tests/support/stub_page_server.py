"""A server for the tests of the page: fixed answers of the real server's shapes, from a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from p2l_engine import routing
from p2l_engine.serve.page import page

STARTED = time.time() - 3 * 3600


@dataclass(frozen=True)
class Candidate:
    """A model, with what the stub says of it."""

    model: str
    coefficient: float
    cost: float
    why_not: str | None = None
    tokens_out: int = 420
    tokens_cached: int = 0


# Expected costs of a request in USD: five orders of magnitude.
NINE = (
    Candidate("claude-sonnet-5", 1.42, 0.0138, tokens_out=610, tokens_cached=1024),
    Candidate("gpt-5.2", 1.31, 0.0094, tokens_out=580),
    Candidate("gemini-3-pro", 1.18, 0.0071, tokens_out=540),
    Candidate("qwen3-235b-a22b", 0.86, 0.00062, tokens_out=690),
    Candidate("deepseek-v3.2", 0.74, 0.00048, tokens_out=510),
    Candidate("gpt-5-mini", 0.52, 0.0011),
    Candidate("llama-4-maverick", 0.18, 0.00029, "the prompt needs 140,000 tokens; its context is 128,000"),
    Candidate("gemma-3-27b-it", -0.12, 0.000081, tokens_out=380),
    Candidate("mistral-small-3.2", -0.45, 0.000054, tokens_out=350),
)
HOSTILE = (
    Candidate('<img src=x onerror="window.hacked=1">', 1.0, 0.004),
    Candidate("<script>window.hacked=1</script>", 0.8, 0.003),
    Candidate("javascript:window.hacked=1", 0.5, 0.002, "</td><iframe srcdoc='<script>parent.hacked=1</script>'>"),
    Candidate("a-very-long-name-" + "without-any-place-to-break" * 5, 0.3, 0.001),
    Candidate("\u202eright-to-left & 'quotes' \"double\" ${x} {{y}}", 0.1, 0.0005),
    Candidate("モデル・日本語", 0.0, 0.0001),
)


def many(count: int = 130) -> tuple[Candidate, ...]:
    """As many models as the published leaderboard has."""
    rng = np.random.default_rng(7)
    families = ("claude", "gpt", "gemini", "llama", "qwen", "mistral", "deepseek", "gemma", "phi", "command-r")
    coefficients = np.sort(rng.normal(0, 0.9, count))[::-1]
    costs = 10 ** (-4.2 + 0.5 * coefficients + rng.normal(0, 0.55, count))
    return tuple(
        Candidate(
            f"{families[i % len(families)]}-{i // len(families) + 1}-{('instruct', 'chat', 'it-fp8', '2026-03-01')[i % 4]}",
            float(coefficients[i]),
            float(costs[i]),
            "it takes no images" if i % 17 == 3 else None,
            tokens_out=int(rng.integers(200, 900)),
        )
        for i in range(count)
    )


@dataclass
class Stub:
    """What the server answers from now on; tests change it while a page is open."""

    url: str = ""
    candidates: tuple[Candidate, ...] = NINE
    others: dict[str, tuple[Candidate, ...]] = field(default_factory=dict)  # for these prompts
    key: str | None = None  # asked for where it is not None
    budget: float | None = 0.004  # that of the server's own decision
    held: set[str] = field(default_factory=set)  # prompts that are answered when they are taken out
    failures: dict[str, tuple[int, Any, dict[str, str]]] = field(default_factory=dict)  # a path's status, body and headers
    limits: list[dict[str, Any]] = field(default_factory=lambda: _limits())
    pacer: dict[str, Any] | None = field(default_factory=lambda: {"budget": 0.004, "mean_cost": 0.00371, "count": 18_204})
    health: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: _trouble())
    recent: list[dict[str, Any]] | None = None  # None: fifty decisions over the candidates
    asked: list[dict[str, Any]] = field(default_factory=list)  # bodies of the ranked prompts
    polls: list[float] = field(default_factory=list)  # when the status was asked for
    headers: list[dict[str, str]] = field(default_factory=list)  # of all requests, with their address
    unit: str = "USD"
    slow: bool = False  # whether the status waits
    learning: dict[str, int] | None = None

    # ---- What it knows of a prompt ----

    def win_rates(self) -> np.ndarray:
        """Against all models, uniformly [M]."""
        theta = np.array([[candidate.coefficient for candidate in self.candidates]])
        return np.asarray(routing.win_rates(theta, np.full(len(self.candidates), 1 / len(self.candidates))))[0]

    def allowed(self) -> list[int]:
        return [i for i, candidate in enumerate(self.candidates) if candidate.why_not is None]

    def best(self, budget: float) -> tuple[dict[str, float], float, float]:
        """The best policy within a budget, its win rate and its cost, by HiGHS."""
        kept = self.allowed()
        v = self.win_rates()[kept][None]
        costs = np.array([self.candidates[i].cost for i in kept])
        found = routing.solve_budget(v, costs, budget, solver="highs")
        policy: dict[str, float] = {}
        for i, p in zip(found.indices[0], found.probabilities[0], strict=True):
            if p > 1e-12:
                name = self.candidates[kept[i]].model
                policy[name] = policy.get(name, 0.0) + float(p)
        return policy, float(found.value[0]), float(found.cost[0])

    def frontier(self) -> list[dict[str, Any]]:
        kept = self.allowed()
        if not kept:
            return []
        v, costs = self.win_rates()[kept][None], np.array([self.candidates[i].cost for i in kept])
        found = routing.frontier(v, costs)
        vertices = []
        for cost, rate in zip(found.cost, found.value, strict=True):
            nearest = min(range(len(kept)), key=lambda k: abs(costs[k] - cost) + abs(v[0, k] - rate))
            name = self.candidates[kept[nearest]].model
            vertices.append({"cost": float(costs[nearest]), "win_rate": float(v[0, nearest]), "model": name})
        return vertices

    # ---- Answers ----

    def ranking(self) -> dict[str, Any]:
        rates = self.win_rates()
        order = np.argsort(-rates)
        kept = self.allowed()
        cheapest = min((self.candidates[i].cost for i in kept), default=0.0)
        policy, rate, cost = self.best(max(self.budget or np.inf, cheapest)) if kept else ({}, 0.0, 0.0)
        model = max(policy, key=lambda name: policy[name]) if policy else "none"
        mix = ", ".join(f"{name} {p:.3f}" for name, p in policy.items())
        why = (
            f"highest win rate within the budget of {self.budget:g} USD: a mix of {mix}" if self.budget else "highest win rate"
        )
        return {
            "id": "dec_" + "0" * 32,
            "model": model,
            "fallbacks": [self.candidates[i].model for i in order if i in kept and self.candidates[i].model != model][:6],
            "policy": policy,
            "propensity": policy.get(model, 1.0),
            "expected_cost": cost,
            "win_rate": rate,
            "score": None,
            "why": why,
            "tokens_in": 1312,
            "candidates": [
                {
                    "model": self.candidates[i].model,
                    "win_rate": float(rates[i]),
                    "expected_cost": self.candidates[i].cost,
                    "tokens_cached": self.candidates[i].tokens_cached,
                    "tokens_out": self.candidates[i].tokens_out,
                    "coefficient": self.candidates[i].coefficient,
                    "allowed": self.candidates[i].why_not is None,
                    "why_not": self.candidates[i].why_not,
                }
                for i in order
            ],
            "frontier": self.frontier(),
            "unit": self.unit,
        }

    def status(self) -> dict[str, Any]:
        ok = {"name": "main", "state": "ok", "seconds_left": 0.0, "failures": 0}
        return {
            "version": "0.9.0",
            "started": STARTED,
            "models": [
                {"model": candidate.model, "deployments": self.health.get(candidate.model, [ok])}
                for candidate in self.candidates
            ],
            "limits": self.limits,
            "pacer": self.pacer,
            "coefficient_cache": {"hits": 912, "misses": 288},
            "learning": self.learning,
            "recent": self._decisions() if self.recent is None else self.recent,
        }

    def _decisions(self) -> list[dict[str, Any]]:
        rng = np.random.default_rng(3)
        rates = self.win_rates()
        found = []
        for k in range(50):
            i = int(rng.integers(len(self.candidates)))
            outcome, status = [("answered", 200)] * 9 + [("cached", 200), ("cut", 200), ("refused", 402), ("failed", 503)], 0
            outcome, status = outcome[k * 5 % 13]
            cost = self.candidates[i].cost
            found.append(
                {
                    "id": f"dec_{k:032x}",
                    "time": STARTED + 3 * 3600 - 7 * k,
                    "api": ("chat", "messages", "responses")[k % 3],
                    "asked": self.candidates[i].model if k % 6 == 5 else "auto",
                    "model": self.candidates[i].model,
                    "win_rate": float(rates[i]),
                    "expected_cost": cost,
                    "cost": None if outcome in ("refused", "failed") else cost * float(rng.uniform(0.5, 1.5)),
                    "estimated": outcome == "cut",
                    "status": status,
                    "outcome": outcome,
                    "latency_ms": float(rng.uniform(300, 4000)),
                    "tokens_in": 1200,
                    "tokens_out": 400,
                    "attempts": 2 if k % 7 == 3 else 1,
                }
            )
        return found


def _limits() -> list[dict[str, Any]]:
    tomorrow = datetime.fromtimestamp(STARTED + 86_400, UTC).replace(hour=0, minute=0, second=0, microsecond=0).isoformat()
    return [
        {"limit": "total", "amount": 500.0, "spent": 212.4, "reserved": 0.31, "left": 287.29, "ends": None},
        {"limit": "a day", "amount": 20.0, "spent": 14.2, "reserved": 1.1, "left": 4.7, "ends": tomorrow},
        {"limit": "key batch-jobs, a day", "amount": 5.0, "spent": 5.0, "reserved": 0.0, "left": 0.0, "ends": tomorrow},
    ]


def _trouble() -> dict[str, list[dict[str, Any]]]:
    ok = {"name": "eu", "state": "ok", "seconds_left": 0.0, "failures": 0}
    return {
        "gpt-5.2": [ok, {"name": "us", "state": "cooling", "seconds_left": 12.4, "failures": 3}],
        "deepseek-v3.2": [{"name": "main", "state": "cooling", "seconds_left": 41.0, "failures": 5}],
    }


def app(stub: Stub) -> Starlette:
    """The page and the two addresses that it asks."""

    def refused(request: Request) -> Response | None:
        stub.headers.append({**request.headers, "address": str(request.url)})
        if request.url.path in stub.failures:
            status, body, headers = stub.failures[request.url.path]
            return Response(body, status, headers) if isinstance(body, str) else JSONResponse(body, status, headers)
        if stub.key is not None and request.headers.get("authorization") != f"Bearer {stub.key}":
            return JSONResponse(
                {"error": {"message": "no such key", "type": "authentication_error", "param": None, "code": None}}, 401
            )
        return None

    async def index(request: Request) -> Response:
        body, headers = page()
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)

    async def route(request: Request) -> Response:
        body = await request.json()
        stub.asked.append(body)
        text = body["messages"][0]["content"]
        answer = refused(request)
        if answer is None:
            answer = JSONResponse(replace(stub, candidates=stub.others.get(text, stub.candidates)).ranking())
        while text in stub.held:
            await asyncio.sleep(0.01)
        return answer

    async def status(request: Request) -> Response:
        stub.polls.append(time.monotonic())
        answer = refused(request) or JSONResponse(stub.status())
        while stub.slow:
            await asyncio.sleep(0.01)
        return answer

    return Starlette(
        routes=[Route("/", index), Route("/v1/route", route, methods=["POST"]), Route("/v1/status", status)],
    )


@contextlib.contextmanager
def serve(stub: Stub, port: int = 0) -> Iterator[Stub]:
    """Serves until the block ends; ``stub.url`` is its address."""
    ready = queue.Queue[Callable[[], object] | BaseException]()

    async def run() -> None:
        own = uvicorn.Config(app(stub), port=port, log_level="warning", timeout_graceful_shutdown=1)
        own.load()
        server, stop = uvicorn.Server(own), asyncio.Event()
        server.lifespan = own.lifespan_class(own)
        try:
            await server.startup()
            stub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        except BaseException as error:  # uvicorn exits where it cannot bind
            ready.put(error)
            return
        ticks = asyncio.create_task(server.main_loop())  # its end is not waited for, which takes a tenth of a second
        ready.put(partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set))
        await stop.wait()
        ticks.cancel()
        await server.shutdown()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    stop = ready.get(timeout=60)
    if isinstance(stop, BaseException):
        raise RuntimeError("the stub server did not start") from stop
    try:
        yield stub
    finally:
        stop()
        thread.join()
