"""Worst cases: whatever a request contains, what is reserved for it is a bound on what its provider may bill."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.mock_provider import MockProvider
from p2l_engine.apis.api import Usage
from p2l_engine.apis.ask import BadRequest
from p2l_engine.apis.registry import APIS
from p2l_engine.serve.model_entry import Model
from p2l_engine.serve.prices import Prices
from tests.support.serving import PRICES, FixedEngine, config_for, serving

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
WINDOW = 10_000
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 2}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "A" * 1000}
DOCUMENT = {"type": "document", "source": PDF}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts) if len(parts) != 1 or isinstance(parts[0], dict) else parts[0]}]


def body_for(api: str, **fields: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"model": "auto", "max_output_tokens" if api == "responses" else "max_tokens": 50}
    return own | ({"input": "hello"} if api == "responses" else {"messages": user("hello")}) | fields


# What a request contains, and the most that its provider may then count: input, output, calls of its own tools.
OPEN = [
    ("chat", {"messages": user({"type": "file", "file": {"file_data": "data:application/pdf;base64,AA"}})}),
    ("chat", {"messages": user({"type": "file", "file": {"file_id": "file-1"}})}),
    ("chat", {"messages": user({"type": "video_url", "video_url": {"url": "https://example.com/long.mp4"}})}),
    ("chat", {"chat_template": "{{ messages * 1000 }}"}),
    ("chat", {"messages": user({"type": "something_new", "url": "https://example.com"})}),
    ("responses", {"input": user({"type": "input_file", "file_url": "https://example.com/long.pdf"})}),
    ("responses", {"input": user({"type": "something_new"})}),
    ("responses", {"input": [*user("a"), {"type": "item_reference", "id": "msg_1"}]}),
    ("messages", {"messages": user({"type": "document", "source": PDF})}),
    ("messages", {"messages": user({"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}})}),
    (
        "messages",
        {"messages": user({"type": "tool_result", "tool_use_id": "1", "content": [{"type": "document", "source": PDF}]})},
    ),
]
HOSTED = [
    ("chat", {"web_search_options": {}}),
    ("chat", {"plugins": [{"id": "web"}]}),
    ("chat", {"tools": [{"type": "browser_search"}]}),
    ("responses", {"tools": [{"type": "web_search"}]}),
    ("responses", {"tools": [{"type": "mcp", "server_url": "https://example.com"}]}),
    ("responses", {"tools": [{"type": "image_generation"}]}),
    ("messages", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
    ("messages", {"tools": [SEARCH], "mcp_servers": [{"type": "url", "url": "https://example.com"}]}),
    ("messages", {"context_management": {"edits": [{"type": "compact_20260112"}]}}),
]
TIERS = [
    ("chat", {"service_tier": "priority"}),
    ("responses", {"service_tier": "priority"}),
    ("messages", {"speed": "fast"}),
]
OF_CLIENTS = [
    ("chat", {"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "custom", "custom": {"name": "g"}}]}),
    ("responses", {"tools": [{"type": "function", "name": "f"}, {"type": "local_shell"}, {"type": "custom", "name": "g"}]}),
    ("messages", {"tools": [{"name": "f", "input_schema": {}}, {"type": "bash_20250124", "name": "bash"}]}),
    ("chat", {"service_tier": "auto"}),
    ("responses", {"service_tier": "flex"}),
    ("messages", {"service_tier": "standard_only"}),
    ("messages", {"messages": user({"type": "document", "source": {"type": "text", "data": "hello"}})}),
    ("messages", {"messages": user({"type": "document", "source": {"type": "content", "content": "hello"}})}),
]
IDS = str


def asked(cases: list[tuple[str, dict[str, Any]]], tmp_path: Any, **large: Any) -> list[tuple[int, bytes, int]]:
    """Status, body and number of requests to the provider, for each case, of one model under a hard limit."""

    async def one() -> list[tuple[int, bytes, int]]:
        async with MockProvider(PRICES) as provider:
            limits = {"limits": [{"amount": 100}], "store": str(tmp_path / "serve.sqlite")}
            config = config_for(provider, {"large": large, "medium": None, "small": None}, **limits)
            async with serving(config, FixedEngine(("large",), (1.0,))) as server, aiohttp.ClientSession() as client:
                found = []
                for api, fields in cases:
                    before = len(provider.requests)
                    async with client.post(server.url + PATHS[api], json=body_for(api, **fields)) as response:
                        found.append((response.status, await response.read(), len(provider.requests) - before))
                return found

    return asyncio.run(one())


def test_what_has_no_bound_is_refused_under_a_hard_limit(tmp_path):
    for (api, fields), (status, body, sent) in zip(
        [*OPEN, *HOSTED, *TIERS], asked([*OPEN, *HOSTED, *TIERS], tmp_path), strict=True
    ):
        assert (status, sent) == (400, 0), fields
        assert b"not stated" in body, (api, fields, body)


def test_what_has_a_bound_is_answered(tmp_path):
    known = {"context": WINDOW, "usd_per_tool_call": 0.01, "max_tool_calls": 3, "tiers": {"priority": 2, "fast": 6}}
    every = [*OPEN, *HOSTED, *TIERS, *OF_CLIENTS]
    for (api, fields), (status, body, sent) in zip(every, asked(every, tmp_path, **known), strict=True):
        assert (status, sent) == (200, 1), (api, fields, body)


def test_tools_of_clients_and_usual_tiers_need_no_statement(tmp_path):
    for (api, fields), (status, body, _) in zip(OF_CLIENTS, asked(OF_CLIENTS, tmp_path), strict=True):
        assert status == 200, (api, fields, body)


def worst(api: str, fields: dict[str, Any], model: dict[str, Any]) -> Fraction:
    """What is reserved for a request at one model."""

    async def one() -> Fraction:
        config = config_for("http://127.0.0.1:9/v1", {"large": model, "medium": None, "small": None})
        async with serving(config, FixedEngine(("large",), (1.0,))) as server:
            call = await server.service.call(APIS[api], body_for(api, **fields), {}, None, api)
            return call.bill.worst(0)

    return asyncio.run(one())


IN, OUT = Fraction(3, 10**6), Fraction(15, 10**6)  # prices of the model large


@pytest.mark.parametrize(("api", "fields"), OPEN, ids=IDS)
def test_what_cannot_be_counted_may_fill_the_window(api, fields):
    assert worst(api, fields, {"context": WINDOW}) >= WINDOW * IN + 50 * OUT


@pytest.mark.parametrize(("api", "fields"), HOSTED, ids=IDS)
def test_each_call_of_a_providers_tool_may_read_the_window_again(api, fields):
    found = worst(api, fields, {"context": WINDOW, "usd_per_tool_call": 0.01, "max_tool_calls": 3})
    assert found >= 4 * (WINDOW * IN + 50 * OUT) + 3 * Fraction(1, 100)


@pytest.mark.parametrize(
    ("api", "fields"),
    [("responses", {"tools": [{"type": "web_search"}], "max_tool_calls": 2}), ("messages", {"tools": [SEARCH]})],
)
def test_the_callers_own_bound_on_calls_counts(api, fields):
    model = {"context": WINDOW, "usd_per_tool_call": 0.01}
    assert worst(api, fields, model) == worst(api, fields, model | {"max_tool_calls": 5})
    assert worst(api, fields, model) > worst(api, fields, model | {"max_tool_calls": 1})


@pytest.mark.parametrize(("api", "fields"), TIERS, ids=IDS)
def test_a_tier_costs_what_its_price_says(api, fields):
    tier = next(iter(fields.values()))
    assert worst(api, fields, {"tiers": {tier: 6}}) == 6 * worst(api, {}, {})


def test_every_way_to_ask_for_more_output_counts():
    base = worst("chat", {}, {})
    assert worst("chat", {"n": 4}, {}) >= base + 3 * 50 * OUT
    assert worst("chat", {"n": 2, "best_of": 5}, {}) >= base + 4 * 50 * OUT
    assert worst("chat", {"max_completion_tokens": 10}, {}) >= 50 * OUT  # a provider may know the other one
    assert worst("chat", {"max_completion_tokens": 90}, {}) >= base + 40 * OUT
    text = "a word " * 100
    assert worst("chat", {"prediction": {"type": "content", "content": text}}, {}) >= base + len(text) // 4 * OUT
    hour = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    written = {"usd_per_m_cache_write": 3.75}
    part = {"type": "text", "text": "hello"}
    plain = worst("messages", {"messages": user(part)}, written)
    for fields in ({"messages": user(part | hour)}, {"messages": user(part), **hour}):
        assert (worst("messages", fields, written) - 50 * OUT) * Fraction(375, 100) == (plain - 50 * OUT) * 6
    assert APIS["messages"].ask(body_for("messages", tools=[{"name": "f", **hour}])).extras.lasting


LONG = "nine words that no other field of it contains " * 400


@pytest.mark.parametrize(
    ("api", "fields"),
    [
        ("chat", {"messages": [{"role": "assistant", "content": "a", "reasoning_content": LONG}]}),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "input_text", "text": LONG}]}]}),
        ("chat", {"messages": [{"role": "tool", "content": LONG, "tool_call_id": "1"}]}),
        ("chat", {"messages": user("a"), "tools": [{"type": "function", "function": {"name": "f", "description": LONG}}]}),
        ("chat", {"messages": user("a"), "documents": [{"text": LONG}]}),
        ("chat", {"messages": user("a"), "guided_grammar": LONG}),
        ("responses", {"input": [{"type": "function_call_output", "call_id": "1", "output": LONG}]}),
        ("responses", {"input": [{"type": "function_call_output", "call_id": "1", "output": [{"text": LONG}]}]}),
        ("responses", {"input": "a", "instructions": LONG}),
        ("messages", {"messages": user({"type": "tool_result", "tool_use_id": "1", "content": LONG})}),
        ("messages", {"messages": user({"type": "search_result", "source": "a", "title": "b", "content": LONG})}),
        ("messages", {"messages": user({"type": "document", "source": {"type": "text", "data": LONG}})}),
        ("messages", {"messages": user("a"), "system": [{"type": "text", "text": LONG}]}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_text_counts_wherever_it_is(api, fields):
    assert worst(api, fields, {"context": 10**6}) >= len(LONG) // 4 * IN + 50 * OUT


def test_an_image_within_a_tools_result_is_one_image():
    picture = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 400_000}
    item = {"type": "function_call_output", "call_id": "1", "output": [picture]}
    found = APIS["responses"].ask({"model": "auto", "input": [*user("hello"), item]})
    assert found.images == 1
    assert "image" in found.needs
    assert sum(map(len, found.texts)) < 1000


@pytest.mark.parametrize("api", PATHS)
@pytest.mark.parametrize("value", [-1, 1.5, True, "5", [], {}, 10**30])
def test_odd_bounds_on_the_output_are_refused(api, value):
    names = {"chat": ("max_tokens", "max_completion_tokens", "n"), "responses": ("max_output_tokens", "max_tool_calls")}
    for name in names.get(api, ("max_tokens",)):
        given = orjson.loads(orjson.dumps(body_for(api, **{name: value if value != 10**30 else 1e30})))
        with pytest.raises(BadRequest, match=name):
            APIS[api].ask(given)


def test_no_bound_on_the_output_is_the_models_own():
    assert APIS["chat"].ask(body_for("chat", max_tokens=None)).max_tokens is None
    assert APIS["responses"].ask(body_for("responses", max_output_tokens=None)).max_tokens is None
    assert worst("chat", {"max_tokens": None}, {"max_output": 700}) >= 700 * OUT
    assert APIS["messages"].ask(body_for("messages", max_tokens=0)).max_tokens == 0  # fills the prompt cache
    for api in ("chat", "responses"):
        with pytest.raises(BadRequest):
            APIS[api].ask(body_for(api, **{"max_tokens" if api == "chat" else "max_output_tokens": 0}))


def test_a_stored_prompt_is_its_providers_alone():
    with pytest.raises(BadRequest, match="prompt"):
        APIS["responses"].ask(body_for("responses", prompt={"id": "pmpt_1"}))
    assert APIS["responses"].ask(body_for("responses", model="large", prompt={"id": "pmpt_1"})).extras.unseen


def test_usage_is_read_as_it_is_billed():
    chat, responses, messages = (APIS[name].usage for name in ("chat", "responses", "messages"))
    # Some leave reasoning out of completion_tokens.
    assert chat({"usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115}}) == Usage(10, 105)
    hits = {"prompt_tokens": 10, "completion_tokens": 5, "prompt_cache_hit_tokens": 8}
    assert chat({"usage": hits}) == Usage(10, 5, 8)
    found = responses({"output": [{"type": "web_search_call"}, {"type": "function_call"}], "usage": {"input_tokens": 1}})
    assert found == Usage(1, 0, calls=1)
    usage = {
        "input_tokens": 5, "output_tokens": 7, "cache_creation_input_tokens": 30, "server_tool_use": {"web_search_requests": 2},
        "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
    }  # fmt: skip
    assert messages({"usage": usage}) == Usage(35, 7, 0, 30, 20, 0, 2)
    rounds = {"iterations": [{"input_tokens": 100, "output_tokens": 50}, {"input_tokens": 5, "output_tokens": 7}]}
    assert messages({"usage": {"input_tokens": 5, "output_tokens": 7, **rounds}}) == Usage(105, 57)


@pytest.mark.slow
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 50))
def test_a_cost_is_never_beyond_the_worst_case_of_its_counts(plain, cached, brief, lasting, calls):
    model = Model(
        usd_per_m_in=3, usd_per_m_out=15, usd_per_m_cached=0.3, usd_per_m_cache_write=3.75, usd_per_tool_call=0.01,
        tokens_in=1, tokens_out=1,
    )  # fmt: skip
    prices = Prices({"a": model})
    usage = Usage(plain + cached + brief + lasting, 70, cached, brief + lasting, lasting, 0, calls)
    cost = prices.cost(0, usage)
    assert cost == (plain * 3 + cached * Fraction(3, 10) + brief * Fraction(375, 100) + lasting * 6 + 70 * 15) / Fraction(
        10**6
    ) + Fraction(calls, 100)
    assert cost <= prices.worst(0, usage.tokens_in, 70, 1, True, 0, calls)


@pytest.mark.parametrize(
    ("fields", "model", "full"),
    [({}, {}, False), ({"reasoning_effort": "high"}, {}, True), ({}, {"reasons": True}, True)],
)
def test_a_stream_that_may_hide_its_reasoning_counts_what_fits_into_its_time(fields, model, full, monkeypatch):
    monkeypatch.setattr("p2l_engine.serve.bill.FASTEST", 10**6)  # as if it had taken long

    async def one() -> Any:
        async with MockProvider(PRICES) as provider:
            config = config_for(provider, {"large": model, "medium": None, "small": None})
            async with serving(config, FixedEngine(("large",), (1.0,))) as server, aiohttp.ClientSession() as client:
                provider.fail("cut", tokens=3)
                async with client.post(server.url + PATHS["chat"], json=body_for("chat", stream=True, **fields)) as response:
                    await response.read()
                return server.records[0]

    record = asyncio.run(one())
    assert record.estimated
    assert (record.cost >= 50 * OUT) == full


@pytest.mark.parametrize(("api", "fields"), [case for case in OPEN if case[0] == "chat"], ids=IDS)
def test_a_client_that_leaves_pays_for_what_cannot_be_counted(api, fields, tmp_path):
    """Where the provider has told no usage yet."""

    async def one() -> Any:
        async with MockProvider(PRICES, per_token=0.02) as provider:
            config = config_for(provider, {"large": {"context": WINDOW}, "medium": None, "small": None})
            async with serving(config, FixedEngine(("large",), (1.0,))) as server:
                async with aiohttp.ClientSession() as client:
                    response = await client.post(server.url + PATHS[api], json=body_for(api, stream=True, **fields))
                    await response.content.readany()
                    response.close()
                for _ in range(200):
                    if server.records:
                        break
                    await asyncio.sleep(0.01)
                return server.records[0]

    record = asyncio.run(one())
    assert (record.outcome, record.estimated) == ("left", True)
    assert record.cost >= float(WINDOW * IN)


def test_a_model_that_has_reported_hidden_reasoning_is_not_trusted_again():
    async def one() -> Any:
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server:
            deployment = server.runtime.plan.deployments[0][0]
            call = await server.service.call(APIS["chat"], body_for("chat"), {}, None, "chat")
            before = call.bill.hides(0)
            deployment.reasons = True
            return before, call.bill.hides(0), call.bill.hides(1)

    assert asyncio.run(one()) == (False, True, False)
    assert APIS["chat"].usage(
        {"usage": {"prompt_tokens": 1, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 8}}}
    ) == Usage(1, 9, reasoning=8)
