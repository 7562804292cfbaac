"""One connection of a client: HTTP/1.1 with keep-alive, one answer after another."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import Protocol, cast

import httptools

from bench.mock_provider.reply import Reply

Headers = list[tuple[bytes, bytes]]


class Answers(Protocol):
    """What a connection asks for replies, and tells how they went."""

    connections: set[Connection]

    def accepts(self) -> bool:
        """Whether a new connection stays open."""

    def reply(self, method: bytes, target: bytes, headers: Headers, body: bytes) -> Reply:
        """The answer to a request."""

    def ended(self, reply: Reply, written: int, left: bool) -> None:
        """written: pieces of the body that were sent. left: whether the client went away before the end."""


class Connection(asyncio.Protocol):
    """Parses requests and writes replies, the fast ones in one write."""

    def __init__(self, answers: Answers, loop: asyncio.AbstractEventLoop) -> None:
        self._answers, self._loop = answers, loop
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[tuple[Reply, bool]] = deque()  # of requests that came before the last answer ended
        self._reply: Reply | None = None
        self._keep_alive = True
        self._steps: Iterator[tuple[float, bytes, bool]] = iter(())
        self._step: tuple[float, bytes, bool] | None = None
        self._written = 0
        self._timer: asyncio.Handle | None = None
        self._paused = False
        self._target, self._headers, self._body = b"", Headers(), list[bytes]()

    # the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without being its subclass
        if self._answers.accepts():
            self._answers.connections.add(self)
        else:
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._answers.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._reply is not None:
            self._answers.ended(self._reply, self._written, left=True)
            self._reply = None
        for reply, _ in self._waiting:
            self._answers.ended(reply, 0, left=True)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._step is not None and self._timer is None:
            self._timer = self._loop.call_soon(self._write)

    # the parser

    def on_message_begin(self) -> None:
        self._target, self._headers, self._body = b"", [], []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        reply = self._answers.reply(self._parser.get_method(), self._target, self._headers, body)
        keep_alive = self._parser.should_keep_alive() and reply.framing != "close"
        if self._reply is None:
            self._start(reply, keep_alive)
        else:
            self._waiting.append((reply, keep_alive))

    # writing

    def _start(self, reply: Reply, keep_alive: bool) -> None:
        self._reply, self._keep_alive, self._written = reply, keep_alive, 0
        pieces = reply.at_once
        if pieces is not None:
            self.transport.write(reply.head(keep_alive) + reply.framed(b"".join(pieces)) + reply.last)
            self._written = len(pieces)
            self._end()
        else:
            self._timer = self._loop.call_later(reply.delay, self._begin)

    def _begin(self) -> None:
        assert self._reply is not None
        self._timer = None
        self.transport.write(self._reply.head(self._keep_alive))
        self._steps = self._reply.steps()
        self._advance()

    def _advance(self) -> None:
        """Prepares the next write."""
        assert self._reply is not None
        self._step = next(self._steps, None)
        if self._step is None:
            self.transport.write(self._reply.last)
            self._end()
        elif self._step[0]:
            self._timer = self._loop.call_later(self._step[0], self._write)
        else:
            self._timer = self._loop.call_soon(self._write)

    def _write(self) -> None:
        self._timer = None
        if self._step is None or self._paused:  # resume_writing goes on
            return
        _, data, complete = self._step
        self.transport.write(data)
        self._written += complete
        self._advance()

    def _end(self) -> None:
        reply = self._reply
        assert reply is not None
        if reply.end == "hang":
            return
        self._reply = None
        self._answers.ended(reply, self._written, left=False)
        if reply.end == "reset":
            self._timer = self._loop.call_later(0.01, self._reset)  # what was written must leave first
        elif reply.end in ("leave", "close") or not self._keep_alive:
            self.transport.close()
        elif self._waiting:
            self._start(*self._waiting.popleft())

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # to close is to reset
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()
