"""Hard limits on spent money, on SQLite and on PostgreSQL."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from p2l_engine.routing import Limit, SpendLimit, SpendLimitReached, UnknownReservation
from tests.support import postgres, spenders

NOON = datetime(2026, 3, 15, 12, tzinfo=UTC).timestamp()
HOUR, DAY = 3600.0, 86400.0


class Clock:
    """Seconds since 1970, as the test wants them."""

    def __init__(self, now=NOON):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=[pytest.mark.store, pytest.mark.xdist_group("postgres")])])
def store(request, tmp_path):
    """An empty store."""
    if request.param == "sqlite":
        yield str(tmp_path / "spend.sqlite")
        return
    url = request.getfixturevalue("postgres_url")
    yield url
    postgres.empty(url)


@pytest.fixture
def open_limit(store, clock):
    """Makes a SpendLimit on the store, and closes it."""
    made = []

    def make(limits, **options):
        made.append(SpendLimit(limits, store, **{"clock": clock, **options}))
        return made[-1]

    yield make
    for limit in made:
        limit.close()


def refusal(limit, worst, key=None):
    with pytest.raises(SpendLimitReached) as caught:
        limit.reserve(worst, key)
    return caught.value


def at(seconds):
    return datetime.fromtimestamp(seconds, UTC)


def used(limit, key=None):
    return [(balance.spent, balance.reserved) for balance in limit.balances(key)]


def test_reserve_settle_and_release(open_limit):
    limit = open_limit(Limit(1))
    first, second = limit.reserve(0.4), limit.reserve(0.6)
    error = refusal(limit, Decimal("0.000000001"))
    assert (error.left, error.frees_at, error.limits) == (0, at(NOON + HOUR), ("total, all keys",))
    settled = limit.settle(first, 0.1)
    assert (settled.spent, settled.reserved, settled.beyond, settled.late, settled.over) == (
        Decimal("0.1"),
        Decimal("0.4"),
        0,
        False,
        (),
    )
    limit.release(second)
    assert used(limit) == [(Decimal("0.1"), 0)]
    assert refusal(limit, 0.95).left == Decimal("0.9")
    last = limit.reserve(0.9)
    for token in (first, second, "", "x"):
        with pytest.raises(UnknownReservation, match="neither settled nor released"):
            limit.settle(token, 0)
        with pytest.raises(UnknownReservation):
            limit.release(token)
    assert used(limit) == [(Decimal("0.1"), Decimal("0.9"))]
    limit.settle(last, 0.9)
    assert refusal(limit, 0.1).frees_at is None


def test_a_reservation_passes_all_limits_or_none(open_limit):
    limit = open_limit([Limit(10), Limit(3, "day"), Limit(1, "day", each_key=True), Limit(2, "month", key="b")])
    limit.reserve(1, "a")
    assert refusal(limit, 0.5, "a").limits == ("day in UTC, key 'a'",)
    limit.settle(limit.reserve(1, "b"), 0.75)
    error = refusal(limit, 2, "b")
    assert error.limits == ("day in UTC, all keys", "day in UTC, key 'b'", "month in UTC, key 'b'")
    assert error.left == Decimal("0.25")
    assert error.frees_at is None  # more than a day's whole limit
    assert [balance.limit for balance in limit.balances("c")] == [
        "day in UTC, all keys",
        "day in UTC, key 'c'",
        "total, all keys",
    ]
    assert {balance.limit: balance.spent + balance.reserved for balance in limit.balances("b")} == {
        "day in UTC, all keys": Decimal("1.75"),
        "day in UTC, key 'b'": Decimal("0.75"),
        "month in UTC, key 'b'": Decimal("0.75"),
        "total, all keys": Decimal("1.75"),
    }
    with pytest.raises(ValueError, match="key: expected a string, since each key has its own limit"):
        limit.reserve(1)


def test_of_two_limits_of_one_account_the_smaller_holds(open_limit):
    limit = open_limit([Limit(5, "day", each_key=True), Limit(50, "day", key="vip"), Limit(1, "day", key="new")])
    assert refusal(limit, 6, "vip").left == 5
    assert refusal(limit, 2, "new").left == 1
    assert [b.amount for b in limit.balances("vip")] == [5]


def test_what_no_limit_bounds_is_kept_all_the_same(open_limit):
    limit = open_limit([Limit(1, key="a")])
    token = limit.reserve(1000, "b")
    limit.settle(token, 999)
    (balance,) = limit.balances("b")
    assert (balance.amount, balance.left, balance.spent) == (None, None, 999)
    with pytest.raises(UnknownReservation):
        limit.settle(token, 999)
    assert used(open_limit([])) == [(0, 0)]


@pytest.mark.parametrize("key", ["", "all keys", "'", "\0", "\ud800", "ä, key 'b'", "x" * 5000, "'; DROP TABLE spend_hold; --"])
def test_any_string_is_a_key_of_its_own(open_limit, key):
    limit = open_limit([Limit(1, each_key=True), Limit(5)])
    limit.reserve(1, key)
    assert refusal(limit, 1, key).limits == (f"total, key {key!r}",)
    limit.reserve(1, key + "'")


def test_amounts_are_exact_and_rounded_against_the_spender(open_limit):
    limit = open_limit(Limit(0.3))
    for _ in range(3):
        limit.settle(limit.reserve(0.1), 0.1)  # 0.1 + 0.1 + 0.1 > 0.3 in floats
    assert limit.balances()[0].left == 0
    limit = open_limit(Limit(Fraction(2, 3), "day"))  # 0.666666666
    limit.settle(limit.reserve(Fraction(1, 3)), Fraction(1, 3))  # 0.333333334
    assert refusal(limit, Fraction(1, 3)).left == Decimal("0.333333332")
    for tiny in (1e-300, Decimal("1e-999999"), Fraction(1, 10**40), 5e-324):
        assert limit.settle(limit.reserve(tiny), tiny).spent == Decimal("1e-9")
    for amount in (np.float32(0.1), np.float64(0.1), Decimal("0.1"), Fraction(1, 10), np.int64(0), 0):
        assert limit.settle(limit.reserve(amount), 0).reserved in (Decimal("0.1"), 0)
    large = open_limit(Limit(9_223_372_036, "month"))
    large.reserve(9_223_372_036)
    assert refusal(large, Decimal("1e-9")).left == 0


@pytest.mark.parametrize(
    "bad",
    [
        -1,
        -1e-12,
        float("nan"),
        float("inf"),
        Decimal("nan"),
        Decimal("snan"),
        Decimal("1e999999999"),
        1e11,
        True,
        None,
        "1",
        [1],
        1j,
    ],
)
def test_bad_amounts_are_named(tmp_path, bad):
    limit = SpendLimit(Limit(1), tmp_path / "a")
    token = limit.reserve(1)
    with pytest.raises(ValueError, match="worst_case: expected an amount from 0 to 9,223,372,036 units"):
        limit.reserve(bad)
    with pytest.raises(ValueError, match="actual: expected an amount"):
        limit.settle(token, bad)
    with pytest.raises(ValueError, match="amount: expected an amount"):
        Limit(bad)
    assert limit.balances()[0].reserved == 1


def test_bad_arguments_are_named(tmp_path):
    for arguments, message in [
        (dict(window="week"), "window: expected 'total', 'day', 'month' or a timedelta"),
        (dict(window=timedelta(0)), "window: expected"),
        (dict(window=timedelta(days=40000)), "window: expected"),
        (dict(window=60), "window: expected"),
        (dict(window="day", zone="Mars/Base"), "zone: expected the IANA name"),
        (dict(window="day", zone="../etc/passwd"), "zone: expected the IANA name"),
        (dict(window="day", zone=1), "zone: expected the IANA name"),
        (dict(zone="UTC"), "zone: expected None for the window 'total'"),
        (dict(key="a", each_key=True), "each_key: expected False"),
        (dict(key=1), "key: expected a string or None, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Limit(1, **arguments)
    for arguments, message in [
        (dict(limits=["a"]), "limits\\[0\\]: expected a Limit"),
        (dict(lifetime=timedelta(0)), "lifetime: expected a timedelta"),
        (dict(lifetime=60), "lifetime: expected a timedelta"),
        (dict(levels=[0.5, 1.5]), "levels: expected shares"),
        (dict(levels=[0]), "levels: expected shares"),
        (dict(timeout=0), "timeout: expected seconds > 0"),
        (dict(store="mysql://a/b"), "store: expected a path, sqlite:///PATH without options, or a URL of post"),
        (dict(store="sqlite://"), "store: expected a file in a folder that exists"),
        (dict(store=tmp_path / "none" / "a"), "store: expected a file in a folder that exists"),
        (dict(clock=lambda: float("nan")), "clock: expected seconds since 1970, got nan"),
        (dict(clock=lambda: -1), "clock: expected seconds since 1970, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            SpendLimit(**{"limits": Limit(1), "store": tmp_path / "a", **arguments}).reserve(1)
    with pytest.raises(ValueError, match="key: expected a string or None, got 5"):
        SpendLimit(Limit(1), tmp_path / "a").reserve(1, 5)


@pytest.mark.parametrize(
    ("zone", "start", "now", "end", "month_end"),
    [
        ("UTC", "2026-03-15T00:00Z", "2026-03-15T12:00Z", "2026-03-16T00:00Z", "2026-04-01T00:00Z"),
        ("Europe/Berlin", "2026-03-28T23:00Z", "2026-03-29T10:00Z", "2026-03-29T22:00Z", "2026-03-31T22:00Z"),
        ("Asia/Kolkata", "2026-12-30T18:30Z", "2026-12-31T18:29Z", "2026-12-31T18:30Z", "2026-12-31T18:30Z"),
        # Midnight is skipped: the day begins at 01:00.
        ("America/Sao_Paulo", "2018-11-04T03:00Z", "2018-11-04T05:00Z", "2018-11-05T02:00Z", "2018-12-01T02:00Z"),
        # The hour after midnight comes twice: the day begins with the first.
        ("America/Havana", "2026-11-01T04:00Z", "2026-11-01T05:30Z", "2026-11-02T05:00Z", "2026-12-01T05:00Z"),
        # The next date never came.
        ("Pacific/Apia", "2011-12-29T10:00Z", "2011-12-30T06:00Z", "2011-12-30T10:00Z", "2011-12-31T10:00Z"),
    ],
)
def test_calendar_windows_follow_local_clocks(tmp_path, clock, zone, start, now, end, month_end):
    clock.now = datetime.fromisoformat(start).timestamp() - 1
    limit = SpendLimit([Limit(1, "day", zone), Limit(3, "month", zone)], tmp_path / "a", clock=clock, lifetime=None)
    limit.reserve(1)
    assert refusal(limit, 1).frees_at == datetime.fromisoformat(start)
    clock.now += 1
    limit.reserve(1)
    clock.now = datetime.fromisoformat(now).timestamp()
    assert refusal(limit, 1).frees_at == datetime.fromisoformat(end)
    assert [balance.ends for balance in limit.balances()] == [datetime.fromisoformat(end), datetime.fromisoformat(month_end)]
    clock.now = datetime.fromisoformat(end).timestamp() - 1e-6
    refusal(limit, 1)
    clock.now = datetime.fromisoformat(end).timestamp()
    limit.reserve(1)


def test_a_rolling_window_frees_late_by_a_thousandth_at_most_and_never_early(open_limit, clock):
    limit = open_limit(Limit(1, timedelta(seconds=1000)))
    for second in range(10):
        clock.now = NOON + second * 100
        limit.settle(limit.reserve(0.1), 0.1)
    error = refusal(limit, 0.25)
    assert at(NOON + 1200) <= error.frees_at <= at(NOON + 1201)
    clock.now = NOON + 1199.9
    assert refusal(limit, 0.25).left == Decimal("0.2")
    clock.now = NOON + 1201
    limit.reserve(0.3)


@pytest.mark.slow
def test_an_hour_of_many_requests_keeps_few_rows(tmp_path, clock):
    limit = SpendLimit(Limit(10, timedelta(seconds=10)), tmp_path / "a", clock=clock)
    for _ in range(300):
        clock.now += 0.001
        limit.settle(limit.reserve(0.01), 0.01)
    rows = sqlite3.connect(tmp_path / "a").execute("SELECT count(*) FROM spend_step").fetchone()[0]
    assert rows <= 31
    assert used(limit) == [(3, 0)]


def test_money_counts_in_the_window_of_its_reservation(open_limit, clock):
    limit = open_limit([Limit(1, "day")], lifetime=None)
    token = limit.reserve(0.8)
    clock.now += DAY
    assert used(limit) == [(0, 0)]
    limit.reserve(1)
    assert limit.settle(token, 0.7).over == ()
    assert used(limit) == [(0, 1)]


def test_reservations_expire_and_late_settlements_still_count(open_limit, clock):
    limit = open_limit(Limit(1), lifetime=timedelta(minutes=10))
    token = limit.reserve(0.8)
    clock.now += 599.9
    assert refusal(limit, 0.3).frees_at == at(NOON + 600)
    clock.now = NOON + 600
    assert [(r.token, r.worst_case, r.made, r.late) for r in limit.reservations()] == [(token, Decimal("0.8"), at(NOON), False)]
    assert used(limit) == [(0, 0)]
    assert [r.late for r in limit.reservations()] == [True]
    other = limit.reserve(1)
    settled = limit.settle(token, 0.5)  # it did cost something
    assert (settled.late, settled.over) == (True, ("total, all keys",))
    assert used(limit) == [(Decimal("0.5"), 1)]
    assert refusal(limit, 0).left == 0
    limit.release(other)
    assert refusal(limit, 0.6).left == Decimal("0.5")
    assert limit.reservations() == ()


def test_without_a_lifetime_nothing_expires(open_limit, clock):
    limit = open_limit(Limit(1), lifetime=None)
    limit.reserve(0.8)
    clock.now += 50 * 365 * DAY
    assert refusal(limit, 0.3).frees_at is None


def test_a_cost_above_the_worst_case_is_recorded_and_said(open_limit, caplog):
    limit = open_limit(Limit(1))
    token = limit.reserve(0.5)
    other = limit.reserve(0.5)
    with caplog.at_level(logging.WARNING):
        settled = limit.settle(token, 0.75)
    assert (settled.beyond, settled.over) == (Decimal("0.25"), ("total, all keys",))
    assert "a request cost 0.75, 0.5 was reserved; exceeded: total, all keys" in caplog.text
    assert used(limit) == [(Decimal("0.75"), Decimal("0.5"))]
    assert refusal(limit, 0).left == 0
    limit.settle(other, 0)
    assert limit.balances()[0].left == Decimal("0.25")


def test_time_that_runs_backwards_opens_nothing(store, clock):
    """Two machines, one of whose clocks is a day behind."""
    behind = Clock(NOON - DAY)
    limits = [Limit(1, "day"), Limit(1, timedelta(hours=2), key="a"), Limit(1, key="b")]
    with SpendLimit(limits, store, clock=clock) as here, SpendLimit(limits, store, clock=behind) as there:
        there.settle(there.reserve(0.5), 0.5)  # yesterday's limit has a half left
        here.settle(here.reserve(1), 1)
        refusal(there, 0.1)
        behind.now += DAY / 2 - 1
        assert refusal(there, 0.1).frees_at == at(NOON + DAY / 2)
        clock.now -= DAY
        refusal(here, 0.1)
        clock.now = behind.now = NOON + DAY  # a rolling window's money does not count from the time of a late clock
        here.settle(here.reserve(0, "a"), 0)
        behind.now = NOON + DAY - 1.5 * HOUR
        there.settle(there.reserve(1, "a"), 1)
        clock.now = NOON + DAY + 2 * HOUR - 1
        refusal(here, 0.1, "a")
        clock.now = NOON + 2 * DAY  # nor does a lifetime
        here.settle(here.reserve(0, "b"), 0)
        behind.now = NOON + 2 * DAY - HOUR
        there.reserve(1, "b")
        clock.now = NOON + 2 * DAY + HOUR - 1
        refusal(here, 0.1, "b")


def test_levels_are_announced_once_in_a_window(store, clock):
    told = []
    limits = [Limit(100, "day"), Limit(1000)]
    with (
        SpendLimit(limits, store, clock=clock, on_notice=told.append) as one,
        SpendLimit(limits, store, clock=clock, on_notice=told.append) as two,
    ):
        token = one.reserve(Decimal("49.999999999"))
        assert told == []
        two.reserve(Decimal("0.000000001"))
        assert [(n.limit, n.level, n.amount, n.spent, n.reserved) for n in told] == [("day in UTC, all keys", 0.5, 100, 0, 50)]
        assert (told[0].at, told[0].ends) == (at(NOON), at(NOON + DAY / 2))
        one.release(token)
        two.reserve(49)
        assert len(told) == 1
        one.reserve(50)
        assert [n.level for n in told] == [0.5, 0.8, 0.95]
        clock.now += DAY
        one.settle(one.reserve(80), 80)
        assert [n.level for n in told] == [0.5, 0.8, 0.95, 0.5, 0.8]
        for _ in range(5):
            clock.now += DAY
            one.settle(one.reserve(90), 90)
        assert [n.level for n in told if n.limit == "total, all keys"] == [0.5]


def test_a_rolling_window_announces_a_level_once_in_its_length(open_limit, clock):
    told = []
    limit = open_limit(Limit(1, timedelta(seconds=100)), on_notice=lambda n: told.append((n.level, clock.now - NOON)))
    for _ in range(12):
        limit.settle(limit.reserve(0.6), 0.6)
        clock.now += 0.5
        for _ in range(3):
            limit.release(limit.reserve(0.3))
        clock.now += 100.5
    assert [t for level, t in told if level == 0.5] == [101.0 * i for i in range(12)]
    assert [t for level, t in told if level == 0.8] == [101.0 * i + 0.5 for i in range(12)]


def test_a_notice_that_fails_loses_no_token(open_limit, caplog):
    def fails(notice):
        raise OSError("no network")

    limit = open_limit(Limit(1), on_notice=fails)
    limit.settle(limit.reserve(1), 1)
    assert caplog.text.count("on_notice failed") == 3
    logged = open_limit(Limit(2, "day"))
    with caplog.at_level(logging.WARNING):
        logged.reserve(1)
    assert "day in UTC, all keys has reached 50% of 2" in caplog.text


def test_a_limit_may_be_changed(open_limit):
    open_limit(Limit(1)).reserve(1)
    higher = open_limit(Limit(3))
    token = higher.reserve(1)
    lower = open_limit(Limit(1.5))
    assert refusal(lower, 0).left == 0
    assert lower.settle(token, 1).over == ("total, all keys",)


def test_any_process_settles_under_any_configuration(open_limit, clock):
    token = open_limit([Limit(1, "day", "Asia/Tokyo"), Limit(1, timedelta(hours=1))]).reserve(1, "a")
    other = open_limit(Limit(7, "month"))
    assert other.settle(token, 0.5).over == ()
    assert used(open_limit([Limit(1, "day", "Asia/Tokyo"), Limit(1, timedelta(hours=1))])) == [(Decimal("0.5"), 0)] * 2


@pytest.mark.slow
def test_threads_never_pass_the_limit(open_limit):
    limit = open_limit([Limit(1), Limit(0.7, "day", each_key=True)])

    def spend(i):
        try:
            token = limit.reserve(0.01, f"{i % 2}")
        except SpendLimitReached:
            return 0
        limit.settle(token, 0.01)
        return 1

    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(spend, range(200))) == 100
    assert limit.balances("0")[-1].spent == 1


@pytest.mark.slow
def test_a_forked_child_shares_the_limit(open_limit):
    limit = open_limit(Limit(1))
    token = limit.reserve(0.5)
    child = os.fork()
    if child == 0:
        try:
            limit.settle(token, 0.25)
            limit.reserve(0.5)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert used(limit) == [(Decimal("0.25"), Decimal("0.5"))]
    limit.reserve(0.25)


def test_the_machines_clock_is_the_default(store):
    with SpendLimit(Limit(1, "day"), store) as limit:
        before = datetime.now(UTC)
        limit.reserve(1)
        (reservation,) = limit.reservations()
    assert abs(reservation.made - before) < timedelta(minutes=5)


@pytest.mark.parametrize(("fsync", "mode"), [(False, 1), (True, 2)])
def test_sqlite_writes_ahead(tmp_path, fsync, mode):
    limit = SpendLimit(Limit(1), f"sqlite:///{tmp_path}/a.db", fsync=fsync)
    with limit._ledger.database.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == mode


def test_a_store_that_is_locked_grants_nothing(tmp_path):
    from sqlalchemy.exc import OperationalError, TimeoutError

    limit = SpendLimit(Limit(1), tmp_path / "a", timeout=0.1)
    limit.reserve(0.5)
    other = sqlite3.connect(tmp_path / "a", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OperationalError, match="locked"):
        limit.reserve(0.5)
    other.execute("ROLLBACK")
    limit.reserve(0.5)
    first = limit._ledger.database.begin()
    with first, ThreadPoolExecutor(1) as pool, pytest.raises(TimeoutError, match="other transactions took longer than 0.1 s"):
        pool.submit(limit.reserve, 0).result()


def test_files_that_are_no_stores(tmp_path):
    from sqlalchemy.exc import DatabaseError, OperationalError

    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(DatabaseError, match="not a database"):
        SpendLimit(Limit(1), tmp_path / "text")
    other = sqlite3.connect(tmp_path / "busy", isolation_level=None)
    other.execute("CREATE TABLE a (b)")
    other.execute("BEGIN EXCLUSIVE")  # its journal mode cannot be changed now
    with pytest.raises(OperationalError, match="locked"):
        SpendLimit(Limit(1), tmp_path / "busy", timeout=0.1)
    other.execute("ROLLBACK")
    SpendLimit(Limit(1), tmp_path / "busy").reserve(1)
    for address in (tmp_path, f"sqlite:///{tmp_path}/a?mode=ro", "sqlite+aiosqlite:///a"):
        with pytest.raises(ValueError, match="store: expected a"):
            SpendLimit(Limit(1), address)


@pytest.mark.store
@pytest.mark.xdist_group("postgres")
def test_postgres_keeps_its_settings(postgres_url):
    with pytest.raises(ValueError, match="fsync: expected False for PostgreSQL"):
        SpendLimit(Limit(1), postgres_url, fsync=True)
    with (
        SpendLimit(Limit(1), f"{postgres_url}&options=-c%20work_mem=9MB", timeout=7) as limit,
        limit._ledger.database.begin() as connection,
    ):
        for name, value in (("work_mem", "9MB"), ("lock_timeout", "7s"), ("transaction_isolation", "read committed")):
            assert connection.exec_driver_sql(f"SHOW {name}").scalar() == value
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'p2l-engine\[postgres\]'"):
        SpendLimit(Limit(1), "postgresql+pg8000://a/b")


KILLED = """
import os, signal, sys
from p2l_engine.routing import Limit, SpendLimit
limit = SpendLimit(Limit(1), sys.argv[1], lifetime=None)
limit.settle(limit.reserve(0.5), 0.25)
limit.reserve(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_process_forgets_nothing(store):
    ended = subprocess.run([sys.executable, "-c", KILLED, store], check=False)
    assert ended.returncode == -9
    with SpendLimit(Limit(1), store, lifetime=None) as limit:
        assert used(limit) == [(Decimal("0.25"), Decimal("0.5"))]
        (left_over,) = limit.reservations()
        limit.release(left_over.token)
        assert limit.balances()[0].left == Decimal("0.75")


@pytest.mark.slow
def test_eight_killed_processes_of_64_threads_spend_the_limit_and_no_more(store, tmp_path, seed):
    limit, kills = (Decimal("1.5"), 6) if "postgres" in store else (Decimal(3), 15)
    bills = tmp_path / "bills"
    arguments = [sys.executable, "-m", "tests.support.spenders", store, bills, str(limit), str(kills), str(seed)]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    billed = {token: spenders.units(int(amount)) for token, amount in map(str.split, bills.read_text().splitlines())}
    assert sum(billed.values()) <= limit
    limits = [Limit(limit), Limit(limit, each_key=True)]
    with SpendLimit(limits, store, lifetime=None) as spending:
        left_over = spending.reservations()
        balances = spending.balances("key")
        known = sum(billed[token] for token in billed.keys() - {reservation.token for reservation in left_over})
        for balance in balances:
            assert balance.spent == known  # to the billionth
            assert balance.reserved == sum(reservation.worst_case for reservation in left_over)
        # Whatever is counted for requests that died is known to be theirs; what they cost may be settled later.
        for reservation in left_over:
            spending.settle(reservation.token, billed.get(reservation.token, 0))
        assert spending.balances("key")[0].spent == sum(billed.values())
        worst = spenders.units(spenders.MOST)
        while spending.balances("key")[0].left >= worst:
            spending.settle(spending.reserve(worst, "key"), worst)
        assert limit - worst < spending.balances("key")[0].spent <= limit
    notices = [line for line in ended.stdout.splitlines() if line.startswith("notice")]
    assert 0 < len(set(notices)) == len(notices) <= 6


@pytest.mark.slow
def test_routing_loads_no_database():
    code = "import sys; from p2l_engine import routing, SpendLimit; assert not {'sqlalchemy', 'sqlite3'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_a_process_that_is_always_busy_lets_others_pass(tmp_path):
    """Six threads that never pause, and a process of one thread: it gets its turn before fifty of theirs."""
    store, turns = tmp_path / "spend.sqlite", 30
    limit, started, done, made = SpendLimit(Limit(10**6), store), threading.Event(), threading.Event(), []

    def work():
        while not done.is_set():
            limit.release(limit.reserve(1))
            made.append(1)
            started.set()

    threads = [threading.Thread(target=work) for _ in range(6)]
    other = f"""
from p2l_engine.routing import Limit, SpendLimit
limit = SpendLimit(Limit(10**6), {str(store)!r})
print(flush=True)
for _ in range({turns}): limit.reserve(1)
"""
    for thread in threads:
        thread.start()
    try:
        started.wait()
        with subprocess.Popen([sys.executable, "-c", other], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            before = len(made)
            assert process.wait() == 0
        after = len(made)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    print(f"{(after - before) / turns:.1f} turns of the busy process for each of the other's")
    assert after - before < 50 * turns
