"""What a provider keeps of one caller's requests is no other caller's: answers, their items, containers, audio, sessions."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.mock_provider import MockProvider
from p2l_engine.apis.registry import APIS
from p2l_engine.serve.options import of_caller
from p2l_engine.serve.sessions import KeptAnswer
from p2l_engine.serve.settings import Key
from tests.support.serving import PRICES, config_for, serving

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
KEYS = [{"id": name, "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in ("a", "b")]
KEPT = KeptAnswer("small-responses", 7)


def body_for(api: str, model: str, **more: Any) -> dict[str, Any]:
    said = {"input": "hello", "max_output_tokens": 9} if api == "responses" else {"max_tokens": 9}
    if api != "responses":
        said["messages"] = [{"role": "user", "content": "hello"}]
    return {"model": model, **said, **more}


async def send(url: str, api: str, key: str | None, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, str], bytes]:
    headers = {**headers, **({} if key is None else {"authorization": f"Bearer {key}"})}
    async with aiohttp.ClientSession() as client, client.post(url + PATHS[api], json=body, headers=headers) as response:
        return response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()


def answer_of(data: bytes) -> dict[str, Any]:
    """Of a whole answer, or of the last event of a stream."""
    if data.startswith(b"{"):
        return json.loads(data)
    return json.loads(data.rstrip().rsplit(b"data: ", 1)[1])["response"]


@pytest.mark.parametrize("model", ["auto", "small"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_continued_by_its_own_caller_alone(model, stream):
    """Another key gets what an unknown id gets, word by word, and the provider hears nothing of it."""

    async def one() -> Any:
        async with MockProvider(PRICES) as provider, serving(config_for(provider, keys=KEYS)) as server:
            _, _, data = await send(server.url, "responses", "a", body_for("responses", model, stream=stream))
            kept, before, found = answer_of(data), len(provider.requests), []
            item = [{"type": "item_reference", "id": kept["output"][0]["id"]}]
            for more in ({"previous_response_id": kept["id"]}, {"input": item}):
                others = await send(server.url, "responses", "b", body_for("responses", model, stream=stream, **more))
                route = {**body_for("responses", model, **more), "p2l": {"dry_run": True}}
                found.append((others[0], (await send(server.url, "responses", "b", route))[0], others[2]))
                seen = len(provider.requests) - before
                own = await send(server.url, "responses", "a", body_for("responses", model, stream=stream, **more))
                before = len(provider.requests)
                found.append((seen, own[0]))
            unknown = await send(
                server.url, "responses", "b", body_for("responses", model, previous_response_id="resp_unknown")
            )
            return found, unknown

    (answer, own, item, own_item), unknown = asyncio.run(one())
    assert answer[:2] == item[:2] == (404, 404)
    assert (answer[0], answer[2]) == (unknown[0], unknown[2])
    assert json.loads(unknown[2])["error"]["code"] == "previous_response_not_found"
    assert own == own_item == (0, 200)


REFERENCES = {
    "an item": ("responses", {"input": [{"type": "item_reference", "id": "x"}]}),
    "a container": ("responses", {"tools": [{"type": "code_interpreter", "container": "x"}]}),
    "a container of a shell": (
        "responses",
        {"tools": [{"type": "shell", "environment": {"type": "container_reference", "container_id": "x"}}]},
    ),
    "a call's container": (
        "responses",
        {"input": [{"type": "code_interpreter_call", "id": "ci_1", "container_id": "x", "code": "1"}, {"role": "user"}]},
    ),
    "audio": ("chat", {"messages": [{"role": "assistant", "audio": {"id": "x"}}, {"role": "user", "content": "and?"}]}),
    "Anthropic's container": ("messages", {"container": "x"}),
    "Anthropic's container with skills": ("messages", {"container": {"id": "x", "skills": []}}),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_is_its_own_callers_alone(name):
    api, more = REFERENCES[name]

    async def one() -> Any:
        config = {"small": {"accepts": ["text", "tools", "audio"]}}
        async with MockProvider(PRICES) as provider, serving(config_for(provider, config, keys=KEYS)) as server:
            body, sent = body_for(api, "small", **more), len(provider.requests)
            unknown = await send(server.url, api, "b", body)
            server.service.sessions.remember_answer(of_caller(Key(**KEYS[0]), "x"), KEPT)
            others = await send(server.url, api, "b", body)
            seen = len(provider.requests) - sent
            await send(server.url, api, "a", body)
            return unknown[0], unknown[2], others[0], others[2], seen, len(provider.requests) - sent

    status, first, other, second, seen, passed = asyncio.run(one())
    assert (status, other, seen, passed) == (404, 404, 0, 1)
    assert first == second
    assert orjson.loads(first)["error"]["message"].startswith("this request refers to")


def test_more_references_than_can_be_looked_up_are_refused():
    async def one() -> Any:
        items = [{"type": "item_reference", "id": f"msg_{i}"} for i in range(5_001)]
        async with MockProvider(PRICES) as provider, serving(config_for(provider, keys=KEYS)) as server:
            status, _, data = await send(server.url, "responses", "a", body_for("responses", "small", input=items))
            return status, json.loads(data)["error"]["message"], len(provider.requests)

    assert asyncio.run(one()) == (400, "expected at most 5000 references to earlier answers, got 5001", 0)


def test_without_keys_all_are_one_caller():
    async def one() -> Any:
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server:
            _, _, data = await send(server.url, "responses", "a", body_for("responses", "auto"))
            more = {"previous_response_id": json.loads(data)["id"]}
            return (await send(server.url, "responses", "b", body_for("responses", "auto", **more)))[0]

    assert asyncio.run(one()) == 200


ANSWERS = {
    "chat": ({"choices": [{"message": {"audio": {"id": "audio_1"}}}, {"message": {"audio": None}}, None]}, ["audio_1"]),
    "responses": (
        {
            "id": "resp_1",
            "output": [
                {"type": "message", "id": "msg_1"},
                {"type": "code_interpreter_call", "id": "ci_1", "container_id": "cntr_1"},
                {"type": "shell_call", "id": None, "environment": {"container_id": "cntr_1"}},
                "no item",
            ],
        },
        ["resp_1", "msg_1", "ci_1", "cntr_1"],
    ),
    "messages": ({"content": [], "container": {"id": "container_1", "expires_at": "x"}}, ["container_1"]),
}
EVENTS = {
    "chat": [{"choices": [{"delta": {"audio": {"id": "audio_1"}}}]}],
    "responses": [{"type": "response.completed", "response": ANSWERS["responses"][0]}],
    "messages": [{"type": "message_delta", "delta": {"container": {"id": "container_1"}}}],
}


@pytest.mark.parametrize("api", PATHS)
def test_the_ids_of_an_answer_are_read_whole_and_streamed(api):
    answer, ids = ANSWERS[api]
    assert APIS[api].kept(answer) == ids
    stream = APIS[api].stream(APIS[api].ask(body_for(api, "auto")))
    for event in EVENTS[api]:
        assert stream.read(b"data: " + orjson.dumps(event) + b"\n\n")
    assert stream.kept == ids


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "output", "container", "container_id", "environment", "choices", "message", "audio"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(["id", "output", "container", "choices"]), JSON))
def test_ids_are_texts_whatever_an_answer_is(answer):
    for api in APIS.values():
        assert all(isinstance(found, str) for found in api.kept(answer))


IDS = st.text("ab\0:,é\ud800", max_size=4)


@pytest.mark.slow
@given(st.sampled_from(["a", "ab", "b"]) | st.none(), IDS, st.sampled_from(["a", "ab", "b"]) | st.none(), IDS)
def test_no_two_callers_share_a_name(key, name, other_key, other):
    keys = [None if one is None else Key(id=one, sha256="0" * 64) for one in (key, other_key)]
    same = of_caller(keys[0], name) == of_caller(keys[1], other)
    names = [text.encode("utf-8", "replace") for text in (name, other)]
    assert same == ((key, names[0]) == (other_key, names[1]))


@pytest.mark.parametrize("how", ["header", "prompt_cache_key", "content"])
def test_a_session_is_its_callers_alone(how):
    """Whatever names it: another key's is priced, and explained, as a new conversation."""

    async def one() -> Any:
        text = "words " * 300
        async with MockProvider(PRICES) as provider, serving(config_for(provider, keys=KEYS)) as server:
            body = body_for("chat", "small", messages=[{"role": "user", "content": text}])
            if how == "prompt_cache_key":
                body |= {"prompt_cache_key": "shared"}
            headers = {"x-p2l-session": "shared"} if how == "header" else {}
            found = []
            await send(server.url, "chat", "a", body, **headers)
            for key in ("a", "b"):
                look = body | {"p2l": {"dry_run": True, "explain": True}}
                _, _, data = await send(server.url, "chat", key, look, **headers)
                rows = {row["model"]: row["tokens_cached"] for row in json.loads(data)["candidates"]}
                found.append(rows["small"] > 0)
            return found

    assert asyncio.run(one()) == [True, False]


