"""A client of HTTP/1.1 that costs little: prepared bytes out, a parser in C, connections kept for the next request."""

from __future__ import annotations

import asyncio
import time
from typing import cast

import httptools

from bench.load.request import Answer


class Pool:
    """Connections to one server, opened when no other is free. open: all of them; left: whether they were closed from here."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.free: list[Connection] = []
        self.open: set[Connection] = set()
        self.left = False
        self._opening: set[asyncio.Future[None]] = set()

    def send(self, data: bytes, answer: Answer) -> None:
        """Sends a request now. The answer is filled in as it comes."""
        if self.free:
            self.free.pop().send(data, answer)
        else:
            opening = asyncio.ensure_future(self._open(data, answer))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    async def _open(self, data: bytes, answer: Answer) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: Connection(self, data, answer), self.host, self.port)
        except OSError as error:
            answer.failed(f"connect: {type(error).__name__}")

    def close(self) -> None:
        """Closes all connections, for good; what is still awaited has failed."""
        self.free.clear()
        self.left = True
        for connection in list(self.open):
            connection.transport.abort()


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, pool: Pool, data: bytes, answer: Answer) -> None:
        self._pool, self._data = pool, data
        self._answer: Answer | None = answer
        self._keep = True

    def send(self, data: bytes, answer: Answer) -> None:
        """The next request."""
        self._parser = httptools.HttpResponseParser(self)
        self._answer = answer
        answer.sent = time.perf_counter()
        self.transport.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._pool.open.add(self)
        assert self._answer is not None
        self.send(self._data, self._answer)

    def connection_lost(self, error: Exception | None) -> None:
        self._pool.open.discard(self)
        if self in self._pool.free:
            self._pool.free.remove(self)
        if self._answer is not None:
            self._answer.failed("no answer in time" if self._pool.left else "closed")
            self._answer = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._answer is not None:
                self._answer.failed(f"not HTTP: {error}"[:80])
                self._answer = None
            self.transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is not None and name.lower() == b"retry-after":
            self._answer.retry_after = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._answer.came(body)

    def on_message_complete(self) -> None:
        answer, self._answer = self._answer, None
        assert answer is not None
        answer.ended(self._parser.get_status_code())
        if self._parser.should_keep_alive() and not self.transport.is_closing():
            self._pool.free.append(self)
        else:
            self.transport.close()
