"""The HTTP interface: which path does what."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import orjson
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from p2l_engine import __version__
from p2l_engine.errors import PromptError
from p2l_engine.prompts.parse import user_turns
from p2l_engine.serve.answers import Answers
from p2l_engine.serve.api import Api
from p2l_engine.serve.apis import APIS, shaped_like
from p2l_engine.serve.ask import BadRequest
from p2l_engine.serve.gate import Unauthorized
from p2l_engine.serve.log import DecisionLog
from p2l_engine.serve.metrics import Metrics
from p2l_engine.serve.page import page
from p2l_engine.serve.record import Record
from p2l_engine.serve.relay import Relay, respond
from p2l_engine.serve.replay import Keeper
from p2l_engine.serve.scorer import Overloaded
from p2l_engine.serve.service import Refused, Service
from p2l_engine.serve.settings import Key
from p2l_engine.serve.traces import Traces

logger = logging.getLogger(__name__)

RECENT = 50
FEEDBACK = ("score", "against", "preference", "label")
MOST_PROMPTS = 1_000  # of one request for coefficients
JSON = "application/json"


class ClientLeft(Exception):
    """The client closed its connection before it had sent everything."""


class TooLarge(BadRequest):
    """A body beyond the limit."""


class Server:
    """One server's state beside the service: what happened lately. log: where decisions are kept; watch: is shown each, too;
    answers: the cache of answers."""

    def __init__(
        self,
        service: Service,
        log: DecisionLog | None,
        watch: Callable[[Record], None] | None = None,
        answers: Answers | None = None,
    ) -> None:
        self.service, self.log, self.answers = service, log, answers
        self.metrics = Metrics(service.scorer, service.plan.names, answers)
        self.recent: deque[Record] = deque(maxlen=RECENT)
        self.started = time.time()
        self.traces: Traces | None = None
        self.running = 0
        self.ready = True
        self._watch = watch

    def finished(self, record: Record) -> None:
        """Takes the record of every decision."""
        self.recent.appendleft(record)
        self.metrics.add(record)
        if self.log is not None:
            self.log.add(record)
        if self._watch is not None:
            self._watch(record)


class Endpoint:
    """An ASGI application for one path that takes a JSON object. It answers every error in the API's own format, and stops its
    work when the client leaves."""

    def __init__(self, server: Server, api: Api | None) -> None:
        self.server, self.api = server, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        api = self.api or APIS["chat"]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.server.running += 1
        try:
            key = self.server.service.gate.caller(headers)
            body = _object(await _body(receive, headers, int(self.server.service.plan.serve.body_mb * 2**20)))
            api = self.api or shaped_like(body)
            await _until_left(self.handle(api, body, headers, key, send), receive)
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
        finally:
            self.server.running -= 1

    async def handle(self, api: Api, body: dict[str, Any], headers: Mapping[str, str], key: Key | None, send: Send) -> None:
        """Answers one request."""
        raise NotImplementedError


class Completion(Endpoint):
    """Routes a request and relays its answer; or, by the name ``route``, tells the decision alone for a body of any API."""

    def __init__(self, server: Server, api: Api | None, name: str | None = None) -> None:
        super().__init__(server, api)
        self.name = name

    async def handle(self, api: Api, body: dict[str, Any], headers: Mapping[str, str], key: Key | None, send: Send) -> None:
        service = self.server.service
        call = await service.call(api, body, headers, key, self.name or api.name)
        keeper, traces = Keeper(self.server.answers, call), self.server.traces
        if traces is None:
            await Relay(service, call, self.server.finished, keeper).answer(send)
            return
        span = traces.begin(headers)
        call.trace = traces.outgoing(span)

        def finished(record: Record) -> None:
            traces.end(span, record)
            self.server.finished(record)

        await Relay(service, call, finished, keeper).answer(send)


class CountTokens(Endpoint):
    """Anthropic's count of a request's tokens, by the P2L tokenizer."""

    async def handle(self, api: Api, body: dict[str, Any], headers: Mapping[str, str], key: Key | None, send: Send) -> None:
        body.setdefault("max_tokens", 1)
        call = await self.server.service.call(api, {"model": "auto", **body}, headers, key, "route")
        await _answer(send, {"input_tokens": call.tokens_in})


class CoefficientsOf(Endpoint):
    """The coefficients of a batch of prompts."""

    async def handle(self, api: Api, body: dict[str, Any], headers: Mapping[str, str], key: Key | None, send: Send) -> None:
        prompts = body.get("prompts")
        if not isinstance(prompts, list) or not 0 < len(prompts) <= MOST_PROMPTS:
            raise BadRequest(f"prompts: expected a list of 1 to {MOST_PROMPTS} prompts", "prompts")
        turns = [_turns(prompt, i) for i, prompt in enumerate(prompts)]
        found = await self.server.service.scorer.batch(turns)
        theta = np.concatenate([one.theta for one in found])
        eta = None if found[0].eta is None else np.concatenate([one.eta for one in found if one.eta is not None])
        await _answer(send, {"models": found[0].models, "feedback": found[0].feedback.name, "theta": theta, "eta": eta})


class Predict(Endpoint):
    """lmarena/p2l's own endpoint: coefficients of one prompt. See its serve_p2l.py."""

    async def handle(self, api: Api, body: dict[str, Any], headers: Mapping[str, str], key: Key | None, send: Send) -> None:
        prompt = body.get("prompt")
        if not isinstance(prompt, str | list):
            raise BadRequest("prompt: expected a list of the user's turns, or text", "prompt")
        coefficients, _ = await self.server.service.scorer.coefficients(_turns(prompt, 0))
        eta = None if coefficients.eta is None else float(coefficients.eta[0])
        await _answer(send, {"coefs": coefficients.theta[0].tolist(), "eta": eta})


