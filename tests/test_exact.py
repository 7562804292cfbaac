"""Sums of amounts in units are exact, against fractions."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from p2l_engine.routing import exact

amounts = st.floats(allow_nan=False, allow_infinity=False)


@given(parts=st.lists(amounts, max_size=8))
def test_sums_of_amounts_are_exact(parts):
    total, count = sum(map(Fraction, parts)), sum(map(exact.units, parts))
    assert Fraction(count, exact.UNIT) == total
    assert sum(map(Fraction, exact.summands(count))) == total
    most = Fraction(sys.float_info.max)
    assert exact.amount(count) == float(min(max(total, -most), most))
    if abs(total) < most:
        below = exact.at_most(count)
        assert Fraction(below) <= total < Fraction(math.nextafter(below, math.inf))
