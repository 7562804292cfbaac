"""One request to one deployment: sent, timed, and read as far as is needed to know that it will be an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from p2l_engine.apis.api import UNREADABLE, Api, Stream, Usage, error_text
from p2l_engine.apis.ask import Ask
from p2l_engine.apis.events import EventTooLong, Splitter, data_of
from p2l_engine.serve.health import Deployment
from p2l_engine.serve.settings import Serve
from p2l_engine.serve.upstream_failure import TOO_LONG, Blame, UpstreamFailed, loop_time, refused

KEPT_HEADERS = ("x-request-id", "request-id")
LAST_WORDS = 1.0  # seconds that a stream may stay open after its last event


class StreamCut(Exception):
    """A stream that ended before its answer did. error: in one word."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error, self.message = error, message


@dataclass(frozen=True, slots=True)
class Whole:
    """A complete answer: its body as it came."""

    body: bytes
    headers: dict[str, str]
    usage: Usage | None
    answer: dict[str, Any]


class Opened:
    """A streamed answer whose first event has come. Must be closed."""

    def __init__(self, response: aiohttp.ClientResponse, reader: Stream, serve: Serve, deadline: float) -> None:
        self.reader = reader
        self.headers = _kept(response)
        self._response, self._idle, self._deadline = response, serve.timeouts.idle, deadline
        self._splitter = Splitter()
        self._first = b""
        self._begun = False
        self._most = int(serve.answer_mb * 2**20)
        self._bytes = 0

    async def begin(self, until: float) -> None:
        """Reads up to the first event that is no comment. Raises UpstreamFailed."""
        while not self._begun:
            try:
                self._first += await self._next(until)
                if self.reader.error is not None and not self._begun:
                    raise StreamCut("unreadable" if self.reader.error == UNREADABLE else "error", self.reader.error)
            except StreamCut as cut:
                blame: Blame = "context" if TOO_LONG.search(cut.message) else "deployment"
                raise UpstreamFailed(cut.error, cut.message, blame, status=200, sent=cut.error != "error") from None

    async def events(self) -> AsyncIterator[bytes]:
        """Whole events, as they came, joined as they arrive. Raises StreamCut where the answer ends too early."""
        yield self._first
        while not self.reader.ended:
            if self.reader.error is not None:
                raise StreamCut("unreadable" if self.reader.error == UNREADABLE else "error", self.reader.error)
            if found := await self._next(min(time.monotonic() + self._idle, self._deadline)):
                yield found
        # What follows the last event, so that the connection can be used again.
        try:
            async with asyncio.timeout(LAST_WORDS):
                if await self._response.content.read(1024):
                    return
        except (TimeoutError, aiohttp.ClientError):
            return

    def close(self) -> None:
        """Ends the request; a deployment that still writes is cut off."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()

    async def _next(self, until: float) -> bytes:
        """The events of the next piece that the client should see."""
        try:
            async with asyncio.timeout_at(loop_time(until)):
                data = await self._response.content.readany()
        except TimeoutError:
            late = time.monotonic() >= self._deadline
            raise StreamCut("deadline" if late else "idle", "the model stopped answering") from None
        except (aiohttp.ClientError, OSError) as error:
            raise StreamCut("cut", f"the connection to the model broke ({type(error).__name__})") from None
        if not data:
            raise StreamCut("cut", "the model's answer ended too early")
        self._bytes += len(data)
        if self._bytes > self._most:
            raise StreamCut("size", "the model's answer is longer than this server passes on")
        seen = list[bytes]()
        try:
            for event in self._splitter.feed(data):
                if self.reader.read(event):
                    seen.append(event)
                    self._begun = self._begun or bool(data_of(event))
                if self.reader.error is not None:
                    break
        except EventTooLong as error:
            raise StreamCut("size", str(error)) from None
        if self.reader.error is not None and not seen:
            raise StreamCut("unreadable" if self.reader.error == UNREADABLE else "error", self.reader.error)
        return b"".join(seen)  # what came before an error still reaches the client


class Upstream:
    """Owns the connections to all deployments."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Makes the one session, in the running loop."""
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, keepalive_timeout=30)
        jar = aiohttp.DummyCookieJar()
        self._session = aiohttp.ClientSession(connector=connector, cookie_jar=jar, trust_env=False, auto_decompress=True)

    async def close(self) -> None:
        """Closes all connections."""
        if self._session is not None:
            await self._session.close()

    async def send(
        self,
        deployment: Deployment,
        api: Api,
        ask: Ask,
        serve: Serve,
        deadline: float,
        given: Mapping[str, str],
        key: str | None,
        trace: Mapping[str, str],
    ) -> Whole | Opened:
        """Sends a request and returns its answer, or its stream once the first event is there.

        deadline: of the request, on the monotonic clock; given: the client's headers; key: its secret, for deployments that
        take it; trace: headers of its trace. Raises UpstreamFailed.
        """
        assert self._session is not None, "open() comes first"
        provider = deployment.provider
        secret = key if provider.forward_client_key else deployment.key
        headers = {
            "content-type": "application/json",
            "accept-encoding": "identity",
            **trace,
            **api.headers(secret, dict(given)),
        }
        body = orjson.dumps(api.outgoing(ask, provider.model, provider.stream_usage))
        timeouts = serve.timeouts
        until = min(time.monotonic() + (timeouts.first_byte if ask.stream else timeouts.whole), deadline)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect)
        sent = False
        try:
            async with asyncio.timeout_at(loop_time(until)):
                response = await self._session.post(
                    provider.base_url + api.path, data=body, headers=headers, timeout=timeout, allow_redirects=False
                )
        except aiohttp.ConnectionTimeoutError:
            raise UpstreamFailed("connect", "the model's server cannot be reached in time") from None
        except TimeoutError:
            raise UpstreamFailed("first_byte", "the model did not begin to answer in time", sent=True) from None
        except aiohttp.ClientConnectorError as error:
            raise UpstreamFailed("connect", f"the model's server cannot be reached ({type(error).__name__})") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            sent = not isinstance(error, ValueError)
            raise UpstreamFailed(
                "connection", f"the connection to the model broke ({type(error).__name__})", sent=sent
            ) from None
        keep = False
        try:
            if response.status != 200:
                raise await refused(response, min(time.monotonic() + timeouts.idle, deadline), ask, provider)
            if ask.stream and "json" not in response.content_type and "html" not in response.content_type:
                opened = Opened(response, api.stream(ask), serve, deadline)
                await opened.begin(until)
                keep = True
                return opened
            whole = await _whole(response, api, serve, deadline, until)
            if ask.stream:
                raise UpstreamFailed("body", "expected a stream of events, got one body", status=200, sent=True)
            keep = True
            return whole
        finally:
            if not keep:
                response.close()


