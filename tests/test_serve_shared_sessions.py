"""Sessions that several servers share through PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from sqlalchemy.exc import SQLAlchemyError

from bench.mock_provider import MockProvider
from p2l_engine.serve import shared_sessions
from p2l_engine.serve.sessions import KeptAnswer
from p2l_engine.serve.shared_sessions import SharedSessions
from p2l_engine.serve.tokens import Counted
from tests.support import postgres
from tests.support.serving import PRICES, config_for, serving

pytestmark = [pytest.mark.store, pytest.mark.xdist_group("postgres")]

MODELS = ("large", "small")


@pytest.fixture
def url(postgres_url, monkeypatch):
    monkeypatch.setattr(shared_sessions, "EVERY", 0.02)
    yield postgres_url
    postgres.empty(postgres_url)


def counted(*messages: str) -> Counted:
    """Ten tokens a message; the chain's hashes are of sixteen bytes."""
    texts = ["/".join(messages[: i + 1]).encode()[-16:].rjust(16, b"\0") for i in range(len(messages))]
    return Counted(tuple(10 * (i + 1) for i in range(len(messages))), tuple(texts))


@asynccontextmanager
async def opened(url: str, seconds: float = 300, most: int = 100):
    memory = SharedSessions(url, seconds, most)
    memory.open()
    try:
        yield memory
    finally:
        await memory.close()


async def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen in 20 s")


def test_what_one_server_learned_the_others_know(url):
    async def one():
        async with opened(url) as a, opened(url) as b:
            a.remember("s", "large", counted("1", "2"))
            assert a.cached("s", counted("1", "2", "3"), MODELS) == [20, 0]  # at once
            await until(lambda: b.cached("s", counted("1", "2", "3"), MODELS) == [20, 0])
            b.remember("s", "small", counted("1", "2", "3"))
            b.remember("s", "large", counted("1", "2", "3", "4"))
            await until(lambda: a.cached("s", counted("1", "2", "3", "4"), MODELS) == [40, 30])
            assert b.cached("other", counted("1"), MODELS) == [0, 0]
        async with opened(url) as after:  # also after a restart
            await until(lambda: after.cached("s", counted("1", "2", "3", "4"), MODELS) == [40, 30])

    asyncio.run(one())


def test_sessions_are_kept_as_long_as_providers_keep_a_prefix(url):
    async def one():
        async with opened(url) as a:
            a.remember("s", "large", counted("1"))
        async with opened(url, seconds=0.05) as b:
            await asyncio.sleep(0.2)
            assert b.cached("s", counted("1"), MODELS) == [0, 0]
        async with opened(url) as c:  # b deleted what was too old for it
            c.remember("t", "large", counted("1"))
            await asyncio.sleep(0.2)
            assert c.cached("s", counted("1"), MODELS) == [0, 0]

    asyncio.run(one())


def test_an_answer_of_another_server_is_found(url):
    async def one():
        async with opened(url) as a, opened(url) as b:
            a.remember_answer("resp_1", KeptAnswer("small-responses", 7))
            assert a.of_answer("resp_1") == KeptAnswer("small-responses", 7)
            await b.find_answers(["resp_1"])
            assert b.of_answer("resp_1") == KeptAnswer("small-responses", 7)
            for strange in ("unknown", "a\0b", "\ud800", "x" * 1000):
                await b.find_answers([strange])
                a.remember_answer(strange, KeptAnswer("x", 1))
            await b.find_answers([])
            await b.find_answers(["resp_1", *(f"unknown_{i}" for i in range(5_000))])
            await until(lambda: not a._answers)
            assert not a._failing
            assert not b._failing

    asyncio.run(one())


def test_many_servers_write_the_same_sessions_at_once(url):
    async def one():
        async with AsyncExitStack() as stack:
            memories = [await stack.enter_async_context(opened(url, most=1000)) for _ in range(4)]

            async def step(n: int) -> None:
                for i, memory in enumerate(memories):
                    for session in range(30):
                        memory.remember(f"s{session}", MODELS[(i + n) % 2], counted(*map(str, range(n + 1))))
                await asyncio.sleep(0.01)

            for n in range(19):
                await step(n)
            full = counted(*map(str, range(20)))
            # The order of what different servers read of one session within milliseconds is not defined: the last goes on.
            for _ in range(200):
                await step(19)
                await asyncio.sleep(0.1)
                if all(min(memory.cached(f"s{i}", full, MODELS)) == 200 for i in range(30) for memory in memories):
                    break
            else:
                raise AssertionError("the servers do not agree")
            assert not any(memory._failing for memory in memories)

    asyncio.run(one())


def test_a_database_that_is_away_costs_sharing_alone(url, caplog, monkeypatch):
    monkeypatch.setattr(shared_sessions, "LONGEST_PAUSE", 0.02)

    async def one():
        async with opened(url) as a, opened(url) as b:
            begin, away = a._database.begin, [True]

            def broken():
                if away[0]:
                    raise ConnectionError("a message that may name the password")
                return begin()

            a._database.begin = broken
            a.remember("s", "large", counted("1"))
            await until(lambda: a._failing)
            assert a.cached("s", counted("1"), MODELS) == [10, 0]
            await a.find_answers(["resp_2"])
            a.remember("s", "large", counted("1", "2"))
            away[0] = False
            await until(lambda: b.cached("s", counted("1", "2"), MODELS) == [20, 0])

    with caplog.at_level(logging.WARNING):
        asyncio.run(one())
    assert [record.getMessage() for record in caplog.records if "sessions" in record.getMessage()] == [
        "the store of sessions fails (ConnectionError): this server knows its own alone",
        "the store of sessions works again",
    ]
    with pytest.raises(SQLAlchemyError):
        SharedSessions("postgresql+psycopg://unknown@/x?host=/nowhere", 1, 1)


def test_a_conversation_goes_on_at_another_server(url):
    async def one():
        async with MockProvider(PRICES) as provider:
            config = config_for(provider, store=url)
            async with serving(config) as first, serving(config) as second, aiohttp.ClientSession() as client:

                async def send(server: Any, **body: Any) -> tuple[int, Any, Any]:
                    async with client.post(f"{server.url}/v1/responses", json={"model": "auto", **body}) as response:
                        return response.status, response.headers, json.loads(await response.read())

                _, _, answer = await send(first, input="hello")
                status, headers, _ = await send(second, input="and then?", previous_response_id=answer["id"])
                assert status == 200
                assert first.records[0].model == headers["x-p2l-model"]
                status, _, _ = await send(second, input="and then?", previous_response_id="resp_unknown")
                assert status == 404

                long = [{"role": "user", "content": "words " * 300}]
                await send(first, input=long)
                more = {"model": "auto", "input": [*long, {"role": "user", "content": "more"}], "p2l": {"explain": True}}

                async def cached() -> int:
                    async with client.post(f"{second.url}/v1/route", json=more) as response:
                        rows = {row["model"]: row for row in (await response.json())["candidates"]}
                        return rows[first.records[0].model]["tokens_cached"]

                for _ in range(500):
                    if await cached():
                        return
                    await asyncio.sleep(0.01)
                raise AssertionError("the other server's session was not learned")

    asyncio.run(one())
