"""The ledger against a model in plain Python that adds everything up again each time, with clocks that run any way."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from zoneinfo import ZoneInfo

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from p2l_engine.routing import Limit, SpendLimit, SpendLimitReached, UnknownReservation
from tests.support import postgres

MICRO = 10**6
ROLLING = 7000  # seconds: steps of 7 s
START = int(datetime(2026, 3, 28, 20, tzinfo=UTC).timestamp()) * MICRO  # a day before Berlin's clocks change
PLACES = {"UTC": UTC, "Europe/Berlin": ZoneInfo("Europe/Berlin")}
LIMITS = [
    Limit(100),
    Limit(40, "day", "Europe/Berlin"),
    Limit(25, "day", each_key=True),
    Limit(60, "month", key="a"),
    Limit(15, timedelta(seconds=ROLLING), each_key=True),
    Limit(30, timedelta(seconds=ROLLING)),
]
LEVELS = (0.5, 0.8, 0.95)

amounts = st.one_of(st.integers(0, 12), st.sampled_from([0, 1, 5, 7.5, Fraction(1, 3), 0.1, 26, 101]))
keys = st.sampled_from(["a", "b"])
moves = st.one_of(
    st.integers(0, 20 * MICRO),
    st.sampled_from([1, 3599, 3600, ROLLING, ROLLING + 7, 10_000, 86_400, 82_800, 3 * 86_400]).map(lambda s: s * MICRO),
    st.integers(-86_400, 40_000).map(lambda s: s * MICRO),
)


def window(limit, at):
    """What tells the calendar window of a time from others."""
    if limit.window not in ("day", "month"):
        return None
    local = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at)).astimezone(PLACES[limit.zone or "UTC"])
    return (local.year, local.month, local.day if limit.window == "day" else 0)


def end(limit, at):
    """The first microsecond of the next calendar window, by bisection."""
    low, high = at, at + 33 * 86_400 * MICRO
    if limit.window == "day":
        high = at + 26 * 3600 * MICRO
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if window(limit, middle) == window(limit, at) else (low, middle)
    return high


def leaves_rolling(made):
    step = ROLLING * MICRO // 1000
    return (made + ROLLING * MICRO + step - 1) // step * step


class Model:
    """All reservations ever made, as [key, made, worst, actual or None]."""

    def __init__(self, lifetime):
        self.lifetime, self.made, self.seen, self.told = lifetime, [], {}, {}

    def accounts(self, key):
        return [(i, key if limit.each_key else None) for i, limit in enumerate(LIMITS) if limit.key in (None, key)]

    def now(self, key, clock):
        accounts = self.accounts(key)
        now = max([clock, *(self.seen.get(account, 0) for account in accounts)])
        self.seen |= dict.fromkeys(accounts, now)
        return now

    def used(self, account, now):
        """What was spent and what is reserved in the account's window."""
        i, _ = account
        limit, spent, held = LIMITS[i], Fraction(0), Fraction(0)
        for key, made, worst, actual in self.made:
            if account not in self.accounts(key) or window(limit, made) != window(limit, now):
                continue
            if isinstance(limit.window, timedelta) and leaves_rolling(made) <= now:
                continue
            if actual is not None:
                spent += actual
            elif self.lifetime is None or made + self.lifetime > now:
                held += worst
        return spent, held

    def left(self, account, now):
        return LIMITS[account[0]].amount - sum(self.used(account, now))

    def fits_at(self, account, now, worst):
        """The first time from now on at which this fits, if nothing else is reserved; None if never."""
        limit = LIMITS[account[0]]
        times = [end(limit, now)] if limit.window in ("day", "month") else []
        for _, made, _, actual in self.made:
            times += [leaves_rolling(made)] if isinstance(limit.window, timedelta) else []
            times += [made + self.lifetime] if self.lifetime and actual is None else []
        return min((at for at in times if at > now and self.left(account, at) >= worst), default=None)

    def levels(self, key, now):
        """The levels that are reached for the first time in their window."""
        found = []
        for account in self.accounts(key):
            limit, used = LIMITS[account[0]], sum(self.used(account, now))
            for level in LEVELS:
                before = self.told.get((account, level))
                again = before is None or window(limit, before) != window(limit, now)
                again |= isinstance(limit.window, timedelta) and before is not None and before + ROLLING * MICRO <= now
                if again and used >= Fraction(str(level)) * limit.amount:
                    self.told[account, level] = now
                    found.append((level, limit.amount))
        return sorted(found)


