"""One request to one deployment: sent, timed, and read as far as is needed to know that it will be an answer."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import aiohttp
import orjson

from p2l_engine.apis.api import UNREADABLE, Api, Stream, Usage, error_text, mapping
from p2l_engine.apis.ask import Ask
from p2l_engine.apis.events import EventTooLong, Splitter, data_of
from p2l_engine.serve.health import Deployment
from p2l_engine.serve.model_entry import Provider
from p2l_engine.serve.settings import Serve

# Whose fault a failure is. deployment: it is left out for a while; configuration: so too, since it answers no request as it is
# configured; request: no other model would answer it either; context: a model with a larger window would.
Blame = Literal["deployment", "configuration", "request", "context"]
PROBLEMS = {
    401: "its provider refuses the key that is configured",
    402: "its provider's account has no credit left",
    403: "its provider refuses the key that is configured, or this use of it",
    404: "its provider does not know the model or the path that is configured",
}
# Of a client's own key, where that is passed on.
OF_THE_KEY = frozenset({401, 402, 403, 429})
# That say more than their status.
CODES = {"model_not_found": 404, "DeploymentNotFound": 404, "invalid_api_key": 401, "insufficient_quota": 402}
OF_THE_REQUEST = frozenset({400, 405, 406, 410, 411, 412, 413, 414, 415, 416, 417, 422, 431, 451})
TOO_LONG = re.compile(
    r"context[ _](length|window)|maximum context|(prompt|input) is too long|too many (input )?tokens|exceeds? .{0,40}tokens",
    re.I,
)
KEPT_HEADERS = ("x-request-id", "request-id")
ERROR_BYTES = 64 * 1024  # of an error's body that are read
LAST_WORDS = 1.0  # seconds that a stream may stay open after its last event


class UpstreamFailed(Exception):
    """No answer. error: what failed, in one word; status and body: what came, if anything; sent: whether the deployment may
    have begun to work, and to bill. retry_after: seconds."""

    def __init__(
        self,
        error: str,
        message: str,
        blame: Blame = "deployment",
        status: int | None = None,
        retry_after: float | None = None,
        body: bytes | None = None,
        sent: bool = False,
    ) -> None:
        super().__init__(message)
        self.error, self.message, self.blame, self.status = error, message, blame, status
        self.retry_after, self.body, self.sent = retry_after, body, sent


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
            async with asyncio.timeout_at(_loop_time(until)):
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
            async with asyncio.timeout_at(_loop_time(until)):
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
                raise await _refused(response, min(time.monotonic() + timeouts.idle, deadline), ask, provider)
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
        while True:
            async with asyncio.timeout_at(_loop_time(until)):
                data = await response.content.readany()
            if not data:
                break
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


async def _refused(response: aiohttp.ClientResponse, until: float, ask: Ask, provider: Provider) -> UpstreamFailed:
    """What an answer of another status than 200 says."""
    body, status = b"", response.status
    try:
        async with asyncio.timeout_at(_loop_time(until)):
            while len(body) < ERROR_BYTES and (data := await response.content.readany()):
                body += data
    except (TimeoutError, aiohttp.ClientError, OSError):
        body = b""  # the status says enough
    try:
        answer = orjson.loads(body[:ERROR_BYTES])
    except orjson.JSONDecodeError:
        answer = None
    message = error_text(answer) or f"status {status}"
    code = mapping(mapping(answer).get("error")).get("code")
    if status in (400, 413, 422) and (code == "context_length_exceeded" or TOO_LONG.search(message)):
        return UpstreamFailed("context", message, "context", status, body=body if answer is not None else None)
    wait, code = _retry_after(response.headers.get("retry-after")), CODES.get(code if isinstance(code, str) else "")
    own_key = provider.forward_client_key and (status in OF_THE_KEY or code in OF_THE_KEY)
    # What a provider keeps may be gone, or another's.
    kept = ask.previous is not None or ask.sealed or bool(ask.extras.unseen or ask.extras.tools)
    stored = status == 404 and code is None and kept and provider.model not in message
    if own_key or stored or (status in OF_THE_REQUEST and code is None):
        return UpstreamFailed("http", message, "request", status, wait, body if answer is not None else None)
    if (problem := PROBLEMS.get(code or status)) is not None:  # the provider's own words may have a part of the key
        return UpstreamFailed("http", problem, "configuration", status, wait)
    return UpstreamFailed("http", message, "deployment", status, wait)


def _retry_after(header: str | None) -> float | None:
    """Seconds, from a number of them or a date; None where it is neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            when = parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = (when - datetime.now(UTC)).total_seconds() if when.tzinfo else 0.0
    return seconds if 0 < seconds < float("inf") else None


def _kept(response: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: response.headers[name] for name in KEPT_HEADERS if name in response.headers}


def _loop_time(until: float) -> float:
    """A time of the monotonic clock on the running loop's own."""
    return asyncio.get_running_loop().time() + until - time.monotonic()
