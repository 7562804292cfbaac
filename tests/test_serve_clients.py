"""Clients that people have: the official SDKs of OpenAI and Anthropic, OpenAI's for Node, and curl, against a whole server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import anthropic
import openai
import pytest
import yaml
from pydantic import BaseModel

from bench import serve_demo
from bench.mock_provider import MockProvider
from p2l_engine import Catalog
from p2l_engine.catalog import CatalogModel
from p2l_engine.serve import settings
from tests.support.serving import APIS, PRICES, config_for, serving

pytestmark = pytest.mark.slow  # many cases: all together take longer than the fast tests may

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SECRET = "sk-p2l-test"
KEYS = [{"id": "team", "sha256": hashlib.sha256(SECRET.encode()).hexdigest()}]
# Of cases in all three APIs, the fast tests run the chat API's.
ALL = [APIS[0], *(pytest.param(api, marks=pytest.mark.slow) for api in APIS[1:])]
NODE_PACKAGE = "openai@7.57.0"


class Trip(BaseModel):
    """What an answer must look like."""

    city: str
    days: int
    mode: Literal["train", "plane"]


def served(test, models=None, **serve):
    """Runs a coroutine function with a server and its provider."""

    async def run():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, models, **serve)) as server:
            return await asyncio.wait_for(test(server, provider), 300)

    return asyncio.run(run())


def openai_client(server, kind=openai.AsyncOpenAI, key=SECRET):
    return kind(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def anthropic_client(server, kind=anthropic.AsyncAnthropic, key=SECRET):
    return kind(base_url=server.url, api_key=key, max_retries=0)


def is_routed(headers, record):
    """Whether the headers say what the server's record of the decision says."""
    assert headers["x-p2l-decision"] == record.id
    assert headers["x-p2l-model"] == record.model == "large"
    assert headers["x-p2l-attempts"] == "1"
    assert float(headers["x-p2l-expected-cost"]) == pytest.approx(record.expected_cost)
    assert float(headers["x-p2l-win-rate"]) == pytest.approx(record.win_rate, rel=1e-5)
    return True


# OpenAI's SDK for Python


def test_openai_asks_for_a_chat_completion():
    async def test(server, provider):
        async with openai_client(server) as client:
            raw = await client.chat.completions.with_raw_response.create(model="auto", messages=HELLO, temperature=0, seed=7)
            return raw.headers, raw.parse(), server.records[-1], provider.requests[-1].body

    headers, found, record, sent = served(test)
    assert is_routed(headers, record)
    assert found.model == "large"
    assert found.choices[0].finish_reason == "stop"
    assert len(found.choices[0].message.content.split()) == found.usage.completion_tokens == record.tokens_out == 50
    assert sent == {"model": "large", "messages": HELLO, "temperature": 0, "seed": 7}


def test_the_synchronous_openai_client_asks_at_once_and_streaming():
    def ask(server):
        with openai_client(server, openai.OpenAI) as client:
            whole = client.chat.completions.create(model="auto", messages=HELLO)
            chunks = list(client.chat.completions.create(model="auto", messages=HELLO, stream=True))
            response = client.responses.create(model="auto", input="Hello")
            events = list(client.responses.create(model="auto", input="Hello", stream=True))
            return whole, chunks, response, events

    async def test(server, provider):
        return await asyncio.to_thread(ask, server)

    whole, chunks, response, events = served(test)
    assert whole.choices[0].message.content
    assert len("".join(chunk.choices[0].delta.content or "" for chunk in chunks).split()) == 50
    assert len(response.output_text.split()) == response.usage.output_tokens == 50
    assert events[-1].type == "response.completed"
    assert events[-1].response.usage.output_tokens == 50


