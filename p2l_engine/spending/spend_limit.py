"""Hard limits on money really spent, shared by threads, processes and machines."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Self

from p2l_engine.errors import SpendLimitReached, UnknownReservation
from p2l_engine.spending import money
from p2l_engine.spending.calls import Reserve, Settle
from p2l_engine.spending.limit import Limit, check_key
from p2l_engine.spending.money import Money
from p2l_engine.spending.records import Balance, Notice, Reservation, Settlement
from p2l_engine.spending.windows import LONGEST, Window, to_datetime

if TYPE_CHECKING:
    from p2l_engine.spending.books import Account, Books, Locked
    from p2l_engine.spending.ledger import Ledger

logger = logging.getLogger(__name__)

LEVELS = (0.5, 0.8, 0.95)  # shares of a limit that are announced
TOKEN = re.compile("[0-9a-f]{32}")


class SpendLimit:
    """Reserve the worst case before a request, settle what it cost afterwards: the limits are never exceeded.

    Every reservation must fit into all limits that hold for its key, and counts towards them from then on: in the windows that
    it was made in, even if it is settled later. Money is exact, in billionths of the unit: what is reserved or spent is rounded
    up, limits down; a float counts as the decimal that it prints as.

    store: an SQLite file, or the URL of a PostgreSQL database (``postgresql+psycopg://...``; extra ``postgres``). All threads,
    processes and machines that use one store share its limits; a limit's account is found again by its window and key, so that
    its amount may change. Nothing is forgotten when a process is killed. fsync: whether SQLite waits for the disk at each
    transaction; otherwise a power cut may forget the last moments. PostgreSQL has its own setting.

    lifetime: how long a reservation counts that is neither settled nor released, a timedelta: longer than any request lasts, so
    that only those of dead processes expire. Their requests may have cost money that is never reported. A settlement after the
    expiry is still counted, and may exceed the limit by what was spent meanwhile. None: reservations never expire, and limits
    hold whatever dies.

    on_notice is called with a Notice when a limit's spent and reserved money first reaches each of ``levels`` in its window
    (once in a rolling window's length): in one process alone, after the transaction; None: it is logged. clock: seconds since
    1970, for tests; None: the clock of this machine for SQLite, of the server for PostgreSQL. Where a clock runs backwards, a
    limit's time stands still. timeout: seconds to wait for other transactions. Thread-safe; may be used after a fork.

    Raises ValueError for bad arguments, SQLAlchemyError where the store cannot be reached or waited too long: nothing was
    reserved then, or it expires.
    """

    def __init__(
        self,
        limits: Limit | Sequence[Limit],
        store: str | Path,
        *,
        lifetime: timedelta | None = timedelta(hours=1),
        levels: Sequence[float] = LEVELS,
        on_notice: Callable[[Notice], None] | None = None,
        fsync: bool = False,
        clock: Callable[[], float] | None = None,
        timeout: float = 30.0,
    ) -> None:
        self.limits = (limits,) if isinstance(limits, Limit) else tuple(limits)
        for i, limit in enumerate(self.limits):
            if not isinstance(limit, Limit):
                raise ValueError(f"limits[{i}]: expected a Limit, got {limit!r}")
        if lifetime is not None and not (isinstance(lifetime, timedelta) and timedelta(0) < lifetime <= LONGEST):
            raise ValueError(f"lifetime: expected a timedelta of up to 100 years, or None, got {lifetime!r}")
        if not all(isinstance(level, int | float) and 0 < level <= 1 for level in levels):
            raise ValueError(f"levels: expected shares above 0, up to 1, got {levels!r}")
        if not (isinstance(timeout, int | float) and 0 < timeout < math.inf):
            raise ValueError(f"timeout: expected seconds > 0, got {timeout!r}")
        self._lifetime = None if lifetime is None else lifetime // timedelta(microseconds=1)
        self._levels = {str(level): Fraction(str(level)).as_integer_ratio() for level in sorted(map(float, levels))}
        self._notify = on_notice or _log
        self._ledger = _open(store, fsync, clock, timeout)

    def reserve(self, worst_case: Money, key: str | None = None) -> str:
        """Reserves the most that a request can cost, in all limits of the key at once; returns the token to settle it with.

        key: whose request it is; an id, not a secret: errors and notices show it. Raises SpendLimitReached where it does not
        fit.
        """
        (answer,) = self.together([Reserve(worst_case, key)])
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, str)
        return answer

    def settle(self, token: str, actual: Money) -> Settlement:
        """Replaces a reservation by what the request really cost, which is counted in full even where it is more.

        Any process may settle, in any order. Raises UnknownReservation for a token that was settled or released before.
        """
        (answer,) = self.together([Settle(token, actual)])
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Settlement)
        return answer

    def together(self, calls: Sequence[Reserve | Settle]) -> list[str | Settlement | Exception]:
        """What ``reserve`` and ``settle`` return, or raise, for these calls one after the other, in one transaction: a call is
        granted, refused or fails by itself. Where the store fails, all calls have its error, and nothing was changed."""
        answers = dict[int, str | Settlement | Exception]()
        entries = dict[int, _Entry]()
        for i, call in enumerate(calls):
            try:
                entries[i] = self._entry(call)
            except (ValueError, UnknownReservation) as error:
                answers[i] = error
        answers |= zip(entries, self._made(list(entries.values())), strict=True)
        return [answers[i] for i in range(len(calls))]

    def release(self, token: str) -> None:
        """Gives back a reservation whose request cost nothing. Raises UnknownReservation like ``settle``."""
        self.settle(token, 0)

    def balances(self, key: str | None = None) -> tuple[Balance, ...]:
        """The limits that hold for a key, in their current windows."""
        windows = self._windows(key)
        with self._ledger.transaction(windows) as locked:
            books = locked.books(windows)
            amounts, now = self._amounts(books), books.now
        found = []
        for name, account in books.accounts.items():
            amount = amounts.get(name)
            bound = None if amount is None else money.units(amount)
            left = None if amount is None else money.units(max(amount - account.used, 0))
            ends = account.window.end(now)
            found.append(Balance(name, bound, money.units(account.spent), money.units(account.held), left, ends))
        return tuple(found)

    def reservations(self) -> tuple[Reservation, ...]:
        """Those that are neither settled nor released, the oldest first; what dead processes have left is among them."""
        found = []
        for token, rows in groupby(self._ledger.open(), lambda row: row.token):
            holds = list(rows)
            names, late = tuple(hold.account for hold in holds), any(hold.expired for hold in holds)
            found.append(Reservation(token, names, money.units(holds[0].worst), to_datetime(holds[0].made), late))
        return tuple(found)

    def close(self) -> None:
        """Closes the store's connections."""
        self._ledger.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, call: Reserve | Settle) -> _Entry:
        """Raises ValueError for bad arguments, UnknownReservation for tokens that no store has and some cannot look for."""
        if isinstance(call, Reserve):
            return _Entry(money.round_up("worst_case", call.worst_case), None, self._windows(call.key))
        actual = money.round_up("actual", call.actual)
        if not isinstance(call.token, str) or not TOKEN.fullmatch(call.token):
            raise UnknownReservation(call.token)
        return _Entry(actual, call.token, {})

    def _made(self, entries: Sequence[_Entry]) -> list[str | Settlement | Exception]:
        """Makes entries, in one transaction unless one of them is wrong; then each has one of its own."""
        windows = {name: window for entry in entries for name, window in entry.windows.items()}
        tokens = [entry.token for entry in entries if entry.token is not None]
        if not entries:
            return []
        try:
            with self._ledger.transaction(windows, tokens) as locked:
                made = [self._make(entry, locked) for entry in entries]
        except Exception as error:
            if len(entries) == 1 or self._ledger.database.has_failed(error):
                return [error] * len(entries)
            return [self._made([entry])[0] for entry in entries]
        for _, notices, warning in made:
            if warning:
                logger.warning("SpendLimit: %s", warning)
            self._announce(notices)
        return [answer for answer, _, _ in made]

    def _make(self, entry: _Entry, locked: Locked) -> tuple[str | Settlement | Exception, list[Notice], str]:
        """Answer, notices and warning of one call, told once the transaction is committed."""
        return self._reserve(entry, locked) if entry.token is None else self._settle(entry.token, entry.amount, locked)

    def _reserve(self, entry: _Entry, locked: Locked) -> tuple[str | Exception, list[Notice], str]:
        books, worst = locked.books(entry.windows), entry.amount
        lefts = {name: amount - books.accounts[name].used for name, amount in self._amounts(books).items()}
        if refused := [name for name, left in lefts.items() if left < worst]:
            times = [self._fits_at(books, name, worst) for name in refused]
            never, left = None in times, money.units(max(min(lefts.values()), 0))
            frees_at = None if never else max(filter(None, times))
            return SpendLimitReached(refused, money.units(worst), left, frees_at), [], ""
        token = os.urandom(16).hex()
        books.hold(token, worst, self._lifetime)
        return token, self._reached(books), ""

    def _settle(self, token: str, spent: int, locked: Locked) -> tuple[Settlement | Exception, list[Notice], str]:
        books = locked.books_of(token)
        found = books.settle(token, spent)
        if found is None:
            return UnknownReservation(token), [], ""
        worst, late = found
        notices = self._reached(books)
        over = tuple(name for name, amount in self._amounts(books).items() if books.accounts[name].used > amount)
        warning = ""
        if spent > worst or over:
            warning = f"a request cost {money.shown(spent)}, {money.shown(worst)} was reserved{' (expired)' if late else ''}"
            warning += f"; exceeded: {' and '.join(over)}" if over else ""
        beyond = money.units(max(spent - worst, 0))
        return Settlement(money.units(spent), money.units(worst), beyond, late, over), notices, warning

    def _windows(self, key: str | None) -> dict[str, Window]:
        """The accounts that a key's reservations count towards. Without a limit, what is spent is kept all the same."""
        check_key(key)
        found = {name: limit.span for limit in self.limits if (name := limit.account(key)) is not None}
        return found or {f"no limit, key {key!r}": Window.of("total")}

    def _amounts(self, books: Books) -> dict[str, int]:
        """What each account may use at most; of several limits, the least."""
        found = {name: [limit.billionths for limit in self.limits if limit.holds_for(name)] for name in books.accounts}
        return {name: min(amounts) for name, amounts in found.items() if amounts}

    def _fits_at(self, books: Books, name: str, worst: int) -> datetime | None:
        """When an amount that does not fit will fit, if nothing else is reserved."""
        account, amount = books.accounts[name], self._amounts(books)[name]
        if worst > amount:
            return None
        leaves = books.frees(account, account.used + worst - amount)
        times = (None if leaves is None else to_datetime(leaves), account.window.end(books.now))
        return min((at for at in times if at is not None), default=None)

    def _reached(self, books: Books) -> list[Notice]:
        """The levels that accounts have newly reached; notes them down."""
        found = []
        for name, amount in self._amounts(books).items():
            account = books.accounts[name]
            for level, (numerator, denominator) in self._levels.items():
                before = account.notices.get(level)
                again = before is None or (account.window.kind == "rolling" and before + account.window.length <= books.now)
                if again and account.used * denominator >= amount * numerator:
                    account.notices[level] = books.now
                    found.append(_notice(account, float(level), amount, books.now))
        return found

    def _announce(self, notices: Sequence[Notice]) -> None:
        for notice in notices:
            try:
                self._notify(notice)
            except Exception:  # the money is reserved: its token must reach the caller
                logger.exception("SpendLimit: on_notice failed for %s", notice)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A call whose arguments are right. amount: billionths; token: of a reservation to settle; None reserves in ``windows``."""

    amount: int
    token: str | None
    windows: dict[str, Window]


def _open(store: str | Path, fsync: bool, clock: Callable[[], float] | None, timeout: float) -> Ledger:
    # Here: routing is imported where there is no database.
    from p2l_engine.spending.database import Database
    from p2l_engine.spending.ledger import Ledger
    from p2l_engine.spending.ledger_tables import TABLES

    return Ledger(Database(store, TABLES, fsync, timeout), clock)


def _notice(account: Account, level: float, amount: int, now: int) -> Notice:
    amounts = (money.units(amount), money.units(account.spent), money.units(account.held))
    return Notice(account.name, level, *amounts, to_datetime(now), account.window.end(now))


def _log(notice: Notice) -> None:
    logger.warning(
        "SpendLimit: %s has reached %g%% of %f: %f spent, %f reserved",
        notice.limit, 100 * notice.level, notice.amount, notice.spent, notice.reserved,
    )  # fmt: skip