class GiveFeedback(Endpoint):
    """What somebody thinks of a decision: see ``DecisionLog.feedback``."""

    async def handle(self, api: Api, body: dict[str, Any], headers: Mapping[str, str], key: Key | None, send: Send) -> None:
        log = self.server.log
        if log is None:
            raise Refused(404, "this server keeps no log: name a file under serve.store")
        if not isinstance(body.get("id"), str) or not set(body) <= {"id", *FEEDBACK}:
            raise BadRequest(
                f"expected 'id' and one of score, label, or preference with against; got {', '.join(sorted(body))}"[:300]
            )
        given = {name: body[name] for name in FEEDBACK if body.get(name) is not None}
        try:
            await asyncio.to_thread(lambda: log.feedback(body["id"], key.id if key else None, **given))
        except ValueError as error:
            raise BadRequest(str(error)) from None
        except LookupError as error:
            raise Refused(404, str(error)) from None
        except (TimeoutError, SQLAlchemyError) as error:
            logger.error("feedback cannot be stored: %s", type(error).__name__)
            raise Refused(503, "feedback cannot be stored now; try again", retry_after=5) from None
        await _answer(send, {"id": body["id"], "stored": True})


def application(server: Server) -> Starlette:
    """The whole application."""
    routes: list[BaseRoute] = [
        Route("/v1/chat/completions", Completion(server, APIS["chat"]), methods=["POST"]),
        Route("/v1/responses", Completion(server, APIS["responses"]), methods=["POST"]),
        Route("/v1/messages", Completion(server, APIS["messages"]), methods=["POST"]),
        Route("/v1/messages/count_tokens", CountTokens(server, APIS["messages"]), methods=["POST"]),
        Route("/v1/route", Completion(server, None, "route"), methods=["POST"]),
        Route("/v1/coefficients", CoefficientsOf(server, None), methods=["POST"]),
        Route("/v1/feedback", GiveFeedback(server, None), methods=["POST"]),
        Route("/predict", Predict(server, None), methods=["POST"]),
        Route("/models", _get(server, _p2l_models)),
        Route("/v1/models", _get(server, _models)),
        Route("/v1/status", _get(server, _status)),
        Route("/metrics", _get(server, lambda server, key: server.metrics.text())),
        Route("/healthz", _healthz),
        Route("/readyz", _readyz(server)),
    ]
    if server.service.plan.serve.page:
        routes.append(Route("/", _page))
    return Starlette(routes=routes, exception_handlers={404: _not_found, 405: _wrong_method, Exception: _failed})


def _get(server: Server, answer: Callable[[Server, Key | None], Any]) -> Callable[[Request], Awaitable[Response]]:
    """A path that tells something to those who have a key."""

    async def handler(request: Request) -> Response:
        try:
            key = server.service.gate.caller(request.headers)
        except Unauthorized as error:
            return _error(401, str(error))
        found = answer(server, key)
        if asyncio.iscoroutine(found):
            found = await found
        if isinstance(found, bytes):
            return PlainTextResponse(found, media_type="text/plain; version=0.0.4")
        return Response(_json(found), media_type=JSON)

    return handler


def _models(server: Server, key: Key | None) -> Any:
    own = server.service.plan.names if key is None or key.models is None else key.models
    entries = [
        {"id": name, "object": "model", "created": int(server.started), "owned_by": "p2l-engine"} for name in ("auto", *own)
    ]
    return {"object": "list", "data": entries}


