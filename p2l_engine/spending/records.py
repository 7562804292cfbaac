"""What a SpendLimit tells: notices, settlements, balances, reservations. Amounts are exact, times in UTC."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class Notice:
    """A limit whose spent and reserved money has reached ``level`` (a share) of its amount for the first time in its window.

    limit: its name. ends: when its window does; None for totals and rolling windows.
    """

    limit: str
    level: float
    amount: Decimal
    spent: Decimal
    reserved: Decimal
    at: datetime
    ends: datetime | None


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a settlement found. beyond: by how much the cost was above the reservation; late: whether the reservation no longer
    counted towards one of its limits; over: the names of the limits that are exceeded now (by one of these two, or because the
    limit was lowered)."""

    spent: Decimal
    reserved: Decimal
    beyond: Decimal
    late: bool
    over: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Balance:
    """A limit in its current window. amount: None where no limit holds for the key. left: the largest reservation that fits.
    ends: when a calendar window does."""

    limit: str
    amount: Decimal | None
    spent: Decimal
    reserved: Decimal
    left: Decimal | None
    ends: datetime | None


@dataclass(frozen=True, slots=True)
class Reservation:
    """One that is neither settled nor released: its request is running, or its process died. limits: those that it was made in;
    late: whether it no longer counts towards one of them (see ``Settlement``)."""

    token: str
    limits: tuple[str, ...]
    worst_case: Decimal
    made: datetime
    late: bool
