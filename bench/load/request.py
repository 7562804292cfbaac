"""A request as bytes, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import orjson

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
ENDS = {"chat": b"data: [DONE]", "responses": b"event: response.completed", "messages": b"event: message_stop"}


def body_of(api: str, model: str, prompt: str, stream: bool, max_tokens: int) -> dict[str, Any]:
    """A body of one of the three APIs."""
    body: dict[str, Any] = {"model": model, "stream": stream}
    if api == "responses":
        return body | {"input": prompt, "max_output_tokens": max_tokens}
    body |= {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
    return body | {"stream_options": {"include_usage": True}} if api == "chat" and stream else body


def wire(host: str, api: str, body: dict[str, Any]) -> bytes:
    """The request as it is sent."""
    data = orjson.dumps(body)
    head = f"POST {PATHS[api]} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nauthorization: Bearer -\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data


class Answer:
    """Times are those of ``time.perf_counter``. due: when the request should have been sent; first: byte of the body. status: 0
    where there was none, and ``error`` says why. parts: the last piece of the body, or the ``whole`` of it."""

    __slots__ = ("_done", "_whole", "due", "end", "error", "first", "parts", "retry_after", "sent", "status")

    def __init__(self, due: float, done: Callable[[Answer], object], whole: bool = False) -> None:
        self.due, self._done, self._whole = due, done, whole
        self.sent = self.first = self.end = 0.0
        self.status, self.error = 0, ""
        self.parts = list[bytes]()
        self.retry_after: str | None = None

    def came(self, part: bytes) -> None:
        """A piece of the body."""
        if not self.parts:
            self.first = time.perf_counter()
        if self._whole or not self.parts:
            self.parts.append(part)
        else:
            self.parts[0] = part

    def ended(self, status: int) -> None:
        """The whole answer is there."""
        self.status, self.end = status, time.perf_counter()
        self._done(self)

    def failed(self, error: str) -> None:
        """No whole answer will come."""
        self.error, self.end = error, time.perf_counter()
        self._done(self)
