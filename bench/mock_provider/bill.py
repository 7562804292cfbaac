"""What a provider charges for: one entry for each request, exact."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple


class Price(NamedTuple):
    """USD for a million tokens: input, output, input from the cache."""

    usd_per_m_in: Fraction
    usd_per_m_out: Fraction
    usd_per_m_cached: Fraction

    @classmethod
    def read(cls, usd_in: float | str, usd_out: float | str, usd_cached: float | str | None = None) -> Price:
        """Exact: 0.1 is a tenth. Without a price of its own, cached input costs as much as other input."""
        exact = [Fraction(Decimal(str(usd))) for usd in (usd_in, usd_out, usd_in if usd_cached is None else usd_cached)]
        return cls(*exact)


class Entry(NamedTuple):
    """What one request was charged for; no tokens at all where it failed before the first one.

    end: "answered"; "left": the client went away before the end; "cut": the provider broke off after the first byte;
    "failed": an error before the first token. usage_told: whether the client was sent these counts.
    user: whom the request named, in ``user`` or, in Anthropic's API, ``metadata.user_id``.
    """

    id: int
    api: str
    model: str
    tokens_in: int  # cached ones included
    tokens_cached: int
    tokens_out: int  # those that were sent
    streamed: bool
    status: int | None  # None: no status was sent
    end: str
    usage_told: bool
    fault: str | None
    user: str | None


class Bill:
    """Entries in the order in which the requests ended. prices: by model; other models cost nothing."""

    def __init__(self, prices: Mapping[str, Price]) -> None:
        self.prices = dict(prices)
        self.entries: list[Entry] = []

    def usd(self, entry: Entry) -> Fraction:
        """What an entry costs."""
        if entry.model not in self.prices:
            return Fraction(0)
        price = self.prices[entry.model]
        fresh = entry.tokens_in - entry.tokens_cached
        parts = (
            fresh * price.usd_per_m_in + entry.tokens_cached * price.usd_per_m_cached + entry.tokens_out * price.usd_per_m_out
        )
        return parts / 1_000_000

    @property
    def total(self) -> Fraction:
        """USD of all entries."""
        return sum(map(self.usd, self.entries), Fraction(0))

    def by_id(self) -> dict[int, Entry]:
        """Entries by the request's id."""
        return {entry.id: entry for entry in self.entries}

    def json(self) -> dict[str, Any]:
        """As a JSON object; USD are exact, as fractions such as "3/2000"."""
        total, entries = Fraction(0), []
        for entry in self.entries:
            usd = self.usd(entry)
            total += usd
            entries.append({**entry._asdict(), "usd": str(usd)})
        return {"total": str(total), "entries": entries}
