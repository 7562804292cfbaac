"""Windows of spend limits: calendar days and months of every time zone, against the local clock itself."""

from __future__ import annotations

from datetime import UTC, timedelta
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2l_engine.spending.windows import EPOCH, Window, to_datetime
from tests.support.cases import slow_but

MICROSECOND = timedelta(microseconds=1)
ZONES = sorted(available_timezones() - {"localtime", "Factory"})
JUMPING = (
    "America/Sao_Paulo",  # at midnight
    "America/Havana",
    "Asia/Beirut",
    "Africa/Cairo",
    "Asia/Gaza",
    "Pacific/Apia",  # by a whole day
    "Pacific/Kwajalein",
    "Australia/Lord_Howe",  # by half an hour
    "Antarctica/Troll",  # by two hours
    "America/Godthab",
)
times = st.integers(0, 2**31 - 1).flatmap(lambda second: st.integers(second * 10**6, second * 10**6 + 999_999))


def transitions(zone):
    """Microseconds around which the local clock jumps, from 1971 on."""
    found, at, last = [], EPOCH + timedelta(days=365), None
    while at.year < 2030:
        offset = at.astimezone(zone).utcoffset()
        if last is not None and offset != last:
            found.append((at - EPOCH) // MICROSECOND)
        last, at = offset, at + timedelta(hours=6)
    return found


def check(kind, name, at):
    window = Window.of(kind, name)
    start, end = window.start(at), (window.end(at) - EPOCH) // MICROSECOND
    zone = UTC if name == "UTC" else ZoneInfo(name)

    def date(at):
        local = to_datetime(at).astimezone(zone)
        return (local.year, local.month, local.day if kind == "day" else 1)

    assert start <= at < end
    assert date(start) == date(end - 1) == date(at)
    assert date(start - 1) < date(at) < date(end)
    assert window.start(start) == window.start(end - 1) == start
    assert window.start(end) == end
    assert Window.parse(str(window)) == window


@pytest.mark.slow
@given(st.sampled_from(["day", "month"]), st.sampled_from(ZONES), times)
def test_a_window_is_a_local_date_from_its_first_to_its_last_instant(kind, name, at):
    check(kind, name, at + 2 * 86_400 * 10**6)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(JUMPING[:1], JUMPING))
def test_windows_hold_around_every_jump_of_the_clock(name):
    found = transitions(ZoneInfo(name))
    assert found
    for jump in found[-40:]:
        for hours in range(-30, 31, 5):
            check("day", name, jump + hours * 3600 * 10**6)
        check("month", name, jump)


@pytest.mark.slow
@given(st.integers(1, 36525 * 86_400 * 10**6), times)
def test_a_rolling_window_keeps_money_for_its_length_and_little_longer(length, at):
    window = Window.of(timedelta(microseconds=length))
    leaves = window.leaves(at)
    assert at + length <= leaves < at + length + max(1, length / 1000)
    assert leaves <= window.leaves(at + 1)
    assert (window.start(at), window.end(at)) == (0, None)
    assert Window.parse(str(window)) == window
