"""What the server tells of itself: its models, its state, its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from p2l_engine import __version__
from p2l_engine.apis.api import Api
from p2l_engine.apis.registry import APIS
from p2l_engine.decision_log.record import Record
from p2l_engine.serve.endpoint import as_json
from p2l_engine.serve.gate import Unauthorized
from p2l_engine.serve.page import page
from p2l_engine.serve.server import Server
from p2l_engine.serve.service import Service
from p2l_engine.serve.settings import Key

if TYPE_CHECKING:
    from p2l_engine.serve.learn import OnlineLearning

JSON = "application/json"


def told(server: Server, answer: Callable[[Server, Key | None], Any]) -> Callable[[Request], Awaitable[Response]]:
    """A path that tells something to those who have a key."""

    async def handler(request: Request) -> Response:
        try:
            key = server.service.gate.caller(request.headers)
        except Unauthorized as error:
            return _error(401, str(error))
        found = answer(server, key)
        if asyncio.iscoroutine(found):
            found = await found
        if found is None:
            return _error(404, "no such model")
        if isinstance(found, bytes):
            return PlainTextResponse(found, media_type="text/plain; version=0.0.4")
        return Response(as_json(found), media_type=JSON)

    return handler


def models(server: Server, key: Key | None) -> Any:
    """The list of models, with the fields of OpenAI's and of Anthropic's."""
    own = server.service.plan.names if key is None or key.models is None else key.models
    entries = [_model(name, server) for name in ("auto", *own)]
    pages = {"has_more": False, "first_id": entries[0]["id"], "last_id": entries[-1]["id"]}
    return {"object": "list", "data": entries, **pages}


def model(server: Server) -> Callable[[Request], Awaitable[Response]]:
    """One model of the list."""

    async def handler(request: Request) -> Response:
        name = request.path_params["name"]

        def found(server: Server, key: Key | None) -> Any:
            return next((entry for entry in models(server, key)["data"] if entry["id"] == name), None)

        return await told(server, found)(request)

    return handler


def _model(name: str, server: Server) -> dict[str, Any]:
    made = datetime.fromtimestamp(int(server.started), UTC).isoformat().replace("+00:00", "Z")
    openai = {"object": "model", "created": int(server.started), "owned_by": "p2l-engine"}
    return {"id": name, "type": "model", "display_name": name, "created_at": made, **openai}


def p2l_models(server: Server, key: Key | None) -> Any:
    """lmarena/p2l's list: the columns of its coefficients."""
    return {"models": server.service.plan.choosers["bt"].models}


async def status(server: Server, key: Key | None) -> Any:
    """Models' health, limits, and the last decisions: what the page shows."""
    service = server.service
    plan, health = service.plan, service.health
    deployments = [
        {
            "model": name,
            "deployments": [
                {
                    "name": d.name,
                    "state": "ok" if health.is_up(d) else "cooling",
                    "seconds_left": round(health.seconds_left(d), 1),
                    "failures": d.failures,
                    "problem": d.problem,
                }
                for d in group
            ],
        }
        for name, group in zip(plan.names, plan.deployments, strict=True)
        if key is None or key.models is None or name in key.models
    ]
    pacer = service.pacer
    return {
        "version": __version__,
        "started": server.started,
        "models": deployments,
        "limits": await _limits(service, key),
        "pacer": None
        if pacer is None
        else {"budget": pacer.budget, "mean_cost": _finite(pacer.mean_cost), "count": pacer.count},
        "coefficient_cache": {"hits": service.scorer.hits, "misses": service.scorer.misses},
        "answer_cache": None if server.answers is None else {"hits": server.answers.hits, "misses": server.answers.misses},
        "learning": None if server.learning is None else _learning(server.learning),
        "recent": [_shown(record) for record in server.recent if key is None or record.key == key.id],
    }


def _learning(learning: OnlineLearning) -> dict[str, Any]:
    names = ("ready", "learned", "pending", "waiting", "lag", "updates", "refinements", "failures", "skipped")
    return {name: getattr(learning, name) for name in names}


async def _limits(service: Service, key: Key | None) -> list[dict[str, Any]] | None:
    """None: their store fails."""
    limit = service.spending.limit
    if limit is None:
        return []
    try:
        found = await asyncio.to_thread(limit.balances, key.id if key else None)
    except SQLAlchemyError as error:
        service.note_spending_store(error)
        return None
    return [
        {
            "limit": balance.limit,
            "amount": None if balance.amount is None else float(balance.amount),
            "spent": float(balance.spent),
            "reserved": float(balance.reserved),
            "left": None if balance.left is None else float(balance.left),
            "ends": None if balance.ends is None else balance.ends.isoformat(),
        }
        for balance in found
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


async def front_page(request: Request) -> Response:
    """The page."""
    body, headers = page()
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers)


async def healthz(request: Request) -> Response:
    """The process lives."""
    return PlainTextResponse("ok")


def readyz(server: Server) -> Callable[[Request], Awaitable[Response]]:
    """It takes requests: not once it was told to stop."""

    async def handler(request: Request) -> Response:
        return PlainTextResponse("ready") if server.ready else PlainTextResponse("shutting down", 503)

    return handler


async def not_found(request: Request, error: Exception) -> Response:
    """404."""
    return _error(404, f"no such path: {request.method} {request.url.path:.80}", _api_of(request))


async def wrong_method(request: Request, error: Exception) -> Response:
    """405, with the methods that the path takes."""
    found = _error(405, f"{request.method} is not what this path takes", _api_of(request))
    found.headers.update(getattr(error, "headers", None) or {})
    return found


async def failed(request: Request, error: Exception) -> Response:
    """500: uvicorn logs the exception."""
    return _error(500, "an internal error; the server's log has it")


def _api_of(request: Request) -> Api:
    """In whose format a path's errors are."""
    return APIS["messages" if request.url.path.startswith("/v1/messages") else "chat"]


def _error(status: int, message: str, api: Api = APIS["chat"]) -> Response:
    return Response(orjson.dumps(api.error(status, message)), status, media_type=JSON)
