"""Hidden states of the prompts that were asked, on disk, by the hash of their turns: feedback may come days later."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sqlalchemy import Column, Double, Index, LargeBinary, MetaData, Table, Text, bindparam, delete, func, select
from sqlalchemy.dialects import sqlite

from p2l_engine.spending.database import Database

Float32 = npt.NDArray[np.float32]

LOCK = 5.0  # seconds to wait for the file
PENDING = 10_000  # states that wait in memory at most
ROOM = 0.95  # of the states that may be kept, what is left once there are more

TABLES = MetaData()
STATE = Table(
    "prompt_state",
    TABLES,
    Column("prompt", Text, primary_key=True),
    Column("time", Double, nullable=False),  # when it was computed last, seconds since 1970
    Column("state", LargeBinary, nullable=False),  # [D] float32, little-endian
    Index("prompt_state_time", "time"),
)
_MADE = sqlite.insert(STATE)
PUT = _MADE.on_conflict_do_update(
    index_elements=[STATE.c.prompt], set_={"time": _MADE.excluded.time, "state": _MADE.excluded.state}
)
GET = select(STATE.c.prompt, STATE.c.state).where(STATE.c.prompt.in_(bindparam("prompts", expanding=True)))
NEWEST = select(STATE.c.state).order_by(STATE.c.time.desc(), STATE.c.prompt).limit(bindparam("n"))
COUNT = select(func.count()).select_from(STATE)
DELETE_BEFORE = delete(STATE).where(STATE.c.time < bindparam("before"))
DELETE_OLDEST = delete(STATE).where(
    STATE.c.prompt.in_(select(STATE.c.prompt).order_by(STATE.c.time, STATE.c.prompt).limit(bindparam("n")))
)


class PromptStates:
    """An SQLite file. most: states that are kept; days: how long, None: as long as there is room; the oldest go first.

    ``add`` never waits; ``flush`` writes. Any thread may call any method. Raises ValueError and SQLAlchemyError where the file
    cannot be used.
    """

    def __init__(self, path: Path, most: int, days: float | None = None) -> None:
        self._database = Database(path, TABLES, fsync=False, timeout=LOCK)
        self._most, self._days = most, days
        self._pending = dict[str, tuple[float, Float32]]()
        self._lock = threading.Lock()
        self.lost = 0  # states that did not fit into memory while the file could not be written
        with self._database.begin() as connection:
            self.count = int(connection.scalar(COUNT) or 0)  # of states, without those in memory

    def add(self, prompt: str, state: Float32) -> None:
        """Remembers the state [D] of the prompt with this hash."""
        with self._lock:
            if len(self._pending) < PENDING:
                self._pending[prompt] = time.time(), state
            else:
                self.lost += 1

    def flush(self) -> None:
        """Writes what is in memory, and deletes what is too old or too much."""
        with self._lock:
            taken = dict(self._pending)
        if not taken:
            return
        rows = [{"prompt": prompt, "time": at, "state": state.astype("<f4").tobytes()} for prompt, (at, state) in taken.items()]
        with self._database.begin() as connection:
            connection.exec_driver_sql("PRAGMA secure_delete=ON")  # they say something of the texts
            connection.execute(PUT, rows)
            if self._days is not None:
                connection.execute(DELETE_BEFORE, {"before": time.time() - self._days * 86_400})
            count = int(connection.scalar(COUNT) or 0)
            if count > self._most:
                connection.execute(DELETE_OLDEST, {"n": count - int(self._most * ROOM)})
                count = int(connection.scalar(COUNT) or 0)
        self.count = count
        with self._lock:
            for prompt, given in taken.items():
                if self._pending.get(prompt) is given:
                    del self._pending[prompt]

    def get(self, prompts: Collection[str]) -> dict[str, Float32]:
        """The states of those of these hashes that are known."""
        with self._lock:
            found = {prompt: self._pending[prompt][1] for prompt in prompts if prompt in self._pending}
        with self._database.begin() as connection:
            rows = connection.execute(GET, {"prompts": [prompt for prompt in prompts if prompt not in found]}).all()
        return found | {row.prompt: _array(row.state) for row in rows}

    def newest(self, n: int) -> list[Float32]:
        """The states that were computed last, ``n`` of them at most."""
        with self._database.begin() as connection:
            return [_array(state) for state in connection.scalars(NEWEST, {"n": n})]

    def close(self) -> None:
        """Closes the file."""
        self._database.close()


def _array(state: bytes) -> Float32:
    return np.frombuffer(state, "<f4").astype(np.float32)