def _p2l_models(server: Server, key: Key | None) -> Any:
    return {"models": server.service.plan.choosers["bt"].models}


async def _status(server: Server, key: Key | None) -> Any:
    service = server.service
    plan, health, limit = service.plan, service.health, service.purse.limit
    deployments = [
        {
            "model": name,
            "deployments": [
                {
                    "name": d.name,
                    "state": "ok" if health.is_up(d) else "cooling",
                    "seconds_left": round(health.seconds_left(d), 1),
                    "failures": d.failures,
                }
                for d in group
            ],
        }
        for name, group in zip(plan.names, plan.deployments, strict=True)
    ]
    pacer = service.pacer
    return {
        "version": __version__,
        "started": server.started,
        "models": deployments,
        "limits": [] if limit is None else await asyncio.to_thread(_balances, limit, key),
        "pacer": None
        if pacer is None
        else {"budget": pacer.budget, "mean_cost": _finite(pacer.mean_cost), "count": pacer.count},
        "coefficient_cache": {"hits": service.scorer.hits, "misses": service.scorer.misses},
        "answer_cache": None if server.answers is None else {"hits": server.answers.hits, "misses": server.answers.misses},
        "recent": [_shown(record) for record in server.recent if key is None or record.key == key.id],
    }


def _balances(limit: Any, key: Key | None) -> list[dict[str, Any]]:
    return [
        {
            "limit": balance.limit,
            "amount": None if balance.amount is None else float(balance.amount),
            "spent": float(balance.spent),
            "reserved": float(balance.reserved),
            "left": None if balance.left is None else float(balance.left),
            "ends": None if balance.ends is None else balance.ends.isoformat(),
        }
        for balance in limit.balances(key.id if key else None)
    ]


def _shown(record: Record) -> dict[str, Any]:
    names = (
        "id",
        "time",
        "api",
        "asked",
        "win_rate",
        "expected_cost",
        "cost",
        "estimated",
        "status",
        "outcome",
        "tokens_in",
        "tokens_out",
    )
    found = {name: getattr(record, name) for name in names}
    latency = record.latency.get("total")
    return found | {"model": record.model or record.chosen, "latency_ms": latency, "attempts": len(record.attempts)}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


async def _page(request: Request) -> Response:
    body, headers = page()
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers)


async def _healthz(request: Request) -> Response:
    return PlainTextResponse("ok")


def _readyz(server: Server) -> Callable[[Request], Awaitable[Response]]:
    async def handler(request: Request) -> Response:
        return PlainTextResponse("ready") if server.ready else PlainTextResponse("shutting down", 503)

    return handler


async def _not_found(request: Request, error: Exception) -> Response:
    return _error(404, f"no such path: {request.method} {request.url.path:.80}")


async def _wrong_method(request: Request, error: Exception) -> Response:
    return _error(405, f"{request.method} is not what this path takes")


async def _failed(request: Request, error: Exception) -> Response:
    return _error(500, "an internal error; the server's log has it")


def _error(status: int, message: str) -> Response:
    return Response(orjson.dumps(APIS["chat"].error(status, message)), status, media_type=JSON)


async def _refuse(
    send: Send,
    api: Api,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    after: float | None = None,
) -> None:
    headers = [] if after is None else [(b"retry-after", str(int(np.ceil(after))).encode())]
    await respond(send, status, orjson.dumps(api.error(status, message, param, code)), headers)


async def _answer(send: Send, found: Any) -> None:
    await respond(send, 200, _json(found), [])


def _json(found: Any) -> bytes:
    return orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def _turns(prompt: object, index: int) -> Any:
    try:
        return user_turns(prompt, index)
    except PromptError as error:
        raise BadRequest(str(error), f"prompts[{index}]") from None


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"expected a body of JSON in UTF-8: {error}") from None
    if not isinstance(found, dict):
        raise BadRequest(f"expected a JSON object, got {type(found).__name__}")
    return found


async def _body(receive: Receive, headers: Mapping[str, str], most: int) -> bytes:
    """The request's body. Raises TooLarge, ClientLeft."""
    length = headers.get("content-length", "0")
    parts, size = list[bytes](), 0
    if length.isdigit() and int(length) > most:
        raise TooLarge(f"expected a body of at most {most} bytes, got {length}", status=413)
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise TooLarge(f"expected a body of at most {most} bytes, got more", status=413)
        if not message.get("more_body"):
            return b"".join(parts)


async def _until_left(work: Any, receive: Receive) -> None:
    """Runs ``work``; cancels it when the client leaves."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        await task
    except asyncio.CancelledError:
        if not left.done():  # the server stops, not the client
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        raise ClientLeft from None
    finally:
        left.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