@pytest.mark.parametrize("usage", [False, True])
def test_openai_streams_a_chat_completion_with_usage_only_where_it_was_asked_for(usage):
    async def test(server, provider):
        options = {"stream_options": {"include_usage": True}} if usage else {}
        async with openai_client(server) as client:
            raw = await client.chat.completions.with_raw_response.create(model="auto", messages=HELLO, stream=True, **options)
            chunks = [chunk async for chunk in raw.parse()]
            return raw.headers, chunks, server.records[-1]

    headers, chunks, record = served(test)
    assert is_routed(headers, record)
    assert headers["content-type"].startswith("text/event-stream")
    assert len("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).split()) == 50
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert (chunks[-1].choices == [], chunks[-1].usage is not None) == (usage, usage)
    assert (record.tokens_out, record.estimated) == (50, False)  # the server has the usage in either case


def test_openai_calls_a_tool_and_goes_on_after_it():
    tools = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]

    async def test(server, provider):
        asked = {"model": "auto", "messages": HELLO, "tools": tools}
        async with openai_client(server) as client:
            async with client.chat.completions.stream(**asked) as stream:
                streamed = await stream.get_final_completion()
            whole = await client.chat.completions.create(**asked)
            answer = whole.choices[0].message
            result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "sunny"}
            asked["messages"] = [*HELLO, answer.model_dump(exclude_unset=True), result]  # content: null among it
            after = await client.chat.completions.create(**asked)
            return streamed, whole, after, server.records, provider.requests[-1].body

    streamed, whole, after, records, sent = served(test)
    for found in (streamed, whole):
        assert found.choices[0].finish_reason == "tool_calls"
        assert json.loads(found.choices[0].message.tool_calls[0].function.arguments).keys() == {"city"}
    assert after.choices[0].finish_reason == "stop"
    assert sent["messages"][1]["content"] is None
    assert sent["tools"] == tools
    assert len({record.turns_hash for record in records}) == len({record.session for record in records}) == 1


def test_openai_parses_answers_of_a_schema():
    async def test(server, provider):
        async with openai_client(server) as client:
            chat = await client.chat.completions.parse(model="auto", messages=HELLO, response_format=Trip)
            response = await client.responses.parse(model="auto", input="A trip, please.", text_format=Trip)
            return chat.choices[0].message.parsed, response.output_parsed

    for trip in served(test):
        assert isinstance(trip, Trip)
        assert trip.mode == "train"


def test_what_a_model_does_not_accept_goes_to_one_that_does():
    """Images, tools and schemas."""
    plain = {"large": {"accepts": ["text"]}, "medium": {"accepts": ["text", "image", "tools"]}}
    image = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]

    async def test(server, provider):
        async with openai_client(server) as client:
            create = client.chat.completions.create
            seen = await create(model="auto", messages=[{"role": "user", "content": image}])
            called = await create(model="auto", messages=HELLO, tools=tools)
            parsed = await client.chat.completions.parse(model="auto", messages=HELLO, response_format=Trip)
            return [seen.model, called.model, parsed.model], provider.requests[0].body

    models, sent = served(test, plain)
    assert models == ["medium", "medium", "small"]
    assert sent["messages"][0]["content"] == image


@pytest.mark.parametrize("tools", [False, True])
def test_openai_asks_for_responses(tools):
    more = {"tools": [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}]} if tools else {}

    async def test(server, provider):
        async with openai_client(server) as client:
            raw = await client.responses.with_raw_response.create(model="auto", input="Hello", instructions="Be kind.", **more)
            whole = raw.parse()
            record = server.records[-1]
            async with client.responses.stream(model="auto", input="Hello", instructions="Be kind.", **more) as stream:
                events = [event async for event in stream]
                return raw.headers, record, whole, events, await stream.get_final_response()

    headers, record, whole, events, streamed = served(test)
    assert is_routed(headers, record)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for found in (whole, streamed):
        assert found.status == "completed"
        if tools:
            assert json.loads(found.output[0].arguments).keys() == {"city"}
        else:
            assert len(found.output_text.split()) == found.usage.output_tokens == 50


def test_a_response_is_continued_by_the_model_that_gave_it():
    async def test(server, provider):
        async with openai_client(server) as client:
            options = {"extra_body": {"p2l": {"models": ["small"]}}}
            first = await client.responses.create(model="auto", input="Hello", **options)
            second = await client.responses.create(model="auto", input="And?", previous_response_id=first.id)
            with pytest.raises(openai.NotFoundError, match="previous_response_id"):
                await client.responses.create(model="auto", input="And?", previous_response_id="resp_unknown")
            return first.model, second.model, provider.requests[-1].body["previous_response_id"] == first.id

    assert served(test) == ("small", "small", True)


def test_the_worst_case_of_a_continued_response_has_the_conversation_before_it(tmp_path):
    """The provider bills all of it as input again."""

    async def test(server, provider):
        async with openai_client(server) as client:
            long = {"model": "large", "input": "word " * 32_000, "max_output_tokens": 10}  # 0.12 of 0.2 USD
            first = await client.responses.create(**long)
            with pytest.raises(openai.APIStatusError) as caught:
                await client.responses.create(model="large", input="And?", previous_response_id=first.id, max_output_tokens=10)
            return caught.value.status_code

    assert served(test, limits=[{"amount": 0.2}], store=str(tmp_path / "serve.sqlite")) == 402


