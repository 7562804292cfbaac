"""What a SpendLimit is asked for, where several calls share a transaction: see ``SpendLimit.together``."""

from __future__ import annotations

from dataclasses import dataclass

from p2l_engine.spending.money import Money


@dataclass(frozen=True, slots=True)
class Reserve:
    """As the arguments of ``SpendLimit.reserve``."""

    worst_case: Money
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Settle:
    """As the arguments of ``SpendLimit.settle``."""

    token: str
    actual: Money
