"""The mock provider: official clients read its answers, its bill is exact, and each fault is on the wire what it says."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import subprocess
import sys
import time
from contextlib import asynccontextmanager, nullcontext
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from fractions import Fraction
from pathlib import Path

import aiohttp
import anthropic
import openai
import pytest
import uvloop

from bench.mock_provider import FAULTS, MockProvider, Rule, Rules

PRICES = {"small": (0.1, 0.4, 0.025), "large": (3, 15, 0.3)}
TOOL = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city", "days"]}
HELLO = [{"role": "user", "content": "Hello, who are you?"}]  # 19 bytes: 9 tokens
APIS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


def served(test, loop=None, **settings):
    """Runs a coroutine function with a provider."""

    async def run():
        async with MockProvider(**{"prices": PRICES, **settings}) as provider:
            return await asyncio.wait_for(test(provider), 60)

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(run())


def openai_client(provider):
    return openai.AsyncOpenAI(base_url=f"{provider.url}/v1", api_key="sk-client", max_retries=0)


def anthropic_client(provider):
    return anthropic.AsyncAnthropic(base_url=provider.url, api_key="sk-client", max_retries=0)


@asynccontextmanager
async def official(provider, api):
    """The function of an official client that asks an API."""
    async with anthropic_client(provider) if api == "messages" else openai_client(provider) as client:
        if api == "chat":
            yield client.chat.completions.create
        else:
            yield getattr(client, api).create


def body(api, model="small", stream=False, **fields):
    asked = {"model": model, "stream": stream, **fields}
    if api == "chat" and stream:
        asked.setdefault("stream_options", {"include_usage": True})
    if api == "messages":
        asked.setdefault("max_tokens", 1000)
    asked.setdefault("input" if api == "responses" else "messages", HELLO)
    return asked


# the official clients


def test_openai_reads_a_chat_completion():
    async def test(provider):
        async with openai_client(provider) as client:
            return await client.chat.completions.create(model="small", messages=HELLO), provider.bill

    found, bill = served(test)
    choice = found.choices[0]
    assert choice.finish_reason == "stop"
    assert len(choice.message.content.split()) == found.usage.completion_tokens == 50
    assert (found.usage.prompt_tokens, found.usage.prompt_tokens_details.cached_tokens) == (9, 0)
    assert bill.total == Fraction(9, 10) / 10**6 + Fraction(50 * 4, 10) / 10**6
    assert [(entry.end, entry.usage_told) for entry in bill.entries] == [("answered", True)]


@pytest.mark.parametrize("usage", [True, False])
def test_openai_reads_a_stream_of_chunks(usage):
    async def test(provider):
        async with openai_client(provider) as client:
            options = {"stream_options": {"include_usage": True}} if usage else {}
            stream = await client.chat.completions.create(model="small", messages=HELLO, stream=True, **options)
            chunks = [chunk async for chunk in stream]
            whole = await client.chat.completions.create(model="small", messages=HELLO, seed=0)
            return chunks, whole, provider.bill.entries

    chunks, whole, entries = served(test)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(text.split()) == 50
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert [chunk.usage is not None for chunk in chunks] == [False] * 52 + [True] * usage
    assert chunks[-1].choices == [] if usage else chunks[-1].choices
    assert entries[0].usage_told is usage
    assert (entries[0].tokens_in, entries[0].tokens_out) == (9, 50)
    assert whole.usage.prompt_tokens_details.cached_tokens == 9


def test_openai_reads_calls_of_tools_and_goes_on_after_them():
    async def test(provider):
        tools = [{"type": "function", "function": {"name": "weather", "parameters": TOOL}}]
        async with openai_client(provider) as client:
            asked = {"model": "small", "messages": HELLO, "tools": tools}
            whole = await client.chat.completions.create(**asked)
            async with client.chat.completions.stream(**asked) as stream:
                streamed = await stream.get_final_completion()
            answer = whole.choices[0].message
            result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "sunny"}
            asked["messages"] = [*HELLO, answer.model_dump(exclude_none=True), result]
            after = await client.chat.completions.create(**asked)
            none = await client.chat.completions.create(**{**asked, "messages": HELLO, "tool_choice": "none"})
            return whole, streamed, after, none

    whole, streamed, after, none = served(test)
    for found in (whole, streamed):
        assert found.choices[0].finish_reason == "tool_calls"
        call = found.choices[0].message.tool_calls[0]
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments).keys() == {"city", "days"}
    assert after.choices[0].finish_reason == none.choices[0].finish_reason == "stop"
    cached = whole.usage.prompt_tokens  # tools and the user's message
    assert after.usage.prompt_tokens_details.cached_tokens == cached < after.usage.prompt_tokens


@pytest.mark.parametrize("tools", [False, True])
def test_openai_reads_responses(tools):
    async def test(provider):
        more = {"tools": [{"type": "function", "name": "weather", "parameters": TOOL, "strict": True}]} if tools else {}
        async with openai_client(provider) as client:
            whole = await client.responses.create(model="small", input="Hello", instructions="Be kind.", **more)
            async with client.responses.stream(model="small", input="Hello", instructions="Be kind.", **more) as stream:
                events = [event async for event in stream]
                return whole, events, await stream.get_final_response()

    whole, events, streamed = served(test)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for found, cached in ((whole, 0), (streamed, whole.usage.input_tokens)):
        assert found.status == "completed"
        assert found.usage.input_tokens_details.cached_tokens == cached
        assert found.usage.output_tokens == (found.usage.total_tokens - found.usage.input_tokens)
        if tools:
            assert json.loads(found.output[0].arguments).keys() == {"city", "days"}
        else:
            assert len(found.output_text.split()) == found.usage.output_tokens == 50
            assert found.usage.input_tokens == -(-13 // 4) + 8


@pytest.mark.parametrize("tools", [False, True])
def test_anthropic_reads_messages(tools):
    async def test(provider):
        more = {"tools": [{"name": "weather", "input_schema": TOOL}]} if tools else {}
        asked = {"model": "large", "max_tokens": 1000, "system": "Be kind.", "messages": HELLO, **more}
        async with anthropic_client(provider) as client:
            whole = await client.messages.create(**asked)
            async with client.messages.stream(**asked) as stream:
                streamed = await stream.get_final_message()
            asked["messages"] = [*HELLO, {"role": "assistant", "content": "Hm."}, {"role": "user", "content": "And?"}]
            return whole, streamed, await client.messages.create(**asked), provider.bill

    whole, streamed, longer, bill = served(test)
    for found in (whole, streamed):
        assert found.stop_reason == ("tool_use" if tools else "end_turn")
        if tools:
            assert found.content[0].input.keys() == {"city", "days"}
        else:
            assert len(found.content[0].text.split()) == found.usage.output_tokens == 50
    size = whole.usage.input_tokens
    assert (whole.usage.cache_read_input_tokens, streamed.usage.cache_read_input_tokens, streamed.usage.input_tokens) == (
        0,
        size,
        0,
    )
    assert longer.usage.cache_read_input_tokens == size
    assert longer.usage.input_tokens > 0
    usd = sum(
        3 * found.usage.input_tokens + Fraction(3, 10) * found.usage.cache_read_input_tokens + 15 * found.usage.output_tokens
        for found in (whole, streamed, longer)
    )
    assert bill.total == usd / 10**6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_a_limit_on_output_ends_the_answer(api, stream):
    limit = {"chat": "max_completion_tokens", "responses": "max_output_tokens", "messages": "max_tokens"}[api]

    async def test(provider):
        async with official(provider, api) as create:
            found = await create(**body(api, stream=stream, **{limit: 7}))
            if stream:
                events = [event async for event in found]
                found = {"chat": events[-2], "messages": getattr(events[-2], "delta", None)}.get(api) or events[-1].response
        if api == "chat":
            return found.choices[0].finish_reason, provider.bill
        return found.incomplete_details.reason if api == "responses" else found.stop_reason, provider.bill

    reason, bill = served(test)
    assert reason == {"chat": "length", "responses": "max_output_tokens", "messages": "max_tokens"}[api]
    assert bill.entries[0].tokens_out == 7


# by any client


async def post(provider, api, headers=None, **fields):
    """Status, headers, body of an answer."""
    async with (
        aiohttp.ClientSession(auto_decompress=False, headers=headers) as session,
        session.post(provider.url + APIS[api], json=body(api, **fields)) as answer,
    ):
        return answer.status, answer.headers, await answer.read()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_the_text_follows_from_seed_and_body(api, stream):
    async def test(provider):
        return [re.sub(rb'"created(_at)?":\d+', b"", (await post(provider, api, stream=stream, user=user))[2]) for user in "ab"]

    first = served(test)
    assert served(test) == first
    assert served(test, seed=1) != first


def test_keys_are_checked_and_headers_kept():
    async def test(provider):
        async with openai_client(provider) as client, anthropic_client(provider) as other:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model="small", messages=HELLO)
            with pytest.raises(anthropic.AuthenticationError):
                await other.messages.create(model="small", messages=HELLO, max_tokens=5)
            await client.with_options(api_key="sk-own").chat.completions.create(model="small", messages=HELLO)
        await post(provider, "messages", headers={"x-api-key": "sk-own"}, max_tokens=5)
        return list(provider.requests), provider.bill

    requests, bill = served(test, key="sk-own")
    assert [found.headers.get("authorization") for found in requests] == ["Bearer sk-client"] * 2 + ["Bearer sk-own", None]
    assert requests[3].headers["x-api-key"] == "sk-own"
    assert requests[3].body["max_tokens"] == 5
    assert [entry.id for entry in bill.entries] == [3, 4]


@pytest.mark.parametrize(
    ("api", "fields", "status"),
    [
        ("chat", {"model": "unknown"}, 404),
        ("chat", {"model": None}, 400),
        ("chat", {"messages": []}, 400),
        ("chat", {"messages": [None]}, 400),
        ("chat", {"max_tokens": 0}, 400),
        ("chat", {"max_tokens": "7"}, 400),
        ("chat", {"tools": [3]}, 400),
        ("responses", {"input": 3}, 400),
        ("messages", {"max_tokens": None}, 400),
        ("messages", {"messages": {}}, 400),
    ],
)
def test_wrong_requests_are_refused_in_the_apis_own_format(api, fields, status):
    async def test(provider):
        return await post(provider, api, **fields), provider.bill.entries

    (found, _, data), entries = served(test)
    assert found == status
    error = json.loads(data)["error"]
    assert error["message"]
    assert entries == []
    if api == "messages":
        assert error["type"] == "invalid_request_error"


def test_each_copy_of_an_answer_is_charged():
    async def test(provider):
        async with openai_client(provider) as client:
            whole = await client.chat.completions.create(model="small", messages=HELLO, n=3, user="me")
            async with client.chat.completions.stream(model="small", messages=HELLO, n=3) as stream:
                return whole, await stream.get_final_completion(), provider.bill.entries

    whole, streamed, entries = served(test)
    for found in (whole, streamed):
        assert [len(choice.message.content.split()) for choice in found.choices] == [50] * 3
    assert whole.usage.completion_tokens == 150
    assert [(entry.tokens_in, entry.tokens_out, entry.user) for entry in entries] == [(9, 150, "me"), (9, 150, None)]


@pytest.mark.parametrize("api", APIS)
def test_an_answer_has_the_schema_that_was_asked_for(api):
    schema = {"chat": {"response_format": {"type": "json_schema", "json_schema": {"name": "trip", "schema": TOOL}}}}
    schema["responses"] = {"text": {"format": {"type": "json_schema", "name": "trip", "schema": TOOL}}}
    schema["messages"] = {"output_config": {"format": {"type": "json_schema", "schema": TOOL}}}

    async def test(provider):
        return parsed((await wire(provider, api, stream=True, **schema[api]))[0])[2]

    assert json.loads(text(api, served(test))).keys() == {"city", "days"}


def test_the_prompt_cache_forgets_after_its_time():
    now = [0.0]

    async def test(provider):
        cached = []
        for seconds, model, text in [
            (0, "small", "a"),
            (300, "small", "a"),
            (601, "small", "a"),
            (601, "large", "a"),
            (602, "small", "b"),
        ]:
            now[0] = seconds
            messages = [{"role": "system", "content": "x" * 400}, {"role": "user", "content": text}]
            found = json.loads((await post(provider, "chat", model=model, messages=messages))[2])
            cached.append(found["usage"]["prompt_tokens_details"]["cached_tokens"])
        return cached

    assert served(test, clock=lambda: now[0]) == [0, 109, 0, 0, 104]


def test_a_client_that_leaves_before_the_first_byte_is_charged_nothing():
    async def test(provider):
        _, writer = await asyncio.open_connection(provider.host, provider.port)
        data = json.dumps(body("chat")).encode()
        request = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(data) + data
        writer.write(request + request)  # the second one waits for the first
        while len(provider.requests) < 2:
            await asyncio.sleep(0.001)
        writer.close()
        while len(provider.bill.entries) < 2:
            await asyncio.sleep(0.001)
        return provider.bill

    bill = served(test, first_byte=60.0)
    assert [(entry.end, entry.status, entry.tokens_in) for entry in bill.entries] == [("left", None, 0)] * 2


def test_requests_that_come_at_once_are_answered_in_order():
    async def test(provider):
        reader, writer = await asyncio.open_connection(provider.host, provider.port)
        datas = [json.dumps(body(api, stream=True)).encode() for api in APIS]
        for path, data in zip(APIS.values(), datas, strict=True):
            writer.write(b"POST %b HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (path.encode(), len(data)) + data)
        received = b""
        while b"message_stop" not in received:
            received += await reader.read(65536)
        writer.close()
        return received, provider.bill.entries

    received, entries = served(test, per_token=1e-9)
    places = [received.index(word) for word in (b"[DONE]", b"response.completed", b"message_stop")]
    assert places == sorted(places)
    assert [(entry.api, entry.end) for entry in entries] == [(api, "answered") for api in APIS]


def test_what_is_sent_until_the_client_leaves_is_charged():
    async def test(provider):
        async with aiohttp.ClientSession() as session:
            asked = body("chat", model="large", stream=True)
            async with session.post(provider.url + APIS["chat"], json=asked) as answer:
                received = b""
                while received.count(b'"content"') < 6:  # the first one is empty
                    received += await answer.content.readany()
                answer.close()
        while not provider.bill.entries:
            await asyncio.sleep(0.001)
        return received.count(b'"content"') - 1, provider.bill

    received, bill = served(test, tokens_out=10**6, per_token=1e-9)
    entry = bill.entries[0]
    assert (entry.end, entry.usage_told, entry.tokens_in) == ("left", False, 9)
    assert received <= entry.tokens_out < 10**6
    assert bill.total == Fraction(9 * 3 + entry.tokens_out * 15, 10**6)


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps(PRICES), encoding="utf-8")
    command = [sys.executable, "-m", "bench.mock_provider", "--port", "0", "--prices", str(prices), "--tokens-out", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = re.search(r"http://\S+", process.stdout.readline())[0]
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-client", max_retries=0)
            found = client.chat.completions.create(model="small", messages=HELLO)
        finally:
            process.terminate()
    assert found.usage.completion_tokens == 4
    assert process.returncode == 0


def test_the_mock_is_asked_and_told_by_http():
    async def test(provider):
        async with aiohttp.ClientSession(provider.url) as session:
            await (await session.post(APIS["chat"], json=body("chat"))).read()
            bill = await (await session.get("/_bill")).json()
            requests = await (await session.get("/_requests?last=1")).json()
            rules = {"rules": [{"fault": "status", "status": 429, "model": "small", "times": 1}], "tokens_out": 3}
            told = await session.post("/_control", json=rules)
            statuses = [(await session.post(APIS["chat"], json=body("chat"))).status for _ in range(2)]
            wrong = [
                await session.post("/_control", json=settings)
                for settings in ({"rules": [{"fault": "unheard"}]}, {"rule": []}, [], {"add": [{"fault": "cut", "token": 3}]})
            ]
            wrong += [await session.get("/_requests?last=x"), await session.post("/_control", data=b"{")]
            errors = [(answer.status, (await answer.json())["error"]) for answer in wrong]
            return bill, requests, told.status, statuses, errors, (await session.get("/_nothing")).status, provider.bill

    bill, requests, told, statuses, errors, unknown, now = served(test)
    assert Fraction(bill["total"]) == Fraction(bill["entries"][0]["usd"]) == now.usd(now.entries[0])
    assert requests["requests"][0]["body"]["model"] == "small"
    assert (told, statuses, unknown) == (200, [429, 200], 404)
    assert now.entries[-1].tokens_out == 3
    assert [status for status, _ in errors] == [400] * 6
    assert "expected one of" in errors[0][1]


# faults, on the wire

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


async def wire(provider, api, **fields):
    """All bytes that come until the connection ends, and whether a reset ended it."""
    reader, writer = await asyncio.open_connection(provider.host, provider.port)
    data = json.dumps(body(api, **fields)).encode()
    received, reset = b"", False
    try:
        writer.write(
            b"POST %b HTTP/1.1\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % (APIS[api].encode(), len(data)) + data
        )
        while part := await reader.read(65536):
            received += part
    except ConnectionError:
        reset = True
    writer.close()
    return received, reset


def parsed(received):
    """Status, headers, chunks of the body, and whether the body has its end."""
    head, _, rest = received.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = dict(line.decode().split(": ", 1) for line in lines)
    status = int(first.split()[1])
    if "transfer-encoding" not in headers:
        return status, headers, [rest], len(rest) == int(headers.get("content-length", len(rest)))
    chunks, ended = [], False
    while rest and not ended:
        size, _, rest = rest.partition(b"\r\n")
        ended = int(size, 16) == 0
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return status, headers, [chunk for chunk in chunks if chunk], ended


def text(api, chunks):
    """The words of a stream."""
    found = []
    for event in b"".join(chunks).replace(b"\r\n", b"\n").split(b"\n\n")[:-1]:
        lines = [line for line in event.split(b"\n") if line.startswith(b"data: ")]
        data = {} if not lines or lines[0] == b"data: [DONE]" else json.loads(lines[0][6:])
        if api == "chat":
            found += [choice["delta"].get("content") or "" for choice in data.get("choices", [])]
        elif str(data.get("type")).endswith("delta"):
            delta = data["delta"]
            found.append(delta if api == "responses" else delta.get("text", ""))
    return "".join(found)


def usual(api, **fields):
    """The chunks of the body without a fault."""

    async def test(provider):
        return parsed((await wire(provider, api, **fields))[0])[2]

    return served(test)


def same(chunks):
    """A body without what differs from request to request."""
    return re.sub(rb'"created(_at)?":\d+', b"", b"".join(chunks))


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
    ("fault", "settings"), [("split", {}), ("split", {"size": 7}), ("burst", {}), ("crlf", {}), ("comments", {})]
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
@pytest.mark.parametrize("fault", ["empty_choices", "usage_with_choices", "no_usage"])
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
