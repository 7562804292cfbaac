"""From a server's decisions to what other policies would have earned: served, given feedback, exported and replayed."""

from __future__ import annotations

import asyncio

import aiohttp
import numpy as np
import pytest

from bench.mock_provider import MockProvider
from p2l_engine.decision_log.export import export
from p2l_engine.decision_log.store import LogStore, Selection
from p2l_engine.replay.compare import replay
from p2l_engine.replay.policies import PolicySpec
from p2l_engine.replay.read import read_log
from tests.support.serving import PRICES, FixedEngine, config_for, serving

GOOD = {"large": 0.9, "medium": 0.6, "small": 0.2}  # how often each model's answer is
ASKED = 300


async def served(store, rng, **serve):
    """Asks for answers to prompts, every tenth of a named model and every third as a stream, and says what they were worth."""
    engine = FixedEngine(theta=(0.6, 0.4, 0.2), deviation=(0.5, 0.5, 0.8))
    async with MockProvider(PRICES) as provider:
        config = config_for(provider, store=str(store), log_prompts=True, **serve)
        async with serving(config, engine) as server, aiohttp.ClientSession() as http:
            for i in range(ASKED):
                messages = [{"role": "user", "content": f"prompt {i // 2}"}]
                body = {"model": "auto" if i % 10 else "small", "messages": messages, "stream": i % 3 == 0}
                body["p2l"] = {"session": f"session {i}"}
                async with http.post(f"{server.url}/v1/chat/completions", json=body) as response:
                    await response.read()
                    assert response.status == 200
            while len(server.records) < ASKED:
                await asyncio.sleep(0.01)
            for record in server.records:
                said = {"id": record.id, "score": float(rng.random() < GOOD[record.model])}
                async with http.post(f"{server.url}/v1/feedback", json=said) as response:
                    assert response.status < 300
            return server.records


@pytest.mark.slow
@pytest.mark.parametrize("explore", [True, False])
def test_what_a_server_decided_is_replayed(tmp_path, rng, explore):
    records = asyncio.run(served(tmp_path / "log.sqlite", rng, **({"explore": "thompson"} if explore else {})))
    store = LogStore(str(tmp_path / "log.sqlite"))
    export(store, tmp_path / "log", Selection(None, None, None))
    store.close()
    log = read_log(tmp_path / "log")
    routed = [record for record in records if record.asked == "auto"]
    assert len(log) == len(routed) == ASKED * 9 // 10
    assert sorted(log.propensity.tolist()) == sorted(record.propensity for record in routed)
    assert log.real.all()
    assert not np.isnan(log.reward).any()
    report = replay(log, [PolicySpec("was", logged=True), *(PolicySpec(name, always=name) for name in GOOD)])
    was, *others = report.policies
    assert was.value["ips"].value == pytest.approx(log.reward.mean())
    assert was.cost["ips"].value == pytest.approx(np.mean([record.cost for record in routed]))
    for found in others:
        if not explore and found.name != "large":
            assert found.verdict == "refused"
            assert found.unsupported == {found.name: 1.0}
            continue
        value, cost = found.value["dr"], found.cost["snips"].value
        assert abs(value.value - GOOD[found.name]) < 2.5 * (value.high - value.value)  # five standard errors
        assert cost == pytest.approx(np.mean([record.cost for record in routed if record.chosen == found.name]), rel=0.05)
