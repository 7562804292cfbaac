"""Concurrent callers: each gets its own result or its own error, and waits for others only under load."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest

from p2l_engine import InfeasibleBudget, Router
from p2l_engine.coefficients import Coefficients
from p2l_engine.engine.batcher import Batcher
from p2l_engine.errors import PromptError
from p2l_engine.feedback import feedback_model
from p2l_engine.routing import BudgetPacer
from tests.support.catalogs import catalog, same

PROMPTS = [f"prompt {i} " * (1 + i % 5) for i in range(60)]


class Slow:
    """An engine whose one coefficient is the prompt's length; it takes its time, or fails for some prompts."""

    def __init__(self, seconds=0.0, gate=None):
        self.seconds, self.gate, self.batches = seconds, gate, []
        self.entered = threading.Event()

    def coefficients(self, prompts):
        self.batches.append(list(prompts))
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(60)
        time.sleep(self.seconds)
        if "broken" in prompts:
            raise FloatingPointError(f"{len(prompts)} prompts")
        theta = np.array([[len(p)] for p in prompts], np.float32)
        return Coefficients(theta, None, ("m",), feedback_model("bt"))


def length(coefficients):
    assert len(coefficients) == 1
    return int(coefficients.theta[0, 0])


@pytest.fixture
def router(engine):
    with Router(engine, catalog()) as router:
        yield router


@pytest.mark.slow
def test_threads_get_what_they_would_get_alone(router):
    alone = [router.route(prompt, 2.5) for prompt in PROMPTS]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: router.route(prompt, 2.5), PROMPTS))
    for one, other in zip(alone, together, strict=True):
        same(one, other)


def test_asyncio_gets_each_its_own_result_or_error(router):
    bad = [[], 7, "lone \ud800", [{"role": "assistant", "content": "no user"}]]

    async def everything():
        calls = [router.aroute(prompt, 2.5) for prompt in PROMPTS]
        calls += [router.aroute(prompt) for prompt in bad]
        calls += [router.aroute("too expensive", 0.5), router.aroute("paced", pacer=BudgetPacer(2.0))]
        return await asyncio.gather(*calls, return_exceptions=True)

    got = asyncio.run(everything())
    for prompt, decision in zip(PROMPTS[:20], got, strict=False):
        same(decision, router.route(prompt, 2.5))
    assert all(isinstance(error, PromptError) and error.index == 0 for error in got[len(PROMPTS) : -2])
    assert isinstance(got[-2], InfeasibleBudget)
    assert got[-1].why.startswith("highest win rate less cost")
    with pytest.raises(ValueError, match="budget: expected None with a pacer"):
        asyncio.run(router.aroute("x", 1.0, BudgetPacer(2.0)))


def test_calls_that_arrive_while_the_engine_is_busy_go_together():
    engine = Slow(gate=threading.Event())
    batcher = Batcher(engine)
    first = batcher.submit("a", length)
    assert engine.entered.wait(60)
    rest = [batcher.submit("b" * n, length) for n in range(2, 40)]
    engine.gate.set()
    assert first.result(60) == 1
    assert [f.result(60) for f in rest] == list(range(2, 40))
    assert [len(b) for b in engine.batches] == [1, 38]
    batcher.close()


def test_a_lone_call_never_waits_for_others():
    batcher = Batcher(Slow(), wait=600.0)
    start = time.monotonic()
    for _ in range(3):
        assert batcher.submit("abc", length).result(60) == 3
        assert batcher.run("ab", length) == 2
    assert time.monotonic() - start < 300
    batcher.close()


def test_under_load_a_call_waits_for_others_but_not_for_long(monkeypatch):
    engine = Slow(gate=threading.Event())
    batcher = Batcher(engine, wait=0.1)
    futures = [batcher.submit("a", length)]
    assert engine.entered.wait(60)
    futures += [batcher.submit("bb", length) for _ in range(3)]
    engine.gate.set()
    [f.result(60) for f in futures]
    with batcher._engine_free:  # the batch of three has ended; from here on the clock is stopped
        now = [batcher._ended]
        monkeypatch.setattr("p2l_engine.engine.batcher.monotonic", lambda: now[0])
    one, two = batcher.submit("c", length), batcher.submit("d", length)
    time.sleep(0.3)
    assert [len(b) for b in engine.batches] == [1, 3]
    now[0] += 0.2
    assert one.result(60) + two.result(60) == 2
    assert [len(b) for b in engine.batches] == [1, 3, 2]
    with batcher._engine_free:
        now[0], batcher.wait = now[0] + 1000, 600.0  # idle for longer than it may wait
    assert batcher.submit("e", length).result(60) == 1
    batcher.close()