def test_the_callers_wishes_come_in_the_body_or_in_headers():
    async def test(server, provider):
        async with openai_client(server) as client:
            create = client.chat.completions.create
            body = await create(model="auto", messages=HELLO, extra_body={"p2l": {"models": ["small"], "session": "a"}})
            headers = {"x-p2l-models": "small, medium", "x-p2l-session": "a", "x-p2l-budget": "0.001"}
            header = await create(model="auto", messages=HELLO, extra_headers=headers)
            decided = await create(model="auto", messages=HELLO, extra_body={"p2l": {"dry_run": True}})
            return body.model, header.model, decided.to_dict(), server.records, [r.body for r in provider.requests]

    body, header, decided, records, sent = served(test)
    assert (body, header) == ("small", "medium")
    assert records[0].session == records[1].session
    assert records[1].budget == 0.001
    assert decided["model"] == "large"
    assert decided["policy"] == {"large": 1.0}
    assert [set(found) for found in sent] == [{"model", "messages"}] * 2  # nothing of the router's own, and no dry run


def test_both_sdks_list_the_models():
    async def test(server, provider):
        async with openai_client(server) as client, anthropic_client(server) as other:
            return [m.id async for m in client.models.list()], [m.id async for m in other.models.list()]

    assert served(test) == (["auto", *PRICES],) * 2


def test_both_sdks_know_each_model():
    async def test(server, provider):
        async with openai_client(server) as client, anthropic_client(server) as other:
            assert (await client.models.retrieve("auto")).id == "auto"
            assert (await other.models.retrieve("large")).id == "large"
            assert [(m.type, bool(m.display_name), bool(m.created_at)) async for m in other.models.list()] == [
                ("model", True, True)
            ] * (1 + len(PRICES))

    served(test)


# Anthropic's SDK for Python


@pytest.mark.parametrize("tools", [False, True])
def test_anthropic_asks_for_messages(tools):
    more = {"tools": [{"name": "weather", "input_schema": WEATHER}]} if tools else {}
    asked = {"model": "auto", "max_tokens": 100, "system": "Be kind.", "messages": HELLO, **more}

    async def test(server, provider):
        async with anthropic_client(server) as client:
            raw = await client.messages.with_raw_response.create(**asked)
            whole, record = await raw.parse(), server.records[-1]
            async with client.messages.stream(**asked) as stream:
                streamed = await stream.get_final_message()
            version = client.default_headers["anthropic-version"]
            return raw.headers, whole, record, streamed, provider.requests[0], version

    headers, whole, record, streamed, sent, version = served(test)
    assert is_routed(headers, record)
    assert sent.body == {**asked, "model": "large"}
    assert sent.headers["anthropic-version"] == version
    for found in (whole, streamed):
        assert found.model == "large"
        assert found.stop_reason == ("tool_use" if tools else "end_turn")
        if tools:
            assert found.content[0].input.keys() == {"city"}
        else:
            assert len(found.content[0].text.split()) == found.usage.output_tokens == 50


def test_the_synchronous_anthropic_client_asks_at_once_and_streaming():
    def ask(server):
        with anthropic_client(server, anthropic.Anthropic) as client:
            asked = {"model": "auto", "max_tokens": 100, "messages": HELLO}
            whole = client.messages.create(**asked)
            with client.messages.stream(**asked) as stream:
                return whole, "".join(stream.text_stream)

    async def test(server, provider):
        return await asyncio.to_thread(ask, server)

    whole, text = served(test)
    assert len(whole.content[0].text.split()) == len(text.split()) == 50


