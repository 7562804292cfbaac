"""The log of decisions: records wait in memory and a thread writes them, so that no request waits for a database."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from sqlalchemy.exc import OperationalError

from p2l_engine.decision_log.record import Feedback, Preference, Record, check_id
from p2l_engine.decision_log.rows import row_of
from p2l_engine.decision_log.store import PAGE, Deleted, LogStore, Said, Selection

RECORDS = 10_000  # that wait in memory at most,
CHARACTERS = 32 << 20  # or this many of prompts
BATCH = 50  # records that one transaction writes: preparing more would hold up the event loop
PAUSE = 0.02  # seconds between two looks at the queue
LONGEST_PAUSE = 5.0  # while the store fails
HOUR = 3600.0
BUSY = "the log's file is in use all the time: it may hold what was deleted until its last process ends, or more is deleted"

logger = logging.getLogger(__name__)


class DecisionLog:
    """The log in an SQLite file or a PostgreSQL database.

    store: a path, or a URL of SQLAlchemy. retention: decisions that are older are deleted with their feedback, when the log is
    opened and every hour; None keeps them. Raises ValueError for tables of another program or version, SQLAlchemyError where
    the store cannot be opened.

    ``add`` never waits. What was written survives the end of the process, kill -9 included; what is still in memory then,
    the records of about the last tenth of a second, is lost. While the store fails or is too slow, records wait in memory, up
    to 10,000 of them or 32 Mi characters of prompts; those beyond are dropped, counted in ``dropped``, and the first is
    reported to the process's log. All other methods wait for the store: call them outside the event loop. Any thread may call
    any method.
    """

    def __init__(self, store: str | Path, *, retention: timedelta | None = None) -> None:
        if retention is not None and retention <= timedelta(0):
            raise ValueError(f"retention: expected a positive time, got {retention}")
        self._store = LogStore(store)
        self._queue: deque[Record | threading.Event] = deque()
        self._adding, self._wake = threading.Lock(), threading.Event()
        self._added = self._taken = 0  # characters of prompts, ever
        self._rows: list[dict[str, Any]] = []  # taken from the queue and not yet written
        self._flushed: list[threading.Event] = []  # calls of flush that wait for these rows
        self._pause, self._failing, self._full = PAUSE, False, False
        self._closing = self._closed = False
        self.dropped = 0
        self._retention = None if retention is None else retention.total_seconds()
        self._retained = -HOUR  # monotonic time
        self._retaining = False  # whether something was deleted since
        self._writer = threading.Thread(target=self._write, name="decision-log", daemon=True)
        self._writer.start()

    def add(self, record: Record) -> None:
        """Queues a record. It is dropped and counted where the queue is full, the log is closed, or a field cannot be stored (a
        NaN, a whole number of more than 64 bits)."""
        size = 0 if record.turns is None else sum(map(len, record.turns))
        with self._adding:
            waiting = self._added - self._taken
            if not (self._closing or len(self._queue) >= RECORDS or waiting >= CHARACTERS):
                self._added += size
                self._queue.append(record)
                return
            self.dropped += 1
            first, self._full = not self._full, True
        if first:
            why = "closed" if self._closing else "full: its store fails or is too slow"
            logger.error("the log's queue is %s; records are dropped", why)

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits until all records that were added before are written; False where they are not within ``timeout`` seconds."""
        written = threading.Event()
        with self._adding:
            closing = self._closing
            if not closing:
                self._queue.append(written)
        if closing:
            self._writer.join(timeout)
            return not self._writer.is_alive()
        self._wake.set()
        return written.wait(timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Writes what is in memory, within ``timeout`` seconds. What is not written then is dropped, counted and reported."""
        with self._adding:
            self._closing = True
        self._wake.set()
        self._writer.join(timeout)
        if self._writer.is_alive():
            self._closed = True
            lost = len(self._rows) + sum(isinstance(item, Record) for item in list(self._queue))
            self._drop(lost)
            logger.error("the log was closed before %d records were written: they are lost", lost)
        else:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, id: str) -> Record | None:
        """A decision; None where there is none of this id. Raises ValueError for what is no id."""
        check_id(id, "id")
        found = self._store.get([id]).get(id)
        if found is None and self.flush():
            found = self._store.get([id]).get(id)
        return found

    def recent(self, n: int) -> list[Record]:
        """The last n decisions that were written, the newest first."""
        return self._store.recent(n)

    def decisions(self, ids: Sequence[str]) -> dict[str, Record]:
        """Those of these ids that were written."""
        return self._store.get(ids)

    def feedback_after(self, number: int, n: int) -> list[Said]:
        """See ``LogStore``."""
        return self._store.feedback_after(number, n)

    def said_of(self, ids: Sequence[str]) -> list[Said]:
        """See ``LogStore``."""
        return self._store.said_of(ids)

    def waiting(self, number: int) -> tuple[int, float | None]:
        """See ``LogStore``."""
        return self._store.waiting(number)

    def last_number(self) -> int:
        """See ``LogStore``."""
        return self._store.last_number()

    def scores_on(self, turns_hash: str, number: int, n: int) -> list[tuple[Feedback, Record]]:
        """See ``LogStore``."""
        return self._store.scores_on(turns_hash, number, n)

    def feedback(
        self,
        id: str,
        key: str | None,
        *,
        score: float | None = None,
        against: str | None = None,
        preference: Preference | None = None,
        label: str | None = None,
    ) -> Feedback:
        """Stores what was said about a decision: a score in [0, 1], or a preference against another decision, or a label. It is
        written when this returns; a decision may have any number.

        key: the id of the caller's key, which may speak of its own decisions only; None where there are no keys. Raises
        ValueError for other values, LookupError for decisions that are not there, TimeoutError where the decision may still
        be in memory and the store fails.
        """
        made = Feedback(id, time.time(), score, against, preference, label)
        try:
            self._store.add_feedback(made, key)
        except LookupError:
            self._flush()  # it may be in memory still
            self._store.add_feedback(made, key)
        return made

    def delete(self, *, key: str | None = None, before: datetime | None = None) -> Deleted:
        """Deletes the decisions of a key, those before a time (UTC where it has no zone), or those of which both hold, with all
        feedback that names them. Raises ValueError where neither is given, TimeoutError where the store fails."""
        if key is None and before is None:
            raise ValueError("delete: expected a key, a time before, or both")
        self._flush()
        until = None
        if before is not None:
            until = (before if before.tzinfo else before.replace(tzinfo=UTC)).timestamp()
        deleted = self._store.delete(Selection(until=until, key=key))
        self._purge()
        return deleted

    def _flush(self) -> None:
        if not self.flush():
            raise TimeoutError("store: it does not take what is in memory; try again later")

    def _drop(self, count: int) -> None:
        with self._adding:
            self.dropped += count

    def _write(self) -> None:
        """The writer thread."""
        while True:
            self._wake.wait(self._pause)
            self._wake.clear()
            closing = self._closing  # before the queue is looked at: nothing is added afterwards
            try:
                self._drain()
                if not closing:
                    self._retain()
            except Exception as error:  # whatever it is, the thread must continue
                self._fails(error)
            if self._closed or (closing and not (self._queue or self._rows)):
                return

    def _drain(self) -> None:
        wrote = False
        while self._queue or self._rows or self._flushed:
            while self._queue and len(self._rows) < BATCH:
                self._take(self._queue.popleft())
            if self._rows:
                self._store.add(self._rows)
                wrote = True
            self._rows = []
            while self._flushed:
                self._flushed.pop().set()
        if wrote:
            self._succeeds()

    def _take(self, item: Record | threading.Event) -> None:
        if isinstance(item, threading.Event):
            self._flushed.append(item)
            return
        self._taken += 0 if item.turns is None else sum(map(len, item.turns))
        try:
            self._rows.append(row_of(item))
        except ValueError as error:
            self._drop(1)
            logger.error("a record cannot be logged: %s", error)

    def _retain(self) -> None:
        """Deletes what is too old, a page at a time: records are written in between."""
        if self._retention is None or time.monotonic() < self._retained + HOUR:
            return
        deleted = self._store.delete_page(Selection(until=time.time() - self._retention))
        self._retaining = self._retaining or deleted.decisions > 0
        if deleted.decisions < PAGE:
            if self._retaining:
                self._purge()
            self._retained, self._retaining = time.monotonic(), False
        else:
            self._wake.set()
        self._succeeds()

    def _purge(self) -> None:
        if not self._store.purge():
            logger.warning(BUSY)

    def _succeeds(self) -> None:
        """The store works, and the queue was empty just now."""
        if self._failing or self._full:
            logger.warning("the log's queue is written; %d records were dropped so far", self.dropped)
        self._pause, self._failing, self._full = PAUSE, False, False

    def _fails(self, error: Exception) -> None:
        if not self._failing:
            # Other errors may repeat values.
            why = f": {error.orig}".splitlines()[0] if isinstance(error, OperationalError) else ""
            logger.error("the log's store fails (%s%s): records wait in memory until it works", type(error).__name__, why)
            self._failing, self._pause = True, PAUSE
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
