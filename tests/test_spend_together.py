"""Calls of a spend limit that share a transaction: the same answers as one after the other."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import tempfile
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from p2l_engine.routing import Limit, SpendLimit, SpendLimitReached, UnknownReservation
from p2l_engine.spending.books import Locked
from p2l_engine.spending.calls import Reserve, Settle

NOON = datetime(2026, 3, 28, 12, tzinfo=UTC).timestamp()
LIMITS = [
    Limit(100),
    Limit(40, "day", "Europe/Berlin"),
    Limit(25, "day", each_key=True),
    Limit(15, timedelta(seconds=7000), each_key=True),
    Limit(30, timedelta(seconds=7000)),
]

amounts = st.sampled_from([0, 1, 2, 5, 7.5, Fraction(1, 3), 0.1, 16, 101])
wrong = st.sampled_from([-1, float("nan"), None, 10**12])
reserves = st.tuples(st.just("reserve"), amounts | wrong, st.sampled_from(["a", "b", None]))
settles = st.tuples(st.just("settle"), amounts | wrong, st.integers(0, 30))  # of the reservation of this number, or none
groups = st.lists(st.lists(reserves | settles, min_size=1, max_size=8), min_size=1, max_size=6)
moves = st.sampled_from([0, 1, 7, 3600, 6999, 7001, 86_400, -4000])


class Spender:
    """A store of its own; tokens are known by their order."""

    def __init__(self, folder, name, lifetime):
        self.now, self.tokens, self.told = NOON, [], []
        self.limit = SpendLimit(
            LIMITS,
            Path(folder) / name,
            lifetime=lifetime,
            clock=lambda: self.now,
            on_notice=lambda notice: self.told.append(notice),
        )

    def call(self, kind, amount, which):
        """Of a group: it does not know the tokens that it makes itself."""
        if kind == "reserve":
            return Reserve(amount, which)
        return Settle(self.tokens[which] if which < len(self.tokens) else "unknown", amount)

    def one_by_one(self, calls):
        answers = []
        for call in calls:
            try:
                if isinstance(call, Reserve):
                    answers.append(self.limit.reserve(call.worst_case, call.key))
                else:
                    answers.append(self.limit.settle(call.token, call.actual))
            except (SpendLimitReached, UnknownReservation, ValueError) as error:
                answers.append(error)
        return answers

    def learn(self, answers):
        """The answers, tokens apart."""
        shown = []
        for answer in answers:
            if isinstance(answer, str):
                self.tokens.append(answer)
            elif isinstance(answer, UnknownReservation):
                answer = "unknown"
            elif isinstance(answer, SpendLimitReached):
                answer = (answer.limits, answer.worst_case, answer.left, answer.frees_at)
            elif isinstance(answer, ValueError):
                answer = str(answer)
            shown.append("token" if isinstance(answer, str) and answer in self.tokens else answer)
        return shown

    def state(self):
        with sqlite3.connect(self.limit._ledger.database._url.database) as connection:
            tables = [
                sorted(connection.execute(f"SELECT * FROM {table}")) for table in ("spend_account", "spend_step", "spend_past")
            ]
            holds = connection.execute("SELECT token, account, start, made, worst, leaves, expired FROM spend_hold").fetchall()
        return tables, sorted((self.tokens.index(token), *rest) for token, *rest in holds)


@pytest.mark.slow
@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(
    groups=groups,
    moves=st.lists(moves, min_size=6, max_size=6),
    lifetime=st.sampled_from([None, timedelta(hours=1), timedelta(days=2)]),
)
def test_a_group_gives_the_answers_of_its_calls_one_by_one(groups, moves, lifetime):
    with tempfile.TemporaryDirectory() as folder:
        alone, grouped = Spender(folder, "alone", lifetime), Spender(folder, "grouped", lifetime)
        for group, move in zip(groups, moves, strict=False):
            for spender in (alone, grouped):
                spender.now += move
            answers = grouped.limit.together([grouped.call(*call) for call in group])
            expected = alone.one_by_one([alone.call(*call) for call in group])
            assert grouped.learn(answers) == alone.learn(expected)
            assert grouped.told == alone.told
            assert grouped.state() == alone.state()
        alone.limit.close()
        grouped.limit.close()


def test_an_account_that_has_seen_a_later_time_does_not_move_the_others(tmp_path):
    """A machine whose clock is ahead serves one key: the other key's window stands where it was."""
    limits = [Limit(10, timedelta(hours=1), each_key=True)]
    now = NOON
    with SpendLimit(limits, tmp_path / "a", clock=lambda: now, lifetime=None) as limit:
        limit.reserve(6, "a")
        now += 3 * 3600
        limit.reserve(1, "b")
        now -= 3 * 3600
        first, second = limit.together([Reserve(1, "b"), Reserve(6, "a")])
        assert isinstance(first, str)
        assert isinstance(second, SpendLimitReached)


