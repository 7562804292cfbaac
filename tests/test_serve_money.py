"""Money in the server: what is spent is what the provider bills, budgets hold, and hard limits are never exceeded."""

from __future__ import annotations

import asyncio
import hashlib
from decimal import Decimal
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from bench.mock_provider import MockProvider
from p2l_engine.apis.api import Usage
from p2l_engine.routing import Problem, solve
from p2l_engine.serve.choice import choose
from p2l_engine.serve.model_entry import Model
from p2l_engine.serve.prices import Prices
from tests.support.serving import APIS, PRICES, FixedEngine, config_for, serving

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


def body_for(api: str, text: str, model: str = "auto", **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, **fields}
    return body | ({"input": text} if api == "responses" else {"messages": [{"role": "user", "content": text}]})


async def send(
    client: aiohttp.ClientSession, url: str, api: str, body: dict[str, Any], **headers: str
) -> tuple[int, dict[str, str], Any]:
    async with client.post(url + PATHS[api], json=body, headers=headers) as response:
        data = await response.read()
        return response.status, {name.lower(): value for name, value in response.headers.items()}, data


def spent(server) -> Decimal:
    return sum((balance.spent + balance.reserved for balance in server.service.spending.limit.balances("team")), Decimal(0))


def limited(tmp_path, amount: float, **serve: Any) -> dict[str, Any]:
    return {"limits": [{"amount": amount}], "store": str(tmp_path / "serve.sqlite"), **serve}


@pytest.mark.slow
def test_the_ledger_is_the_providers_bill(tmp_path):
    async def one():
        async with (
            MockProvider(PRICES, tokens_out={"large": 31, "medium": 47, "small": 13}) as provider,
            serving(config_for(provider, **limited(tmp_path, 100)), FixedEngine(theta=None)) as server,
        ):
            async with aiohttp.ClientSession() as client:
                bodies = [
                    (
                        api,
                        body_for(
                            api,
                            f"question {i} " * (i % 7 + 1),
                            max_tokens=900 - i,
                            max_output_tokens=None,
                            stream=i % 2 == 0,
                        ),
                    )
                    for i in range(40)
                    for api in APIS
                ]
                answers = await asyncio.gather(*(send(client, server.url, api, body) for api, body in bodies))
            await server.service.spending.drain()
            return answers, server.records, spent(server), provider.bill.total

    answers, records, ledger, bill = asyncio.run(one())
    assert {status for status, _, _ in answers} == {200}
    assert not any(record.estimated for record in records)
    assert len({record.model for record in records}) > 1
    assert abs(float(ledger) - float(bill)) < 1e-9
    assert sum(record.cost for record in records) == pytest.approx(float(bill), abs=1e-12)


@pytest.mark.slow
def test_concurrent_clients_never_exceed_a_hard_limit(tmp_path):
    async def one():
        async with (
            MockProvider(PRICES, per_token=0.001) as provider,
            serving(config_for(provider, **limited(tmp_path, 0.05))) as server,
            aiohttp.ClientSession() as client,
        ):
            most = 0.0

            async def caller(i: int) -> list[int]:
                nonlocal most
                statuses = []
                for j in range(6):
                    status, _, _ = await send(
                        client, server.url, "chat", body_for("chat", f"{i} {j}", max_tokens=200, stream=j % 2 == 0)
                    )
                    statuses.append(status)
                    most = max(most, float(provider.bill.total))
                return statuses

            found = await asyncio.gather(*(caller(i) for i in range(64)))
            await server.service.spending.drain()
            return [status for statuses in found for status in statuses], most, spent(server), provider.bill.total

    statuses, most, ledger, bill = asyncio.run(one())
    assert most <= 0.05
    assert 0.02 < float(bill) == pytest.approx(float(ledger), abs=1e-9)
    assert set(statuses) == {200, 402}


