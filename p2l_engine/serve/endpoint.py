"""A path that takes a JSON object: the body is read, errors are answered in the API's own format, and the work stops when the
client leaves."""

from __future__ import annotations

import asyncio
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping
from typing import Any

import orjson
from starlette.types import Message, Receive, Scope, Send

from p2l_engine.apis.api import Api
from p2l_engine.apis.ask import BadRequest
from p2l_engine.apis.registry import APIS, shaped_like
from p2l_engine.serve.gate import Unauthorized
from p2l_engine.serve.relay import respond
from p2l_engine.serve.scorer import Overloaded
from p2l_engine.serve.server import Server
from p2l_engine.serve.service import Refused
from p2l_engine.serve.settings import Key

logger = logging.getLogger(__name__)


DEEPEST = 250  # levels of JSON: orjson reads more than it writes


class ClientLeft(Exception):
    """The client closed its connection before it had sent everything."""


class TooLarge(BadRequest):
    """A body beyond the limit."""


class Endpoint(ABC):
    """An ASGI application for one path. api: of its bodies; None: they show it."""

    def __init__(self, server: Server, api: Api | None) -> None:
        self.server, self.api = server, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        api = self.api or APIS["chat"]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.server.running += 1
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            key = self.server.service.gate.caller(headers)
            serve = self.server.service.plan.serve
            body = _object(await read_body(receive, headers, int(serve.body_mb * 2**20), serve.timeouts.idle))
            api = self.api or shaped_like(body)
            await _until_left(self.handle(api, body, headers, key, sending), receive)
        except ClientLeft:
            return
        except Unauthorized as error:
            await _refuse(send, api, 401, str(error))
        except BadRequest as error:
            await _refuse(send, api, error.status, error.message, error.param, error.code)
        except Refused as error:
            await _refuse(send, api, error.status, error.message, error.param, error.code, error.retry_after)
        except Overloaded as error:
            await _refuse(send, api, 503, str(error), None, "overloaded", error.retry_after)
        except Exception:  # whatever it is, the client gets an error of its API, and the log all of it
            logger.exception("a request to %s failed", scope["path"])
            if begun:  # the connection is closed: the client sees that the answer is not whole
                raise
            await _refuse(send, api, 500, "an internal error; the server's log has it")
        finally:
            self.server.running -= 1

    @abstractmethod
    async def handle(self, api: Api, body: dict[str, Any], headers: Mapping[str, str], key: Key | None, send: Send) -> None:
        """Answers one request."""


async def _refuse(
    send: Send,
    api: Api,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    after: float | None = None,
) -> None:
    headers = [] if after is None else [(b"retry-after", str(math.ceil(after)).encode())]
    await respond(send, status, orjson.dumps(api.error(status, message, param, code)), headers)


async def answer(send: Send, found: Any) -> None:
    """A whole answer of status 200."""
    await respond(send, 200, as_json(found), [])


def as_json(found: Any) -> bytes:
    """Any object, arrays of numpy among them."""
    return orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"expected a body of JSON in UTF-8: {error}") from None
    if not isinstance(found, dict):
        raise BadRequest(f"expected a JSON object, got {type(found).__name__}")
    if body.count(b"{") + body.count(b"[") > DEEPEST:
        try:
            orjson.dumps(found)
        except orjson.JSONEncodeError:
            raise BadRequest(f"expected JSON nested at most {DEEPEST} levels deep, got a deeper one") from None
    return found


async def read_body(receive: Receive, headers: Mapping[str, str], most: int, idle: float) -> bytes:
    """The request's body. idle: seconds that a piece may take. Raises TooLarge, ClientLeft, BadRequest."""
    if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
        raise BadRequest(f"content-encoding: expected a body that is not compressed, got {coding:.20}", status=415)
    length = headers.get("content-length", "0")
    parts, size = list[bytes](), 0
    if length.isdigit() and int(length) > most:
        raise TooLarge(f"expected a body of at most {most} bytes, got {length}", status=413)
    while True:
        try:
            async with asyncio.timeout(idle):
                message = await receive()
        except TimeoutError:
            raise BadRequest(f"expected a body without pauses of more than {idle:g} seconds", status=408) from None
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise TooLarge(f"expected a body of at most {most} bytes, got more", status=413)
        if not message.get("more_body"):
            return b"".join(parts)


async def _until_left(work: Awaitable[None], receive: Receive) -> None:
    """Does ``work``; ends it when the client leaves. Raises ClientLeft."""
    left = False

    async def watch(working: asyncio.Task[Any]) -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        working.cancel()

    own = asyncio.current_task()
    assert own is not None, "a coroutine runs in a task"
    watching = asyncio.ensure_future(watch(own))
    try:
        await work
    except asyncio.CancelledError:
        if left and own.uncancel() == 0:
            raise ClientLeft from None
        raise  # the server stops
    else:
        if left:  # too late to matter
            own.uncancel()
    finally:
        watching.cancel()
