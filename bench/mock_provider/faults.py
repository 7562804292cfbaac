"""What each fault does to a reply.

The names are the keys of FAULTS, each described by its function. One more, "refuse", closes new connections at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import chain, repeat
from typing import TYPE_CHECKING

import orjson

from bench.mock_provider.api import Call
from bench.mock_provider.reply import Reply

if TYPE_CHECKING:
    from bench.mock_provider.rules import Rule

# no answer


def _close(reply: Reply, call: Call, rule: Rule) -> None:
    """The connection closes before the headers."""
    _nothing(reply).end = "close"


def _reset(reply: Reply, call: Call, rule: Rule) -> None:
    """The connection is reset before the headers."""
    _nothing(reply).end = "reset"


def _silent(reply: Reply, call: Call, rule: Rule) -> None:
    """The socket stays open and nothing comes."""
    _nothing(reply).end = "hang"


def _headers_only(reply: Reply, call: Call, rule: Rule) -> None:
    """The headers come, and nothing of the body."""
    reply.pieces, reply.end, reply.charged = [], "hang", False


def _nothing(reply: Reply) -> Reply:
    reply.status, reply.pieces, reply.charged = None, [], False
    return reply


# late or incomplete answers


def _slow_first_byte(reply: Reply, call: Call, rule: Rule) -> None:
    """The headers come after seconds."""
    reply.delay = rule.seconds


def _slow_tokens(reply: Reply, call: Call, rule: Rule) -> None:
    """Seconds before each token of a stream."""
    reply.gap = rule.seconds


def _stall(reply: Reply, call: Call, rule: Rule) -> None:
    """A stream stops after tokens, a plain answer in its middle; the socket stays open."""
    _cut_short(reply, call, rule).end = "hang"


def _cut(reply: Reply, call: Call, rule: Rule) -> None:
    """A stream ends after tokens, properly for HTTP but without its last event; a plain answer ends in its middle."""
    _cut_short(reply, call, rule)
    if not call.stream:
        reply.length = sum(map(len, reply.pieces))


def _cut_close(reply: Reply, call: Call, rule: Rule) -> None:
    """As cut, but the connection closes within the body."""
    _cut_short(reply, call, rule).end = "close"


def _cut_reset(reply: Reply, call: Call, rule: Rule) -> None:
    """As cut, but the connection is reset within the body."""
    _cut_short(reply, call, rule).end = "reset"


def _cut_short(reply: Reply, call: Call, rule: Rule) -> Reply:
    pieces = list(reply.pieces)
    if call.stream:
        kept = pieces[: min(rule.tokens + 1, len(pieces) - 1)]
        if rule.half:
            following = pieces[len(kept)]
            kept[-1] += following[: len(following) // 2]
    else:
        kept = [pieces[0][: len(pieces[0]) // 2]]
    reply.pieces, reply.broken = kept, True
    return reply


def _error_event(reply: Reply, call: Call, rule: Rule) -> None:
    """A stream ends in an error event after tokens; otherwise as status."""
    if not call.stream:
        return _status(reply, call, rule)
    *kept, last = _cut_short(reply, call, rule).pieces
    reply.pieces = [*kept, last + call.api.error_event(rule.status or 500)]
    return None


# errors


def _status(reply: Reply, call: Call, rule: Rule) -> None:
    """An error with that status (500) and the provider's body for it."""
    status = rule.status or 500
    message = None if rule.code is None else "You exceeded your limit, please check your plan."
    _whole(reply, status, b"application/json", orjson.dumps(call.api.error(status, message, None, rule.code)))
    if rule.retry_after is not None:
        value = f"{rule.retry_after:g}"
        if rule.retry_date:
            value = format_datetime(datetime.now(UTC) + timedelta(seconds=rule.retry_after), usegmt=True)
        reply.headers.append((b"retry-after", value.encode()))


