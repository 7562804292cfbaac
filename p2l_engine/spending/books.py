"""Accounts of spend limits that a transaction has locked, and what reservations and settlements change in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert

from p2l_engine.spending import ledger_tables as sql
from p2l_engine.spending.windows import Window


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


class Locked:
    """The accounts of one transaction, and the reservations of ``tokens``. clock: the time, unless an account has seen a later.

    What calls change is written together: at the end, and before anything is read that they may have changed.
    """

    def __init__(self, connection: Connection, accounts: Mapping[str, Account], tokens: Sequence[str], clock: int) -> None:
        self._connection, self._accounts, self._tokens, self._clock = connection, accounts, tokens, clock
        self._holds: dict[str, list[Any]] | None = None
        self._new: list[dict[str, Any]] = []
        self._closed: list[str] = []
        self._added: defaultdict[tuple[sql.Sums, str, int], int] = defaultdict(int)

    def books(self, names: Iterable[str]) -> Books:
        """Some of the accounts, up to date."""
        accounts = {name: self._accounts[name] for name in sorted(names)}
        # A clock that runs behind another's, or is set back, must not give money back: time stands still until it catches up.
        now = max([self._clock, *(account.seen for account in accounts.values())])
        books = Books(self, accounts, now)
        books.forget()
        return books

    def books_of(self, token: str) -> Books:
        """The accounts of a reservation, up to date; none where there is no such reservation."""
        return self.books(hold.account for hold in self.holds(token))

    def holds(self, token: str) -> list[Any]:
        """The rows of a reservation, one for each account."""
        if self._holds is None:
            self.write()
            self._holds = defaultdict(list)
            for hold in self._connection.execute(sql.HOLDS, {"tokens": self._tokens}):
                self._holds[hold.token].append(hold)
        return self._holds.get(token, [])

    def scalar(self, statement: Any, which: Mapping[str, Any]) -> int | None:
        """One number, as it is after all changes so far."""
        self.write()
        found: int | None = self._connection.scalar(statement, which)
        return found

    def expire(self, which: Mapping[str, Any]) -> list[Any]:
        """Marks the reservations that have left an account, and returns their rows."""
        self.write()
        found = list(self._connection.execute(sql.EXPIRED, which))
        self._connection.execute(sql.EXPIRE, which)
        self._holds = None
        return found

    def drop_steps(self, which: Mapping[str, Any]) -> int:
        """Deletes the steps that have left a rolling window, and returns their sum."""
        found = self.scalar(sql.OLD_STEPS, which)
        self._connection.execute(sql.DROP_STEPS, which)
        return int(found or 0)

    def reserve(self, rows: list[dict[str, Any]]) -> None:
        """Adds the rows of a reservation."""
        self._new += rows

    def close(self, token: str) -> None:
        """Deletes a reservation."""
        self._closed.append(token)
        if self._holds is not None:
            self._holds.pop(token, None)

    def add(self, sums: sql.Sums, account: str, at: int, amount: int) -> None:
        """Adds to a sum of an account."""
        if amount:
            self._added[sums, account, at] += amount

    def write(self) -> None:
        """Writes what has changed, the accounts' own rows apart."""
        if self._new:
            self._connection.execute(sql.RESERVE, self._new)
            self._new = []
        if self._closed:
            self._connection.execute(sql.CLOSE, [{"of": token} for token in self._closed])
            self._closed = []
        for (sums, account, at), amount in self._added.items():
            if not self._connection.execute(sums.add, {"of": account, "at": at, "more": amount}).rowcount:
                self._connection.execute(insert(sums.table), {"account": account, sums.by: at, "amount": amount})
        self._added.clear()

    def save(self) -> None:
        """Writes everything."""
        self.write()
        rows = [
            {
                "of": account.name,
                **{name: getattr(account, name) for name in ("start", "seen", "spent", "held", "due", "notices")},
            }
            for account in self._accounts.values()
        ]
        if rows:
            self._connection.execute(sql.SAVE, rows)


class Books:
    """The accounts that one call is about, at the time ``now``."""

    def __init__(self, locked: Locked, accounts: dict[str, Account], now: int) -> None:
        self.accounts, self.now, self._locked = accounts, now, locked

    def forget(self) -> None:
        """Begins new windows, and takes out what has left them: expired reservations, the oldest of rolling windows."""
        for account in self.accounts.values():
            account.seen = self.now
            start = account.window.start(self.now)
            if start > account.start:
                self._locked.add(sql.PAST_SUMS, account.name, account.start, account.spent)
                account.start, account.spent, account.held, account.notices = start, 0, 0, {}
            if account.due is None or account.due > self.now:
                continue
            which = {"of": account.name, "now": self.now, "began": account.start}
            account.held -= sum(hold.worst for hold in self._locked.expire(which) if hold.start == account.start)
            if account.window.kind == "rolling":
                account.spent -= self._locked.drop_steps(which)
            account.due = self._locked.scalar(sql.DUE, which)

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
        self._locked.reserve(rows)

    def settle(self, token: str, actual: int) -> tuple[int, bool] | None:
        """Replaces a reservation by what was spent, in the windows that it was made in.

        Returns the amount that was reserved, and whether it had left a window or expired; None where there is no such
        reservation.
        """
        holds = self._locked.holds(token)
        if not holds:
            return None
        for hold in holds:
            account = self.accounts[hold.account]
            leaves = account.window.leaves(hold.made)
            if hold.start != account.start:
                self._locked.add(sql.PAST_SUMS, account.name, hold.start, actual)
                continue
            if not hold.expired:
                account.held -= hold.worst
            if leaves is None:
                account.spent += actual
            elif leaves > self.now:
                account.spent += actual
                account.add_due(leaves)
                self._locked.add(sql.STEP_SUMS, account.name, leaves, actual)
        self._locked.close(token)
        return holds[0].worst, any(hold.expired for hold in holds)

    def frees(self, account: Account, amount: int) -> int | None:
        """When this much will have left the account by itself; None if never."""
        return self._locked.scalar(sql.FREES, {"of": account.name, "began": account.start, "needed": amount})
