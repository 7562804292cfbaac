"""One limit on spent money: how much, in which window of time, for whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from p2l_engine.spending import money
from p2l_engine.spending.money import Money
from p2l_engine.spending.windows import Window


@dataclass(frozen=True, slots=True)
class Limit:
    """At most this much money in a window of time.

    amount: units of the currency, rounded down to a billionth. window: "total"; "day" or "month" of the calendar in ``zone``
    (an IANA name; None: UTC), which begin at local midnight; or a timedelta, over every stretch of that length. key: only
    reservations of this key count; each_key: every key has this amount for itself; neither: all reservations count together.
    Raises ValueError for other arguments.
    """

    amount: Money
    window: Literal["total", "day", "month"] | timedelta = "total"
    zone: str | None = None
    key: str | None = None
    each_key: bool = False
    billionths: int = field(init=False, repr=False)
    span: Window = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "billionths", money.round_down("amount", self.amount))
        object.__setattr__(self, "span", Window.of(self.window, self.zone))
        if self.key is not None and self.each_key:
            raise ValueError(f"each_key: expected False for a limit of the key {self.key!r}, got True")
        check_key(self.key)

    def account(self, key: str | None) -> str | None:
        """The account of a reservation of this key; None where the limit is another key's.

        Raises ValueError where each key has its own account and there is none.
        """
        if self.each_key and key is None:
            raise ValueError(f"key: expected a string, since each key has its own limit ({self.span}), got None")
        if self.key is None and not self.each_key:
            return f"{self.span}, all keys"
        return f"{self.span}, key {key!r}" if self.each_key or key == self.key else None

    def holds_for(self, account: str) -> bool:
        """Whether it bounds this account."""
        return account.startswith(f"{self.span}, key ") if self.each_key else account == self.account(self.key)


def check_key(key: object) -> None:
    """Raises ValueError unless it is a string or None."""
    if key is not None and not isinstance(key, str):
        raise ValueError(f"key: expected a string or None, got {key!r}")
