"""The server beyond its load, and errors of its own."""

from __future__ import annotations

import asyncio
import gc
import json

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.mock_provider import MockProvider
from p2l_engine.serve import endpoint
from tests.support.serving import PRICES, FixedEngine, config_for, serving

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


def body_for(api, stream, text="What is 17 * 23?", model="auto"):
    body = {"model": model, "stream": stream}
    if api == "responses":
        return body | {"input": text, "max_output_tokens": 60}
    return body | {"messages": [{"role": "user", "content": text}], "max_tokens": 60}


@pytest.mark.parametrize("api", PATHS)
def test_an_estimate_is_not_below_what_was_sent(api):
    """The event that cannot be read comes in one piece with later ones, which the provider bills."""

    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server:
            provider.fail("invalid_utf8")
            async with aiohttp.ClientSession() as client, client.post(server.url + PATHS[api], json=body_for(api, True)) as r:
                await r.read()
            return server.records[-1], provider.bill.total

    record, bill = asyncio.run(one())
    assert record.estimated
    assert record.cost >= float(bill)


def test_requests_beyond_the_queue_are_refused_before_they_are_tokenised():
    async def one():
        async with MockProvider(PRICES) as provider:
            config = config_for(provider, queue={"most": 2})
            async with serving(config, FixedEngine(seconds=0.5)) as server, aiohttp.ClientSession() as client:
                counted, counter = [], server.service.counter
                original = counter.counted

                async def counting(texts):
                    counted.append(texts)
                    return await original(texts)

                counter.counted = counting

                async def ask(i):
                    async with client.post(server.url + PATHS["chat"], json=body_for("chat", False, f"question {i}")) as r:
                        return r.status, r.headers.get("retry-after")

                found = await asyncio.gather(*(ask(i) for i in range(40)))
                return found, len(counted)

    found, counted = asyncio.run(one())
    refused = [after for status, after in found if status == 503]
    assert len(refused) >= 30
    assert None not in refused
    assert counted <= 40 - len(refused) + 2


@pytest.mark.parametrize("api", PATHS)
def test_an_internal_error_is_in_the_apis_own_format(api):
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server, aiohttp.ClientSession() as client:

            async def broken(*arguments, **options):
                raise ZeroDivisionError

            server.service.upstream.send = broken
            async with client.post(server.url + PATHS[api], json=body_for(api, False)) as r:
                return r.status, await r.json(), server.records

    status, body, (record,) = asyncio.run(one())
    assert status == 500
    assert (record.status, record.outcome) == (500, "failed")
    assert ("type" in body) == (api == "messages")
    assert body["error"]["message"]


ENDS = {
    "whole": {},
    "stream": {"stream": True},
    "an unknown model": {"model": "other"},
    "a field of another type": {"messages": 3},
    "a budget that no model meets": {"p2l": {"budget": 0}},
    "no JSON": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_a_request_leaves_no_reference_cycles(end):
    """Its memory is free when it ends: the garbage collector, which would take a fifth of the time, runs seldom."""

    async def one():
        given = ENDS[end]
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server:
            data = b"{" if given is None else json.dumps(body_for("chat", False) | given).encode()
            async with aiohttp.ClientSession() as client:
                for round in range(2):
                    if round:
                        gc.collect()
                        gc.disable()
                    for _ in range(10):
                        async with client.post(server.url + PATHS["chat"], data=data) as r:
                            await r.read()
                return gc.collect()

    try:
        assert asyncio.run(one()) < 10
    finally:
        gc.enable()


@pytest.mark.slow
@given(
    st.integers(0, 6),
    st.integers(0, 8) | st.none(),
    st.integers(0, 8) | st.none(),
    st.sampled_from(["ends", "fails", "goes on"]),
)
def test_a_request_ends_whenever_its_client_leaves_or_the_server_stops(steps, leaves, stops, how):
    """Its work has always come to its end by then, and nothing of it is left running."""

    async def one():
        ended, left = [], asyncio.Event()

        async def work():
            try:
                for _ in range(steps):
                    await asyncio.sleep(0)
                if how == "fails":
                    raise ZeroDivisionError
            except asyncio.CancelledError:
                if how != "goes on":
                    raise
            finally:
                ended.append(True)

        async def receive():
            if leaves is None:
                await asyncio.Event().wait()
            for _ in range(leaves):
                await asyncio.sleep(0)
            left.set()
            return {"type": "http.disconnect"}

        async def request():
            await endpoint._until_left(work(), receive)
            assert asyncio.current_task().cancelling() == 0 or stops is not None

        task = asyncio.ensure_future(request())
        for _ in range(stops or 0):
            await asyncio.sleep(0)
        if stops is not None:
            task.cancel()
        (found,) = await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return found, ended, left.is_set()

    found, ended, left = asyncio.run(one())
    if stops != 0:  # it was stopped before it began
        assert ended == [True]
    if isinstance(found, asyncio.CancelledError):
        assert stops is not None
    elif isinstance(found, endpoint.ClientLeft):
        assert left
    else:
        assert found is None or (how == "fails" and isinstance(found, ZeroDivisionError))
    if leaves is None and stops is None:
        assert isinstance(found, ZeroDivisionError) if how == "fails" else found is None
