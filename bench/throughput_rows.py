"""The rows of bench.throughput, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line of the table.

    precision: the engine's dtype, or the other's; lengths: 5%, 25%, 50%, 75%, 95% and mean of the prompts' tokens, the
    template's among them; seconds: median of the rounds, and the fastest and slowest; cpu_seconds: the median of CPU time, of
    all threads; times_engine: prompts per second over those of the engine in its first dtype; after_theta: seconds of routing
    as a share of the engine's; gib: peak of the device's memory; largest_difference: of theta to the reference's, with theta's
    standard deviation; off: of a peer's theta, as in ``peers.expected``.
    """

    model: str
    path: str
    precision: str
    prompts: int
    tokens: int
    lengths: str
    seconds: float
    fastest: float
    slowest: float
    cpu_seconds: float
    prompts_per_s: float
    tokens_per_s: float
    times_reference: float
    times_engine: float
    utilisation: float | None
    after_theta: float | None = None
    elsewhere: float | None = None
    gib: float | None = None
    largest_difference: float | None = None
    deviation: float | None = None
    off: float | None = None


def table(name: str, rows: Sequence[Row]) -> Table:
    shown = Table(title=name, title_justify="left")
    for column in ("", "prompts", "prompts/s", "tokens/s", "x ref.", "x engine", "utilised", "after theta", "elsewhere", "GiB"):
        shown.add_column(column, justify="left" if not column else "right")
    for r in rows:
        percent = [None if x is None else f"{100 * x:.1f}%" for x in (r.utilisation, r.after_theta, r.elsewhere)]
        shown.add_row(
            f"{r.path} {r.precision}", f"{r.prompts:,}", f"{r.prompts_per_s:,.1f}", f"{r.tokens_per_s:,.0f}",
            f"{r.times_reference:.2f}", f"{r.times_engine:.2f}", *percent, None if r.gib is None else f"{r.gib:.1f}",
        )  # fmt: skip
    return shown
