"""Where stored answers lie: in memory, in an SQLite file, or in redis. Entries are bytes by key, and live for a time."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from sqlalchemy import (
    Column,
    Connection,
    Delete,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    delete,
    func,
    select,
)
from sqlalchemy.dialects.sqlite import insert

from p2l_engine.spending.database import Database

OVERHEAD = 200  # bytes that an entry takes beside its data, about
LOCK = 1.0  # seconds that a transaction waits for other processes
KEPT = 7 / 8  # of the most bytes, after a file was too large
PREFIX = "p2l:answer:"  # of keys in redis, which others may use too
CONNECTIONS = 16  # of one process to redis

TABLES = MetaData()
ANSWER = Table(
    "cached_answer",
    TABLES,
    Column("key", String(64), primary_key=True),
    Column("expires", Float, nullable=False),  # seconds since 1970
    Column("size", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
)
Index("cached_answer_by_age", ANSWER.c.expires, ANSWER.c.size)

NOW = bindparam("now", type_=Float)
LATEST = bindparam("latest", type_=Float)  # what expires later: the clock was set back, or entries lived longer once
GET = select(ANSWER.c.data).where(ANSWER.c.key == bindparam("of"), ANSWER.c.expires > NOW, ANSWER.c.expires <= LATEST)
_NEW = insert(ANSWER)
PUT = _NEW.on_conflict_do_update(["key"], set_={name: _NEW.excluded[name] for name in ("expires", "size", "data")})
DELETE_EXPIRED = delete(ANSWER).where((ANSWER.c.expires <= NOW) | (ANSWER.c.expires > LATEST))
SIZE = select(func.coalesce(func.sum(ANSWER.c.size), 0))
_NEWER = select(ANSWER.c.key, func.sum(ANSWER.c.size).over(order_by=(ANSWER.c.expires.desc(), ANSWER.c.key)).label("total"))
_NEWER_ROWS = _NEWER.subquery()
DELETE_OLDEST = delete(ANSWER).where(
    ANSWER.c.key.in_(select(_NEWER_ROWS.c.key).where(_NEWER_ROWS.c.total > bindparam("kept", type_=Integer)))
)


class AnswerStore(Protocol):
    """Entries by key; any call may raise what its library raises where the store is away."""

    async def get(self, key: str) -> bytes | None:
        """The entry; None where there is none, or it is too old."""

    async def put(self, key: str, data: bytes) -> None:
        """Stores an entry, in place of an earlier one."""

    async def prune(self) -> None:
        """Removes what is too old."""

    async def close(self) -> None:
        """Ends threads and connections."""


class InMemory:
    """seconds: that an entry lives; most: bytes, beyond which the entries go that were not asked for longest."""

    def __init__(self, seconds: float, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._most, self._clock = seconds, most, clock
        self._entries: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self.size = 0  # bytes

    async def get(self, key: str) -> bytes | None:
        found = self._entries.get(key)
        if found is None:
            return None
        if found[0] <= self._clock():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return found[1]

    async def put(self, key: str, data: bytes) -> None:
        if key in self._entries:
            self._drop(key)
        self._entries[key] = self._clock() + self._seconds, data
        self.size += len(data) + OVERHEAD
        while self.size > self._most:
            self._drop(next(iter(self._entries)))

    async def prune(self) -> None:
        now = self._clock()
        for key in [key for key, (expires, _) in self._entries.items() if expires <= now]:
            self._drop(key)

    async def close(self) -> None:
        self._entries.clear()
        self.size = 0

    def _drop(self, key: str) -> None:
        self.size -= len(self._entries.pop(key)[1]) + OVERHEAD


class InFile:
    """An SQLite file, which processes of one machine may share; its calls wait for the disk in a thread.

    seconds: that an entry lives; most: bytes, beyond which the oldest go. Raises ValueError and SQLAlchemyError where the file
    cannot be used.
    """

    def __init__(self, path: str, seconds: float, most: int, clock: Callable[[], float] = time.time) -> None:
        self._seconds, self._most, self._clock = seconds, most, clock
        self._database = Database(path, TABLES, fsync=False, timeout=LOCK)
        self._thread = ThreadPoolExecutor(1, "p2l-answers")
        self._deleted = False  # since the write-ahead log was emptied

    async def get(self, key: str) -> bytes | None:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._get, key)

    async def put(self, key: str, data: bytes) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._put, key, data)

    async def prune(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._prune)

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
        self._database.close()

    def _get(self, key: str) -> bytes | None:
        with self._database.begin() as connection:
            found: bytes | None = connection.scalar(GET, {"of": key, **self._living()})
        return found

    def _put(self, key: str, data: bytes) -> None:
        with self._database.begin() as connection:
            living = self._living()  # once the file is this process's: entries of others, who had it before, are older
            self._delete(connection, DELETE_EXPIRED, living)
            entry = {"key": key, "expires": living["latest"], "size": len(data) + OVERHEAD, "data": data}
            connection.execute(PUT, entry)
            if int(connection.scalar(SIZE) or 0) > self._most:
                self._delete(connection, DELETE_OLDEST, {"kept": int(self._most * KEPT)})

    def _prune(self) -> None:
        with self._database.begin() as connection:
            self._delete(connection, DELETE_EXPIRED, self._living())
        if self._deleted and self._database.empty_log(timeout=0):  # requests wait for this thread
            self._deleted = False

    def _delete(self, connection: Connection, which: Delete, values: dict[str, Any]) -> None:
        connection.exec_driver_sql("PRAGMA secure_delete=ON")  # answers must not stay in free pages
        self._deleted = connection.execute(which, values).rowcount > 0 or self._deleted

    def _living(self) -> dict[str, float]:
        now = self._clock()
        return {"now": now, "latest": now + self._seconds}


class InRedis:
    """A redis server, which bounds its memory itself (``maxmemory``). url: redis://HOST:PORT/DB; seconds: that an entry lives;
    timeout: seconds for a call. Raises ModuleNotFoundError where the package redis is missing."""

    def __init__(self, url: str, seconds: float, timeout: float, password: str | None = None) -> None:
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ModuleNotFoundError as error:
            remedy = "pip install 'p2l-engine[redis]'"
            raise ModuleNotFoundError(f"serve.cache.store: {error}: {remedy}") from None
        self._lifetime = max(1, int(1000 * seconds))  # milliseconds
        options: dict[str, Any] = {"password": password, "socket_timeout": timeout, "socket_connect_timeout": timeout}
        options["protocol"] = 2  # redis before 6, and some proxies, do not know the HELLO of 3
        # Without retries: a request does not wait for a store that is away.
        pool = BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=timeout, retry=Retry(NoBackoff(), 0), **options
        )
        self._client = Redis.from_pool(pool)

    async def get(self, key: str) -> bytes | None:
        found = await self._client.get(PREFIX + key)
        return found if isinstance(found, bytes) else None

    async def put(self, key: str, data: bytes) -> None:
        await self._client.set(PREFIX + key, data, px=self._lifetime)

    async def prune(self) -> None:
        """redis does so itself."""

    async def close(self) -> None:
        await self._client.aclose()