async def _whole(response: aiohttp.ClientResponse, api: Api, serve: Serve, deadline: float, until: float) -> Whole:
    parts, size, most = list[bytes](), 0, int(serve.answer_mb * 2**20)
    try:
        while not response.content.at_eof():
            async with asyncio.timeout_at(loop_time(until)):
                data = await response.content.readany()
            parts.append(data)
            size += len(data)
            if size > most:
                raise UpstreamFailed("size", "the model's answer is longer than this server passes on", status=200, sent=True)
            until = min(time.monotonic() + serve.timeouts.idle, deadline)
    except TimeoutError:
        raise UpstreamFailed("idle", "the model stopped answering", status=200, sent=True) from None
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamFailed(
            "cut", f"the connection to the model broke ({type(error).__name__})", status=200, sent=True
        ) from None
    response.release()
    body = b"".join(parts)
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UpstreamFailed("body", "the model's server did not answer with JSON", status=200, sent=True) from None
    if (fault := api.fault(answer)) is not None:
        blame: Blame = "context" if TOO_LONG.search(fault) else "deployment"
        raise UpstreamFailed("body", fault, blame, status=200, sent=error_text(answer) is None)
    return Whole(body, _kept(response), api.usage(answer), answer)


def _kept(response: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: response.headers[name] for name in KEPT_HEADERS if name in response.headers}
