"""A request to a deployment that got no answer: what failed, and whose fault it is."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

import aiohttp
import orjson

from p2l_engine.apis.api import error_text, mapping
from p2l_engine.apis.ask import Ask
from p2l_engine.serve.model_entry import Provider

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
ERROR_BYTES = 64 * 1024  # of an error's body that are read


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


async def refused(response: aiohttp.ClientResponse, until: float, ask: Ask, provider: Provider) -> UpstreamFailed:
    """What an answer of another status than 200 says."""
    body, status = b"", response.status
    try:
        async with asyncio.timeout_at(loop_time(until)):
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


def loop_time(until: float) -> float:
    """A time of the monotonic clock on the running loop's own."""
    return asyncio.get_running_loop().time() + until - time.monotonic()
