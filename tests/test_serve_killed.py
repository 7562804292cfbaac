"""Hard limits survive the death of the server: 64 clients, kill -9 in the middle of their requests, and a restart."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections import Counter
from fractions import Fraction

import aiohttp
import pytest

from bench.load import servers
from bench.load.checkpoint import write_tiny
from bench.load.process import Process
from bench.load.request import PATHS, body_of
from p2l_engine.routing import Limit, SpendLimit

CLIENTS, LIVES = 64, 4
AMOUNT = Fraction("0.04")  # USD; what 64 requests reserve when the server dies is a sixth of it


def billed(mock: Process) -> Fraction:
    with urllib.request.urlopen(f"http://127.0.0.1:{mock.port}/_bill", timeout=30) as answer:
        return Fraction(json.load(answer)["total"])


async def clients(port: int, until: asyncio.Event) -> Counter[str]:
    """Asks without a pause until the event is set; returns how often which status came."""
    found = Counter[str]()

    async def client(i: int, session: aiohttp.ClientSession) -> None:
        number = 0
        while not until.is_set():
            api, number = tuple(PATHS)[(i + number) % 3], number + 1
            body = body_of(api, "auto", f"question {i % 8}", number % 2 == 0, 20)
            try:
                async with session.post(f"http://127.0.0.1:{port}{PATHS[api]}", json=body) as response:
                    await response.read()
                    found[str(response.status)] += 1
            except aiohttp.ClientError:
                found["no answer"] += 1
                await asyncio.sleep(0.01)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(i, session) for i in range(CLIENTS)))
    return found


async def a_life(server: Process, mock: Process, spend: Fraction, kill: bool) -> Counter[str]:
    """Clients ask until so much more is billed, or nothing is any more; then the server dies while they go on."""
    until = asyncio.Event()
    asking = asyncio.create_task(clients(server.port, until))
    before = last = await asyncio.to_thread(billed, mock)
    still = 0
    while last < before + spend and still < (200 if last == before else 30):
        await asyncio.sleep(0.05)
        now = await asyncio.to_thread(billed, mock)
        assert now <= AMOUNT
        still, last = still + 1 if now == last else 0, now
    if kill:
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(0.1)
    until.set()
    return await asking


@pytest.mark.slow
def test_a_limit_holds_when_the_server_is_killed(tmp_path):
    models = write_tiny(tmp_path / "tiny", 3)
    store, apis = tmp_path / "serve.sqlite", tuple(PATHS)
    with servers.provider(tmp_path, models, tokens_out=12, per_token=0.002) as mock:
        config = servers.config(mock.port, models, apis, store=str(store), limits=[{"amount": float(AMOUNT)}])
        bills = [Fraction(0)]
        for life in range(LIVES):
            last = life == LIVES - 1
            with servers.ours("killed", tmp_path, config, str(tmp_path / "tiny")) as subject:
                spend = AMOUNT if last else AMOUNT / 20
                statuses = asyncio.run(a_life(subject.processes[0], mock, spend, kill=not last))
            bills.append(billed(mock))
            assert bills[-1] <= AMOUNT
            assert statuses["200"] > 0
        with SpendLimit([Limit(float(AMOUNT))], str(store), lifetime=None) as limit:
            (balance,) = limit.balances()
            left_by_the_dead = len(limit.reservations())
    assert bills == sorted(bills)
    assert statuses["402"] > 0  # the money ran out
    assert left_by_the_dead > 0  # requests of dead processes may have been billed: their reservations are held
    assert bills[-1] <= Fraction(balance.spent + balance.reserved) <= AMOUNT