def _context_length(reply: Reply, call: Call, rule: Rule) -> None:
    """400: the prompt is longer than the model's context of size tokens (1)."""
    most = rule.size or 1
    _whole(reply, 400, b"application/json", orjson.dumps(call.api.too_long(max(call.tokens_in, most + 1), most)))


def _html(reply: Reply, call: Call, rule: Rule) -> None:
    """A page of HTML with that status (200)."""
    page = b"<!DOCTYPE html>\n<html><head><title>Just a moment</title></head><body><h1>Bad gateway</h1></body></html>\n"
    _whole(reply, rule.status or 200, b"text/html; charset=utf-8", page)


def _invalid_json(reply: Reply, call: Call, rule: Rule) -> None:
    """200 with a body, or the data of each event, that is no JSON."""
    if call.stream:
        reply.pieces = [b'data: {"id": "chatcmpl-1", "choices": [{\n\n'] * 3
        reply.charged = False
    else:
        _whole(reply, rule.status or 200, b"application/json", b'{"id": "chatcmpl-1", "choices": [{"index": 0, "message"')


def _invalid_utf8(reply: Reply, call: Call, rule: Rule) -> None:
    """The first token, or the middle of a plain answer, has a byte that UTF-8 never has."""
    pieces = list(reply.pieces)
    place = 1 if call.stream else 0
    middle = pieces[place].rindex(b'"')
    pieces[place] = pieces[place][:middle] + b"\xff" + pieces[place][middle:]
    reply.pieces, reply.length = pieces, reply.length + 1


def _error_body(reply: Reply, call: Call, rule: Rule) -> None:
    """200 with the body of an error."""
    _whole(reply, 200, b"application/json", orjson.dumps(call.api.error(rule.status or 500)))


def _redirect(reply: Reply, call: Call, rule: Rule) -> None:
    """A redirection (307) to location; without one, to a path of the provider's own."""
    _whole(reply, rule.status or 307, b"text/plain", b"")
    reply.headers.append((b"location", (rule.location or "/v1/elsewhere").encode()))


def _first_event_error(reply: Reply, call: Call, rule: Rule) -> None:
    """A stream whose first event is an error, and the only one; otherwise as status."""
    if not call.stream:
        return _status(reply, call, rule)
    reply.pieces, reply.charged = [call.api.error_event(rule.status or 500)], False
    return None


def _whole(reply: Reply, status: int, content_type: bytes, body: bytes) -> None:
    """Instead of the answer, and charged for nothing."""
    reply.status, reply.content_type, reply.pieces = status, content_type, [body]
    reply.framing, reply.length, reply.charged = "length", len(body), False


# unusual answers


def _as_it_is(reply: Reply, call: Call, rule: Rule) -> None:
    """What the answer contains is unusual, and each API writes its own.

    empty_choices: a plain answer has no choices, output or content; a stream of chat begins with a chunk without choices.
    usage_with_choices, usage_in_every_chunk: in a stream of chat, usage is on the last chunk with choices, or on each chunk as
    it is so far. no_usage: nothing states the usage.
    """


def _split(reply: Reply, call: Call, rule: Rule) -> None:
    """Size bytes (1) are written at once, within events and characters too."""
    reply.split = rule.size or 1


def _burst(reply: Reply, call: Call, rule: Rule) -> None:
    """All events of a stream are written at once, whatever the pace of tokens."""
    reply.gap = 0.0


def _crlf(reply: Reply, call: Call, rule: Rule) -> None:
    """The lines of events end in CR LF."""
    if call.stream:
        reply.pieces = [piece.replace(b"\n", b"\r\n") for piece in reply.pieces]


def _comments(reply: Reply, call: Call, rule: Rule) -> None:
    """A comment before each event."""
    if call.stream:
        reply.pieces = [b": ping\n\n" + piece for piece in reply.pieces]


def _no_space(reply: Reply, call: Call, rule: Rule) -> None:
    """No space between the name and the value of an event's fields."""
    if call.stream:
        reply.pieces = [piece.replace(b"event: ", b"event:").replace(b"data: ", b"data:") for piece in reply.pieces]


