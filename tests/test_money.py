"""Exact money against rationals."""

from __future__ import annotations

import decimal
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2l_engine.spending import money

amounts = st.one_of(
    st.floats(0, 9e9),
    st.floats(0, 1e-6),
    st.integers(0, 9 * 10**9),
    st.fractions(0, 9 * 10**9),
    st.decimals(0, 9 * 10**9, allow_nan=False),
    st.builds(lambda digits, places: Decimal(digits).scaleb(-places), st.integers(0, 10**9), st.integers(0, 400)),
    st.floats(0, 100, width=32).map(np.float32),
)


@pytest.mark.slow
@given(amounts, st.integers(1, 40))
def test_amounts_round_up_and_down_to_billionths(amount, precision):
    exact = Fraction(str(amount)) * 10**9
    with decimal.localcontext(prec=precision):  # the caller's context rounds nothing
        up, down = money.round_up("a", amount), money.round_down("a", amount)
        assert up - 1 < exact <= up
        assert down <= exact < down + 1
        assert Fraction(money.units(up)) == Fraction(up, 10**9)
        assert Fraction(money.shown(up)) == Fraction(up, 10**9)


def test_a_float_is_the_decimal_that_it_prints_as():
    assert money.round_up("a", 0.1) == money.round_down("a", 0.1) == 10**8
    assert money.round_up("a", 0.1 + 0.2) == 3 * 10**8 + 1
    assert money.shown(10**8) == "0.1"
    assert money.shown(30 * 10**9) == "30"
    assert money.shown(0) == "0"