def billionths_up(amount):
    return Fraction(-(-Fraction(str(amount)) * 10**9 // 1), 10**9)


class LedgerMachine(RuleBasedStateMachine):
    """Two processes on one store, each with a clock of its own. url: of PostgreSQL; None: an SQLite file."""

    url = None

    @initialize(
        lifetime=st.sampled_from([None, 3600, 3 * 86_400]), skew=st.sampled_from([0, 0, -7200 * MICRO, -86_400 * MICRO])
    )
    def begin(self, lifetime, skew):
        self.folder = tempfile.TemporaryDirectory()
        self.model = Model(lifetime and lifetime * MICRO)
        self.lifetime = lifetime and timedelta(seconds=lifetime)
        self.clock, self.skew, self.tokens, self.told, self.of = START, (0, skew), {}, [], 0
        self.limits = [self.open(0), self.open(1)]

    def open(self, which):
        return SpendLimit(
            LIMITS,
            self.url or Path(self.folder.name) / "a",
            lifetime=self.lifetime,
            clock=lambda: Fraction(self.clock + self.skew[which], MICRO),
            on_notice=lambda notice: self.told.append((notice.level, notice.amount)),
        )

    @property
    def time(self):
        return self.clock + self.skew[self.of]

    @property
    def limit(self):
        return self.limits[self.of]

    @rule(by=moves)
    def move(self, by):
        self.clock += by

    @rule()
    def other(self):
        self.of = 1 - self.of

    @rule()
    def restart(self):
        self.limit.close()
        self.limits[self.of] = self.open(self.of)

    @rule(amount=amounts, key=keys)
    def reserve(self, amount, key):
        worst, now = billionths_up(amount), self.model.now(key, self.time)
        accounts = self.model.accounts(key)
        refused = [account for account in accounts if self.model.left(account, now) < worst]
        if not refused:
            token = self.limit.reserve(amount, key)
            self.tokens[token] = len(self.model.made)
            self.model.made.append([key, now, worst, None])
            self.check_notices(key, now)
            return
        try:
            self.limit.reserve(amount, key)
        except SpendLimitReached as error:
            assert len(error.limits) == len(refused)
            assert error.left == max(min(self.model.left(account, now) for account in accounts), 0)
            times = [self.model.fits_at(account, now, worst) for account in refused]
            expected = None if None in times else max(times)
            got = error.frees_at and (error.frees_at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
            assert got == expected
        else:
            raise AssertionError(f"{amount} was reserved beyond {refused}")

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), share=st.sampled_from([0, 0.3, 1, 1, 1.5]))
    def settle(self, data, share):
        token = data.draw(st.sampled_from(sorted(self.tokens, key=self.tokens.get)))
        record = self.model.made[self.tokens.pop(token)]
        key, made, worst, _ = record
        now = self.model.now(key, self.time)
        actual = billionths_up(float(worst * Fraction(share)))
        late = bool(self.model.lifetime and made + self.model.lifetime <= now) or leaves_rolling(made) <= now
        record[3] = actual
        found = self.limit.settle(token, actual)
        assert (found.spent, found.reserved, found.beyond) == (actual, worst, max(actual - worst, 0))
        assert found.late == late
        assert len(found.over) == sum(self.model.left(account, now) < 0 for account in self.model.accounts(key))
        self.check_notices(key, now)
        try:
            self.limit.release(token)
        except UnknownReservation:
            return
        raise AssertionError("a token was settled twice")

    @rule(key=keys)
    def balances(self, key):
        now = self.model.now(key, self.time)
        found = sorted((b.amount, b.spent, b.reserved, b.left) for b in self.limit.balances(key))
        expected = []
        for account in self.model.accounts(key):
            spent, held = self.model.used(account, now)
            amount = LIMITS[account[0]].amount
            expected.append((amount, spent, held, max(amount - spent - held, 0)))
        assert found == sorted(expected), (found, sorted(expected))

    def check_notices(self, key, now):
        expected = self.model.levels(key, now)
        assert sorted(self.told) == expected, (self.told, expected)
        self.told.clear()

    @invariant()
    def open_reservations_are_known(self):
        if hasattr(self, "limits"):
            assert {reservation.token for reservation in self.limit.reservations()} == set(self.tokens)

    def teardown(self):
        if hasattr(self, "limits"):
            for limit in self.limits:
                limit.close()
            self.folder.cleanup()
            if self.url:
                postgres.empty(self.url)


@pytest.mark.slow
def test_sqlite_is_the_model():
    run_state_machine_as_test(LedgerMachine, settings=hypothesis.settings(max_examples=25, stateful_step_count=40))


@pytest.mark.store
@pytest.mark.xdist_group("postgres")
def test_postgres_is_the_model(postgres_url):
    machine = type("PostgresMachine", (LedgerMachine,), {"url": postgres_url})
    run_state_machine_as_test(machine, settings=hypothesis.settings(max_examples=10, stateful_step_count=40))
