"""A routing server in the test's own event loop, on an engine whose coefficients are known, before a mock provider."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import uvicorn

from bench.mock_provider import MockProvider
from p2l_engine.coefficients import Coefficients
from p2l_engine.decision_log.record import Record
from p2l_engine.feedback import feedback_model
from p2l_engine.serve import settings
from p2l_engine.serve.runtime import Runtime

PRICES = {"large": (3.0, 15.0, 0.3), "medium": (0.5, 1.5, 0.05), "small": (0.1, 0.4, 0.1)}
APIS = ("chat", "responses", "messages")
BEST = (2.0, 1.0, 0.0)  # their coefficients, for every prompt


class _Tokenizer:
    added_tokens = ()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[0] * -(-len(text.encode()) // 4) for text in texts]


class _Encoder:
    tokenizer = _Tokenizer()


class FixedEngine:
    """theta: the coefficients of every prompt, or None: drawn by the prompt's text. seconds: of a batch. deviation: of them."""

    encoder = _Encoder()
    prefix_cache = None

    def __init__(
        self,
        models: Sequence[str] = tuple(PRICES),
        theta: Sequence[float] | None = BEST,
        seconds: float = 0.0,
        deviation: Sequence[float] | None = None,
    ) -> None:
        self.uncertainty = deviation
        self.models, self.feedback = tuple(models), feedback_model("bt")
        self.theta, self.seconds, self.batches = theta, seconds, list[int]()

    def coefficients(self, prompts: Sequence[Sequence[str]]) -> Coefficients:
        import time

        time.sleep(self.seconds)
        self.batches.append(len(prompts))
        rows = [self.theta if self.theta is not None else self._drawn(turns) for turns in prompts]
        deviation = None if self.uncertainty is None else np.array([self.uncertainty] * len(rows), np.float32)
        return Coefficients(np.array(rows, np.float32), None, self.models, self.feedback, deviation)

    def _drawn(self, turns: Sequence[str]) -> Any:
        return np.random.default_rng(zlib.crc32("\0".join(turns).encode())).normal(size=len(self.models))


def config_for(provider: MockProvider | str, models: dict[str, Any] | None = None, **serve: Any) -> dict[str, Any]:
    """A configuration of the three models at a mock provider. models: further settings of some of them; None: leave it out."""
    url = provider if isinstance(provider, str) else f"{provider.url}/v1"
    entries: dict[str, Any] = {}
    for name, (usd_in, usd_out, usd_cached) in PRICES.items():
        entries[name] = {
            "usd_per_m_in": usd_in, "usd_per_m_out": usd_out, "usd_per_m_cached": usd_cached,
            "tokens_in": 100, "tokens_out": 50, "max_output": 1000, "cached_from": 1,
            "accepts": ["text", "tools", "image", "json_schema"],
            "provider": [{"base_url": url, "model": name, "api": api, "name": f"{name}-{api}"} for api in APIS],
        }  # fmt: skip
        if models is not None and name in models:
            entries[name] |= models[name] or {}
    quick = {
        "queue": {"seconds": 60},
        "timeouts": {"connect": 1, "first_byte": 2, "whole": 2, "idle": 1, "total": 10},
        "retries": {"backoff": 0.01},
    }
    return {
        "models": {k: v for k, v in entries.items() if models is None or models.get(k, {}) is not None},
        "serve": quick | serve,
    }


class Serving:
    """A running server. url: without /v1; records: of its decisions, in order."""

    def __init__(self, runtime: Runtime, port: int, records: list[Record]) -> None:
        self.runtime, self.url, self.records = runtime, f"http://127.0.0.1:{port}", records

    @property
    def service(self) -> Any:
        assert self.runtime.server is not None
        return self.runtime.server.service


@asynccontextmanager
async def serving(config: dict[str, Any], engine: Any = None, **options: Any) -> AsyncIterator[Serving]:
    """Starts a server and stops it."""
    records = list[Record]()
    runtime = Runtime(settings.parse(config), engine or FixedEngine(), watch=records.append, **options)
    own = uvicorn.Config(runtime.application(), port=0, log_level="warning", http="httptools", ws="none", lifespan="on")
    own.load()
    web = uvicorn.Server(own)
    web.lifespan = own.lifespan_class(own)
    await web.startup()
    if web.should_exit:
        raise RuntimeError("the server did not start; its log says why")
    ticks = asyncio.create_task(web.main_loop())  # its end is not waited for, which takes a tenth of a second
    try:
        yield Serving(runtime, web.servers[0].sockets[0].getsockname()[1], records)
    finally:
        ticks.cancel()
        await _shutdown(web)


async def _shutdown(web: uvicorn.Server) -> None:
    """As uvicorn does, which waits for a tenth of a second also where no request runs."""
    for connection in list(web.server_state.connections):
        connection.shutdown()
    await asyncio.sleep(0)  # idle connections are closed
    if web.server_state.connections or web.server_state.tasks:
        await web.shutdown()
        return
    for server in web.servers:
        server.close()
        await server.wait_closed()
    await web.lifespan.shutdown()
