"""The server's spend limit: calls that come while the store is busy share a transaction, each with its own answer."""

from __future__ import annotations

import asyncio
import threading
from fractions import Fraction

import pytest
from sqlalchemy.exc import OperationalError

from p2l_engine.routing import Limit, SpendLimit, SpendLimitReached
from p2l_engine.serve import async_spend_limit as module
from p2l_engine.serve.async_spend_limit import AsyncSpendLimit
from p2l_engine.spending.calls import Reserve, Settle


class Watched(SpendLimit):
    """Notes the groups; ``free`` lets transactions begin; the first ``failures`` of them find no store."""

    def __init__(self, amount, store):
        super().__init__([Limit(amount)] if amount else [], store, lifetime=None)
        self.groups, self.free, self.failures, self.began = [], threading.Event(), 0, threading.Event()
        self.free.set()

    def together(self, calls):
        self.groups.append([type(call) for call in calls])
        self.began.set()
        assert self.free.wait(30)
        if self.failures:
            self.failures -= 1
            return [OperationalError("locked", None, Exception("locked")) for _ in calls]
        return super().together(calls)


async def busy(limit):
    """The store takes a transaction, and holds it until ``free`` is set."""
    limit.free.clear()
    limit.began.clear()
    return asyncio.to_thread(limit.began.wait, 30)


@pytest.fixture
def limit(tmp_path):
    with Watched(10, tmp_path / "a") as found:
        yield found


def run(limit, body):
    async def one():
        spending = AsyncSpendLimit(limit, 600.0)
        try:
            return await asyncio.wait_for(body(spending), 30)
        finally:
            limit.free.set()
            await spending.drain()
            spending.close()

    return asyncio.run(one())


def test_calls_that_wait_share_a_transaction_and_are_answered_each(limit):
    async def body(spending):
        taken = await busy(limit)
        first = asyncio.create_task(spending.reserve(Fraction(2), None))
        await taken
        others = [asyncio.create_task(spending.reserve(Fraction(amount), None)) for amount in (7, 2, 1, 1)]
        await asyncio.sleep(0)
        limit.free.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    answers = run(limit, body)
    assert limit.groups == [[Reserve], [Reserve] * 4]
    assert [type(answer) for answer in answers] == [str, str, SpendLimitReached, str, SpendLimitReached]


def test_settlements_go_with_the_next_reservation_in_order(limit, monkeypatch):
    monkeypatch.setattr(module, "LINGER", 1000.0)

    async def body(spending):
        token = await spending.reserve(Fraction(10), None)
        spending.settle(token, Fraction(4))
        return await spending.reserve(Fraction(6), None)  # fits, since it comes after the settlement

    assert isinstance(run(limit, body), str)
    assert limit.groups == [[Reserve], [Settle, Reserve]]


def test_settlements_alone_wait_a_moment(limit):
    async def body(spending):
        tokens = [await spending.reserve(Fraction(1), None) for _ in range(3)]
        for token in tokens:
            spending.settle(token, Fraction(1))
        while len(limit.groups) < 4:
            await asyncio.sleep(0.005)
        await spending.drain()
        return limit.balances()[0]

    balance = run(limit, body)
    assert limit.groups[3:] == [[Settle] * 3]
    assert (balance.spent, balance.reserved) == (3, 0)


@pytest.mark.parametrize("when", ["it was made", "it is being settled", "its client left as it was made"])
def test_no_reservation_of_this_process_counts_in_full_however_old_it_seems(when, limit, monkeypatch):
    """Its clock may jump. The loop is busy meanwhile, so that all transactions end before it is told of the first."""
    monkeypatch.setattr(module, "MARGIN", -1200.0)  # all seem to be of dead processes

    async def body(spending):
        if when == "it is being settled":
            spending.settle(await spending.reserve(Fraction(4), None), Fraction(1))
        else:
            taken = await busy(limit)
            reserving = asyncio.create_task(spending.reserve(Fraction(4), None))
            await taken
            if when != "it was made":
                reserving.cancel()
        sweeping = asyncio.create_task(spending.sweep())
        await asyncio.sleep(0)
        limit.free.set()
        spending._thread.submit(bool).result(30)
        swept = await sweeping
        if when == "it was made":
            spending.settle(await reserving, Fraction(1))
        await spending.drain()
        return swept, limit.balances()[0]

    swept, balance = run(limit, body)
    assert (swept, balance.reserved) == (0, 0)
    assert balance.spent == (0 if when.startswith("its client") else 1)


