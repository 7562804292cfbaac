"""Expected output tokens in a server: the checkpoint's for each prompt, put right by what providers report."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bench.mock_provider import MockProvider
from p2l_engine.coefficients import ExpectedUsage
from p2l_engine.serve import settings
from p2l_engine.serve.expectations import MEMORY, PRIOR, Expectations
from tests.support.serving import PRICES, FixedEngine, config_for, serving

LENGTHS = {"large": 400.0, "medium": 100.0, "small": 25.0}  # of a short prompt; of a long one three times as much


class ForeseeingEngine(FixedEngine):
    """Expects answers to prompts that say "long" to be three times as long; it has seen none of ``unseen``."""

    def __init__(self, *unseen: str, models=tuple(PRICES), theta=(2.0, 1.0, 0.0)):
        super().__init__(models, theta)
        self.seen = np.array([name not in unseen for name in models])

    def coefficients(self, prompts):
        found = super().coefficients(prompts)
        factor = np.array([[3.0 if "long" in turns[-1] else 1.0] for turns in prompts])
        tokens = (factor * [LENGTHS.get(name, 77.0) for name in self.models]).astype(np.float32)
        count = np.array([len(turns[-1]) for turns in prompts], np.float32)
        return replace(found, usage=ExpectedUsage(count, tokens, tokens / 50, self.seen))


async def explained(url: str, text: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "p2l": {"explain": True}} | fields
    async with aiohttp.ClientSession() as http, http.post(f"{url}/v1/route", json=body) as response:
        assert response.status == 200, await response.text()
        return {row["model"]: row for row in (await response.json())["candidates"]}


def test_costs_are_those_of_the_answer_that_is_expected_to_this_prompt():
    async def run() -> None:
        async with serving(config_for("http://127.0.0.1:1/v1"), ForeseeingEngine("small")) as server:
            short, long = [await explained(server.url, text) for text in ("hello", "long one")]
            for name, (usd_in, usd_out, _) in PRICES.items():
                seen = name != "small"
                for rows, text, factor in ((short, "hello", 1), (long, "long one", 3)):
                    tokens = factor * LENGTHS[name] if seen else 50  # the configuration's
                    assert rows[name]["tokens_out"] == pytest.approx(tokens)
                    least = (usd_out * tokens) / 1e6
                    assert least < rows[name]["expected_cost"] < least + usd_in * 50 / 1e6, text
            capped = await explained(server.url, "long one", max_tokens=120)
            assert [capped[name]["tokens_out"] for name in PRICES] == [120, 120, 50]
            twice = await explained(server.url, "hello", n=2)
            assert twice["medium"]["tokens_out"] == 200

    asyncio.run(run())


def test_what_providers_report_puts_it_right():
    async def run() -> None:
        async with (
            MockProvider(PRICES, tokens_out=10) as provider,
            serving(config_for(provider), ForeseeingEngine()) as server,
            aiohttp.ClientSession() as http,
        ):
            body = {"model": "auto", "messages": [{"role": "user", "content": "hello"}]}
            for _ in range(10):
                async with http.post(f"{server.url}/v1/chat/completions", json=body) as response:
                    assert response.status == 200
            written = [record.tokens_out for record in server.records]
            assert {record.model for record in server.records} == {"large"}
            ratio = (PRIOR * 400 + sum(written)) / (PRIOR * 400 + 10 * 400)
            short, long = [await explained(server.url, text) for text in ("hello", "long one")]
            assert short["large"]["tokens_out"] == pytest.approx(400 * ratio, rel=1e-6)
            assert long["large"]["tokens_out"] == pytest.approx(1200 * ratio, rel=1e-6)
            assert short["medium"]["tokens_out"] == pytest.approx(100)

    asyncio.run(run())


def test_coefficients_come_with_what_is_expected():
    async def asked(engine: Any) -> Any:
        async with (
            serving(config_for("http://127.0.0.1:1/v1"), engine) as server,
            aiohttp.ClientSession() as http,
            http.post(f"{server.url}/v1/coefficients", json={"prompts": ["one", "long"]}) as response,
        ):
            return await response.json()

    found = asyncio.run(asked(ForeseeingEngine()))
    assert found["tokens_out"] == [[400, 100, 25], [1200, 300, 75]]
    np.testing.assert_allclose(found["seconds"], [[8, 2, 0.5], [24, 6, 1.5]])
    assert "tokens_out" not in asyncio.run(asked(FixedEngine()))


def test_answers_across_a_reload_count_for_their_own_model(tmp_path):
    """The new configuration has other models at other places."""

    async def run() -> None:
        async with MockProvider(PRICES, tokens_out=10, first_byte=0.3) as provider, aiohttp.ClientSession() as http:
            file = tmp_path / "serve.yaml"
            file.write_text(yaml.safe_dump(config_for(provider)))
            async with serving(config_for(provider), ForeseeingEngine(), file=file) as server:
                body = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
                under_way = asyncio.create_task(http.post(f"{server.url}/v1/chat/completions", json=body))
                await asyncio.sleep(0.1)
                file.write_text(yaml.safe_dump(config_for(provider, {"large": None})))
                assert await server.runtime.reload()
                async with await under_way as response:
                    assert response.status == 200
                (written,) = [record.tokens_out for record in server.records]
                found = server.service.expectations.tokens_out(None)
                assert found.tolist() == pytest.approx([50, 50 + (written - 50) / (PRIOR + 1)])

    asyncio.run(run())


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 4000), st.integers(1, 3), st.sampled_from([None, np.nan, 5.0, 700.0])),
        max_size=30,
    ),
    st.sampled_from([None, 1, 300]),
)
def test_expectations_are_weighted_means(reports, max_tokens):
    """The oracle keeps all reports: up to MEMORY, a mean in which the beginning counts as PRIOR answers."""
    assert len(reports) < MEMORY - PRIOR
    models = settings.parse(config_for("http://127.0.0.1:1/v1")).models
    found = Expectations(models)
    for k, tokens, outputs, foreseen in reports:
        found.add(k, tokens * outputs, outputs, foreseen, max_tokens)
    for of in (found, Expectations(models, found)):
        expected = of.tokens_out(max_tokens, 2, np.array([np.nan, 40.0, 2000.0]))
        for k, foreseen in enumerate([np.nan, 40.0, 2000.0]):
            own = [(tokens, f) for j, tokens, _, f in reports if j == k]
            mean = (PRIOR * 50 + sum(tokens for tokens, _ in own)) / (PRIOR + len(own))
            pairs = [(tokens, min(f, max_tokens or f)) for tokens, f in own if f is not None and not np.isnan(f)]
            if not np.isnan(foreseen):
                start = PRIOR * pairs[0][1] if pairs else 1.0
                ratio = (start + sum(t for t, _ in pairs)) / (start + sum(f for _, f in pairs))
                mean = foreseen * ratio
            assert expected[k] == pytest.approx(2 * min(mean, max_tokens or mean))
