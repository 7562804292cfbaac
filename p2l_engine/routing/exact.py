"""Amounts as whole multiples of the smallest float, so that their sums are exact."""

from __future__ import annotations

import math
import sys

UNIT = 1 << 1074  # an amount of 1
MOST = int(sys.float_info.max) * UNIT


def units(amount: float) -> int:
    """An amount in whole multiples of 1 / UNIT; exact."""
    numerator, denominator = amount.as_integer_ratio()
    return numerator << (UNIT.bit_length() - denominator.bit_length())  # the denominator is a power of two, as UNIT is


def amount(count: int) -> float:
    """The finite amount nearest to so many units."""
    return min(max(count, -MOST), MOST) / UNIT


def at_most(count: int) -> float:
    """The largest amount of no more than so many units."""
    nearest = amount(count)
    return nearest if units(nearest) <= count else math.nextafter(nearest, -math.inf)


def summands(count: int) -> list[float]:
    """Amounts whose exact sum is so many units."""
    parts = []
    while count:
        parts.append(amount(count))
        count -= units(parts[-1])
    return parts
