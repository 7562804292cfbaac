"""What goes over the wire in answer to one request, piece by piece, and how it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal

import orjson

from bench.mock_provider.api import Call, Json
from bench.mock_provider.bill import Entry

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus} | {529: b"Overloaded"}


@dataclass(slots=True)
class Reply:
    """An HTTP response.

    pieces: the body. Of a stream: what comes before the first token, one piece for each token, what comes after the last.
    status: None sends no headers at all. length: the content-length that the headers state. framing: how the body's end is
    marked. delay: seconds before the headers. gap: seconds before each token. split: bytes that are written at once, 0 for
    whole pieces. end: "keep": the body ends as it should; "leave": likewise, and the connection closes although the headers
    did not say so; "close": the connection closes where it is; "reset": likewise, by a TCP reset; "hang": nothing more comes.
    call: what was asked; None where the request could not be read. charged: whether it costs anything, by the tokens that were
    sent. broken: whether a fault keeps the answer from being complete.
    """

    status: int | None
    content_type: bytes
    pieces: Iterable[bytes]
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    framing: Literal["length", "chunked", "close"] = "length"
    length: int = 0
    delay: float = 0.0
    gap: float = 0.0
    split: int = 0
    end: Literal["keep", "leave", "close", "reset", "hang"] = "keep"
    call: Call | None = None
    charged: bool = True
    broken: bool = False
    fault: str | None = None

    @classmethod
    def json(cls, status: int, body: Json | list[Json]) -> Reply:
        """A JSON body at once, which is charged for nothing."""
        data = orjson.dumps(body)
        return cls(status, b"application/json", [data], length=len(data))

    @classmethod
    def answer(cls, call: Call) -> Reply:
        """The usual answer."""
        if call.stream:
            head, words, tail = call.api.events(call)
            return cls(200, b"text/event-stream; charset=utf-8", [head, *words, tail], framing="chunked", call=call)
        reply = cls.json(200, call.api.whole(call))
        reply.call = call
        return reply

    def entry(self, written: int, left: bool) -> Entry | None:
        """What is charged. written: pieces of the body that were sent. left: whether the client went away before the end."""
        call = self.call
        if call is None:
            return None
        sent = self.charged and written > 0
        end = "left" if left else "failed" if not sent else "cut" if self.broken else "answered"
        return Entry(
            id=call.id,
            api=call.api.name,
            model=call.model,
            tokens_in=call.tokens_in if sent else 0,
            tokens_cached=call.tokens_cached if sent else 0,
            tokens_out=(min(written - 1, call.tokens_out) if call.stream else call.tokens_out) if sent else 0,
            streamed=call.stream,
            status=self.status if written else None,
            end=end,
            usage_told=end == "answered" and call.usage_told,
            fault=self.fault,
            user=call.api.user(call.body),
        )

    def head(self, keep_alive: bool) -> bytes:
        """Status line and headers."""
        if self.status is None:
            return b""
        lines = [
            b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\n" % (self.status, _REASONS.get(self.status, b"Unknown"), self.content_type),
            b"transfer-encoding: chunked\r\n" if self.framing == "chunked" else b"",
            b"content-length: %d\r\n" % self.length if self.framing == "length" else b"",
            *(b"%b: %b\r\n" % header for header in self.headers),
            b"\r\n" if keep_alive else b"connection: close\r\n\r\n",
        ]
        return b"".join(lines)

    def framed(self, data: bytes) -> bytes:
        """Part of the body as it goes over the wire."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self.framing == "chunked" and data else data

    @property
    def last(self) -> bytes:
        """What marks the end of the body."""
        return b"0\r\n\r\n" if self.framing == "chunked" and self.end in ("keep", "leave") else b""

    @property
    def at_once(self) -> list[bytes] | None:
        """The pieces, if all are written at once."""
        waits = self.delay or self.gap or self.split
        return self.pieces if not waits and isinstance(self.pieces, list) else None

    def steps(self) -> Iterator[tuple[float, bytes, bool]]:
        """Writes: seconds to wait before it, what is written, and whether that completes a piece."""
        words = len(self.pieces) - 2 if isinstance(self.pieces, list) else 0
        for count, piece in enumerate(self.pieces):
            wait = self.gap if 0 < count <= words else 0.0
            size = self.split or max(len(piece), 1)
            for start in range(0, max(len(piece), 1), size):
                yield wait, self.framed(piece[start : start + size]), start + size >= len(piece)
                wait = 0.0