def test_a_dead_processs_reservation_counts_in_full(limit, monkeypatch):
    monkeypatch.setattr(module, "MARGIN", -1200.0)
    limit.reserve(Fraction(4))

    async def body(spending):
        return await spending.sweep(), await spending.sweep()

    assert run(limit, body) == (1, 0)
    assert limit.balances()[0].spent == 4


def test_draining_does_not_wait(limit, monkeypatch):
    monkeypatch.setattr(module, "LINGER", 1000.0)

    async def body(spending):
        token = await spending.reserve(Fraction(1), None)
        spending.settle(token, Fraction(1))
        await asyncio.gather(spending.drain(), spending.drain())
        return limit.balances()[0]

    assert run(limit, body).spent == 1


def test_settlements_that_linger_while_the_store_is_busy_are_not_forgotten(limit, monkeypatch):
    monkeypatch.setattr(module, "LINGER", 0.001)

    async def body(spending):
        token = await spending.reserve(Fraction(1), None)
        taken = await busy(limit)
        reserving = asyncio.create_task(spending.reserve(Fraction(1), None))
        await taken
        spending.settle(token, Fraction(1))
        await asyncio.sleep(0.02)  # its time is over before the store is free
        limit.free.set()
        await reserving
        while len(limit.groups) < 3:
            await asyncio.sleep(0.005)

    run(limit, body)
    assert limit.groups == [[Reserve], [Reserve], [Settle]]


@pytest.mark.parametrize("when", ["waiting", "under way", "answered"])
def test_what_was_reserved_for_a_client_that_left_is_given_back(limit, when):
    async def body(spending):
        taken = await busy(limit)
        first = asyncio.create_task(spending.reserve(Fraction(2), None))
        await taken
        leaving = first if when != "waiting" else asyncio.create_task(spending.reserve(Fraction(3), None))
        await asyncio.sleep(0)
        if when == "answered":  # by its future, in the moment before the task goes on
            spending._end, end = (lambda callbacks, made: (end(callbacks, made), leaving.cancel())), spending._end
        else:
            leaving.cancel()
        limit.free.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await asyncio.gather(first, return_exceptions=True)
        await spending.drain()
        return limit.balances()[0]

    balance = run(limit, body)
    assert (balance.spent, balance.reserved) == (0, 2 if when == "waiting" else 0)
    if when == "waiting":
        assert limit.groups == [[Reserve]]


def test_a_store_that_is_away_refuses_reservations_and_gets_settlements_again(limit, monkeypatch):
    monkeypatch.setattr(module, "RETRIES", (0.001, 0.001, 0.001))

    async def body(spending):
        token = await spending.reserve(Fraction(5), None)
        limit.failures = 2
        spending.settle(token, Fraction(2))
        with pytest.raises(OperationalError):
            await spending.reserve(Fraction(1), None)
        await spending.drain()
        return limit.balances()[0]

    balance = run(limit, body)
    assert (balance.spent, balance.reserved) == (2, 0)


def test_what_cannot_be_settled_does_not_keep_the_server_from_ending(limit, monkeypatch, caplog):
    monkeypatch.setattr(module, "RETRIES", (0.001,))

    async def body(spending):
        token = await spending.reserve(Fraction(5), None)
        limit.failures = 5
        spending.settle(token, Fraction(2))
        spending.settle(None, Fraction(2))
        await spending.drain()
        limit.failures = 0
        spending.settle("unknown", Fraction(1))
        await spending.drain()
        return limit.balances()[0]

    balance = run(limit, body)
    assert (balance.spent, balance.reserved) == (0, 5)
    assert "could not be stored; its reservation counts in full" in caplog.text
    assert "settled by another process" in caplog.text


def test_a_group_has_no_more_calls_than_others_can_wait_for(limit, monkeypatch):
    monkeypatch.setattr(module, "TOGETHER", 4)

    async def body(spending):
        return await asyncio.gather(*(spending.reserve(Fraction(1), None) for _ in range(10)))

    assert len(set(run(limit, body))) == 10
    assert [len(group) for group in limit.groups] == [1, 4, 4, 1]