def test_a_call_at_fault_fails_alone(tmp_path):
    """The sum that the second asks for is more than a row can hold."""
    with SpendLimit([], tmp_path / "a") as limit:
        answers = limit.together(
            [Reserve(1), Reserve(9 * 10**9), Reserve(9 * 10**9), Reserve(2), Settle("none", 1), Reserve(-1)]
        )
        kinds = [type(answer) for answer in answers]
        assert kinds == [str, str, OverflowError, str, UnknownReservation, ValueError]
        assert sum(reservation.worst_case for reservation in limit.reservations()) == 9 * 10**9 + 3


@pytest.mark.parametrize(
    "token", [None, 5, b"x", ["a"], math.nan, "", "\x00", "\ud800", "0" * 32, "0" * 33, "É" * 32, "0" * 31 + "\n"]
)
def test_what_is_no_token_fails_alone(tmp_path, token):
    """Also what a database cannot look for."""
    with SpendLimit([Limit(10)], tmp_path / "a") as limit:
        for call in (lambda: limit.settle(token, 1), lambda: limit.release(token)):
            with pytest.raises(UnknownReservation, match="token: expected one of reserve"):
                call()
        first, wrong, second = limit.together([Reserve(1), Settle(token, 1), Reserve(2)])
        assert isinstance(wrong, UnknownReservation)
        assert isinstance(first, str)
        assert isinstance(second, str)
        assert {row.token for row in limit.reservations()} == {first, second}


def test_one_token_is_settled_once_in_a_group(tmp_path):
    with SpendLimit([Limit(10)], tmp_path / "a") as limit:
        token = limit.reserve(10)
        settled, again, reserved, refused = limit.together([Settle(token, 4), Settle(token, 5), Reserve(6), Reserve(1)])
        assert settled.spent == 4
        assert isinstance(again, UnknownReservation)
        assert isinstance(reserved, str)
        assert isinstance(refused, SpendLimitReached)
        assert refused.left == 0


def test_a_store_that_is_locked_refuses_all_calls_at_once(tmp_path):
    with SpendLimit([Limit(10)], tmp_path / "a", timeout=0.2) as limit:
        limit.reserve(1)
        with sqlite3.connect(tmp_path / "a", isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            answers = limit.together([Reserve(1) for _ in range(20)])  # not a wait for each
            other.execute("ROLLBACK")
        assert {type(answer).__name__ for answer in answers} == {"OperationalError"}
        assert len(limit.reservations()) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("where", "kept"), [((Locked, "save"), False), ((SpendLimit, "_announce"), True)])
def test_a_kill_keeps_all_of_a_group_or_nothing(tmp_path, monkeypatch, where, kept):
    """Before the transaction ends no call was answered; afterwards nothing is forgotten."""
    with SpendLimit([Limit(10)], tmp_path / "a") as limit:
        token = limit.reserve(3)
        child = os.fork()
        if not child:
            monkeypatch.setattr(*where, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
            limit.together([Settle(token, 1), Reserve(2), Reserve(4)])
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        (balance,) = limit.balances()
        assert (balance.spent, balance.reserved) == ((1, 6) if kept else (0, 3))
