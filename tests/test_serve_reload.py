"""A configuration that is read again while requests run, and stores and clocks that misbehave meanwhile."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from sqlalchemy.exc import OperationalError

from bench.mock_provider import MockProvider
from p2l_engine.routing import SpendLimit
from p2l_engine.serve import config_file as module
from p2l_engine.serve import settings
from tests.support import postgres
from tests.support.cases import slow_but
from tests.support.serving import PRICES, config_for, serving

CHAT = {"model": "auto", "max_tokens": 60, "messages": [{"role": "user", "content": "hello"}]}
PATH = "/v1/chat/completions"


def limited(tmp_path: Path, provider: Any, amount: float | None = 100, **serve: Any) -> dict[str, Any]:
    limits = [] if amount is None else [{"amount": amount}]
    return config_for(provider, limits=limits, store=str(tmp_path / "serve.sqlite"), **serve)


def write(file: Path, config: dict[str, Any] | str) -> None:
    file.write_text(config if isinstance(config, str) else yaml.safe_dump(config), encoding="utf-8")


async def ask(url: str, **fields: Any) -> int:
    async with aiohttp.ClientSession() as client, client.post(url + PATH, json=CHAT | fields) as response:
        await response.read()
        return response.status


@pytest.mark.parametrize(
    "amounts", slow_but([(100, 50), (100, None, 100)], [(100, 50), (100, None), (None, 100), (100, 100), (100, None, 100)])
)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_under_way_are_settled_across_reloads(amounts, stream, tmp_path):
    """Also where the file has no limits any more, or has its first one."""

    async def one() -> Any:
        async with MockProvider(PRICES, tokens_out=8, per_token=0.01, first_byte=0.2) as provider:
            file = tmp_path / "serve.yaml"
            write(file, limited(tmp_path, provider, amounts[0]))
            async with serving(limited(tmp_path, provider, amounts[0]), file=file) as server:
                under_way = [asyncio.create_task(ask(server.url, stream=stream, n=i % 3 + 1)) for i in range(8)]
                await asyncio.sleep(0.1)
                for amount in amounts[1:]:
                    write(file, limited(tmp_path, provider, amount))
                    assert await server.runtime.reload()
                statuses = await asyncio.gather(*under_way)
                statuses.append(await ask(server.url))
                await server.service.spending.drain()
                return statuses, [record.cost for record in server.records], float(provider.bill.total)

    statuses, costs, bill = asyncio.run(one())
    assert statuses == [200] * 9
    assert sum(costs) == pytest.approx(bill, abs=1e-12)
    with SpendLimit([], tmp_path / "serve.sqlite") as ledger:
        assert ledger.reservations() == ()


def test_limits_that_did_not_change_keep_their_connections_and_others_are_closed(tmp_path, monkeypatch):
    closed = list[SpendLimit]()
    close = SpendLimit.close
    monkeypatch.setattr(SpendLimit, "close", lambda limit: (closed.append(limit), close(limit))[1])

    async def one() -> Any:
        async with MockProvider(PRICES) as provider:
            file = tmp_path / "serve.yaml"
            write(file, limited(tmp_path, provider))
            async with serving(limited(tmp_path, provider), file=file) as server:
                first = server.service.spending.limit
                await asyncio.gather(*(server.runtime.reload() for _ in range(5)))
                kept = server.service.spending.limit is first, list(closed)
                write(file, limited(tmp_path, provider, 7))
                await asyncio.gather(*(server.runtime.reload() for _ in range(5)))
                return kept, closed == [first], await ask(server.url)

    assert asyncio.run(one()) == ((True, []), True, 200)


@pytest.mark.parametrize(
    ("name", "value"),
    [("page", False), ("cors", ["https://example.com"]), ("retention_days", 3), ("traces", True), ("store", None)],
)
def test_what_needs_a_restart_is_refused_by_name(name, value, tmp_path, caplog):
    async def one() -> Any:
        async with MockProvider(PRICES) as provider:
            file = tmp_path / "serve.yaml"
            store = str(tmp_path / "serve.sqlite")
            write(file, config_for(provider, **{"store": store, name: value}))
            async with serving(config_for(provider, store=store)) as server:
                server.runtime.source = module.ConfigFile(file)
                return await server.runtime.reload()

    assert asyncio.run(one()) is False
    assert f"serve.{name}: was" in caplog.text
    assert "needs a restart" in caplog.text


def test_prompts_are_logged_after_a_reload_where_the_command_line_says_so(tmp_path):
    async def one() -> Any:
        async with MockProvider(PRICES) as provider:
            file = tmp_path / "serve.yaml"
            write(file, config_for(provider))
            async with serving(config_for(provider), file=file, log_prompts=True) as server:
                await ask(server.url)
                assert await server.runtime.reload()
                await ask(server.url)
                return [record.turns for record in server.records]

    assert asyncio.run(one()) == [("hello",), ("hello",)]


async def until(met: Any) -> None:
    for _ in range(500):
        if met():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within five seconds")


def test_a_file_that_changed_while_the_server_started_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.01)

    async def one() -> Any:
        async with MockProvider(PRICES) as provider:
            file = tmp_path / "serve.yaml"
            config = config_for(provider)
            write(file, config_for(provider, {"large": None}))
            async with serving(config, file=file) as server:
                await until(lambda: server.runtime.plan.names == ("medium", "small"))

    asyncio.run(one())


NESTED = "models: " + "[" * 1_500


BAD = [pytest.param(NESTED, marks=pytest.mark.slow), "models: {1: 2", "- a", "\x00", "models: {? [1]: 2}", "a: 2001-99-99", ""]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_no_file_ends_the_watch(bad, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "EVERY", 0.01)

    async def one() -> Any:
        async with MockProvider(PRICES) as provider:
            file = tmp_path / "serve.yaml"
            write(file, config_for(provider))
            async with serving(config_for(provider), file=file) as server:
                write(file, bad)
                await until(lambda: "the configuration was not changed" in caplog.text)
                status = await ask(server.url)
                write(file, config_for(provider, {"large": None}))
                await until(lambda: server.runtime.plan.names == ("medium", "small"))
                return status

    assert asyncio.run(one()) == 200
    assert "a task of the server failed" not in caplog.text


def test_an_error_that_was_not_foreseen_does_not_end_the_watch(tmp_path, monkeypatch, caplog):
    load, broken = settings.load, [MemoryError("no more")]
    monkeypatch.setattr(settings, "load", lambda path: load(path) if not broken else (_ for _ in ()).throw(broken.pop()))

    async def one() -> Any:
        async with MockProvider(PRICES) as provider:
            file = tmp_path / "serve.yaml"
            write(file, config_for(provider, {"large": None}))
            async with serving(config_for(provider)) as server:
                server.runtime.source = module.ConfigFile(file)
                return await server.runtime.reload(), await server.runtime.reload()

    assert asyncio.run(one()) == (False, True)


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_a_clock_that_jumps_counts_no_living_request_in_full(jump, tmp_path, monkeypatch):
    async def one() -> Any:
        async with MockProvider(PRICES, first_byte=0.3) as provider, serving(limited(tmp_path, provider)) as server:
            under_way = asyncio.create_task(ask(server.url))
            await until(lambda: server.service.spending.limit.reservations())
            monkeypatch.setattr(time, "time", lambda now=time.time: now() + jump)
            swept = await server.service.spending.sweep()
            monkeypatch.undo()
            status = await under_way
            await server.service.spending.drain()
            (balance,) = server.service.spending.limit.balances()
            return swept, status, float(balance.spent), float(provider.bill.total)

    swept, status, spent, bill = asyncio.run(one())
    assert (swept, status) == (0, 200)
    assert spent == pytest.approx(bill, abs=1e-12)


def test_a_ledger_that_is_full_refuses_and_goes_on_when_there_is_room(tmp_path, monkeypatch):
    full = False

    def begin(self: Any, *arguments: Any, **options: Any) -> Any:
        if full:
            raise OperationalError("INSERT", {}, Exception("database or disk is full"))
        return original(self, *arguments, **options)

    from p2l_engine.spending.database import Database

    original = Database.begin

    async def one() -> Any:
        nonlocal full
        async with MockProvider(PRICES) as provider, serving(limited(tmp_path, provider)) as server:
            monkeypatch.setattr(Database, "begin", begin)
            found = [await ask(server.url)]
            full = True
            found += [await ask(server.url) for _ in range(3)]
            async with aiohttp.ClientSession() as client, client.get(server.url + "/v1/status") as response:
                found.append((await response.json())["limits"])
            sent = len(provider.requests)
            full = False
            found += [await ask(server.url)]
            await server.service.spending.drain()
            log = server.runtime.server.log
            assert log is not None
            await asyncio.to_thread(log.flush)
            (balance,) = server.service.spending.limit.balances()
            return found, sent, len(log.recent(10)), float(balance.spent + balance.reserved), float(provider.bill.total)

    found, sent, logged, spent, bill = asyncio.run(one())
    assert found == [200, 503, 503, 503, None, 200]
    assert (sent, logged) == (1, 5)
    assert spent == pytest.approx(bill, abs=1e-12)


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_a_stream_that_the_server_does_not_let_finish_ends_in_an_error_event(api, tmp_path):
    """As uvicorn does to requests beyond the time that it gives them when it stops."""
    path = {"chat": PATH, "responses": "/v1/responses", "messages": "/v1/messages"}[api]
    body = {"model": "auto", "stream": True, ("max_output_tokens" if api == "responses" else "max_tokens"): 60}
    body |= {"input": "hello"} if api == "responses" else {"messages": CHAT["messages"]}

    async def one() -> Any:
        async with (
            MockProvider(PRICES, per_token=1.0) as provider,
            serving(limited(tmp_path, provider)) as server,
            aiohttp.ClientSession() as client,
        ):
            async with client.post(server.url + path, json=body) as response:
                await response.content.readany()
                (answering,) = [task for task in asyncio.all_tasks() if "run_asgi" in repr(task.get_coro())]
                answering.cancel(msg="Task cancelled, timeout graceful shutdown exceeded")
                rest = await response.read()
            await server.service.spending.drain()
            reserved = server.service.spending.limit.reservations()
            return rest, server.records[0], reserved, float(provider.bill.total)

    rest, record, reserved, bill = asyncio.run(one())
    assert b"the server stops" in rest.strip().split(b"\n\n")[-1]
    assert (record.outcome, record.estimated, reserved) == ("left", True, ())
    assert record.cost >= bill


@pytest.mark.store
@pytest.mark.slow
@pytest.mark.xdist_group("postgres")
def test_a_database_that_goes_away_refuses_and_loses_nothing(monkeypatch):
    """Requests under way are answered and settled when it is back; the log is whole."""
    monkeypatch.setattr("p2l_engine.serve.async_spend_limit.RETRIES", (0.05, 0.5, 1.0, 1.0, 1.0, 5.0, 10.0, 20.0))

    async def one(url: str) -> Any:
        async with MockProvider(PRICES, first_byte=0.3, tokens_out=10) as provider:
            config = config_for(provider, limits=[{"amount": 100}], store=url)
            async with serving(config) as server:
                found = [await ask(server.url)]
                under_way = [asyncio.create_task(ask(server.url)) for _ in range(10)]
                await until(lambda: len(provider.requests) == 11)
                await asyncio.to_thread(postgres.control, url, "stop")
                found += await asyncio.gather(*under_way)
                found += [await ask(server.url) for _ in range(2)]
                await asyncio.to_thread(postgres.control, url, "start")
                await server.service.spending.drain()
                for _ in range(20):  # a connection that broke may be noticed by the request that uses it
                    found.append(await ask(server.url))
                await server.service.spending.drain()
                log = server.runtime.server.log
                assert log is not None
                assert await asyncio.to_thread(log.flush, 30)
                (balance,) = server.service.spending.limit.balances()
                return found, float(balance.spent), float(balance.reserved), float(provider.bill.total), len(log.recent(100))

    with postgres.server() as url:
        found, spent, reserved, bill, logged = asyncio.run(one(url))
    assert found[:13] == [200] * 11 + [503] * 2
    assert found[-10:] == [200] * 10
    assert (spent, reserved, logged) == (pytest.approx(bill, abs=1e-12), 0, len(found))