def test_anthropic_goes_on_after_a_tool_and_sends_images_and_schemas():
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Where is this?"}, {"type": "image", "source": source}]}]
    tools = [{"name": "weather", "input_schema": WEATHER, "cache_control": {"type": "ephemeral"}}]

    async def test(server, provider):
        async with anthropic_client(server) as client:
            first = await client.messages.create(model="auto", max_tokens=100, messages=messages, tools=tools)
            result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": "sunny"}
            follow = [*messages, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
            second = await client.messages.create(model="auto", max_tokens=100, messages=follow, tools=tools)
            parsed = await client.messages.parse(model="auto", max_tokens=100, messages=HELLO, output_format=Trip)
            tokens = await client.messages.count_tokens(model="auto", messages=HELLO)
            return first, second, parsed.parsed_output, tokens.input_tokens, server.records, provider.requests

    first, second, trip, tokens, records, sent = served(test)
    assert (first.stop_reason, second.stop_reason) == ("tool_use", "end_turn")
    assert isinstance(trip, Trip)
    assert 0 < tokens < 50
    assert records[0].turns_hash == records[1].turns_hash  # the tool's result is no turn
    assert records[0].session == records[1].session
    assert sent[1].body["messages"][0] == messages[0]
    assert sent[1].body["tools"] == tools


def test_anthropics_tool_runner_runs_to_the_end_with_its_beta_header():
    asked_for = []

    @anthropic.beta_async_tool
    async def weather(city: str) -> str:
        """The weather.

        Args:
            city: where
        """
        asked_for.append(city)
        return "sunny"

    async def test(server, provider):
        async with anthropic_client(server) as client:
            runner = client.beta.messages.tool_runner(
                model="auto", max_tokens=100, messages=HELLO, tools=[weather], betas=["context-management-2025-06-27"]
            )
            return await runner.until_done(), server.records, provider.requests

    last, records, sent = served(test)
    assert last.stop_reason == "end_turn"
    assert len(asked_for) == 1
    assert all("context-management-2025-06-27" in request.headers["anthropic-beta"] for request in sent)
    assert len({record.session for record in records}) == len({record.turns_hash for record in records}) == 1
    assert [len(request.body["messages"]) for request in sent] == [1, 3]


def test_threads_that_a_provider_keeps_are_sent_whole_by_the_sdk():
    """A thread is best effort: where it is not found, Anthropic's SDK sends the conversation again."""

    async def test(server, provider):
        async with anthropic_client(server) as client:
            thread = client.beta.messages.thread(model="auto", max_tokens=100, system="Be kind.")
            for text in ("Hello", "And then?", "And then?"):
                await thread.send({"role": "user", "content": text})
            with pytest.raises(anthropic.NotFoundError, match="send the whole conversation") as caught:
                await client.beta.messages.create(
                    model="auto", max_tokens=9, messages=HELLO, thread={"type": "continue", "previous_message_id": "msg_1"}
                )
            return caught.value, server.records, provider.requests

    error, records, sent = served(test)
    assert error.body["error"]["details"] == {"error_code": "thread_not_found"}
    assert [len(request.body["messages"]) for request in sent] == [1, 3, 5]
    assert all(request.body["system"] == "Be kind." for request in sent)
    assert len({record.session for record in records}) == 1
    assert records[2].tokens_in > records[1].tokens_in > records[0].tokens_in


# errors are those of the SDKs


def asks(server, key=SECRET):
    """A minimal request by each API, with further fields."""
    one, other = openai_client(server, key=key), anthropic_client(server, key=key)
    return {
        "chat": lambda **more: one.chat.completions.create(**{"model": "auto", "messages": HELLO, **more}),
        "responses": lambda **more: one.responses.create(**{"model": "auto", "input": "Hello", **more}),
        "messages": lambda **more: other.messages.create(**{"model": "auto", "max_tokens": 99, "messages": HELLO, **more}),
    }


async def error_of(answer):
    """The SDK's exception."""
    with pytest.raises((openai.APIError, anthropic.APIError)) as caught:
        await answer
    return caught.value


REFUSED = {
    "a wrong key": (401, "AuthenticationError", {}),
    "an unknown model": (404, "NotFoundError", {"model": "gpt-nothing"}),
    "no message": (400, "BadRequestError", {"messages": [], "input": []}),
    "a budget below the cheapest": (402, "PaymentRequiredError", {"extra_headers": {"x-p2l-budget": "1e-12"}}),
    "a limit that is reached": (402, "PaymentRequiredError", {"model": "large"}),
}


@pytest.mark.parametrize("api", ALL)
@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_the_sdks_own(case, api, tmp_path):
    status, kind, fields = REFUSED[case]
    fields = {name: value for name, value in fields.items() if name != ("messages" if api == "responses" else "input")}

    async def test(server, provider):
        return await error_of(asks(server, SECRET if status != 401 else "sk-wrong")[api](**fields))

    # 1e-6 USD are less than any answer of these models may cost.
    error = served(test, keys=KEYS, limits=[{"amount": 1e-6}], store=str(tmp_path / "serve.sqlite"))
    module = anthropic if api == "messages" else openai
    assert error.status_code == status
    assert type(error) is getattr(module, kind, module.APIStatusError)
    if api == "messages":
        assert error.body["type"] == "error"
        assert set(error.body["error"]) == {"type", "message"}
    else:
        assert error.type in ("authentication_error", "insufficient_quota", "invalid_request_error")
        assert error.code == {404: "model_not_found", 402: error.code}.get(status)
    if status == 404:
        assert "gpt-nothing" in str(error)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ALL)