def _no_done(reply: Reply, call: Call, rule: Rule) -> None:
    """A stream of chat ends without data: [DONE]; nothing else is missing."""
    if call.stream:
        reply.pieces = [piece.removesuffix(b"data: [DONE]\n\n") for piece in reply.pieces]


def _gzip(reply: Reply, call: Call, rule: Rule) -> None:
    """The body is compressed although the client asked for identity."""
    packer = zlib.compressobj(wbits=31)
    pieces = [packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in reply.pieces]
    pieces[-1] += packer.flush()
    reply.pieces, reply.length = pieces, sum(map(len, pieces))
    reply.headers.append((b"content-encoding", b"gzip"))


def _endless(reply: Reply, call: Call, rule: Rule) -> None:
    """A body without end (size bytes): one line of JSON, or one event."""
    start = b'data: {"id":"' if call.stream else b'{"id":"'
    block = b"x" * 65536
    blocks: Iterable[bytes] = repeat(block) if rule.size is None else repeat(block, -(-rule.size // len(block)))
    reply.pieces, reply.framing, reply.charged = chain([start], blocks), "chunked", False


def _endless_events(reply: Reply, call: Call, rule: Rule) -> None:
    """A stream whose tokens have no end; otherwise as endless."""
    if not call.stream:
        return _endless(reply, call, rule)
    head, *words, _ = reply.pieces
    block = b"".join(words)

    def events() -> Iterator[bytes]:
        yield head
        yield from repeat(block)

    reply.pieces, reply.charged = events(), False
    return None


def _chunked(reply: Reply, call: Call, rule: Rule) -> None:
    """The body comes in HTTP chunks."""
    reply.framing = "chunked"


def _content_length(reply: Reply, call: Call, rule: Rule) -> None:
    """The headers state the body's length, of a stream too."""
    reply.framing, reply.length = "length", sum(map(len, reply.pieces))


def _until_close(reply: Reply, call: Call, rule: Rule) -> None:
    """The body ends where the connection closes."""
    reply.framing = "close"


def _leave(reply: Reply, call: Call, rule: Rule) -> None:
    """The connection closes after the answer, although the headers did not say so."""
    reply.end = "leave"


def _large_headers(reply: Reply, call: Call, rule: Rule) -> None:
    """A header of size bytes (1 MiB)."""
    reply.headers.append((b"x-filler", b"x" * (rule.size or 2**20)))


QUIRKS = frozenset({"empty_choices", "usage_with_choices", "usage_in_every_chunk", "no_usage"})
"""Faults of what an answer contains."""

FAULTS: dict[str, Callable[[Reply, Call, Rule], None]] = {
    "close": _close,
    "reset": _reset,
    "silent": _silent,
    "headers_only": _headers_only,
    "slow_first_byte": _slow_first_byte,
    "slow_tokens": _slow_tokens,
    "stall": _stall,
    "cut": _cut,
    "cut_close": _cut_close,
    "cut_reset": _cut_reset,
    "error_event": _error_event,
    "status": _status,
    "context_length": _context_length,
    "html": _html,
    "invalid_json": _invalid_json,
    "invalid_utf8": _invalid_utf8,
    "error_body": _error_body,
    "redirect": _redirect,
    "first_event_error": _first_event_error,
    "empty_choices": _as_it_is,
    "usage_with_choices": _as_it_is,
    "no_usage": _as_it_is,
    "usage_in_every_chunk": _as_it_is,
    "split": _split,
    "burst": _burst,
    "crlf": _crlf,
    "comments": _comments,
    "no_space": _no_space,
    "no_done": _no_done,
    "gzip": _gzip,
    "endless": _endless,
    "endless_events": _endless_events,
    "chunked": _chunked,
    "content_length": _content_length,
    "until_close": _until_close,
    "leave": _leave,
    "large_headers": _large_headers,
}