def test_a_cancelled_call_takes_nothing_from_the_others():
    engine = Slow(gate=threading.Event())
    batcher = Batcher(engine)
    first = batcher.submit("a", length)
    assert engine.entered.wait(60)
    dropped, kept = batcher.submit("bb", length), batcher.submit("ccc", length)
    assert dropped.cancel()
    assert not first.cancel()  # it is running
    engine.gate.set()
    assert (first.result(60), kept.result(60)) == (1, 3)
    with pytest.raises(CancelledError):
        dropped.result(0)
    assert engine.batches == [["a"], ["ccc"]]
    batcher.close()


def test_a_cancelled_task_leaves_the_router_sound(router):
    async def scenario():
        tasks = [asyncio.create_task(router.aroute(prompt)) for prompt in PROMPTS]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    got = asyncio.run(scenario())
    assert all(isinstance(got[i], asyncio.CancelledError) for i in range(0, 60, 2))
    for i in range(1, 60, 20):
        same(got[i], router.route(PROMPTS[i]))


def test_the_event_loop_goes_on(engine):
    router = Router(engine, catalog())
    slow = router._batcher.engine = Slow(gate=threading.Event())
    ticks = 0

    async def scenario():
        nonlocal ticks
        call = asyncio.create_task(router.aroute("x"))
        while not call.done():
            ticks += 1
            if ticks == 20:
                slow.gate.set()
            await asyncio.sleep(0.001)
        with pytest.raises(ValueError, match="coefficients"):  # the stand-in knows one model only
            await call

    asyncio.run(scenario())
    assert ticks >= 20
    router.close()


def test_a_fault_stays_with_its_owner():
    engine = Slow(gate=threading.Event())
    batcher = Batcher(engine)
    futures = [batcher.submit(p, length) for p in ("a", "bb", "broken", "dddd")]
    engine.gate.set()
    assert [futures[i].result(60) for i in (0, 1, 3)] == [1, 2, 4]
    with pytest.raises(FloatingPointError, match="1 prompts"):
        futures[2].result(60)

    def refuse(coefficients):
        raise LookupError("mine alone")

    with pytest.raises(LookupError, match="mine alone"):
        batcher.submit("x", refuse).result(60)
    assert batcher.submit("ab", length).result(60) == 2
    batcher.close()


def test_closing_finishes_what_waits_and_takes_no_more():
    engine = Slow(0.05)
    batcher = Batcher(engine)
    futures = [batcher.submit("a" * n, length) for n in range(1, 30)]
    batcher.close()
    assert [f.result(0) for f in futures] == list(range(1, 30))
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit("a", length)
    with pytest.raises(RuntimeError, match="closed"):
        batcher.run("a", length)
    batcher.close()


def test_a_deleted_router_ends_its_thread(engine):
    router = Router(engine, catalog())
    asyncio.run(router.aroute("hello"))
    worker = router._batcher._worker
    assert worker.is_alive()
    del router
    gc.collect()
    worker.join(60)
    assert not worker.is_alive()


@pytest.mark.parametrize("wait", [-1, float("nan"), float("inf"), "1", True, None])
def test_a_wait_must_be_seconds(wait, engine):
    with pytest.raises(ValueError, match="wait: expected seconds >= 0"):
        Router(engine, catalog(), wait=wait)


def test_a_call_from_within_a_call_does_not_wait_for_itself():
    batcher = Batcher(Slow())
    outer = batcher.submit("abc", lambda c: length(c) + batcher.run("de", length))
    assert outer.result(60) == 5
    batcher.close()


def test_closing_waits_for_calls_in_their_own_threads():
    engine = Slow(gate=threading.Event())
    batcher, done = Batcher(engine), []
    caller = threading.Thread(target=lambda: done.append(batcher.run("abc", lambda c: time.sleep(0.2) or length(c))))
    caller.start()
    assert engine.entered.wait(60)
    threading.Timer(0.1, engine.gate.set).start()
    batcher.close()
    caller.join(60)
    assert done == [3]


ENDS_EARLY = """
import time, torch
from p2l_engine.engine.batcher import Batcher

class Engine:
    def coefficients(self, prompts):
        a, until = torch.ones(300, 300), time.monotonic() + 0.5
        while time.monotonic() < until:
            torch.mm(a, a)
        raise ValueError("computed")

batcher = Batcher(Engine())
first = batcher.submit("a", lambda c: c)
while not first.running():
    time.sleep(0.01)
others = [batcher.submit("b", lambda c: c) for _ in range(20)]
"""


@pytest.mark.slow
def test_a_process_that_ends_while_a_batch_is_computed_ends_well():
    """A daemon thread that is in torch when Python ends is ended by force, and aborts the process (status 134 in a shell)."""
    ended = subprocess.run([sys.executable, "-c", ENDS_EARLY], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_starts_again():
    batcher = Batcher(Slow())
    assert batcher.submit("abc", length).result(60) == 3
    child = os.fork()
    if child == 0:
        try:
            os._exit(batcher.submit("abcd", length).result(60))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    batcher.close()