def test_all_models_down_is_an_error_that_sdks_try_again(api, stream):
    async def test(server, provider):
        provider.fail("status", status=500)
        return await error_of(asks(server)[api](stream=stream))

    error = served(test)
    assert error.status_code == 503
    assert int(error.response.headers["retry-after"]) >= 1
    module = anthropic if api == "messages" else openai
    assert type(error) is getattr(module, "ServiceUnavailableError", module.InternalServerError)


@pytest.mark.slow
def test_an_sdk_that_tries_again_is_answered_when_the_models_are_up():
    async def test(server, provider):
        provider.fail("status", status=500, times=3)  # each of the three models, once
        async with openai_client(server).with_options(max_retries=2) as client:
            found = await client.chat.completions.create(model="auto", messages=HELLO)
            return found.model, [record.status for record in server.records]

    assert served(test, retries={"attempts": 3, "backoff": 0.01}, cooldown={"seconds": 0.5}) == ("large", [503, 200])


@pytest.mark.parametrize("api", ALL)
def test_a_request_that_the_provider_refuses_raises_its_error(api):
    async def test(server, provider):
        provider.fail("status", status=400)
        return await error_of(asks(server)[api]())

    error = served(test)
    assert type(error).__name__ == "BadRequestError"
    assert error.response.headers["x-p2l-model"] == "large"


@pytest.mark.parametrize("fault", ["error_event", "cut", "cut_reset", "stall"])
@pytest.mark.parametrize("api", ALL)
def test_a_stream_that_breaks_off_raises_after_what_came(api, fault):
    async def test(server, provider):
        provider.fail(fault, tokens=5)
        said = []

        async def read():
            async for event in await asks(server)[api](stream=True):
                if api == "chat":
                    said.append(event.choices[0].delta.content or "")
                elif event.type == "response.output_text.delta":
                    said.append(event.delta)
                elif event.type == "content_block_delta":
                    said.append(event.delta.text)

        return await error_of(read()), "".join(said)

    error, text = served(test, timeouts={"connect": 1, "first_byte": 1, "whole": 1, "idle": 0.2, "total": 5})
    assert len(text.split()) == 5
    assert "cut off" in str(error)
    assert isinstance(error, anthropic.APIStatusError if api == "messages" else openai.APIError)


@pytest.mark.slow
def test_the_helper_for_responses_raises_too():
    async def test(server, provider):
        provider.fail("error_event", tokens=5)

        async def read():
            async with openai_client(server) as client, client.responses.stream(model="auto", input="Hello") as stream:
                async for _ in stream:
                    pass

        return await error_of(read())

    assert "cut off" in str(served(test))


def test_an_sdk_that_leaves_a_stream_ends_it_upstream():
    async def test(server, provider):
        provider.per_token = 0.05
        async with openai_client(server) as client:
            stream = await client.chat.completions.create(model="auto", messages=HELLO, stream=True)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
            for _ in range(100):
                if server.records and not provider.connections:
                    break
                await asyncio.sleep(0.01)
            return server.records[-1].outcome, len(provider.connections)

    assert served(test) == ("left", 0)


# OpenAI's SDK for Node, and curl

NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.BASE, apiKey: process.env.KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "Hello, who are you?" }];
const out = {};
const raw = await client.chat.completions.create({ model: "auto", messages }).withResponse();
out.model = raw.response.headers.get("x-p2l-model");
out.decision = raw.response.headers.get("x-p2l-decision");
out.whole = raw.data.choices[0].message.content;
out.streamed = "";
const asked = { model: "auto", messages, stream: true, stream_options: { include_usage: true } };
const stream = await client.chat.completions.create(asked);
for await (const chunk of stream) {
  out.streamed += chunk.choices[0]?.delta?.content ?? "";
  out.usage = chunk.usage?.completion_tokens ?? out.usage;
}
const tools = [{ type: "function", function: { name: "weather", parameters: JSON.parse(process.env.SCHEMA) } }];
const called = await client.chat.completions.create({ model: "auto", messages, tools });
out.tool = called.choices[0].message.tool_calls[0].function.name;
const response = await client.responses.create({ model: "auto", input: "Hello" });
out.response = response.output_text;
out.events = [];
for await (const event of client.responses.stream({ model: "auto", input: "Hello" })) out.events.push(event.type);
out.models = [];
for await (const model of await client.models.list()) out.models.push(model.id);
out.errors = [];
for (const [key, body] of [["sk-wrong", {}], [process.env.KEY, { model: "nothing" }], [process.env.KEY, { messages: [] }],
                           [process.env.KEY, { p2l: { budget: 1e-12 } }]]) {
  const other = new OpenAI({ baseURL: process.env.BASE, apiKey: key, maxRetries: 0 });
  try { await other.chat.completions.create({ model: "auto", messages, ...body }); out.errors.push(null); }
  catch (error) { out.errors.push([error.constructor.name, error.status, error.message]); }
}
console.log(JSON.stringify(out));
"""
BROKEN = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.BASE, apiKey: process.env.KEY, maxRetries: 0 });
let said = "";
const asked = { model: "auto", messages: [{ role: "user", content: "Hello" }], stream: true };
try {
  for await (const chunk of await client.chat.completions.create(asked)) said += chunk.choices[0].delta.content ?? "";
} catch (error) { console.log(JSON.stringify([said, error.constructor.name, error.message])); }
"""


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """A folder with OpenAI's SDK for Node; skips where node or the package cannot be had."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", NODE_PACKAGE]
    try:
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm cannot install {NODE_PACKAGE}: no answer in five minutes")
    if ended.returncode:
        pytest.skip(f"npm cannot install {NODE_PACKAGE}: {ended.stderr.strip()[-200:]}")
    return folder


async def run_node(folder: Path, server, program: str):
    (folder / "test.mjs").write_text(program, encoding="utf-8")
    environment = {**os.environ, "BASE": f"{server.url}/v1", "KEY": SECRET, "SCHEMA": json.dumps(WEATHER)}
    return json.loads(await output("node", "test.mjs", cwd=folder, env=environment))


async def output(*command: str, **options) -> str:
    """What a program prints; its errors if it fails."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, **options)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.slow
def test_openais_sdk_for_node(node):
    async def test(server, provider):
        return await run_node(node, server, NODE), server.records

    found, records = served(test, keys=KEYS)
    assert (found["model"], found["decision"]) == ("large", records[0].id)
    for name in ("whole", "streamed", "response"):
        assert len(found[name].split()) == 50
    assert found["usage"] == 50
    assert found["tool"] == "weather"
    assert found["events"][-1] == "response.completed"
    assert found["models"] == ["auto", *PRICES]
    names = [("AuthenticationError", 401), ("NotFoundError", 404), ("BadRequestError", 400), ("APIError", 402)]
    assert [tuple(error[:2]) for error in found["errors"]] == names


@pytest.mark.slow
def test_openais_sdk_for_node_raises_when_a_stream_breaks_off(node):
    async def test(server, provider):
        provider.fail("cut_reset", tokens=5)
        return await run_node(node, server, BROKEN)

    said, kind, message = served(test)
    assert len(said.split()) == 5
    assert kind == "APIError"
    assert "cut off" in message


@pytest.fixture
def curl():
    found = shutil.which("curl")
    if found is None:
        pytest.skip("curl is not installed")
    return found


