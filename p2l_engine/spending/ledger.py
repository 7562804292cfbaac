"""The ledger of spend limits: what each limit's account has spent and holds reserved, in a database that processes share.

Amounts are billionths of the unit, times microseconds since 1970, both whole numbers. Every transaction locks its accounts
first, in the order of their names, so that none waits for another in a circle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, Table, insert, update

from p2l_engine.spending import ledger_tables as sql
from p2l_engine.spending.database import Database
from p2l_engine.spending.windows import Window

BEFORE_ALL = -(2**62)  # the start of an account's window before its first transaction


@dataclass(slots=True)
class Account:
    """A limit's account, locked; the fields are the columns of its row."""

    name: str
    window: Window
    start: int
    seen: int
    spent: int
    held: int
    due: int | None
    notices: dict[str, int]

    @property
    def used(self) -> int:
        """What counts towards the limit: spent, and reserved."""
        return self.spent + self.held

    def add_due(self, leaves: int | None) -> None:
        """Something leaves the account then."""
        if leaves is not None:
            self.due = leaves if self.due is None else min(self.due, leaves)


class Ledger:
    """clock: seconds since 1970; None: of this machine for SQLite, of the server for PostgreSQL."""

    def __init__(self, database: Database, clock: Callable[[], float] | None) -> None:
        self.database = database
        self._clock = clock or (time.time if database.is_sqlite else None)

    @contextmanager
    def accounts(self, windows: Mapping[str, Window]) -> Iterator[Books]:
        """A transaction on these accounts, which are up to date and locked until it ends; missing ones are made."""
        empty: dict[str, Any] = {"start": BEFORE_ALL, "seen": 0, "spent": 0, "held": 0, "due": None, "notices": {}}
        for _ in range(2):
            with self.database.begin() as connection:
                rows = self._lock(connection, sql.BY_NAME, {"names": list(windows)})
                if len(rows) == len(windows):
                    books = self._books(connection, rows)
                    yield books
                    books.save()
                    return
            missing = [{"name": name, "span": str(window), **empty} for name, window in sorted(windows.items())]
            self.database.insert_missing(sql.ACCOUNT, missing)
        raise RuntimeError(f"spend_account: expected rows named {sorted(windows)}, which another program has deleted")

    @contextmanager
    def reservation(self, token: str) -> Iterator[Books]:
        """A transaction on the accounts of a reservation; on none where there is no such reservation."""
        with self.database.begin() as connection:
            books = self._books(connection, self._lock(connection, sql.BY_TOKEN, {"token": token}))
            yield books
            books.save()

    def open(self) -> list[Any]:
        """The rows of the reservations that are neither settled nor released, the oldest first: one for each account."""
        with self.database.begin() as connection:
            return list(connection.execute(sql.OPEN))

    def _lock(self, connection: Connection, which: Select[Any], arguments: dict[str, Any]) -> list[Any]:
        return list(connection.execute(which if self._clock else which.add_columns(sql.SERVER_TIME), arguments))

    def _books(self, connection: Connection, rows: list[Any]) -> Books:
        accounts = {row[0]: Account(row[0], Window.parse(row[1]), *row[2:8]) for row in rows}
        now = _microseconds(self._clock()) if self._clock else max((row[8] for row in rows), default=0)
        # A clock that runs behind another's, or is set back, must not give money back: time stands still until it catches up.
        now = max([now, *(account.seen for account in accounts.values())])
        books = Books(connection, accounts, now)
        books.forget()
        return books


class Books:
    """Some accounts, locked by a transaction, at the time ``now``."""

    def __init__(self, connection: Connection, accounts: dict[str, Account], now: int) -> None:
        self.accounts, self.now, self._connection = accounts, now, connection

    def forget(self) -> None:
        """Begins new windows, and takes out what has left them: expired reservations, the oldest of rolling windows."""
        for account in self.accounts.values():
            account.seen = self.now
            start = account.window.start(self.now)
            if start > account.start:
                self._add(sql.PAST, {"account": account.name, "start": account.start}, account.spent)
                account.start, account.spent, account.held, account.notices = start, 0, 0, {}
            if account.due is None or account.due > self.now:
                continue
            which = {"of": account.name, "now": self.now, "began": account.start}
            expired = self._connection.execute(sql.EXPIRED, which)
            account.held -= sum(hold.worst for hold in expired if hold.start == account.start)
            self._connection.execute(sql.EXPIRE, which)
            if account.window.kind == "rolling":
                account.spent -= int(self._connection.scalar(sql.OLD_STEPS, which) or 0)
                self._connection.execute(sql.DROP_STEPS, which)
            account.due = self._connection.scalar(sql.DUE, which)

    def hold(self, token: str, worst: int, lifetime: int | None) -> None:
        """Reserves the amount in every account."""
        expires = None if lifetime is None else self.now + lifetime
        rows = []
        for account in self.accounts.values():
            leaves = min((at for at in (expires, account.window.leaves(self.now)) if at is not None), default=None)
            row = {"token": token, "account": account.name, "start": account.start, "made": self.now, "worst": worst}
            rows.append({**row, "leaves": leaves, "expired": False})
            account.held += worst
            account.add_due(leaves)
        self._connection.execute(sql.RESERVE, rows)

    def settle(self, token: str, actual: int) -> tuple[int, bool] | None:
        """Replaces a reservation by what was spent, in the windows that it was made in.

        Returns the amount that was reserved, and whether it had left a window or expired; None where there is no such
        reservation.
        """
        holds = self._connection.execute(sql.HOLDS, {"token": token}).all()
        for hold in holds:
            account = self.accounts[hold.account]
            leaves = account.window.leaves(hold.made)
            if hold.start != account.start:
                self._add(sql.PAST, {"account": account.name, "start": hold.start}, actual)
                continue
            if not hold.expired:
                account.held -= hold.worst
            if leaves is None:
                account.spent += actual
            elif leaves > self.now:
                account.spent += actual
                account.add_due(leaves)
                self._add(sql.STEP, {"account": account.name, "leaves": leaves}, actual)
        if not holds:
            return None
        self._connection.execute(sql.CLOSE, {"token": token})
        return holds[0].worst, any(hold.expired for hold in holds)

    def frees(self, account: Account, amount: int) -> int | None:
        """When this much will have left the account by itself; None if never."""
        which = {"of": account.name, "began": account.start, "needed": amount}
        found: int | None = self._connection.scalar(sql.FREES, which)
        return found

    def save(self) -> None:
        """Writes the accounts back."""
        rows = [
            {
                "of": account.name,
                **{name: getattr(account, name) for name in ("start", "seen", "spent", "held", "due", "notices")},
            }
            for account in self.accounts.values()
        ]
        if rows:
            self._connection.execute(sql.SAVE, rows)

    def _add(self, table: Table, key: dict[str, object], amount: int) -> None:
        if not amount:
            return
        where = [table.c[name] == value for name, value in key.items()]
        added = self._connection.execute(update(table).where(*where).values(amount=table.c.amount + amount))
        if not added.rowcount:
            self._connection.execute(insert(table), {**key, "amount": amount})


def _microseconds(seconds: float) -> int:
    if not 0 <= seconds < 2.5e11:  # the year 9892
        raise ValueError(f"clock: expected seconds since 1970, got {seconds!r}")
    return int(seconds * 1_000_000)
