"""Server-sent events: bytes in any pieces to whole events, unchanged."""

from __future__ import annotations

import re

MOST = 16 * 2**20  # bytes of one event
# Two line ends in a row. Atomic: "\r\n" is one line end, never two.
BOUNDARY = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")


class EventTooLong(ValueError):
    """An event of more bytes than any provider sends."""


class Splitter:
    """Splits a stream of bytes into events, each with the blank line that ends it; joined they are the stream."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that ``data`` completes. Raises EventTooLong."""
        # A boundary may have begun in the last three bytes.
        start = max(len(self._rest) - 3, 0)
        data = self._rest + data
        if b"\r" in data:
            events, begin = list[bytes](), 0
            for found in BOUNDARY.finditer(data, start):
                events.append(data[begin : found.end()])
                begin = found.end()
            self._rest = data[begin:]
        else:
            *whole, self._rest = data.split(b"\n\n")  # several times as fast, and what all providers write
            events = [each + b"\n\n" for each in whole]
        if len(self._rest) > MOST:
            raise EventTooLong(f"expected events of at most {MOST} bytes, got a longer one")
        return events

    @property
    def rest(self) -> bytes:
        """What no blank line has ended yet."""
        return self._rest


def data_of(event: bytes) -> bytes:
    """The data of an event; empty for comments."""
    if event.startswith(b"data: ") and event.count(b"\n") == 2 and event.endswith(b"\n\n"):
        return event[6:-2]
    lines = [line[5:].removeprefix(b" ") for line in re.split(rb"\r\n|\n|\r", event) if line.startswith(b"data:")]
    return b"\n".join(lines)
