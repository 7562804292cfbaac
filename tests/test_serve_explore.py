"""A server that explores: draws of its own for each session, propensities in the log, and a start without an uncertainty."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import numpy as np
import pytest
from scipy.stats import binom

from p2l_engine.serve import choice, settings
from p2l_engine.serve.runtime import Runtime
from p2l_engine.serve.settings import ConfigError
from tests.support.serving import FixedEngine, config_for, serving

UNCERTAIN = (0.5, 0.2, 0.8)
THETA = (1.0, 0.8, 0.3)


def decided(*arguments: Any, **options: Any) -> list[Any]:
    return asyncio.run(decisions(*arguments, **options))


async def decisions(count: int, explore: str | None = "thompson", sessions: int | None = None, **serve: Any) -> list[Any]:
    """What a server decides for one prompt in ``count`` requests, each of its own session, or of one of a few."""
    options = {} if explore is None else {"explore": explore}
    found = []
    engine = FixedEngine(theta=THETA, deviation=UNCERTAIN)
    async with (
        serving(config_for("http://127.0.0.1:1/v1", **options, **serve), engine) as server,
        aiohttp.ClientSession() as http,
    ):
        for i in range(count):
            body = {"messages": [{"role": "user", "content": "hello"}], "p2l": {"session": f"s{i % (sessions or count)}"}}
            async with http.post(f"{server.url}/v1/route", json=body) as response:
                assert response.status == 200
                found.append(await response.json())
        assert [record.propensity for record in server.records] == [d["propensity"] for d in found]
        errors = [record.propensity_error for record in server.records]
        assert errors == [d["propensity_error"] for d in found]
        assert all((0 < error < 0.02) is (explore is not None) for error in errors)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, 0.0005])
def test_propensities_are_the_shares_of_sessions(budget):
    found = decided(300, **({} if budget is None else {"budget": budget, "horizon": 1_000_000}))
    counted = {name: [d for d in found if d["model"] == name] for name in {d["model"] for d in found}}
    assert len(counted) > 1
    for own in counted.values():
        p = float(np.mean([d["propensity"] for d in own]))
        assert 0 < p < 1
        assert binom.cdf(len(own), 300, min(p + 0.02, 1)) > 1e-6
        assert binom.sf(len(own) - 1, 300, max(p - 0.02, 0)) > 1e-6
        assert all("drawn from their posterior" in d["why"] for d in own)
    if budget is None:  # at the mean coefficients
        rates = {d["model"]: d["win_rate"] for d in found}
        certain = decided(1, None)[0]
        assert rates[certain["model"]] == pytest.approx(certain["win_rate"])
        assert certain["propensity"] == 1.0


def test_a_session_keeps_its_draw():
    found = decided(40, sessions=8)
    for i, decision in enumerate(found[8:], 8):
        assert (decision["model"], decision["propensity"]) == (found[i % 8]["model"], found[i % 8]["propensity"])
    assert len({d["model"] for d in found}) > 1


def test_coefficients_come_with_their_deviation():
    async def asked(deviation: Any) -> Any:
        engine = FixedEngine(theta=THETA, deviation=deviation)
        async with (
            serving(config_for("http://127.0.0.1:1/v1"), engine) as server,
            aiohttp.ClientSession() as http,
            http.post(f"{server.url}/v1/coefficients", json={"prompts": ["one", "two"]}) as response,
        ):
            return await response.json()

    assert "deviation" not in asyncio.run(asked(None))
    np.testing.assert_allclose(asyncio.run(asked(UNCERTAIN))["deviation"], [UNCERTAIN, UNCERTAIN])


def test_the_chances_of_a_pick_are_those_of_the_choice(rng):
    """Row by row, ``chances`` agrees with ``choose`` on the pick's own terms."""
    costs, allowed = np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, True])
    rows = rng.integers(0, 4, (50, 4)) / 4.0  # with ties
    for budget, price in ((None, None), (1.5, None), (9.0, None), (None, 0.1), (None, np.inf)):
        for k in np.flatnonzero(allowed):
            expected = []
            for row in rows:
                policy = choice.choose(row, costs, allowed, lambda models, _: models[0], budget, price).policy
                expected.append(policy.get(int(k), 0.0))
            pick = choice.Pick(int(k), {int(k): 1.0}, 0.0, 0.0, "", price)
            np.testing.assert_allclose(choice.chances(pick, rows, costs, allowed, budget), expected, atol=1e-12)


def test_exploring_needs_an_uncertainty():
    config = settings.parse(config_for("http://127.0.0.1:1/v1", explore="thompson"))
    with pytest.raises(ConfigError, match="serve.explore: expected a checkpoint that knows how sure it is.*p2l-engine adapt"):
        Runtime(config, FixedEngine())
    with pytest.raises(ConfigError, match="serve.explore"):
        settings.parse(config_for("http://127.0.0.1:1/v1", explore="greedy"))
