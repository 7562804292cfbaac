"""The queue for the engine in virtual time: bursts are served, and under overload the served are not late."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from p2l_engine.serve import scorer as module
from p2l_engine.serve.scorer import Overloaded, Scorer
from tests.support.virtual_time import VirtualEngine, run

ENGINES = {  # seconds of a batch, mean of a prompt, spread of its logarithm; rated load, and seconds of it
    "tiny": (0.0015, 0.0025, 1.0, 116, 20),
    "default": (0.01, 0.056, 0.35, 8, 120),
    "fast": (0.0015, 0.0008, 0.5, 500, 8),
}


async def load(loop, scorer, rate, seconds, name, draw=None):
    """Seconds of the prompts that were served, and of those that were refused."""
    served, refused = [], []

    async def ask(i):
        began = loop.now
        try:
            await scorer.coefficients((f"{name} {i}",))
            served.append(loop.now - began)
        except Overloaded as error:
            assert error.retry_after >= 1
            refused.append(loop.now - began)

    tasks, due = [], loop.now
    for i in range(round(rate * seconds)):
        due += draw.expovariate(rate) if draw else 1 / rate
        await asyncio.sleep(due - loop.now)
        tasks.append(asyncio.create_task(ask(i)))
    await asyncio.gather(*tasks)
    return np.array(served), np.array(refused)


def scorer_of(loop, monkeypatch, engine, draw, patience=0.5, most=64):
    batch, mean, spread, *_ = ENGINES[engine]
    monkeypatch.setattr(module, "time", loop)
    computer = VirtualEngine(loop, batch, lambda: mean * draw.lognormvariate(-(spread**2) / 2, spread))
    return Scorer(computer, patience, most, 10)


@pytest.mark.slow
@pytest.mark.parametrize("poisson", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_ten_times_the_rated_load_makes_the_served_no_later_than_twice(engine, poisson, seed, monkeypatch):
    """All would be five to nine times as late if the queue were kept full."""
    draw = random.Random(seed)
    *_, rate, seconds = ENGINES[engine]

    async def body(loop):
        scorer = scorer_of(loop, monkeypatch, engine, draw)
        between = draw if poisson else None
        await load(loop, scorer, rate, 2, "before")
        rated = await load(loop, scorer, rate, seconds, "rated", between)
        beyond = await load(loop, scorer, 10 * rate, seconds, "beyond", between)
        await load(loop, scorer, rate, 3, "recovering", between)
        return rated, beyond, await load(loop, scorer, rate, 10, "after", between)

    (rated, none), (served, refused), (_, after) = run(body)
    assert not len(none)
    assert not len(after)
    served = served[64:]  # when it begins, a queue is full
    assert np.percentile(served, 99) < 2 * np.percentile(rated, 99)
    assert len(served) > seconds * rate  # more than at the rated load
    assert np.percentile(refused, 99) < 0.001  # at once


def test_a_burst_within_the_bounds_is_served_whole(monkeypatch):
    async def body(loop):
        scorer = scorer_of(loop, monkeypatch, "tiny", random.Random(1))
        await load(loop, scorer, 50, 1, "before")
        return [await load(loop, scorer, 1e6, 60e-6, f"burst {i}") for i in range(10)]

    for served, refused in run(body):
        assert (len(served), len(refused)) == (60, 0)


def test_beyond_the_bounds_those_that_waited_are_refused_too_unless_the_engine_has_begun(monkeypatch):
    async def body(loop):
        scorer = scorer_of(loop, monkeypatch, "default", random.Random(1), most=8)
        await load(loop, scorer, 1, 1, "before")
        running = asyncio.create_task(load(loop, scorer, 1e6, 3e-6, "begun"))
        await asyncio.sleep(0.002)
        waiting = asyncio.create_task(load(loop, scorer, 1e6, 5e-6, "waiting"))
        await asyncio.sleep(0.002)
        beyond = await load(loop, scorer, 1e6, 8e-6, "beyond")
        found = [await running, await waiting, beyond]
        assert scorer.waiting == 0
        found.append(await load(loop, scorer, 1e6, 4e-6, "next"))  # few may wait
        await asyncio.sleep(module.CALM)
        return [*found, await load(loop, scorer, 1e6, 4e-6, "calm")]

    counts = [(len(served), len(refused)) for served, refused in run(body)]
    assert counts[:3] == [(3, 0), (0, 5), (0, 8)]
    assert counts[3][0] < 4
    assert counts[4] == (4, 0)


def test_a_client_that_leaves_does_not_end_what_others_wait_for(monkeypatch):
    async def body(loop):
        scorer = scorer_of(loop, monkeypatch, "default", random.Random(1))
        first = asyncio.create_task(scorer.coefficients(("the same",)))
        second = asyncio.create_task(scorer.coefficients(("the same",)))
        await asyncio.sleep(0.001)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert run(body)[0] == "coefficients"


def test_a_batch_that_has_begun_is_finished(monkeypatch):
    """Its prompts are no longer dropped, those of single requests for the same turns among them."""

    async def body(loop):
        scorer = scorer_of(loop, monkeypatch, "default", random.Random(1), most=20)
        begun = asyncio.create_task(scorer.coefficients(("begun",)))
        await asyncio.sleep(0.002)
        single = asyncio.create_task(scorer.coefficients(("prompt 3",)))
        dropped = asyncio.create_task(scorer.coefficients(("alone",)))
        await asyncio.sleep(0.002)
        batch = asyncio.create_task(scorer.batch([(f"prompt {i}",) for i in range(40)]))
        await asyncio.sleep(0.002)
        _, refused = await load(loop, scorer, 1e6, 60e-6, "beyond")
        assert len(refused) > 50
        with pytest.raises(Overloaded):
            await dropped
        return await batch, await single, await begun

    coefficients, (single, _), _ = run(body)
    assert (coefficients, single) == (["coefficients"] * 40, "coefficients")
