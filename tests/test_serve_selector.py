"""The external selector for vLLM semantic-router, asked as its client asks."""

from __future__ import annotations

import asyncio
import hashlib
import json

import aiohttp
import pytest

from bench.mock_provider import MockProvider
from p2l_engine.serve import runtime, selector
from tests.support.serving import PRICES, FixedEngine, config_for, serving

SECRET = "sk-p2l-test"
KEYS = [{"id": "team", "sha256": hashlib.sha256(SECRET.encode()).hexdigest()}]


@pytest.fixture(autouse=True)
def _selector_routes(monkeypatch):
    """The application with the selector's paths, if it has them not."""
    whole = runtime.application

    def with_selector(server):
        app = whole(server)
        if "/route" not in {getattr(route, "path", None) for route in app.routes}:
            app.router.routes += selector.routes(server)
        return app

    monkeypatch.setattr(runtime, "application", with_selector)


def asked(*bodies, models=None, engine=None, headers=None, **serve):
    """Status and JSON of each answer, and the server's records."""

    async def run():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, models, **serve), engine) as server:
            found = []
            async with aiohttp.ClientSession(headers=headers) as client:
                for body in bodies:
                    data = body if isinstance(body, bytes) else json.dumps(body).encode()
                    async with client.post(f"{server.url}/route", data=data) as answer:
                        found.append((answer.status, await answer.json()))
            return found, server.records

    return asyncio.run(run())


def query(task, *models):
    """As semantic-router's client writes it."""
    return {"query": f"Task: {task}\nAvailable models: {', '.join(models)}"}


def test_a_query_gets_the_best_model():
    ((status, found),), (record,) = asked({"query": "What is the sum of 17 and 23?"})
    assert status == 200
    assert set(found) == {"selected_model", "thinking", "full_response"}
    assert found["selected_model"] == record.chosen == "large"
    assert found["thinking"]
    assert json.loads(found["full_response"]) == {
        "id": record.id, "win_rate": record.win_rate, "expected_cost": record.expected_cost, "fallbacks": ["medium", "small"],
    }  # fmt: skip
    assert (record.api, record.outcome) == ("route", "decision")


def test_the_choice_is_among_semantic_routers_candidates():
    answers, records = asked(
        query("maths", "small", "medium"), query("maths", "qwen3-32b", "small"), query("two\nlines", "large", "small"),
        query("maths", "qwen3-32b"), query("maths"),
    )  # fmt: skip
    assert [found.get("selected_model") for _, found in answers] == ["medium", "small", "large", None, None]
    assert [status for status, _ in answers] == [200, 200, 200, 400, 400]
    assert "qwen3-32b" in answers[3][1]["error"]
    assert [set(record.candidates) for record in records] == [{"small", "medium"}, {"small"}, {"large", "small"}]


def test_the_task_alone_is_what_is_ranked():
    """Not the list of models, which is the same for every prompt of a decision."""
    engine = FixedEngine(theta=None)
    ((_, with_list), (_, without)), records = asked(query("maths", *PRICES), {"query": "maths"}, engine=engine)
    assert with_list["selected_model"] == without["selected_model"]
    assert records[0].turns_hash == records[1].turns_hash


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", {}, {"query": ""}, {"query": "  "}, {"query": 3}, {"query": None}, {"query": ["a"]}]
)
def test_wrong_bodies_are_refused_in_words(body):
    ((status, found),), records = asked(body)
    assert (status, set(found), records) == (400, {"error"}, [])
    assert "expected" in found["error"]


def test_bodies_over_the_limit_are_refused():
    ((status, found),), _ = asked({"query": "x" * 3_000}, body_mb=0.002)
    assert (status, set(found)) == (413, {"error"})


def test_a_body_that_does_not_come_is_not_waited_for():
    async def run():
        config = config_for("http://127.0.0.1:1/v1", timeouts={"idle": 0.2})
        async with serving(config) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
            writer.write(b'POST /route HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{"query": ')
            try:
                head = await asyncio.wait_for(reader.readline(), 20)
            finally:
                writer.close()
            return head, server.runtime.server.running

    head, running = asyncio.run(run())
    assert head.startswith(b"HTTP/1.1 408 ")
    assert running == 0


def test_a_body_that_is_compressed_is_refused():
    ((status, found),), _ = asked({"query": "a"}, headers={"content-encoding": "gzip"})
    assert (status, set(found)) == (415, {"error"})


def test_keys_and_budgets_hold_here_too():
    ((status, _),), _ = asked({"query": "Hello"}, keys=KEYS)
    assert status == 401
    headers = {"authorization": f"Bearer {SECRET}", "x-p2l-budget": "0.0001"}
    ((status, found),), (record,) = asked({"query": "Hello"}, keys=KEYS, headers=headers)
    assert (status, record.key, record.budget) == (200, "team", 0.0001)
    assert found["selected_model"] in PRICES
    ((status, found),), _ = asked({"query": "Hello"}, headers={"x-p2l-budget": "1e-12"})
    assert (status, set(found)) == (402, {"error"})


def test_health_follows_the_server():
    async def run():
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server, aiohttp.ClientSession() as client:
            found = []
            for ready in (True, False):
                server.runtime.server.ready = ready
                async with client.get(f"{server.url}/health") as answer:
                    found.append(answer.status)
            return found

    assert asyncio.run(run()) == [200, 503]
