"""Logged prompts by group and period: whose they are, when they came, and which of them belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from p2l_engine.tables.layouts import read_prompts
from p2l_engine.tables.rows import listed
from p2l_engine.votes.cells import Unusable, seconds_of

Period = Literal["day", "week", "month"]
PERIODS: tuple[Period, ...] = get_args(Period)
TIMES = ("time", "timestamp")  # columns, the first that is there
EXPORTED = "decisions.parquet"  # in a folder that ``p2l-engine log export`` wrote
ALL, NONE = "all", "none"
FIRST, LAST = (datetime(year, 1, day, tzinfo=UTC).timestamp() for year, day in ((1000, 2), (9999, 1)))


@dataclass(frozen=True, slots=True)
class Traffic:
    """N prompts in the order of their time. group, period [N]: names; session [N]: numbers, of prompts that belong together.
    skipped: rows without a prompt, by reason."""

    prompts: tuple[tuple[str, ...], ...]
    group: tuple[str, ...]
    period: tuple[str, ...]
    session: npt.NDArray[np.int64]
    skipped: dict[str, int]


def read_traffic(
    path: str | Path, by: str | None, period: Period, column: str | None = None, csv_escape: str | None = None
) -> Traffic:
    """The prompts of a table, or of a folder that ``p2l-engine log export`` wrote.

    column: of the prompts, see ``layouts.prompt_column``. by: the column whose values are the groups, None: one group; rows
    without a value are the group "none". The time is the column time or timestamp (UTC where it has no zone). Prompts of one
    group with the same value in the column session belong together; where there is none, or no value, those with the same
    first turn. csv_escape: see ``tables.find.find_each``. Raises ValueError for columns that are missing, a time that cannot be
    read, and where no row has a prompt.
    """
    if period not in PERIODS:
        raise ValueError(f"period: expected one of {', '.join(PERIODS)}, got {period!r}")
    folder = Path(str(path))
    where = folder / EXPORTED if (folder / EXPORTED).is_file() else path
    also = {*TIMES, "session"} | ({by} if by is not None else set())
    table, prompts = read_prompts(where, column, also, csv_escape=csv_escape)
    time = next((name for name in TIMES if name in table.columns), None)
    missing = [name for name in (prompts.column, by) if name is not None and name not in table.columns]
    missing += [] if time else [" or ".join(TIMES)]
    if missing or time is None:
        raise ValueError(f"{table.shown}: expected the columns {listed(missing)}; it has {listed(table.names)}")
    for index, row in sorted(table.invalid.items()):
        raise ValueError(f"{table.located(index)}: {row.why}: {row.text}")
    blank: list[Any] = [None] * len(table)
    sessions = table.columns.get("session", blank)
    groups = blank if by is None else table.columns[by]
    rows: list[tuple[float, tuple[str, ...], str, object]] = []
    skipped = 0
    for i, cell in enumerate(table.columns[prompts.column]):
        if cell is None:
            skipped += 1
            continue
        try:
            turns, seconds = prompts.turns(cell), seconds_of(table.columns[time][i])
            period_of(seconds, period)
        except (Unusable, ValueError) as error:
            raise ValueError(f"{table.located(i)}: {error}") from None
        group = ALL if by is None else NONE if groups[i] in (None, "") else str(groups[i])
        opening = ("", turns[0]) if sessions[i] in (None, "") else (str(sessions[i]),)
        rows.append((seconds, turns, group, opening))
    if not rows:
        raise ValueError(f"{table.shown}: expected prompts, and no row has one: were texts logged (log.texts)?")
    rows.sort(key=lambda row: row[0])
    number: dict[object, int] = {}
    session = [number.setdefault((group, opening), len(number)) for _, _, group, opening in rows]
    return Traffic(
        tuple(row[1] for row in rows),
        tuple(row[2] for row in rows),
        tuple(period_of(row[0], period) for row in rows),
        np.array(session, np.int64),
        {"no prompt": skipped} if skipped else {},
    )


def period_of(seconds: float, period: Period) -> str:
    """The name of the day (2026-01-31), ISO week (2026-W05) or month (2026-01) of a time in seconds since 1970, in UTC. Names
    of one kind sort by time. Raises ValueError for times outside the years 1000 to 9999, as of milliseconds."""
    if not FIRST <= seconds < LAST:
        raise ValueError(
            f"time: expected seconds since 1970, in the years 1000 to 9999, got {seconds:.15g}: are these milliseconds?"
        )
    when = datetime.fromtimestamp(seconds, UTC)
    if period == "week":
        year, week, _ = when.isocalendar()
        return f"{year:04}-W{week:02}"
    return when.strftime("%Y-%m-%d" if period == "day" else "%Y-%m")


def rows_of(traffic: Traffic) -> dict[tuple[str, str], npt.NDArray[np.int64]]:
    """The rows of each group and period, groups by size, periods by time."""
    found: dict[tuple[str, str], list[int]] = {}
    for i, key in enumerate(zip(traffic.group, traffic.period, strict=True)):
        found.setdefault(key, []).append(i)
    sizes = Counter(traffic.group)
    keys = sorted(found, key=lambda key: (-sizes[key[0]], *key))
    return {key: np.array(found[key], np.int64) for key in keys}


def consecutive(keys: Sequence[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Each group's periods and the next one that has prompts."""
    return [(one, other) for one, other in pairwise(keys) if one[0] == other[0]]