def test_feedback_status_and_cached_answers_are_their_callers_alone(tmp_path):
    async def one() -> Any:
        keys = [KEYS[0], KEYS[1] | {"models": ["small"]}]
        more = {"keys": keys, "store": str(tmp_path / "serve.sqlite"), "cache": {"store": "memory"}}
        async with MockProvider(PRICES) as provider, serving(config_for(provider, **more)) as server:
            _, headers, _ = await send(server.url, "chat", "a", body_for("chat", "small"))
            _, other, _ = await send(server.url, "chat", "b", body_for("chat", "small"))
            decision, found = headers["x-p2l-decision"], [headers["x-p2l-cache"], other["x-p2l-cache"]]
            async with aiohttp.ClientSession(headers={"authorization": "Bearer b"}) as client:
                for said in (
                    {"id": decision, "score": 0.5},
                    {"id": "dec_" + "0" * 32, "score": 0.5},
                    {"id": other["x-p2l-decision"], "against": decision, "preference": "this"},
                ):
                    async with client.post(f"{server.url}/v1/feedback", json=said) as response:
                        found.append((response.status, (await response.json())["error"]["message"].partition(":")[2]))
                async with client.get(f"{server.url}/v1/status") as response:
                    status = await response.json()
                found.append([entry["model"] for entry in status["models"]])
                found.append([entry["id"] == other["x-p2l-decision"] for entry in status["recent"]])
            return found

    missing = (404, " no decision of this key has this id")
    assert asyncio.run(one()) == ["miss", "miss", missing, missing, missing, ["small"], [True]]
