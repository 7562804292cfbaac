"""The cache of answers: what makes requests equal, its stores, and answers that are sent again."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import logging
import random
import sqlite3
import sys
from dataclasses import replace
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.mock_provider import MockProvider
from p2l_engine.apis.api import Usage
from p2l_engine.serve import answers as answers_module
from p2l_engine.serve import runtime as runtime_module
from p2l_engine.serve.answer_stores import OVERHEAD, InFile, InMemory, InRedis
from p2l_engine.serve.answers import Answers, CachedAnswer, decode, encode, key_of, open_answers
from p2l_engine.serve.settings import AnswerCache, ConfigError, parse
from tests.support import redis_server
from tests.support.serving import APIS, PRICES, FixedEngine, config_for, serving

pytestmark = pytest.mark.slow  # many cases: all together take longer than the fast tests may

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
STORES = ["memory", "file", pytest.param("redis", marks=[pytest.mark.store, pytest.mark.xdist_group("redis")])]
ANSWER = CachedAnswer(b"data: 1\n\n", True, "small", "small-chat", Usage(10, 20, 3), 0.25, 0.5, 1.5, "resp_1")


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """Tests of slow stores set their own: the machine may be busy."""
    monkeypatch.setattr(answers_module, "TIMEOUT", 10.0)


@pytest.fixture(scope="module")
def redis():
    with redis_server.server() as found:
        yield found


@pytest.fixture
def place(request, tmp_path):
    """What ``serve.cache.store`` says for each kind of store."""

    def of(kind: str) -> str:
        if kind == "redis":
            return request.getfixturevalue("redis").url
        return str(tmp_path / "answers.sqlite") if kind == "file" else "memory"

    return of


def body_for(api: str, text: str = "What is 17 * 23?", stream: bool = False, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "auto", "stream": stream, **fields}
    if api == "responses":
        return body | {"input": text, "max_output_tokens": 60}
    return body | {"messages": [{"role": "user", "content": text}], "max_tokens": 60}


async def ask(url: str, api: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, str], bytes]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession() as client, client.post(url + PATHS[api], json=body, headers=headers) as response:
        return response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()


def served(run, cache: dict[str, Any] | None = None, engine: Any = None, **serve: Any):
    """What ``run(provider, server)`` returns on a server with a cache."""

    async def one():
        async with MockProvider(PRICES) as provider:
            config = config_for(provider, cache={} if cache is None else cache, **serve)
            async with serving(config, engine) as server:
                return await run(provider, server)

    return asyncio.run(one())


async def stored(server) -> None:
    await server.runtime.server.answers.drain()


# What makes requests equal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


def plain_key(tenant: Any = None, api: str = "chat", body: Any = None, options: Any = (), headers: Any = (), configuration="c"):
    return key_of(tenant, api, body, list(options), dict(headers), configuration)


def shuffled(value: Any, random: random.Random) -> Any:
    """The same JSON with the keys of objects in another order."""
    if isinstance(value, dict):
        items = [(name, shuffled(item, random)) for name, item in value.items()]
        random.shuffle(items)
        return dict(items)
    return [shuffled(item, random) for item in value] if isinstance(value, list) else value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for name, item in inner for found in places(item, (*path, name)))]


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = with_value(value[path[0]], path[1:], new)
    return changed


@given(JSON, st.randoms(use_true_random=False))
def test_the_order_of_an_objects_keys_does_not_matter(body, random):
    assert plain_key(body=body) == plain_key(body=shuffled(body, random))


@given(JSON, JSON, st.data())
def test_any_change_of_a_body_is_another_request(body, new, data):
    path = data.draw(st.sampled_from(places(body)))
    changed = with_value(body, path, new)
    same = json.dumps(body, sort_keys=True) == json.dumps(changed, sort_keys=True)
    assert (plain_key(body=body) == plain_key(body=changed)) == same


@given(st.permutations(["tenant", "api", "body", "options", "headers", "configuration"]), st.data())
def test_every_part_is_in_the_key(names, data):
    values = {
        "tenant": st.none() | st.text() | st.tuples(st.text(), st.text()).map(list), "api": st.sampled_from(APIS), "body": JSON,
        "options": st.lists(st.none() | st.floats(0, 9) | st.text(), max_size=3), "configuration": st.text(),
        "headers": st.dictionaries(st.text(), st.text(), max_size=2),
    }  # fmt: skip
    first = {name: data.draw(values[name]) for name in names}
    second = {**first, **{name: data.draw(values[name]) for name in names[: data.draw(st.integers(0, 2))]}}
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (plain_key(**first) == plain_key(**second)) == same


def test_what_cannot_be_written_as_json_has_no_key():
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    with pytest.raises(ValueError, match="[Rr]ecursion"):
        plain_key(body=deep)


@given(
    st.text(), st.binary(), st.booleans(), st.floats(), st.floats() | st.none(), st.floats() | st.none(), st.none() | st.text(),
    st.none() | st.builds(Usage, *[st.integers(0, 2**70)] * 4), st.data(),
)  # fmt: skip
def test_an_entry_is_read_as_it_was_written_or_not_at_all(key, body, streamed, cost, rate, score, answer_id, usage, data):
    answer = CachedAnswer(body, streamed, key, key[::-1], usage, cost, rate, score, answer_id)
    entry = encode(key, answer)
    assert repr(decode(key, entry)) == repr(answer)  # NaN is not equal to itself
    place = data.draw(st.integers(0, len(entry) - 1))
    damaged = [entry[:place], entry + b"\0", entry[:place] + bytes([entry[place] ^ (1 << place % 8)]) + entry[place + 1 :]]
    for each in (*damaged, data.draw(st.binary()), b"P2A1"):
        with pytest.raises(ValueError, match="expected an entry"):
            decode(key, each)
    with pytest.raises(ValueError, match="under its own key"):
        decode(key + "x", entry)


# Stores


@pytest.mark.parametrize("kind", STORES)
def test_every_store_gives_back_what_it_was_given(kind, place):
    async def one():
        found = open_answers(AnswerCache(store=place(kind), most_mb=1))
        values = {f"{kind}{i:032x}": replace(ANSWER, body=bytes([i]) * i * 1000) for i in range(20)}
        for key, answer in values.items():
            found.put(key, answer)
        await found.drain()
        assert {key: await found.get(key) for key in values} == values
        assert await found.get("f" * 32) is None
        changed = next(iter(values))
        found.put(changed, ANSWER)
        found.put("large", replace(ANSWER, body=bytes(2**20 // 8 + 1)))
        await found.drain()
        assert (await found.get(changed), await found.get("large")) == (ANSWER, None)
        await found.close()
        assert (found.hits, found.misses, found.failures) == (21, 2, 0)
        assert found.saved == pytest.approx(21 * 0.25)

    asyncio.run(one())


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_entries_live_for_a_time(kind, tmp_path):
    clock = Clock()

    async def one():
        made = {
            "memory": lambda: InMemory(10, 2**20, clock),
            "file": lambda: InFile(str(tmp_path / "a.sqlite"), 10, 2**20, clock),
        }
        store = made[kind]()
        await store.put("a", b"1")
        clock.now += 9.99
        await store.put("b", b"2")
        assert (await store.get("a"), await store.get("b")) == (b"1", b"2")
        clock.now += 0.01
        assert (await store.get("a"), await store.get("b")) == (None, b"2")
        await store.put("a", b"3")
        clock.now += 9.99
        assert (await store.get("a"), await store.get("b")) == (b"3", None)
        clock.now -= 11  # set back: nothing may live longer than it should
        if kind == "file":
            assert await store.get("a") is None
        await store.close()

    asyncio.run(one())


def test_a_file_forgets_what_is_too_old(tmp_path):
    clock = Clock()

    async def one():
        store = InFile(str(tmp_path / "a.sqlite"), 10, 2**20, clock)
        for i in range(5):
            await store.put(str(i), b"secret")
        clock.now += 11
        await store.put("new", b"1")
        await store.close()

    asyncio.run(one())
    with sqlite3.connect(tmp_path / "a.sqlite") as connection:
        assert connection.execute("SELECT key, size FROM cached_answer").fetchall() == [("new", 1 + OVERHEAD)]
    assert b"secret" not in (tmp_path / "a.sqlite").read_bytes()


@pytest.mark.parametrize("again", [False, True])
def test_a_file_forgets_what_is_too_old_without_new_answers_too(again, tmp_path):
    """Beside another process that has the file open; also where the server was started again meanwhile."""
    clock = Clock()

    def left():
        return [file.name for file in tmp_path.iterdir() if b"secret" in file.read_bytes()]

    async def one():
        path = str(tmp_path / "a.sqlite")
        store, other = (InFile(path, 10, 2**20, clock) for _ in range(2))
        for i in range(300):
            await store.put(str(i), b"secret" * 100)
        assert left()
        clock.now += 11
        if again:
            await store.close()
            store = InFile(path, 10, 2**20, clock)
        await store.prune()
        assert left() == []
        await store.close()
        await other.close()

    asyncio.run(one())


def test_memory_forgets_what_is_too_old():
    clock = Clock()

    async def one():
        store = InMemory(10, 2**20, clock)
        await store.put("old", b"1")
        clock.now += 9
        await store.put("new", b"22")
        clock.now += 1
        await store.prune()
        assert (store.size, await store.get("new")) == (2 + OVERHEAD, b"22")

    asyncio.run(one())


def test_a_server_removes_answers_that_are_too_old(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(runtime_module, "SWEEP", 0.05)
    path = tmp_path / "answers.sqlite"

    def rows():
        with sqlite3.connect(path) as connection:
            return connection.execute("SELECT count(*) FROM cached_answer").fetchone()[0]

    async def run(provider, server):
        await ask(server.url, "chat", body_for("chat"))
        await stored(server)
        async with asyncio.timeout(30):
            while rows():
                await asyncio.sleep(0.02)
            path.rename(tmp_path / "moved")  # a store that fails stops no sweep
            path.mkdir()
            server.runtime.server.answers._store._database.close()
            while not caplog.messages:
                await asyncio.sleep(0.02)
        assert not any(task.done() for task in asyncio.all_tasks())

    served(run, {"store": str(path), "seconds": 0.2})
    assert "the store of answers" in caplog.messages[0]


@pytest.mark.store
@pytest.mark.xdist_group("redis")
def test_redis_is_told_how_long_an_entry_lives(redis):
    import redis as library

    async def one():
        store = InRedis(redis.url, 10, 1.0)
        await store.put("lives", b"1")
        await store.close()

    asyncio.run(one())
    with library.Redis.from_url(redis.url) as client:
        assert 9_000 < client.pttl("p2l:answer:lives") <= 10_000


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 400), st.booleans()), max_size=60), st.integers(300, 3000))
def test_memory_holds_what_was_used_last_and_no_more_bytes_than_it_may(steps, most):
    async def one():
        store, order = InMemory(10, most), list[tuple[int, int]]()
        for key, size, write in steps:
            known = dict(order)
            if write:
                await store.put(str(key), bytes(size))
                order = [(k, n) for k, n in order if k != key] + [(key, size)]
                while sum(n + OVERHEAD for _, n in order) > most:
                    order.pop(0)
            else:
                found = await store.get(str(key))
                assert (None if found is None else len(found)) == known.get(key)
                if key in known:
                    order = [(k, n) for k, n in order if k != key] + [(key, known[key])]
            assert store.size == sum(n + OVERHEAD for _, n in order) <= most

    asyncio.run(one())


def test_a_file_keeps_the_newest_and_no_more_bytes_than_it_may(tmp_path):
    clock = Clock()

    async def one():
        store = InFile(str(tmp_path / "a.sqlite"), 1000, 20_000, clock)
        for i in range(100):
            clock.now += 1
            await store.put(str(i), bytes(800))
        there = [i for i in range(100) if await store.get(str(i)) is not None]
        assert there == list(range(there[0], 100))
        assert 12 <= len(there) <= 20
        await store.close()

    asyncio.run(one())


def test_what_a_process_writes_while_another_waits_for_the_file_stays(tmp_path, monkeypatch):
    clock = Clock()
    waiting, other = (InFile(str(tmp_path / "a.sqlite"), 10, 2**20, clock) for _ in range(2))
    begin = waiting._database.begin

    def late():
        clock.now += 1
        other._put("b", b"other")
        return begin()

    monkeypatch.setattr(waiting._database, "begin", late)

    async def one():
        await waiting.put("a", b"own")
        assert [await other.get(key) for key in "ab"] == [b"own", b"other"]
        await waiting.close()
        await other.close()

    asyncio.run(one())


def test_processes_may_share_a_file(tmp_path):
    """Two caches stand for two processes: each has connections of its own."""

    async def one():
        cache = AnswerCache(store=str(tmp_path / "a.sqlite"), most_mb=0.1)
        first, second = open_answers(cache), open_answers(cache)
        for i in range(100):
            (first, second)[i % 2].put(str(i), replace(ANSWER, body=bytes(2_000)))
        await asyncio.gather(first.drain(), second.drain())
        found = [i for i in range(100) if await first.get(str(i)) is not None]
        assert [i for i in range(100) if await second.get(str(i)) is not None] == found
        assert 30 <= len(found) <= 48
        assert (first.failures, second.failures) == (0, 0)
        await first.close()
        await second.close()

    asyncio.run(one())


@pytest.mark.store
@pytest.mark.xdist_group("redis")
def test_redis_may_ask_for_a_password(caplog):
    async def one(url: str, environment: dict[str, str]) -> tuple[Any, int]:
        found = open_answers(AnswerCache(store=url, password_env="REDIS_PASSWORD"), environment)
        found.put("a", ANSWER)
        await found.drain()
        answer = await found.get("a")
        await found.close()
        return answer, found.failures

    with redis_server.server("--requirepass", "right-one") as locked:
        assert asyncio.run(one(locked.url, {"REDIS_PASSWORD": "right-one"})) == (ANSWER, 0)
        assert asyncio.run(one(locked.url, {"REDIS_PASSWORD": "wrong-one"})) == (None, 1)
    assert "fails (AuthenticationError)" in caplog.text
    assert "wrong-one" not in caplog.text


@pytest.mark.parametrize(
    ("reply", "found", "failures"),
    [
        (b"$4\r\nP2A1\r\n", None, 1), (b"<html>\r\n", None, 1), (b"\x00\xff\r\n", None, 1), (b"$-5\r\n", None, 1),
        (b"$9\r\nx", None, 1),
        (b"*1\r\n" * 9999 + b":1\r\n", None, 1), (b"-LOADING\r\n", None, 1), (b":5\r\n", None, 0), (b"$-1\r\n" * 3, None, 0),
        (b"$%d\r\n%s\r\n" % (len(encode("other", ANSWER)), encode("other", ANSWER)), None, 1),
        (b"$%d\r\n%s\r\n" % (len(encode("a", ANSWER)), encode("a", ANSWER)), ANSWER, 0),
    ],
    ids=lambda value: repr(value[:8]) if isinstance(value, bytes) else "",
)  # fmt: skip
def test_what_a_server_in_place_of_redis_says_is_an_answer_or_a_miss(reply, found, failures):
    """It knows no HELLO either, as redis before 6 and some proxies."""

    async def one() -> None:
        async def serve(reader, writer):
            while line := await reader.readline():
                words = [(await reader.readline(), await reader.readline())[1].strip() for _ in range(int(line[1:]))]
                writer.write({b"GET": reply, b"HELLO": b"-ERR unknown command\r\n"}.get(words[0], b"+OK\r\n"))
                if reply.endswith(b"x"):
                    break
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        answers = open_answers(AnswerCache(store=f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"))
        assert await answers.get("a") == found
        assert answers.failures == failures
        await answers.close()
        server.close()

    asyncio.run(one())


class Failing:
    """A store that fails, or never answers, while it is told to."""

    def __init__(self) -> None:
        self.inner, self.fault, self.calls = InMemory(1000, 2**20), "", 0

    async def _fails(self) -> None:
        self.calls += 1
        if self.fault == "slow":
            await asyncio.sleep(60)
        if self.fault:
            raise ConnectionError("a message that may repeat a prompt")

    async def get(self, key: str) -> bytes | None:
        await self._fails()
        return await self.inner.get(key)

    async def put(self, key: str, data: bytes) -> None:
        await self._fails()
        await self.inner.put(key, data)

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("fault", ["away", "slow"])
def test_a_store_that_fails_is_a_miss_and_reported_once(fault, caplog, monkeypatch):
    monkeypatch.setattr(answers_module, "PAUSE", 0.1)
    monkeypatch.setattr(answers_module, "TIMEOUT", 0.05)

    async def one():
        store = Failing()
        found = Answers(store, "redis://cache:6379", 2**20)
        found.put("a", ANSWER)
        await found.drain()
        store.fault = fault
        loop, calls = asyncio.get_running_loop(), store.calls
        began = loop.time()
        assert await found.get("a") is None
        first = loop.time() - began
        for _ in range(100):  # these do not even ask
            assert await found.get("a") is None
            found.put("b", ANSWER)
        assert store.calls == calls + 1
        await asyncio.sleep(0.12)
        assert await found.get("a") is None
        store.fault = ""
        assert await found.get("a") is None
        await asyncio.sleep(0.12)
        assert await found.get("a") == ANSWER
        return first, found

    with caplog.at_level(logging.WARNING):
        first, found = asyncio.run(one())
    assert first < 10
    assert (found.hits, found.misses, found.failures) == (1, 103, 2)
    name = "ConnectionError" if fault == "away" else "TimeoutError"
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("p2l_engine")]
    assert lines == [
        f"the store of answers redis://cache:6379 fails ({name}): requests continue without it",
        "the store of answers redis://cache:6379 works again",
    ]


def test_a_store_that_is_too_slow_to_take_answers_loses_some(monkeypatch):
    monkeypatch.setattr(answers_module, "BACKLOG", 10_000)

    async def one():
        store = Failing()
        store.fault = "slow"
        found = Answers(store, "slow", 9_000)
        for i in range(5):
            found.put(str(i), replace(ANSWER, body=bytes(4_000)))
        assert found.failures == 3
        monkeypatch.setattr(answers_module, "DRAIN", 0.01)
        await found.close()

    asyncio.run(one())


@pytest.mark.parametrize("kind", ["file", STORES[2]])
def test_damaged_entries_are_misses(kind, place, redis_or_none, caplog):
    async def write() -> None:
        found = open_answers(AnswerCache(store=place(kind)))
        for key in ("damaged", "short", "whole"):
            found.put(key, ANSWER)
        await found.close()

    async def read() -> Answers:
        found = open_answers(AnswerCache(store=place(kind)))
        assert [await found.get(key) for key in ("damaged", "short", "whole")] == [None, None, ANSWER]
        await found.close()
        return found

    asyncio.run(write())
    values = {"damaged": encode("damaged", ANSWER).replace(b"data: 1", b"data: 2"), "short": b"P2A1"}
    if kind == "file":
        with sqlite3.connect(place(kind)) as connection:
            connection.executemany("UPDATE cached_answer SET data = ? WHERE key = ?", [(v, k) for k, v in values.items()])
        connection.close()
    else:
        import redis as library

        with library.Redis.from_url(redis_or_none.url) as client:
            for key, value in values.items():
                client.set(f"p2l:answer:{key}", value)
    found = asyncio.run(read())
    assert (found.hits, found.misses, found.failures) == (1, 2, 2)
    assert len([record for record in caplog.records if "cannot be read" in record.getMessage()]) == 1


@pytest.fixture
def redis_or_none(request):
    return request.getfixturevalue("redis") if "redis" in request.node.callspec.id else None


@pytest.mark.parametrize(
    "store", ["", "postgresql://db/x", "redis://", "redis://user:secret@host:6379", "redis://host:port", "redis://host/0?x=1"]
)
def test_stores_that_cannot_be(store):
    with pytest.raises(ConfigError, match=r"serve\.cache\.store: expected memory, a file, or redis") as caught:
        parse({"models": {"a": {"cost": 1}}, "serve": {"cache": {"store": store}}})
    assert "secret" not in str(caught.value)


def test_stores_that_cannot_be_opened_say_why(tmp_path, monkeypatch):
    (tmp_path / "text.sqlite").write_text("no database " * 100)
    for store, why in (("text.sqlite", "file is not a database"), ("no/folder.sqlite", "a file in a folder that exists")):
        with pytest.raises(ConfigError, match=f"serve.cache.store: .*{store} cannot be used: .*{why}"):
            open_answers(AnswerCache(store=str(tmp_path / store)))
    with pytest.raises(ConfigError, match=r"serve\.cache\.password_env: REDIS_PASSWORD is not set"):
        open_answers(AnswerCache(store="redis://127.0.0.1:1", password_env="REDIS_PASSWORD"), {})
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ModuleNotFoundError, match=r"serve\.cache\.store: .*pip install 'p2l-engine\[redis\]'"):
        open_answers(AnswerCache(store="redis://127.0.0.1:1"))


# The server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ["chat", *(pytest.param(api, marks=pytest.mark.slow) for api in APIS[1:])])
@pytest.mark.parametrize("kind", STORES)
def test_an_equal_request_gets_the_same_bytes_at_no_cost(kind, api, stream, place, tmp_path):
    engine = FixedEngine()
    text = f"{kind} {api} {stream} {tmp_path}"

    async def run(provider, server):
        body = body_for(api, text, stream)
        first = await ask(server.url, api, body)
        await stored(server)
        await server.service.spending.drain()
        calls, batches = len(provider.requests), len(engine.batches)
        server.service.scorer._known.clear()
        again = await ask(server.url, api, dict(reversed(body.items())))
        assert (len(provider.requests), len(engine.batches)) == (calls, batches)  # neither a provider nor the engine
        spent = [float(balance.spent + balance.reserved) for balance in server.service.spending.limit.balances(None)]
        async with aiohttp.ClientSession() as client:
            status = await (await client.get(server.url + "/v1/status")).json()
            metrics = await (await client.get(server.url + "/metrics")).text()
        return first, again, server.records, spent, status, metrics, server.service.pacer.count

    limits = {"limits": [{"amount": 10}], "store": str(tmp_path / "serve.sqlite"), "budget": 1.0}
    first, again, (fresh, cached), spent, status, metrics, count = served(run, {"store": place(kind)}, engine, **limits)
    assert first[0] == again[0] == 200
    assert first[2] == again[2]
    assert (b"event" in again[2] or b"[DONE]" in again[2]) == stream
    assert (first[1]["x-p2l-cache"], again[1]["x-p2l-cache"]) == ("miss", "hit")
    for name in ("content-type", "x-p2l-model", "x-p2l-win-rate"):
        assert first[1][name] == again[1][name]
    assert first[1].get("content-length") == again[1].get("content-length")
    assert first[1]["x-p2l-decision"] != again[1]["x-p2l-decision"] == cached.id
    assert (again[1]["x-p2l-expected-cost"], again[1]["x-p2l-attempts"]) == ("0", "0")
    assert (cached.outcome, cached.status, cached.cost, cached.expected_cost, cached.estimated) == ("cached", 200, 0, 0, False)
    for name in ("model", "turns_hash", "session", "win_rate", "score", "streamed", "tokens_in", "tokens_cached", "tokens_out"):
        assert getattr(cached, name) == getattr(fresh, name)
    assert (cached.attempts, cached.propensity, cached.policy) == ((), 1.0, {fresh.model: 1.0})
    assert spent == [pytest.approx(fresh.cost)]
    assert count == 1
    assert status["answer_cache"] == {"hits": 1, "misses": 1}
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert {lines[f"p2l_answer_cache_{name}"] for name in ("hits", "misses")} == {"1.0"}
    assert float(lines["p2l_answer_cache_failures"]) == 0
    assert float(lines["p2l_answer_cache_saved_usd"]) == pytest.approx(fresh.expected_cost)
    assert float(lines[f'p2l_tokens_total{{kind="out",model="{fresh.model}"}}']) == fresh.tokens_out


def test_official_clients_read_a_replayed_stream():
    async def run(provider, server):
        found = []
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            for _ in range(2):
                text, usage = "", None
                options = {"stream": True, "stream_options": {"include_usage": True}}
                async for chunk in await client.chat.completions.create(
                    model="auto", messages=[{"role": "user", "content": "hello"}], max_tokens=60, **options
                ):
                    text += chunk.choices[0].delta.content or "" if chunk.choices else ""
                    usage = chunk.usage or usage
                await stored(server)
                found.append((text, usage))
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none") as client:
            for _ in range(2):
                messages = [{"role": "user", "content": "hello"}]
                async with client.messages.stream(model="auto", messages=messages, max_tokens=60) as stream:
                    message = await stream.get_final_message()
                await stored(server)
                found.append((message.content[0].text, message.usage))
        return found, [record.outcome for record in server.records], len(provider.requests)

    found, outcomes, calls = served(run)
    assert outcomes == ["answered", "cached"] * 2
    assert calls == 2
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0][0]
    assert found[0][1].completion_tokens > 0
    assert found[2][1].output_tokens > 0


def test_what_opts_out():
    async def run(provider, server):
        states = []

        async def send(body=None, **headers: str) -> None:
            before = len(provider.requests)
            _, found, _ = await ask(server.url, "chat", body or body_for("chat"), **headers)
            await stored(server)
            states.append((found.get("x-p2l-cache"), len(provider.requests) - before))

        await send(cache_control="no-store")
        await send()
        await send(cache_control="No-Cache")
        await send(cache_control="max-age=0, no-store")
        await send()
        await send(body_for("chat", p2l={"dry_run": True}))
        await send(x_p2l_dry_run="true")
        await send(body_for("chat", background=True))
        await send(body_for("chat", background=True))
        return states, len(server.runtime.server.answers._store._entries)

    states, entries = served(run)
    assert states == [
        ("bypass", 1), ("miss", 1), ("bypass", 1), ("bypass", 1), ("hit", 0),
        (None, 0), (None, 0), ("bypass", 1), ("bypass", 1),
    ]  # fmt: skip
    assert entries == 1


def test_an_answer_asked_for_with_no_cache_replaces_the_stored_one():
    async def run(provider, server):
        found = []
        for control in ("", "no-cache", ""):
            _, _, body = await ask(server.url, "chat", body_for("chat"), cache_control=control or "max-stale")
            await stored(server)
            found.append(json.loads(body)["id"])
        return found

    first, second, third = served(run)
    assert first != second == third


def test_requests_that_differ_are_misses():
    secret = hashlib.sha256(b"secret").hexdigest()
    keys = [
        {"id": "one", "sha256": hashlib.sha256(b"1").hexdigest()},
        {"id": "two", "sha256": hashlib.sha256(b"2").hexdigest()},
        {"id": "three", "sha256": secret, "models": ["small"]},
    ]
    plain = body_for("messages")

    async def run(provider, server):
        async def send(api="messages", body=plain, key="1", **headers: str) -> str:
            status, found, _ = await ask(server.url, api, body, x_api_key=key, **headers)
            assert status == 200
            await stored(server)
            return found["x-p2l-cache"]

        different = [
            {}, {"key": "2"}, {"key": "secret"}, {"body": plain | {"stream": True}}, {"body": plain | {"max_tokens": 61}},
            {"body": plain | {"model": "small"}}, {"body": plain | {"p2l": {"budget": 1}}}, {"x_p2l_budget": "0.9"},
            {"x_p2l_models": "small,large"}, {"x_p2l_session": "mine"}, {"x_p2l_objective": "half-ties"},
            {"anthropic_beta": "context-1m"}, {"api": "chat"},
        ]  # fmt: skip
        found = [[await send(**each) for each in different] for _ in range(2)]
        found.append([await send(x_p2l_models="large, small"), await send(user_agent="another"), await send(x_session_id="x")])
        refused = await ask(server.url, "messages", plain, x_api_key="wrong")
        return found, refused[0]

    (first, second, same), refused = served(run, keys=keys)
    assert set(first) == {"miss"}
    assert set(second) == {"hit"}
    assert same == ["hit"] * 3
    assert refused == 401


def test_clients_whose_own_keys_are_passed_on_share_nothing():
    async def one():
        async with MockProvider(PRICES) as provider:
            config = config_for(provider, cache={})
            config["models"]["large"]["provider"][0] |= {"forward_client_key": True}
            async with serving(config) as server:
                found = []
                for key in ("first", "second", "first"):
                    _, headers, _ = await ask(server.url, "chat", body_for("chat"), authorization=f"Bearer {key}")
                    await stored(server)
                    found.append(headers["x-p2l-cache"])
                return found

    assert asyncio.run(one()) == ["miss", "miss", "hit"]


@pytest.mark.parametrize(
    "change",
    [
        {"models": {"large": {"usd_per_m_in": 4.0}}},
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in (
                {"models": {"small": None}}, {"objective": "half-ties"}, {"budget": 1.0}, {"opponents": {"large": 1.0}},
                {"timeouts": {"idle": 9}},
            )
        ),
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_configuration_does_not_serve_old_answers(change, tmp_path):
    async def one():
        states, store = [], {"cache": {"store": str(tmp_path / "answers.sqlite")}}
        async with MockProvider(PRICES) as provider:
            changed = config_for(provider, **store | change)
            for config in (config_for(provider, **store), changed, config_for(provider, **store)):
                async with serving(config) as server:
                    _, headers, _ = await ask(server.url, "chat", body_for("chat"))
                    states.append(headers["x-p2l-cache"])
        return states

    assert asyncio.run(one()) == ["miss", "hit" if "timeouts" in change else "miss", "hit"]


BROKEN = [
    {"fault": "status", "status": 500}, {"fault": "status", "status": 400}, {"fault": "cut"}, {"fault": "error_event"},
    {"fault": "stall", "seconds": 5},
]  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN, ids=lambda fault: f"{fault['fault']}-{fault.get('status', 'stream')}")
@pytest.mark.parametrize("model", ["auto", "large"])
def test_only_whole_answers_of_the_chosen_model_are_stored(fault, model):
    async def run(provider, server):
        rule = provider.fail(**fault, model="large")
        first = await ask(server.url, "chat", body_for("chat", stream=True, model=model))
        await stored(server)
        rule.times = 0
        for deployment in (d for group in server.runtime.plan.deployments for d in group):
            server.service.health.answered(deployment)
        second = await ask(server.url, "chat", body_for("chat", stream=True, model=model))
        await stored(server)
        third = await ask(server.url, "chat", body_for("chat", stream=True, model=model))
        return [found[1]["x-p2l-cache"] for found in (first, second, third)], second, third

    timeouts = {"connect": 1, "first_byte": 1, "whole": 1, "idle": 0.2, "total": 5}
    states, second, third = served(run, timeouts=timeouts)
    assert states == ["miss", "miss", "hit"]
    assert third[2] == second[2]
    assert third[1]["x-p2l-model"] == "large"


def test_an_answer_that_its_client_did_not_wait_for_is_not_stored():
    async def run(provider, server):
        provider.fail("stall", seconds=5, tokens=5)
        async with aiohttp.ClientSession() as client:
            response = await client.post(server.url + PATHS["chat"], json=body_for("chat", stream=True))
            await response.content.readany()
            response.close()
        while not server.records:
            await asyncio.sleep(0.01)
        await stored(server)
        return server.records[0].outcome, len(server.runtime.server.answers._store._entries)

    assert served(run) == ("left", 0)


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_are_too_large_pass_through(stream):
    async def run(provider, server):
        found = [await ask(server.url, "chat", body_for("chat", "a question", stream)) for _ in range(2)]
        await stored(server)
        return [each[1]["x-p2l-cache"] for each in found], [each[0] for each in found]

    assert served(run, {"most_mb": 1e-3}) == (["miss", "miss"], [200, 200])


def test_equal_requests_at_once_all_go_to_a_provider():
    async def run(provider, server):
        found = await asyncio.gather(*(ask(server.url, "chat", body_for("chat")) for _ in range(4)))
        return [each[1]["x-p2l-cache"] for each in found], len(provider.requests)

    assert served(run) == (["miss"] * 4, 4)


def test_a_hit_needs_no_money_and_no_provider(tmp_path):
    async def run(provider, server):
        body = body_for("chat", max_tokens=100)
        await ask(server.url, "chat", body)
        await stored(server)
        await server.service.spending.drain()
        other = await ask(server.url, "chat", body | {"user": "another"})
        for deployment in (d for group in server.runtime.plan.deployments for d in group):
            server.service.health.failed(deployment)
        down = await ask(server.url, "chat", body | {"user": "another"})
        again = await ask(server.url, "chat", body)
        return other[0], down[0], again[0], again[1]["x-p2l-cache"]

    limits = {"limits": [{"amount": 0.0017}], "over_limit": "refuse", "store": str(tmp_path / "serve.sqlite")}
    assert served(run, **limits) == (402, 503, 200, "hit")


def test_a_conversation_may_go_on_from_a_replayed_answer(tmp_path):
    """Its provider keeps the answer; the server that replays it must know which provider that is."""

    async def one():
        body = body_for("responses", "hello")
        async with MockProvider(PRICES) as provider:
            config = config_for(provider, cache={"store": str(tmp_path / "answers.sqlite")})
            found = []
            for _ in range(2):
                async with serving(config) as server:
                    _, headers, data = await ask(server.url, "responses", body)
                    follow = body_for("responses", "go on", previous_response_id=json.loads(data)["id"])
                    status, others, _ = await ask(server.url, "responses", follow, cache_control="no-store")
                    found.append((headers["x-p2l-cache"], status, headers["x-p2l-model"] == others["x-p2l-model"]))
            return found

    assert asyncio.run(one()) == [("miss", 200, True), ("hit", 200, True)]


@pytest.mark.store
@pytest.mark.xdist_group("redis")
def test_a_server_goes_on_while_redis_is_away(redis, caplog, monkeypatch):
    monkeypatch.setattr(answers_module, "PAUSE", 0.05)

    async def run(provider, server):
        states = []

        async def send() -> None:
            status, headers, _ = await ask(server.url, "chat", body_for("chat", "while redis is away"))
            await stored(server)
            states.append((status, headers["x-p2l-cache"]))

        await send()
        await send()
        redis.kill()
        await send()
        await asyncio.sleep(0.1)
        await send()
        await asyncio.to_thread(redis.start)
        await asyncio.sleep(0.1)
        await send()
        await send()
        return states, server.runtime.server.answers.failures

    with caplog.at_level(logging.WARNING):
        states, failures = served(run, {"store": redis.url})
    assert states == [(200, "miss"), (200, "hit"), (200, "miss"), (200, "miss"), (200, "miss"), (200, "hit")]
    assert failures >= 2
    assert [r.getMessage().split(" ", 5)[5] for r in caplog.records if "store of answers" in r.getMessage()] == [
        "fails (ConnectionError): requests continue without it", "works again",
    ]  # fmt: skip


def test_a_new_section_needs_a_restart(tmp_path, caplog):
    import yaml

    from p2l_engine.serve import settings as serve_settings
    from p2l_engine.serve.runtime import Runtime

    async def one():
        config = config_for("http://127.0.0.1:9/v1", cache={"store": "memory"})
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        runtime = Runtime(serve_settings.load(file), FixedEngine(), file)
        app = runtime.application()
        async with runtime._lifespan(app):
            file.write_text(yaml.safe_dump({**config, "serve": {**config["serve"], "cache": {"seconds": 1}}}))
            return await runtime.reload()

    assert not asyncio.run(one())
    assert "serve.cache" in caplog.text