@pytest.mark.slow
def test_curl_is_answered_with_the_decision_in_the_headers(curl):
    async def test(server, provider):
        body = json.dumps({"model": "auto", "messages": HELLO})
        shown = await output(
            curl, "-sSi", f"{server.url}/v1/chat/completions", "-H", f"Authorization: Bearer {SECRET}",
            "-H", "Content-Type: application/json", "-d", body,
        )  # fmt: skip
        plain = await output(curl, "-sS", f"{server.url}/v1/route", "-H", f"x-api-key: {SECRET}", "-d", body)
        refused = await output(curl, "-sS", "-o", "/dev/null", "-w", "%{http_code}", f"{server.url}/v1/models")
        return shown, json.loads(plain), refused, server.records[0]

    shown, plain, refused, record = served(test, keys=KEYS)
    head, _, body = shown.partition("\r\n\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:])
    assert head.startswith("HTTP/1.1 200")
    assert is_routed(headers, record)
    assert json.loads(body)["usage"]["completion_tokens"] == 50
    assert plain["model"] == "large"
    assert refused == "401"


@pytest.mark.slow
def test_curl_sends_large_bodies(curl, tmp_path):
    """From a megabyte on it waits for 100 Continue."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 3_000_000}}
    body = {"model": "auto", "messages": [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]}
    (tmp_path / "body").write_text(json.dumps(body), encoding="utf-8")

    async def test(server, provider):
        shown = await output(curl, "-sS", f"{server.url}/v1/chat/completions", "--data-binary", f"@{tmp_path / 'body'}")
        return json.loads(shown), provider.requests[-1].body["messages"]

    found, messages = served(test)
    assert found["choices"][0]["finish_reason"] == "stop"
    assert messages == body["messages"]


@pytest.mark.slow
def test_curl_shows_a_stream_as_it_comes(curl):
    """Each event is passed on before the next one is there."""

    async def test(server, provider):
        provider.per_token, provider.tokens_out = 0.05, 20
        body = json.dumps({"model": "auto", "messages": HELLO, "stream": True})
        process = await asyncio.create_subprocess_exec(
            curl, "-sSN", f"{server.url}/v1/chat/completions", "-d", body, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        lines = []
        while line := await process.stdout.readline():
            lines.append((line.strip(), bool(server.records)))
        return lines, await process.wait()

    lines, status = served(test)
    assert status == 0
    data = [(line, ended) for line, ended in lines if line.startswith(b"data: ")]
    assert data[-1][0] == b"data: [DONE]"
    assert len(data) == 1 + 20 + 1 + 1
    assert not any(ended for _, ended in data[:15])  # the request was still under way


# what docs/clients.md shows


def blocks(language):
    page = Path(__file__).resolve().parents[1] / "docs" / "clients.md"
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def there(block, server):
    """A block of the page with this server's address and key."""
    return block.replace("http://localhost:8000", server.url).replace("sk-p2l", SECRET)


def test_the_pages_configuration_is_valid():
    for block in blocks("yaml"):
        values = yaml.safe_load(block)
        if "models" in values:
            assert [provider.api for provider in settings.parse(values).models["large"].provider] == list(APIS)


@pytest.mark.parametrize("number", [0, 1])
def test_the_pages_python_runs(number, capsys):
    async def test(server, provider):
        code = compile(there(blocks("python")[number], server), "docs/clients.md", "exec")
        await asyncio.to_thread(exec, code, {})
        return [record.outcome for record in server.records]

    assert served(test, keys=KEYS) == ["answered"] * (2 - number)
    assert len(capsys.readouterr().out.split()) >= 50


@pytest.mark.slow
def test_the_pages_curl_runs(curl):
    async def test(server, provider):
        return [await output("sh", "-c", there(block, server)) for block in blocks("sh") if block.startswith("curl")]

    whole, stream = served(test, keys=KEYS)
    assert json.loads(whole)["choices"][0]["finish_reason"] == "stop"
    assert "x-p2l-decision: dec_" in stream
    assert "event: message_stop" in stream


@pytest.mark.slow
def test_the_pages_javascript_runs(node):
    async def test(server, provider):
        (block,) = blocks("js")
        (node / "page.mjs").write_text(there(block, server), encoding="utf-8")
        return await output("node", "page.mjs", cwd=node)

    model, *text = served(test, keys=KEYS).split()
    assert (model, len(text)) == ("large", 50)


def test_the_demos_server_answers_the_clients_that_the_readme_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    serve_demo.FOLDER.mkdir(parents=True)
    models = Catalog(tuple(CatalogModel(name, 1e-4, {}, *prices[:2], context=8192) for name, prices in PRICES.items()))

    async def run():
        async with MockProvider(PRICES) as provider, serving(serve_demo.configuration(models, provider.url)) as server:
            chat = await openai_client(server).chat.completions.create(model="auto", messages=HELLO, max_tokens=60)
            response = await openai_client(server).responses.create(model="auto", input="Hello", max_output_tokens=60)
            message = await anthropic_client(server).messages.create(model="auto", messages=HELLO, max_tokens=60)
            return chat.choices[0].message.content, response.output_text, message.content[0].text

    assert all(asyncio.run(run()))
