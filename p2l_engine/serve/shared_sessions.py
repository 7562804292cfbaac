"""Sessions of several servers, through a PostgreSQL database: each learns within a second what the others' models have read."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from operator import itemgetter
from typing import Any

from sqlalchemy import BigInteger, Column, Double, Index, LargeBinary, MetaData, Table, Text, bindparam, delete, func, select
from sqlalchemy.dialects.postgresql import ARRAY, insert

from p2l_engine.serve.sessions import Held, KeptAnswer, SessionMemory
from p2l_engine.serve.tokens import Counted
from p2l_engine.spending.database import Database

logger = logging.getLogger(__name__)

EVERY = 0.5  # seconds between two looks at what others wrote
OVERLAP = 0.5  # seconds that a look goes back: a transaction may take so long from its time to its end
LONGEST_PAUSE = 10.0  # seconds, while the database fails
LOCK = 5.0  # seconds that a transaction waits
PRUNE = 60.0  # seconds between deletions of what is too old
ANSWER_DAYS = 30  # that a provider keeps an answer
ASKS = (0.0, 0.1, 0.3)  # seconds before each look for an answer that another server may be writing now
PATIENCE = 2.0  # seconds for all of these
TOGETHER = 0.02  # seconds in which what is new is written together
HASH = 16  # bytes of a message's hash

TABLES = MetaData()
PREFIX = Table(
    "session_prefix",
    TABLES,
    Column("session", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("chain", LargeBinary, nullable=False),  # hashes of the messages, joined
    Column("at", Double, nullable=False),  # when the model read them: seconds since 1970, by the database's clock
    Column("written", Double, nullable=False),
    Column("writer", Text, nullable=False),
)
Index("session_prefix_at", PREFIX.c.at)
Index("session_prefix_written", PREFIX.c.written)
KEPT = Table(
    "kept_answer",
    TABLES,
    Column("id", Text, primary_key=True),
    Column("deployment", Text, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("at", Double, nullable=False),
)
Index("kept_answer_at", KEPT.c.at)

CLOCK = func.extract("epoch", func.clock_timestamp())
_PREFIXES = insert(PREFIX).values(at=CLOCK - bindparam("age"), written=CLOCK)
_PREFIX = _PREFIXES.excluded
PUT_PREFIX = _PREFIXES.on_conflict_do_update(
    index_elements=["session", "model"],
    set_={name: _PREFIX[name] for name in ("chain", "at", "written", "writer")},
    where=_PREFIX.at >= PREFIX.c.at,  # another server may have been faster to write, with what came later
)
_KEPT = insert(KEPT).values(at=CLOCK)
PUT_KEPT = _KEPT.on_conflict_do_update(
    index_elements=["id"], set_={name: _KEPT.excluded[name] for name in ("deployment", "tokens", "at")}
)
NEWER = (
    select(PREFIX, CLOCK.label("now"))
    .where(
        PREFIX.c.written > bindparam("since"), PREFIX.c.at > CLOCK - bindparam("seconds"), PREFIX.c.writer != bindparam("own")
    )
    .order_by(PREFIX.c.at.desc())
    .limit(bindparam("most"))
)
KEPT_BY = select(KEPT.c.id, KEPT.c.deployment, KEPT.c.tokens).where(KEPT.c.id == func.any(bindparam("of", type_=ARRAY(Text))))
DELETE_PREFIXES = delete(PREFIX).where(PREFIX.c.at <= CLOCK - bindparam("seconds"))
DELETE_KEPT = delete(KEPT).where(KEPT.c.at <= CLOCK - bindparam("seconds"))


class SharedSessions(SessionMemory):
    """A SessionMemory whose content other servers share. Requests read this process's copy and never wait, but for an answer
    of the Responses API that this copy does not know.

    store: the database's URL. While it fails, a server knows its own sessions alone. Raises SQLAlchemyError where it cannot be
    reached at the start.
    """

    def __init__(self, store: str, seconds: float, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(seconds, most, clock)
        self._database = Database(store, TABLES, fsync=False, timeout=LOCK)
        self._threads = ThreadPoolExecutor(2, "p2l-sessions")
        self._own = os.urandom(8).hex()
        self._prefixes: dict[tuple[str, str], Held] = {}  # to be written
        self._answers: dict[str, KeptAnswer] = {}
        self._changed = asyncio.Event()
        self._since, self._pruned = 0.0, -PRUNE
        self._failing, self._closing = False, False
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        self._closing = True
        self._changed.set()
        if self._task is not None:
            await self._task
        await asyncio.to_thread(self._threads.shutdown)
        self._database.close()

    def remember(self, session: str, model: str, counted: Counted) -> None:
        super().remember(session, model, counted)
        if len(self._prefixes) < self.most:  # while the database fails, the rest is not shared
            self._prefixes[session, model] = Held(counted.chain, self._clock())
            self._changed.set()

    def remember_answer(self, answer_id: str, kept: KeptAnswer) -> None:
        super().remember_answer(answer_id, kept)
        if len(self._answers) < self.most and _storable(answer_id):
            self._answers[answer_id] = kept
            self._changed.set()

    async def find_answers(self, ids: Sequence[str]) -> None:
        missing = [answer_id for answer_id in ids if self.of_answer(answer_id) is None and _storable(answer_id)]
        if not missing or self._failing:
            return
        try:
            async with asyncio.timeout(PATIENCE):
                for seconds in ASKS:
                    await asyncio.sleep(seconds)
                    found = await self._in_thread(lambda connection: connection.execute(KEPT_BY, {"of": missing}).all())
                    for answer_id, deployment, tokens in found:
                        super().remember_answer(answer_id, KeptAnswer(deployment, tokens))
                    if len(found) == len(set(missing)):
                        return
        except Exception as error:
            self._fails(error)

    async def _run(self) -> None:
        """Writes what is new here, and reads what is new elsewhere, again and again."""
        pause, looked = EVERY, -EVERY
        while True:
            closing = self._closing
            try:
                await self._write()
                if not closing and time.monotonic() >= looked + EVERY:
                    await self._read()
                    looked = time.monotonic()
                if self._failing:
                    logger.warning("the store of sessions works again")
                self._failing, pause = False, EVERY
            except Exception as error:
                self._fails(error)
                pause = min(2 * pause, LONGEST_PAUSE)
            if closing:
                return
            if self._failing:
                await asyncio.sleep(pause)
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), EVERY)
                    await asyncio.sleep(0 if self._closing else TOGETHER)

    async def _write(self) -> None:
        self._changed.clear()
        prefixes, answers = self._prefixes, self._answers
        if not prefixes and not answers:
            return
        self._prefixes, self._answers = {}, {}
        now = self._clock()
        rows = [
            {"session": session, "model": model, "chain": b"".join(held.chain), "age": now - held.at, "writer": self._own}
            for (session, model), held in sorted(prefixes.items(), key=itemgetter(0))  # no two servers wait in a circle
        ]

        def write(connection: Any) -> None:
            if rows:
                connection.execute(PUT_PREFIX, rows)
            if answers:
                found = sorted(answers.items(), key=itemgetter(0))
                connection.execute(PUT_KEPT, [{"id": of, "deployment": k.deployment, "tokens": k.tokens} for of, k in found])

        written = False
        try:
            await self._in_thread(write)
            written = True
        finally:
            if not written:  # later, below what is newer
                self._prefixes, self._answers = prefixes | self._prefixes, answers | self._answers

    async def _read(self) -> None:
        own = {"since": self._since - OVERLAP, "seconds": self.seconds, "own": self._own, "most": self.most}
        for row in reversed(await self._in_thread(lambda connection: connection.execute(NEWER, own).all())):
            self._since = max(self._since, row.written)
            hashes = bytes(row.chain)
            chain = tuple(hashes[i : i + HASH] for i in range(0, len(hashes), HASH))
            self.learn(row.session, row.model, Held(chain, self._clock() - max(float(row.now) - row.at, 0.0)))
        if time.monotonic() >= self._pruned + PRUNE:
            self._pruned = time.monotonic()

            def prune(connection: Any) -> None:
                connection.execute(DELETE_PREFIXES, {"seconds": self.seconds})
                connection.execute(DELETE_KEPT, {"seconds": ANSWER_DAYS * 86_400.0})

            await self._in_thread(prune)

    async def _in_thread(self, work: Callable[[Any], Any]) -> Any:
        def transaction() -> Any:
            with self._database.begin() as connection:
                return work(connection)

        return await asyncio.get_running_loop().run_in_executor(self._threads, transaction)

    def _fails(self, error: Exception) -> None:
        if not self._failing:
            logger.error("the store of sessions fails (%s): this server knows its own alone", type(error).__name__)
        self._failing = True


def _storable(answer_id: str) -> bool:
    """Providers and clients write these: a database refuses some texts."""
    return len(answer_id) <= 200 and answer_id.isascii() and answer_id.isprintable()
