"""Exact money: whole billionths of the currency's unit, as 64-bit integers."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

Money: TypeAlias = "int | float | Decimal | Fraction"

PARTS = 10**9  # of one unit: a price with three decimals for a million tokens is whole for every token
MOST = 2**63 - 1  # what a database's integer holds: 9.2 billion units


def round_up(name: str, amount: Money) -> int:
    """The amount in billionths, rounded up. Raises ValueError unless it is a number from 0 to 9.2 billion units."""
    numerator, denominator = _ratio(name, amount)
    return -(-numerator * PARTS // denominator)


def round_down(name: str, amount: Money) -> int:
    """The amount in billionths, rounded down."""
    numerator, denominator = _ratio(name, amount)
    return numerator * PARTS // denominator


def units(billionths: int) -> Decimal:
    """The exact amount in units."""
    return Decimal(f"{billionths}E-9")  # from text: a context's precision does not round it


def shown(billionths: int) -> str:
    """The amount in units, without trailing zeros."""
    text = f"{units(billionths):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _ratio(name: str, amount: Any) -> tuple[int, int]:
    """The amount as a fraction. A float is the shortest decimal that prints as it: 0.1 is one tenth."""
    number = isinstance(amount, int | float | Decimal | Fraction | np.integer | np.floating) and not isinstance(amount, bool)
    if isinstance(amount, Decimal):
        number = amount.is_finite()
    # Compared as it is: a Decimal's exponent may ask for gigabytes of digits.
    if not number or not 0 <= amount <= MOST // PARTS:
        raise ValueError(f"{name}: expected an amount from 0 to {MOST // PARTS:,} units, got {amount!r}")
    if isinstance(amount, float | np.floating):
        return Decimal(str(amount)).as_integer_ratio()
    if isinstance(amount, Decimal) and amount.adjusted() < -30:
        return int(amount > 0), 10**30  # rounds like it
    exact = Fraction(int(amount)) if isinstance(amount, int | np.integer) else Fraction(amount)
    return exact.numerator, exact.denominator
