"""The ledger of spend limits: what each limit's account has spent and holds reserved, in a database that processes share.

Amounts are billionths of the unit, times microseconds since 1970, both whole numbers. Every transaction locks its accounts
first, in the order of their names, so that none waits for another in a circle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection

from p2l_engine.spending import ledger_tables as sql
from p2l_engine.spending.books import Account, Locked
from p2l_engine.spending.database import Database
from p2l_engine.spending.windows import Window

BEFORE_ALL = -(2**62)  # the start of an account's window before its first transaction


class Ledger:
    """clock: seconds since 1970; None: of this machine for SQLite, of the server for PostgreSQL."""

    def __init__(self, database: Database, clock: Callable[[], float] | None) -> None:
        self.database = database
        self._clock = clock or (time.time if database.is_sqlite else None)

    @contextmanager
    def transaction(self, windows: Mapping[str, Window], tokens: Sequence[str] = ()) -> Iterator[Locked]:
        """A transaction on the accounts of these windows, by name, and on those of these reservations, locked until it ends.

        Accounts of windows that are missing are made.
        """
        empty: dict[str, Any] = {"start": BEFORE_ALL, "seen": 0, "spent": 0, "held": 0, "due": None, "notices": {}}
        for _ in range(2):
            with self.database.begin() as connection:
                rows = self._lock(connection, list(windows), tokens)
                accounts = {row[0]: Account(row[0], Window.parse(row[1]), *row[2:8]) for row in rows}
                if all(name in accounts for name in windows):
                    now = _microseconds(self._clock()) if self._clock else max((row[8] for row in rows), default=0)
                    locked = Locked(connection, accounts, tokens, now)
                    yield locked
                    locked.save()
                    return
            missing = [{"name": name, "span": str(window), **empty} for name, window in sorted(windows.items())]
            self.database.insert_missing(sql.ACCOUNT, missing)
        raise RuntimeError(f"spend_account: expected rows named {sorted(windows)}, which another program has deleted")

    def open(self) -> list[Any]:
        """The rows of the reservations that are neither settled nor released, the oldest first: one for each account."""
        with self.database.begin() as connection:
            return list(connection.execute(sql.OPEN))

    def _lock(self, connection: Connection, names: Sequence[str], tokens: Sequence[str]) -> list[Any]:
        if not tokens:
            which, arguments = sql.BY_NAME, {"names": names}
        elif not names:
            which, arguments = sql.BY_TOKEN, {"tokens": tokens}
        else:
            which, arguments = sql.BY_BOTH, {"names": names, "tokens": tokens}
        return list(connection.execute(which if self._clock else which.add_columns(sql.SERVER_TIME), arguments))


def _microseconds(seconds: float) -> int:
    if not 0 <= seconds < 2.5e11:  # the year 9892
        raise ValueError(f"clock: expected seconds since 1970, got {seconds!r}")
    return int(seconds * 1_000_000)
