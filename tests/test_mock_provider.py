"""The mock provider: official clients read its answers, and its bill is exact."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from fractions import Fraction

import aiohttp
import anthropic
import openai
import pytest

from tests.support.mock_provider import (
    APIS,
    HELLO,
    PRICES,
    TOOL,
    anthropic_client,
    body,
    official,
    openai_client,
    parsed,
    post,
    served,
    text,
    wire,
)

pytestmark = pytest.mark.slow  # both official clients are imported


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
        for seconds, model, last in [
            (0, "small", "a"),
            (300, "small", "a"),
            (601, "small", "a"),
            (601, "large", "a"),
            (602, "small", "b"),
        ]:
            now[0] = seconds
            messages = [{"role": "system", "content": "x" * 400}, {"role": "user", "content": last}]
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