@pytest.mark.parametrize(
    ("over_limit", "expected"), [("cheaper", (200, "small")), ("free", (200, "free")), ("refuse", (402, "large"))]
)
def test_what_happens_when_a_limit_would_be_crossed(tmp_path, over_limit, expected):
    async def one():
        async with MockProvider({**PRICES, "free": (0, 0)}) as provider:
            config = config_for(provider, {"medium": None}, **limited(tmp_path, 0.001, over_limit=over_limit))
            free = {"usd_per_m_in": 0, "usd_per_m_out": 0, "tokens_in": 1, "tokens_out": 1, "max_output": 1000}
            config["models"]["free"] = {**free, "provider": {"base_url": f"{provider.url}/v1", "model": "free"}}
            engine = FixedEngine(("large", "small", "free"), (2.0, 1.0, 0.0))
            async with serving(config, engine) as server, aiohttp.ClientSession() as client:
                status, headers, data = await send(client, server.url, "chat", body_for("chat", "hello", max_tokens=500))
                return status, headers["x-p2l-model"], data

    status, model, data = asyncio.run(one())
    assert (status, model) == expected
    if status == 402:
        assert b"USD" in data


def test_each_key_has_its_own_limit_and_models(tmp_path):
    keys = [
        {"id": "team", "sha256": hashlib.sha256(b"secret-1").hexdigest()},
        {"id": "trial", "sha256": hashlib.sha256(b"secret-2").hexdigest(), "models": ["small"]},
    ]

    async def one():
        async with MockProvider(PRICES) as provider:
            limits = [{"amount": 0.001, "each_key": True}]
            config = config_for(provider, **limited(tmp_path, 1, keys=keys) | {"limits": limits})
            async with serving(config) as server, aiohttp.ClientSession() as client:
                body = body_for("chat", "hello", max_tokens=60)
                found = [
                    await send(client, server.url, "chat", body),
                    await send(client, server.url, "chat", body, authorization="Bearer wrong"),
                    await send(client, server.url, "chat", body, authorization="Bearer secret-1"),
                    await send(client, server.url, "chat", body, **{"x-api-key": "secret-2"}),
                    await send(client, server.url, "chat", {**body, "model": "large"}, **{"x-api-key": "secret-2"}),
                ]
                sent = [str(request.headers) + str(request.body) for request in provider.requests]
                return found, server.records, sent

    found, records, sent = asyncio.run(one())
    assert [status for status, _, _ in found] == [401, 401, 200, 200, 400]
    assert [(record.key, record.model) for record in records] == [("team", "large"), ("trial", "small"), ("trial", "")]
    assert not any(
        "secret" in text for text in (*sent, *(str(record) for record in records), *(str(answer) for answer in found))
    )


def test_limits_whose_store_fails_refuse_requests_and_say_so_once(tmp_path, caplog):
    async def one():
        async with (
            MockProvider(PRICES) as provider,
            serving(config_for(provider, **limited(tmp_path, 1))) as server,
            aiohttp.ClientSession() as client,
        ):
            limit, found = server.service.spending.limit, []

            def fails(*_: Any) -> Any:
                raise OperationalError("INSERT", None, Exception("database or disk is full"))

            async def ask(number: int) -> None:
                answered = await send(client, server.url, "chat", body_for("chat", f"{number}", max_tokens=60))
                found.append((answered[0], answered[1].get("retry-after")))

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(limit, "together", fails)
                patched.setattr(limit, "balances", fails)
                for number in range(3):
                    await ask(number)
                    async with client.get(f"{server.url}/v1/status") as response:
                        assert (await response.json())["limits"] is None
            for number in range(2):
                await ask(number)
            return found, len(provider.requests)

    assert asyncio.run(one()) == ([(503, "5")] * 3 + [(200, None)] * 2, 2)
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "the store of spend limits fails", "the store of spend limits works again",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_mean_budget_is_held_over_requests():
    budget = 0.0002  # the best models cost 0.00032

    async def one():
        async with MockProvider(PRICES) as provider:
            config = config_for(provider, budget=budget, horizon=50)
            async with serving(config, FixedEngine(theta=None)) as server, aiohttp.ClientSession() as client:
                for i in range(300):
                    await send(client, server.url, "chat", body_for("chat", f"question {i}", max_tokens=60))
                return provider.bill.total, server.service.pacer.count, {record.model for record in server.records}

    bill, count, models = asyncio.run(one())
    assert count == 300
    assert float(bill) / 300 == pytest.approx(budget, rel=0.08)
    assert len(models) > 1


