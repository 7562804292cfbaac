"""Each fault of the mock provider is on the wire what it says, under asyncio and uvloop, and is charged as it should."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import aiohttp
import anthropic
import openai
import pytest
import uvloop

from bench.mock_provider import FAULTS, Rule, Rules
from tests.support.mock_provider import APIS, TOOL, body, official, parsed, post, same, served, text, usual, wire

pytestmark = pytest.mark.slow  # many cases: all together take longer than the fast tests may

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_refused_connection_is_closed_before_a_request(loop):
    async def test(provider):
        rule = provider.fail("refuse", times=2)
        found = [await wire(provider, "chat") for _ in range(3)]
        return rule.times, found, len(provider.requests)

    left, found, requests = served(test, loop=loop)
    assert [received == b"" for received, _ in found] == [True, True, False]
    assert (left, requests) == (0, 1)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("fault", ["close", "reset"])
def test_a_connection_ends_before_the_headers(fault, loop):
    async def test(provider):
        provider.fail(fault)
        return await wire(provider, "chat"), provider.bill

    found, bill = served(test, loop=loop)
    assert found == (b"", fault == "reset")
    assert bill.total == 0
    assert [(entry.end, entry.status, entry.fault) for entry in bill.entries] == [("failed", None, fault)]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["silent", "headers_only", "stall"])
def test_a_silent_socket_stays_open_until_the_client_leaves(fault, stream, loop):
    async def test(provider):
        provider.fail(fault, tokens=4)
        reader, writer = await asyncio.open_connection(provider.host, provider.port)
        data = json.dumps(body("chat", stream=stream)).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        received = b""
        if fault != "silent":
            received = await reader.readuntil(b"\r\n\r\n")
        if fault == "stall" and stream:
            while received.count(b'"content":') < 5:
                received += await reader.read(65536)
        while not provider.requests:
            await asyncio.sleep(0.001)
        before = list(provider.bill.entries)
        writer.close()
        while not provider.bill.entries:
            await asyncio.sleep(0.001)
        return before, received, provider.bill.entries[0]

    before, received, entry = served(test, loop=loop)
    assert before == []
    assert entry.end == "left"
    assert (entry.tokens_in, entry.tokens_out) == ((0, 0) if fault != "stall" else (9, 4) if stream else (9, 50))
    assert (b"200 OK" in received) is (fault != "silent")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["cut", "cut_close", "cut_reset"])
@pytest.mark.parametrize("api", APIS)
def test_an_answer_is_cut(api, fault, stream, half, loop):
    async def test(provider):
        provider.fail(fault, tokens=5, half=half)
        return await wire(provider, api, stream=stream), provider.bill.entries[0]

    (received, reset), entry = served(test, loop=loop)
    _, _, chunks, ended = parsed(received)
    assert reset is (fault == "cut_reset")
    assert ended is (fault == "cut")
    assert (entry.end, entry.usage_told, entry.tokens_in, entry.tokens_out) == ("cut", False, 9, 5 if stream else 50)
    found, full = b"".join(chunks), b"".join(usual(api, stream=stream))
    assert same([full]).startswith(same([found]))
    assert len(found) < len(full)
    if stream:
        assert len(text(api, [found]).split()) == 5
        assert found.endswith(b"\n\n") is not half


@pytest.mark.parametrize("fault", ["error_event", "first_event_error"])
@pytest.mark.parametrize("api", APIS)
def test_a_stream_ends_in_an_error_event_that_official_clients_raise(api, fault):
    async def test(provider):
        provider.fail(fault, tokens=5, status=529)
        async with official(provider, api) as create:
            count = 0
            with (
                pytest.raises((openai.APIError, anthropic.APIError), match="verloaded") if api != "responses" else nullcontext()
            ):
                async for event in await create(**body(api, stream=True)):
                    count += "delta" in str(getattr(event, "type", "delta"))
                    last = event
                assert last.type == "error"
            return count, provider.bill.entries[0], (await post(provider, api))[0]

    count, entry, status = served(test)
    if fault == "error_event":
        assert (count - (api == "chat"), entry.tokens_out, entry.end) == (5, 5, "cut")  # the first chunk has the role
    else:
        assert (count, entry.tokens_in, entry.end) == (0, 0, "failed")
    assert status == 529


@pytest.mark.parametrize("api", APIS)
def test_errors_with_a_status_are_read_by_official_clients(api):
    statuses = [400, 401, 403, 404, 408, 413, 422, 429, 500, 502, 503, 529]

    async def test(provider):
        errors = []
        for status in statuses:
            provider.fail("status", status=status, times=1)
        async with official(provider, api) as create:
            for status in statuses:
                with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)) as error:
                    await create(**body(api, stream=status % 2 == 1))
                errors.append(error.value)
        return errors, provider.bill

    errors, bill = served(test)
    assert [error.status_code for error in errors] == [entry.status for entry in bill.entries] == statuses
    assert all(error.response.json()["error"]["message"] in str(error) for error in errors)
    assert {entry.end for entry in bill.entries} == {"failed"}
    assert bill.total == 0


def test_a_rate_limit_says_when_to_come_back():
    async def test(provider):
        provider.fail("status", status=429, retry_after=2.5, times=1)
        provider.fail("status", status=429, retry_after=30, retry_date=True, times=1)
        provider.fail("status", status=429, code="insufficient_quota", times=1)
        return [await post(provider, "chat") for _ in range(3)]

    seconds, date, quota = served(test)
    assert seconds[1]["retry-after"] == "2.5"
    left = parsedate_to_datetime(date[1]["retry-after"]) - datetime.now(UTC)
    assert -60 < left.total_seconds() <= 30
    assert "retry-after" not in quota[1]
    assert json.loads(quota[2])["error"]["code"] == "insufficient_quota"
    assert json.loads(seconds[2])["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("api", APIS)
def test_a_prompt_may_be_too_long(api):
    async def test(provider):
        provider.fail("context_length", size=8)
        return await post(provider, api)

    status, _, data = served(test)
    error = json.loads(data)["error"]
    assert status == 400
    if api == "messages":
        assert error["message"] == "prompt is too long: 9 tokens > 8 maximum"
    else:
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "settings", "status", "kind"),
    [
        ("html", {}, 200, "text/html; charset=utf-8"),
        ("html", {"status": 502}, 502, "text/html; charset=utf-8"),
        ("invalid_json", {}, 200, None),
        ("error_body", {}, 200, "application/json"),
        ("error_body", {"status": 429}, 200, "application/json"),
    ],
)
@pytest.mark.parametrize("api", APIS)
def test_the_body_is_not_an_answer(api, fault, settings, status, kind, stream):
    async def test(provider):
        provider.fail(fault, **settings)
        return await post(provider, api, stream=stream), provider.bill

    (found, headers, data), bill = served(test)
    assert found == status
    assert kind in (None, headers["content-type"])
    assert (bill.total, bill.entries[0].end) == (0, "failed")
    if fault == "error_body":
        assert json.loads(data)["error"]["message"]
    else:
        start = data.partition(b"data: ")[2].partition(b"\n")[0] if stream and fault == "invalid_json" else data
        with pytest.raises(ValueError, match="."):
            json.loads(start)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("fault", "settings"),
    [("split", {}), ("split", {"size": 7}), ("burst", {}), ("crlf", {}), ("comments", {}), ("no_space", {}), ("no_done", {})],
)
@pytest.mark.parametrize("api", APIS)
def test_events_arrive_in_unusual_parts(api, fault, settings, loop):
    async def test(provider):
        provider.fail(fault, **settings)
        received, _ = await wire(provider, api, stream=True)
        async with official(provider, api) as create:
            count = len([event async for event in await create(**body(api, stream=True))])
        return parsed(received), count, provider.bill.entries[0]

    (_, _, chunks, ended), count, entry = served(test, loop=loop, tokens_out=8, per_token=0.01 if fault == "burst" else 0.0)
    assert ended
    assert count > 8
    assert (entry.end, entry.usage_told, entry.tokens_out) == ("answered", True, 8)
    assert len(text(api, chunks).split()) == 8
    if fault == "split":
        assert max(map(len, chunks)) == settings.get("size", 1)
        assert all(len(chunk) == 1 for chunk in chunks) is (settings == {})
    elif fault == "burst":
        assert len(chunks) == 1
    elif fault == "crlf":
        assert b"".join(chunks).count(b"\n") == b"".join(chunks).count(b"\r\n")
    elif fault == "no_space":
        assert b"data: " not in b"".join(chunks)
    elif fault == "no_done":
        assert b"[DONE]" not in b"".join(chunks)
    else:
        assert b"".join(chunks).count(b": ping\n\n") == 10


def test_characters_are_split_too():
    async def test(provider):
        provider.fail("split")
        tools = [{"name": "weather", "input_schema": TOOL}]  # whose arguments are not ASCII
        return parsed((await wire(provider, "messages", stream=True, tools=tools))[0])[2]

    assert any(chunk[0] >= 0x80 for chunk in served(test))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault", ["gzip", "chunked", "content_length", "until_close", "leave", "large_headers", "invalid_utf8"]
)
def test_bodies_and_headers_are_framed_in_unusual_ways(fault, stream):
    async def test(provider):
        provider.fail(fault)
        return parsed((await wire(provider, "chat", stream=stream))[0])

    _, headers, chunks, ended = served(test)
    found = b"".join(chunks)
    assert ended
    if fault == "gzip":
        assert headers["content-encoding"] == "gzip"
        found = gzip.decompress(found)
    if fault == "invalid_utf8":
        with pytest.raises(UnicodeDecodeError):
            found.decode()
        found = found.replace(b"\xff", b"", 1)
    assert same([found]) == same(usual("chat", stream=stream))
    assert ("transfer-encoding" in headers) is (
        fault == "chunked" or (stream and fault not in ("content_length", "until_close"))
    )
    assert ("content-length" in headers) is (
        fault == "content_length" or (not stream and fault not in ("chunked", "until_close"))
    )
    assert len(headers.get("x-filler", "")) == (2**20 if fault == "large_headers" else 0)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("fault", "stream"), [("endless", False), ("endless", True), ("endless_events", False), ("endless_events", True)]
)
def test_an_endless_body_is_made_as_it_is_read(fault, stream, loop):
    async def test(provider):
        provider.fail(fault)
        async with (
            aiohttp.ClientSession() as session,
            session.post(provider.url + APIS["chat"], json=body("chat", stream=stream)) as answer,
        ):
            size = 0
            while size < 20 * 2**20:
                part = await answer.content.readany()
                size += len(part)
            (connection,) = provider.connections
            waiting = connection.transport.get_write_buffer_size()
            answer.close()
        while not provider.bill.entries:
            await asyncio.sleep(0.001)
        return waiting, part, provider.bill

    waiting, part, bill = served(test, loop=loop)
    assert waiting < 2**20
    assert (b"\n\n" in part) is (stream and fault == "endless_events")
    assert (bill.total, bill.entries[0].end) == (0, "left")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["empty_choices", "usage_with_choices", "usage_in_every_chunk", "no_usage"])
@pytest.mark.parametrize("api", APIS)
def test_answers_have_unusual_contents(api, fault, stream):
    async def test(provider):
        provider.fail(fault)
        received, _ = await wire(provider, api, stream=stream)
        return b"".join(parsed(received)[2]), provider.bill.entries[0]

    found, entry = served(test)
    nothing = fault == "empty_choices" and not stream
    assert (entry.end, entry.tokens_out, entry.usage_told) == ("answered", 0 if nothing else 50, fault != "no_usage")
    if fault == "no_usage":
        assert b'"usage":{' not in found
    elif nothing:
        answer = json.loads(found)
        assert answer[{"chat": "choices", "responses": "output", "messages": "content"}[api]] == []
    elif api == "chat" and stream:
        chunks = [json.loads(line[6:]) for line in found.split(b"\n\n") if line.startswith(b"data: {")]
        assert (chunks[0]["choices"] == []) is (fault == "empty_choices")
        with_usage = [chunk["choices"] != [] for chunk in chunks if chunk["usage"]]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]]
        if fault == "usage_in_every_chunk":
            assert counts == [*range(1, 51), 50]
        else:
            assert with_usage == [fault == "usage_with_choices"]


def test_slow_answers_take_their_time():
    async def test(provider):
        provider.fail("slow_first_byte", seconds=0.05, model="small")
        provider.fail("slow_tokens", seconds=0.01, model="large")
        times = [time.perf_counter()]
        for model in ("small", "large"):
            received, _ = await wire(provider, "chat", model=model, stream=True)
            assert len(text("chat", parsed(received)[2]).split()) == 5
            times.append(time.perf_counter())
        return times

    start, first, second = served(test, tokens_out=5)
    assert first - start >= 0.05
    assert second - first >= 0.05


def test_a_redirection_shows_whether_it_was_followed():
    async def test(provider):
        provider.fail("redirect", times=2)
        async with aiohttp.ClientSession(provider.url) as session:
            stays = await session.post(APIS["chat"], json=body("chat"), allow_redirects=False)
            await session.post(APIS["chat"], json=body("chat"))
        return stays.status, stays.headers["location"], [found.path for found in provider.requests]

    assert served(test) == (307, "/v1/elsewhere", [APIS["chat"], APIS["chat"], "/v1/elsewhere"])


# rules


def test_a_rule_chooses_models_apis_and_counts():
    async def test(provider):
        rule = provider.fail("status", status=500, model="small", api="chat", skip=1, times=2)
        asked = [("messages", "small"), ("chat", "large")] + [("chat", "small")] * 4
        return [(await post(provider, api, model=model))[0] for api, model in asked], rule.times

    assert served(test) == ([200, 200, 200, 500, 500, 200], 0)


def test_probabilities_repeat_with_their_seed():
    def statuses(seed):
        rules = Rules(seed, [Rule("status", probability=0.3)])
        return [rules.match("small", "chat") is not None for _ in range(1000)]

    assert statuses(1) == statuses(1) != statuses(2)
    assert 250 < sum(statuses(1)) < 350


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fault": "unheard"},
        {"fault": "refuse", "model": "small"},
        {"fault": "cut", "token": 3},
        {"fault": "cut", "tokens": "3"},
        {"fault": "cut", "times": 1.5},
        {"fault": "status", "retry_after": "soon"},
        [],
    ],
)
def test_rules_that_make_no_sense(settings):
    with pytest.raises(ValueError, match="expected"):
        Rule.read(settings)


def test_every_fault_is_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in FAULTS if f'"{name}"' not in source] == []
