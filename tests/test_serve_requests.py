"""Requests of every kind: read as their API means them, or refused in its own error format, never with a trace."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bench.mock_provider import MockProvider
from p2l_engine.apis.ask import BadRequest
from p2l_engine.apis.registry import APIS, shaped_like
from p2l_engine.serve.options import options_of, session_of
from tests.support.serving import PRICES, FixedEngine, config_for, serving

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
CHAT = {"model": "auto", "messages": [{"role": "user", "content": "hello"}]}
BODIES = {
    "chat": CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}], "max_tokens": 9, "stream": False, "n": 1},
    "responses": {
        "model": "auto",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        "stream": False,
    },
    "messages": {
        "model": "auto",
        "max_tokens": 9,
        "system": "s",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    },
}

CALLS = [{"function": {"arguments": "{}", "name": "f"}, "index": 0}]
EVENTS = {
    "chat": {
        "choices": [{"index": 0, "delta": {"content": "a", "tool_calls": CALLS}}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}},
        "error": None,
    },
    "responses": {
        "type": "response.completed",
        "response": {"id": "r", "output": [{"type": "message"}], "usage": {"input_tokens": 1, "output_tokens": 2}},
    },
    "messages": {
        "type": "message_start",
        "message": {"content": [{"type": "text"}], "usage": {"input_tokens": 1, "output_tokens": 1}},
    },
}


def turns(api: str, **body: Any) -> list[str]:
    return list(APIS[api].ask({"model": "auto", "max_tokens": 9} | body).turns)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_the_users_turns_are_what_p2l_reads():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    conversation = [
        {"role": "developer", "content": "be brief"},
        user([{"type": "text", "text": "what is"}, image]),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant"},
        user("and now?"),
    ]
    assert turns("chat", messages=conversation) == ["what is\n[image]", "and now?"]
    assert turns("chat", messages=[{"role": "system", "content": "only this"}]) == ["only this"]
    assert turns("chat", messages=[{"role": "assistant", "content": "a"}]) == ["a"]
    assert turns("responses", input="hello") == ["hello"]
    calls = [{"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}]
    calls += [{"type": "function_call_output", "call_id": "1", "output": "42"}, {"type": "reasoning", "summary": []}]
    assert turns("responses", input=[user("hello"), *calls]) == ["hello"]
    assert turns("responses", instructions="be brief", input=[*calls]) == ["be brief"]
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "42"}]}
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}
    assert turns("messages", messages=[user("hello"), use, user([result])]) == ["hello"]
    assert turns("messages", messages=[user("hello"), use, user([result, {"type": "text", "text": "so?"}])]) == ["hello", "so?"]


def test_what_a_request_needs():
    def needs(api: str, **body: Any) -> set[str]:
        return set(APIS[api].ask({"model": "auto", "max_tokens": 9} | body).needs) - {"text"}

    assert needs("chat", messages=[user("a")]) == set()
    assert needs("chat", messages=[user("a")], tools=[{}]) == {"tools"}
    assert needs("chat", messages=[user([{"type": "image_url", "image_url": {}}])]) == {"image"}
    assert needs("chat", messages=[user([{"type": "input_audio", "input_audio": {}}])]) == {"audio"}
    assert needs("chat", messages=[user("a")], response_format={"type": "json_schema"}) == {"json_schema"}
    assert needs("responses", input=[user([{"type": "input_image"}])], text={"format": {"type": "json_schema"}}) == {
        "image",
        "json_schema",
    }
    assert needs("responses", input="a", tools=[{"type": "web_search"}]) == {"tools"}
    assert needs("messages", messages=[user([{"type": "image", "source": {}}])], tools=[{}]) == {"image", "tools"}


def test_the_session_stays_the_same_in_a_conversation_and_differs_between_two():
    def session(*messages: Any, headers: Any = (), **body: Any) -> str:
        whole = {"model": "auto", "messages": list(messages)} | body
        return session_of(options_of(whole, dict(headers)), whole, dict(headers), None, APIS["chat"].ask(whole).session)

    first = session(user("hello"))
    assert session(user("hello"), {"role": "assistant", "content": "x"}, user("more")) == first
    assert session(user("bye")) != first
    assert session({"role": "system", "content": "s"}, user("hello")) != first
    named = session(user("hello"), headers={"x-p2l-session": "a"}.items())
    assert session(user("bye"), headers={"x-p2l-session": "a"}.items()) == named != first
    assert session(user("bye"), p2l={"session": "a"}) == named
    assert session(user("bye"), headers={"x-session-id": "a"}.items()) == named
    assert session(user("bye"), prompt_cache_key="a") == named


def everything(value: Any) -> list[tuple[Any, ...]]:
    """The paths of all values within."""
    found: list[tuple[Any, ...]] = [()]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += [(key, *path) for path in everything(inner)]
    return found


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@given(st.data())
def test_any_value_in_any_place_is_read_or_refused(data):
    name = data.draw(st.sampled_from(sorted(BODIES)))
    body = copy.deepcopy(BODIES[name])
    *way, last = data.draw(st.sampled_from([path for path in everything(body) if path]))
    place: Any = body
    for key in way:
        place = place[key]
    place[last] = data.draw(JSON)
    shaped_like(body)
    try:
        found = APIS[name].ask(body)
    except BadRequest as error:
        assert 400 <= error.status < 500
        return
    assert found.turns
    assert all(isinstance(turn, str) for turn in found.turns)


FIELDS = {
    "chat": "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens metadata "
    "modalities n parallel_tool_calls prediction prompt_cache_key reasoning_effort response_format seed service_tier stop "
    "store stream stream_options tool_choice tools top_logprobs user verbosity web_search_options plugins best_of",
    "responses": "background conversation include instructions max_output_tokens max_tool_calls metadata prompt reasoning "
    "previous_response_id prompt_cache_key service_tier store stream stream_options text tool_choice tools truncation user",
    "messages": "cache_control container context_management inference_geo max_tokens mcp_servers metadata output_config "
    "output_format service_tier speed stop_sequences stream system thinking tool_choice tools thread",
}


@pytest.mark.slow
@given(st.data())
def test_any_value_of_any_field_is_read_or_refused(data):
    name = data.draw(st.sampled_from(sorted(BODIES)))
    known = FIELDS[name].split()
    body = BODIES[name] | data.draw(st.dictionaries(st.sampled_from(known), JSON, min_size=1, max_size=3))
    try:
        APIS[name].ask(body)
    except BadRequest as error:
        assert 400 <= error.status < 500


@pytest.mark.slow
@given(st.data())
def test_any_event_of_a_provider_is_read(data):
    """What a provider writes is no more to be relied on than what a client does."""
    name = data.draw(st.sampled_from(sorted(BODIES)))
    event = copy.deepcopy(EVENTS[name])
    *way, last = data.draw(st.sampled_from([path for path in everything(event) if path]))
    place: Any = event
    for key in way:
        place = place[key]
    place[last] = data.draw(JSON)
    APIS[name].stream(APIS[name].ask(BODIES[name])).read(b"data: " + orjson.dumps(event) + b"\n\n")
    if isinstance(event, dict):
        APIS[name].usage(event)
        APIS[name].fault(event)


@pytest.mark.slow
@given(JSON)
def test_any_options_are_read_or_refused(value):
    try:
        options_of({"p2l": value}, {})
    except BadRequest as error:
        assert error.status == 400


async def post(url: str, path: str, data: bytes, **headers: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as client, client.post(url + path, data=data, headers=headers) as response:
        return response.status, orjson.loads(await response.read())


HOSTILE = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[1]",
    "text": b'"a"',
    "invalid UTF-8": b'{"model": "auto", "messages": [{"role": "user", "content": "\xff"}]}',
    "half a surrogate pair": b'{"model": "auto", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "deep": b'{"model": "auto", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deeper than can be written": b'{"model": "auto", "messages": [{"role": "user", "content": "a"}], "input": "a", '
    b'"max_tokens": 9, "x": ' + b"[" * 300 + b"]" * 300 + b"}",
    "deep tools": b'{"model": "auto", "messages": [{"role": "user", "content": "a"}], "input": "a", "max_tokens": 9, "tools": '
    b'[{"a": ' + b'{"a": ' * 260 + b"1" + b"}" * 260 + b"}]}",
    "too large": b'{"model": "auto", "messages": [{"role": "user", "content": "' + b"a" * 2_000_000 + b'"}]}',
    "a number of a million digits": b'{"model": "auto", "max_tokens": ' + b"1" * 1_000_000 + b"}",
    "no model": b'{"messages": [{"role": "user", "content": "a"}]}',
    "no messages": b'{"model": "auto"}',
    "no message": b'{"model": "auto", "messages": [], "input": []}',
    "unknown model": b'{"model": "nope", "messages": [{"role": "user", "content": "a"}], "input": "a", "max_tokens": 1}',
    "unknown role": b'{"model": "auto", "messages": [{"role": "king"}], "input": [{"role": "king"}], "max_tokens": 1}',
    "unknown option": b'{"model": "auto", "messages": [{"role": "user"}], "input": "a", "max_tokens": 1, "p2l": {"bugdet": 1}}',
    "no models left": b'{"model": "auto", "messages": [{"role": "user", "content": "a"}], "input": "a", "max_tokens": 5000}',
}


@pytest.mark.parametrize("api", PATHS)
def test_hostile_bodies_are_refused_in_the_apis_own_format(api):
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider, body_mb=1)) as server:
            limit = b"max_output_tokens" if api == "responses" else b"max_tokens"
            bodies = {name: data.replace(b"max_tokens", limit) for name, data in HOSTILE.items()}
            found = {name: await post(server.url, PATHS[api], data) for name, data in bodies.items()}
            return found, len(provider.requests)

    found, sent = asyncio.run(one())
    assert sent == 0
    for name, (status, body) in found.items():
        assert status == {"too large": 413, "unknown model": 404}.get(name, 400), (name, status, body)
        assert body["error"]["message"], name
        assert ("type" in body) == (api == "messages")
        assert "Traceback" not in str(body)


@pytest.mark.slow
@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=5)
@given(st.lists(st.tuples(st.sampled_from(sorted(BODIES)), JSON, st.integers(0, 10**6)), min_size=20, max_size=20))
def test_no_body_makes_the_server_fail(cases):
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server:
            found = []
            for name, value, where in cases:
                body = copy.deepcopy(BODIES[name])
                paths = [path for path in everything(body) if path]
                *way, last = paths[where % len(paths)]
                place: Any = body
                for key in way:
                    place = place[key]
                place[last] = value
                async with aiohttp.ClientSession() as client, client.post(server.url + PATHS[name], json=body) as response:
                    found.append((response.status, await response.read(), body))
            return found

    for status, answer, body in asyncio.run(one()):
        assert status < 500, (status, answer, body)


@pytest.mark.parametrize("coding", ["gzip", "zstd", "br", "GZIP", "identity, gzip"])
def test_a_compressed_body_is_refused_by_name(coding):
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server:
            found = await post(server.url, PATHS["chat"], b"\x1f\x8b\x08", **{"content-encoding": coding})
            plain = await post(server.url, PATHS["chat"], orjson.dumps(CHAT), **{"content-encoding": "identity"})
            return *found, plain[0], len(provider.requests)

    status, body, plain, sent = asyncio.run(one())
    assert (status, plain, sent) == (415, 200, 1)
    assert "content-encoding" in body["error"]["message"]


def test_paths_and_methods_that_are_not_there():
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server, aiohttp.ClientSession() as client:
            found = []
            for method, path in (
                ("GET", "/v1/chat/completions"),
                ("POST", "/v1/nope"),
                ("DELETE", "/metrics"),
                ("GET", "/v1/responses/resp_1"),
                ("PUT", "/v1/messages"),
                ("GET", "/v1/messages/batches"),
            ):
                async with client.request(method, server.url + path) as response:
                    body = orjson.loads(await response.read())
                    found.append(
                        (
                            response.status,
                            sorted(response.headers.get("allow", "").split(", ")),
                            body.get("type"),
                            bool(body["error"]["message"]),
                        )
                    )
            return found

    assert asyncio.run(one()) == [
        (405, ["POST"], None, True), (404, [""], None, True), (405, ["GET", "HEAD"], None, True), (404, [""], None, True),
        (405, ["POST"], "error", True), (404, [""], "error", True),  # in Anthropic's format
    ]  # fmt: skip


def test_coefficients_are_computed_once_for_equal_turns_and_refused_beyond_the_queue():
    async def one():
        engine = FixedEngine(seconds=0.2)
        async with MockProvider(PRICES) as provider, serving(config_for(provider, queue={"most": 3}), engine) as server:
            same = await asyncio.gather(*(post(server.url, PATHS["chat"], orjson.dumps(CHAT)) for _ in range(8)))
            batches = list(engine.batches)
            bodies = [orjson.dumps({"model": "auto", "messages": [user(str(i))]}) for i in range(12)]
            many = await asyncio.gather(*(post(server.url, PATHS["chat"], body) for body in bodies))
            return same, batches, many

    same, batches, many = asyncio.run(one())
    assert {status for status, _ in same} == {200}
    assert batches == [1]
    statuses = [status for status, _ in many]
    assert statuses.count(200) == 3
    assert statuses.count(503) == 9


def test_the_score_of_a_single_model_is_its_coefficient_and_that_of_a_mix_lies_between():
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server:
            found = []
            for options in ({}, {"budget": 0.0003}, {"models": ["small"]}):
                status, body = await post(server.url, "/v1/route", orjson.dumps({**CHAT, "p2l": options}))
                found.append((status, len(body["policy"]), body["score"]))
            return found

    (_, one_model, best), (_, mixed, between), (_, _, small) = asyncio.run(one())
    assert (one_model, best, small) == (1, 2.0, 0.0)
    assert mixed == 2
    assert 1.0 < between < 2.0