def test_a_request_may_bring_its_own_budget():
    async def one():
        async with MockProvider(PRICES) as provider, serving(config_for(provider)) as server, aiohttp.ClientSession() as client:
            own = body_for("chat", "hello", max_tokens=60, p2l={"budget": 0.0001})
            header = await send(
                client, server.url, "chat", body_for("chat", "hello", max_tokens=60), **{"x-p2l-budget": "0.0001"}
            )
            low = await send(client, server.url, "chat", body_for("chat", "hello", p2l={"budget": 1e-9}))
            found = await send(client, server.url, "chat", own)
            return found, header, low, [request.body for request in provider.requests], server.records[0]

    found, header, low, bodies, record = asyncio.run(one())
    assert found[0] == header[0] == 200
    assert float(found[1]["x-p2l-expected-cost"]) <= 0.0001 * (1 + 1e-9)
    assert (low[0], b"raise the budget to at least" in low[2]) == (402, True)
    assert not any("p2l" in body for body in bodies)
    assert sum(record.policy.values()) == pytest.approx(1)


def test_a_switch_pays_for_the_prompt_cache_that_it_loses():
    """Twenty turns on two models of nearly equal win rates; the better one changes from turn to turn."""

    def conversation(sticky: bool) -> tuple[float, int]:
        async def one():
            prices = {"a": (3.0, 3.0, 0.3), "b": (3.0, 3.0, 0.3)}
            async with MockProvider(prices, tokens_out=20) as provider:
                model = {
                    "usd_per_m_in": 3.0, "usd_per_m_out": 3.0, "tokens_in": 100, "tokens_out": 20, "max_output": 100,
                    "usd_per_m_cached": 0.3 if sticky else 3.0, "cached_from": 1,
                }  # fmt: skip
                config = {
                    "models": {n: {**model, "provider": {"base_url": f"{provider.url}/v1", "model": n}} for n in ("a", "b")},
                    "serve": {"budget": 0.004},
                }

                class Alternating(FixedEngine):
                    def coefficients(self, prompts):
                        self.theta = (0.02, 0.0) if len(prompts[0]) % 2 else (0.0, 0.02)
                        return super().coefficients(prompts)

                async with serving(config, Alternating(("a", "b"))) as server, aiohttp.ClientSession() as client:
                    messages: list[dict[str, str]] = []
                    for turn in range(20):
                        messages.append({"role": "user", "content": f"turn {turn}: " + "words " * 200})
                        await send(client, server.url, "chat", {"model": "auto", "messages": messages})
                        messages.append({"role": "assistant", "content": "an answer"})
                    switches = sum(a.model != b.model for a, b in zip(server.records, server.records[1:], strict=False))
                    return float(provider.bill.total), switches

        return asyncio.run(one())

    (with_price, switches), (without, changes) = conversation(True), conversation(False)
    assert switches < changes
    assert with_price < 0.8 * without


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.floats(0.01, 0.99), st.floats(0, 1), st.booleans()), min_size=1, max_size=9),
    st.floats(0, 1),
    st.floats(0, 1, exclude_max=True),
)
def test_a_choice_is_the_optimum_of_the_lp(models, share, uniform):
    v, x, mask = np.array([m[0] for m in models]), np.array([m[1] for m in models]), np.array([m[2] for m in models])
    mask[0] = True
    budget = x[mask].min() + share * (x[mask].max() - x[mask].min())

    def draw(indices, probabilities):
        for i, p in zip(indices, np.cumsum(probabilities), strict=True):
            if uniform < p:
                return i
        return indices[-1]

    found = choose(v, x, mask, draw, budget)
    oracle = solve(Problem(v[None], x, budget, allowed=mask[None]), "highs")
    assert found.rate == pytest.approx(float(oracle.value[0]), abs=1e-9)
    assert found.cost <= budget * (1 + 1e-12) + 1e-15
    assert all(mask[k] for k in found.policy)
    assert sum(found.policy.values()) == pytest.approx(1)
    assert found.propensity > 0


@pytest.mark.slow
@given(
    st.decimals(0, 100, places=4), st.decimals(0, 100, places=4), st.decimals(0, 100, places=4),
    st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7),
)  # fmt: skip
def test_costs_are_exact(price_in, price_out, price_cached, plain, cached, out):
    entry = {"usd_per_m_in": float(price_in), "usd_per_m_out": float(price_out), "usd_per_m_cached": float(price_cached)}
    model = Model(**entry, tokens_in=1, tokens_out=1)
    exact = (plain * price_in + cached * price_cached + out * price_out) / Decimal(10**6)
    assert Prices({"a": model}).cost(0, Usage(plain + cached, out, cached)) == exact
