"""The exact cache of answers: a request that equals an earlier one gets its answer, at no cost.

Two equal requests that are under way at once both go to a provider: neither waits for the other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import orjson
from sqlalchemy.exc import SQLAlchemyError

from p2l_engine.apis.api import Usage
from p2l_engine.apis.ask import digest
from p2l_engine.serve.answer_stores import AnswerStore, InFile, InMemory, InRedis
from p2l_engine.serve.call import Call
from p2l_engine.serve.plan import Plan
from p2l_engine.serve.settings import AnswerCache, ConfigError

logger = logging.getLogger(__name__)

TIMEOUT = 0.05  # seconds that a request waits for the store
PAUSE = 1.0  # seconds without the store after it failed, so that not every request waits for it
SHARE = 8  # of the cache, the largest answer takes at most one part
BACKLOG = 16 * 2**20  # bytes of answers that wait to be stored
DRAIN = 5.0  # seconds that they get when the server stops
MAGIC = b"P2A1"  # the format of an entry


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """A complete answer of status 200.

    body: its bytes, or those of its events, as the client saw them. expected_cost: USD, of the request that it first answered.
    win_rate, score: None where that one named its model. deployment: which keeps the answer under answer_id.
    """

    body: bytes
    streamed: bool
    model: str
    deployment: str
    usage: Usage | None
    expected_cost: float
    win_rate: float | None
    score: float | None
    answer_id: str | None


class Answers:
    """Stored answers by the keys of ``key_of``. A store that fails or is slow is a miss, never an error.

    largest: bytes of an entry, at most. saved: expected costs, USD, of the requests that were answered from the store.
    failures: calls of the store that failed, entries that cannot be read, and answers that it was too slow to take.
    """

    def __init__(self, store: AnswerStore, name: str, largest: int) -> None:
        self.largest = largest
        self.hits = self.misses = self.failures = 0
        self.saved = 0.0
        self._store, self._name = store, name
        self._resumes = 0.0  # on the monotonic clock
        self._failing = self._unreadable = False
        self._waiting = 0  # bytes
        self._putting: set[asyncio.Task[None]] = set()

    async def get(self, key: str) -> CachedAnswer | None:
        """The answer of an equal request; None where there is none."""
        found = None
        if time.monotonic() >= self._resumes:
            try:
                async with asyncio.timeout(TIMEOUT):
                    data = await self._store.get(key)
            except Exception as error:
                self._failed(error)
            else:
                self._works()
                found = None if data is None else self._decoded(key, data)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
            self.saved += found.expected_cost
        return found

    def put(self, key: str, answer: CachedAnswer) -> None:
        """Stores an answer, soon; not one that is too large."""
        if len(answer.body) > self.largest or time.monotonic() < self._resumes:
            return
        data = encode(key, answer)
        if self._waiting + len(data) > max(BACKLOG, self.largest):
            self.failures += 1
            return
        self._waiting += len(data)
        task = asyncio.get_running_loop().create_task(self._put(key, data))
        self._putting.add(task)
        task.add_done_callback(self._putting.discard)

    async def prune(self) -> None:
        """Removes answers that are too old from the store."""
        try:
            await self._store.prune()
        except Exception as error:
            self._failed(error)

    async def drain(self) -> None:
        """Waits until everything is stored, or could not be."""
        while self._putting:
            await asyncio.gather(*self._putting, return_exceptions=True)

    async def close(self) -> None:
        """Stores what waits, for some seconds, and closes the store."""
        try:
            async with asyncio.timeout(DRAIN):
                await self.drain()
        except TimeoutError:
            logger.warning("%d answers could not be stored before the server stopped", len(self._putting))
        await self._store.close()

    async def _put(self, key: str, data: bytes) -> None:
        try:
            await self._store.put(key, data)
        except Exception as error:
            self._failed(error)
        else:
            self._works()
        finally:
            self._waiting -= len(data)

    def _decoded(self, key: str, data: bytes) -> CachedAnswer | None:
        try:
            return decode(key, data)
        except ValueError as error:
            self.failures += 1
            if not self._unreadable:
                logger.warning("the store of answers %s has entries that cannot be read: %s", self._name, error)
            self._unreadable = True
            return None

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._resumes = time.monotonic() + PAUSE
        if not self._failing:  # its type alone: a message may repeat values
            logger.error("the store of answers %s fails (%s): requests continue without it", self._name, type(error).__name__)
        self._failing = True

    def _works(self) -> None:
        if self._failing:
            logger.warning("the store of answers %s works again", self._name)
        self._failing = False


def open_answers(cache: AnswerCache, environment: Mapping[str, str] = os.environ) -> Answers:
    """The cache that the configuration asks for. Raises ConfigError; ModuleNotFoundError, which names the remedy."""
    most, store = int(cache.most_mb * 2**20), cache.store
    largest = most // SHARE
    if store == "memory":
        return Answers(InMemory(cache.seconds, most), store, largest)
    if "://" in store:
        password = None
        if cache.password_env is not None and not (password := environment.get(cache.password_env)):
            raise ConfigError(f"serve.cache.password_env: {cache.password_env} is not set in the environment")
        return Answers(InRedis(store, cache.seconds, TIMEOUT, password), store, largest)
    try:
        return Answers(InFile(store, cache.seconds, most), store, largest)
    except (SQLAlchemyError, ValueError) as error:
        why = getattr(error, "orig", None) or error
        raise ConfigError(f"serve.cache.store: {store} cannot be used: {why}") from None


def key_of(tenant: object, api: str, body: object, options: object, headers: Mapping[str, str], configuration: str) -> str:
    """A hash that is equal for equal requests alone: of its caller, its API, its whole body as JSON (the order of an object's
    keys apart), what the caller asks of the router, the headers that providers get, and what the server was configured with.

    tenant, body, options: as JSON. Raises ValueError for JSON that is nested too deeply.
    """
    try:
        return digest([_json([tenant, api, options, dict(headers), configuration]), _json(body)])
    except TypeError as error:
        raise ValueError(str(error)) from None


def key_of_call(call: Call) -> str:
    """The key of a request. Raises ValueError.

    A request of a configuration with other models, prices, providers, checkpoint, budget or objective is another request; so
    is one of a key that may use other models, and of another provider's key where the client's is passed on.
    """
    own, options = call.key, call.options
    tenant: list[Any] = [None, None] if own is None else [own.id, None if own.models is None else sorted(own.models)]
    if any(d.provider.forward_client_key for group in call.plan.deployments for d in group):
        tenant.append(digest([(call.secret or "").encode("utf-8", "replace")]))
    models = None if options.models is None else sorted(options.models)
    asked = [options.budget, models, options.objective, options.session]
    return key_of(
        tenant, call.ask.api, call.ask.body, asked, call.api.headers(None, dict(call.headers)), _configuration(call.plan)
    )


def encode(key: str, answer: CachedAnswer) -> bytes:
    """An entry: format, checksum, length of the fields, fields as JSON, body."""
    fields = asdict(answer)
    del fields["body"]
    head = json.dumps(fields).encode()
    rest = struct.pack("<I", len(head)) + head + answer.body
    return MAGIC + _checksum(key, rest) + rest


def decode(key: str, data: bytes) -> CachedAnswer:
    """What ``encode`` was given. Raises ValueError for anything else, the entry of another key included."""
    if data[:4] != MAGIC or data[4:20] != _checksum(key, data[20:]):
        raise ValueError("expected an entry of this version, whole, under its own key")
    try:
        (size,) = struct.unpack_from("<I", data, 20)
        fields = json.loads(data[24 : 24 + size])
        usage = fields.pop("usage")
        return CachedAnswer(body=data[24 + size :], usage=None if usage is None else Usage(**usage), **fields)
    except (struct.error, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"expected an entry of this version: {type(error).__name__}") from None


def _checksum(key: str, rest: bytes) -> bytes:
    return bytes.fromhex(digest([key.encode(), rest]))


def _json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


@lru_cache(maxsize=4)
def _configuration(plan: Plan) -> str:
    """A hash of everything in a configuration that may change which model answers, and how."""
    config = plan.config
    chosen = config.serve.model_dump(mode="json", include={"budget", "horizon", "objective", "opponents", "seed", "explore"})
    whole = config.model_dump(mode="json", include={"models", "checkpoint"})
    return digest([_json([whole, chosen, plan.choosers["bt"].models])])
