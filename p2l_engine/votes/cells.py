"""Parses the cells of a table of votes. Numbers may be written as text, as in csv files."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from p2l_engine.feedback import Outcome

WINNERS = {
    "model_a": Outcome.A,
    "model_b": Outcome.B,
    "tie": Outcome.TIE,
    "tie (bothbad)": Outcome.BOTH_BAD,
    "both_bad": Outcome.BOTH_BAD,
    "bothbad": Outcome.BOTH_BAD,
    # FastChat's logs
    "leftvote": Outcome.A,
    "rightvote": Outcome.B,
    "tievote": Outcome.TIE,
    "bothbad_vote": Outcome.BOTH_BAD,
}
PREFERENCES = ("preference_a", "preference_b")
# One column for each outcome, with a 1 in one of them (Kaggle's data of Chatbot Arena).
ONE_HOT = {"winner_model_a": Outcome.A, "winner_model_b": Outcome.B, "winner_tie": Outcome.TIE}
LABELS = ("winner", *PREFERENCES, *ONE_HOT)

Shares = list[tuple[float, float]]  # outcomes (or values) and their shares


class Label(NamedTuple):
    """The label columns, and how their cells are parsed."""

    columns: tuple[str, ...]
    parse: Callable[..., Shares]


class Unusable(ValueError):
    """Why a row cannot be used. reason: without the row's value, so that rows can be counted by it."""

    def __init__(self, reason: str, value: object = None) -> None:
        self.reason, self.value = reason, "" if value is None else f": got {value!r:.60}"
        super().__init__(reason)


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def label_of(found: set[str], values: bool) -> Label | None:
    """The first of the labels that a table with these columns has; None where it has none."""
    if values:
        return next((Label((name,), _value) for name in ("value", "score") if name in found), None)
    if "winner" in found:
        return Label(("winner",), _winner)
    if "preference_a" in found:
        return Label(("preference_a",), lambda p: _preference(p, Outcome.A, Outcome.B))
    if "preference_b" in found:
        return Label(("preference_b",), lambda p: _preference(p, Outcome.B, Outcome.A))
    return Label(tuple(ONE_HOT), _one_hot) if found >= set(ONE_HOT) else None


def _winner(value: Any) -> Shares:
    if not isinstance(value, str) or value not in WINNERS:
        raise Unusable(f"winner: expected one of {', '.join(WINNERS)}", value)
    return [(WINNERS[value], 1.0)]


def _one_hot(*cells: Any) -> Shares:
    flags = [{"true": 1.0, "false": 0.0}.get(str(cell).lower(), number(cell)) for cell in cells]
    if sorted(flags, key=str) != [0, 0, 1]:
        raise Unusable(f"{', '.join(ONE_HOT)}: expected a 1 and two 0", list(cells))
    return [(list(ONE_HOT.values())[flags.index(1)], 1.0)]


def _preference(value: Any, better: Outcome, other: Outcome) -> Shares:
    p = number(value)
    if p is None or not 0 <= p <= 1:
        raise Unusable("preference: expected a probability in [0, 1]", value)
    return [(better, p), (other, 1.0 - p)]


def _value(value: Any) -> Shares:
    found = number(value)
    if found is None:
        raise Unusable("value: expected a finite number", value)
    return [(found, 1.0)]


def weight_of(value: Any) -> float:
    """At least 0."""
    found = number(value)
    if found is None or found < 0:
        raise Unusable("weight: expected a finite number >= 0", value)
    return found


def category_of(value: Any) -> str:
    """A prompt's category; "none" for prompts without."""
    return "none" if value in (None, "") else str(value)


def seconds_of(value: Any) -> float:
    """Since 1970; dates and times without a zone are in UTC."""
    try:
        if isinstance(value, str) and number(value) is None:
            value = datetime.fromisoformat(value)
        elif isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day, tzinfo=UTC)
        if isinstance(value, datetime):
            # Without a zone: UTC, so that a split by time is the same on every machine.
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise Unusable("timestamp: expected seconds since 1970 or ISO 8601", value) from None
    found = number(value)
    if found is None:
        raise Unusable("timestamp: expected seconds since 1970 or ISO 8601", value)
    return found
