"""The window that a spend limit holds for: all time, a calendar day or month of a time zone, or a rolling length of time.

Times are whole microseconds since 1970 in UTC.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from fractions import Fraction
from functools import lru_cache
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECOND = 10**6
LONGEST = timedelta(days=36525)
STEPS = 1000  # money leaves a rolling window in steps of a thousandth of it: late by at most one step, never early


@dataclass(frozen=True, slots=True)
class Window:
    """zone: of a day or a month; length: microseconds, of a rolling window."""

    kind: Literal["total", "day", "month", "rolling"]
    zone: str = "UTC"
    length: int = 0

    @classmethod
    def of(cls, given: str | timedelta, zone: str | None = None) -> Window:
        """From "total", "day", "month" or a timedelta; zone: an IANA name for days and months (None: UTC)."""
        if given == "day" or given == "month":
            _zone(zone or "UTC")
            return cls("day" if given == "day" else "month", zone or "UTC")
        if zone is not None:
            raise ValueError(f"zone: expected None for the window {given!r}, got {zone!r}")
        if given == "total":
            return cls("total")
        if isinstance(given, timedelta) and timedelta(0) < given <= LONGEST:
            return cls("rolling", length=given // timedelta(microseconds=1))
        raise ValueError(f"window: expected 'total', 'day', 'month' or a timedelta of up to 100 years, got {given!r}")

    @classmethod
    @lru_cache(1000)
    def parse(cls, text: str) -> Window:
        """From what ``str`` gives."""
        if found := re.fullmatch(r"(day|month) in (\S+)", text):
            return cls.of(found[1], found[2])
        if found := re.fullmatch(r"rolling (\S+) s", text):
            return cls("rolling", length=int(Fraction(found[1]) * SECOND))
        return cls.of(text)

    def __str__(self) -> str:
        if self.kind == "rolling":
            return f"rolling {self.length // SECOND}.{self.length % SECOND:06d}".rstrip("0").rstrip(".") + " s"
        return "total" if self.kind == "total" else f"{self.kind} in {self.zone}"

    def start(self, at: int) -> int:
        """When the calendar window that ``at`` is in began; 0 for other windows."""
        if self.kind not in ("day", "month"):
            return 0
        local = to_datetime(at).astimezone(_zone(self.zone))
        return self._first(local.year, local.month, local.day if self.kind == "day" else 1)

    def end(self, at: int) -> datetime | None:
        """When the calendar window that ``at`` is in ends; None for other windows."""
        if self.kind not in ("day", "month"):
            return None
        local = to_datetime(at).astimezone(_zone(self.zone))
        if self.kind == "day":
            after = local.date() + timedelta(days=1)
            return to_datetime(self._first(after.year, after.month, after.day))
        return to_datetime(self._first(local.year + local.month // 12, local.month % 12 + 1, 1))

    def leaves(self, at: int) -> int | None:
        """When money of ``at`` leaves a rolling window; None for other windows."""
        if self.kind != "rolling":
            return None
        step = max(1, self.length // STEPS)
        return -(-(at + self.length) // step) * step

    def _first(self, year: int, month: int, day: int) -> int:
        """The first instant of a local date. Where clocks skip midnight, it is the instant at which they do."""
        return (datetime(year, month, day, tzinfo=_zone(self.zone)) - EPOCH) // timedelta(microseconds=1)


def to_datetime(at: int) -> datetime:
    """Microseconds since 1970 as a time in UTC."""
    return EPOCH + timedelta(microseconds=at)


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError, TypeError, AttributeError) as error:
        raise ValueError(
            f"zone: expected the IANA name of a time zone such as 'Europe/Berlin', got {name!r} ({error}); "
            "where none is found, install the package tzdata"
        ) from None
