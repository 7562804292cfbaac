"""A database that processes share: an SQLite file in WAL mode, or PostgreSQL by its URL."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, MetaData, QueuePool, Table, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError

from p2l_engine.spending.fair_semaphore import FairSemaphore

CONNECTIONS = 8  # of one process to PostgreSQL
CREATING = 7_526_083_148  # an advisory lock of PostgreSQL: no two processes create tables at once

_of_parents: list[Engine] = []  # a forked child must neither use nor close its parent's connections


class Database:
    """Transactions on an SQLite file or a PostgreSQL server; tables that are missing are created.

    address: a path, or a URL of SQLAlchemy (``postgresql+psycopg://...``). fsync: whether an SQLite transaction waits until the
    disk has it; PostgreSQL has its own setting. timeout: seconds to wait for a lock or a connection.
    Raises ValueError for other databases and files in folders that do not exist; SQLAlchemyError where there is no connection.
    """

    def __init__(self, address: str | Path, tables: MetaData, fsync: bool, timeout: float) -> None:
        self._url, self._fsync, self._timeout = _url(address), fsync, timeout
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        # Threads take turns in memory: neither SQLite's lock, which is polled, nor SQLAlchemy's pool serves them in order.
        self._connections = 1 if self.is_sqlite else CONNECTIONS
        self._start()
        with self.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": CREATING})
            tables.create_all(connection)

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction: committed at the end of the block, rolled back by an exception."""
        self._start_in_child()
        turns = self._turns
        if not turns.acquire(self._timeout):
            raise TimeoutError(f"store: this process's other transactions took longer than {self._timeout:g} s")
        try:
            with self._engine.begin() as connection:
                yield connection
        finally:
            turns.release()

    def insert_missing(self, table: Table, rows: list[dict[str, Any]]) -> None:
        """Inserts the rows whose primary key is not there yet, in a transaction of its own."""
        insert = sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)
        with self.begin() as connection:
            connection.execute(insert.on_conflict_do_nothing(), rows)

    def empty_log(self, timeout: float | None = None) -> bool:
        """Writes SQLite's write-ahead log into the file and empties it: both hold old copies of what was changed until then.

        timeout: seconds to wait for others that use it; None: as for a lock. False where they use it all the time. PostgreSQL
        has no such copies.
        """
        if not self.is_sqlite:
            return True
        self._start_in_child()
        timeout = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while not self._emptied(timeout):
            if time.monotonic() >= deadline:
                return False
            time.sleep(random.uniform(0.002, 0.02))  # transactions of this process come in between
        return True

    def _emptied(self, timeout: float) -> bool:
        turns = self._turns
        if not turns.acquire(timeout):
            return False
        try:
            with closing(self._engine.raw_connection()) as connection:
                (busy, *_) = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                return not busy
        except sqlite3.Error as error:
            raise OperationalError("PRAGMA wal_checkpoint", None, error) from None
        finally:
            turns.release()

    @staticmethod
    def has_failed(error: Exception) -> bool:
        """Whether an error is the database's own (it cannot be reached, is locked or full), whatever it was asked."""
        return isinstance(error, OperationalError | InterfaceError | TimeoutError)

    def close(self) -> None:
        """Closes the connections; a later transaction opens one again."""
        if self._pid == os.getpid():
            self._engine.dispose()

    def _start_in_child(self) -> None:
        if self._pid != os.getpid():
            _of_parents.append(self._engine)
            self._start()

    def _start(self) -> None:
        self._engine, self._turns, self._pid = self._connect(), FairSemaphore(self._connections), os.getpid()

    def _connect(self) -> Engine:
        options: dict[str, Any] = {
            "hide_parameters": True,
            "poolclass": QueuePool,
            "pool_size": self._connections,
            "max_overflow": 0,
        }
        arguments: dict[str, Any]
        if self.is_sqlite:
            arguments = {"timeout": 0, "isolation_level": None, "check_same_thread": False}
            engine = create_engine(self._url, connect_args=arguments, **options)
            event.listen(engine, "connect", self._prepare)
            event.listen(engine, "begin", self._begin_immediate)
            return engine
        if self._fsync:
            raise ValueError("fsync: expected False for PostgreSQL, whose own synchronous_commit decides, got True")
        own = self._url.query.get("options", "")
        waits = max(1, int(self._timeout * 1000))
        arguments = {"options": f"{own if isinstance(own, str) else ' '.join(own)} -c lock_timeout={waits}"}
        options |= {"isolation_level": "READ COMMITTED", "connect_args": arguments}
        try:
            return create_engine(self._url, **options)
        except ModuleNotFoundError as error:
            remedy = "pip install 'p2l-engine[postgres]', and name its driver in the URL: postgresql+psycopg://..."
            raise ModuleNotFoundError(f"store: {error}: {remedy}", name=error.name) from None

    def _begin_immediate(self, connection: Connection) -> None:
        """Waits by short sleeps of random length: SQLite's own, of up to 100 ms, starve beside a process that is busy."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                return
            except OperationalError as error:
                if "locked" not in str(error.orig) or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.0002, 0.002))

    def _prepare(self, connection: Any, _: object) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
                break
            except sqlite3.OperationalError as error:  # SQLite does not wait for other processes here
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise ValueError(
                f"store: expected a file on a local disk, got {self._url.database!r}, where SQLite's journal mode "
                f"is {mode!r}, not 'wal'"
            )
        connection.execute(f"PRAGMA synchronous={'FULL' if self._fsync else 'NORMAL'}")


def _url(address: str | Path) -> URL:
    if isinstance(address, str) and "://" in address:
        url = make_url(address)
        if url.get_backend_name() == "postgresql":
            return url
        if url.drivername not in ("sqlite", "sqlite+pysqlite") or url.query:
            shown = url.render_as_string(hide_password=True)
            raise ValueError(f"store: expected a path, sqlite:///PATH without options, or a URL of postgresql, got {shown!r}")
        address = url.database or ""
    path = Path(address).absolute()
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"store: expected a file in a folder that exists, got {path}")
    return URL.create("sqlite+pysqlite", database=str(path))
