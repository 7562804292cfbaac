"""The external selector that vLLM semantic-router asks for a model: ``POST /route`` and ``GET /health``.

Its client is pkg/selection/router_r1_client.go of https://github.com/vllm-project/semantic-router (v0.2 and v0.3).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from p2l_engine.apis.ask import BadRequest
from p2l_engine.apis.registry import APIS
from p2l_engine.serve.endpoint import ClientLeft, read_body
from p2l_engine.serve.gate import Unauthorized
from p2l_engine.serve.scorer import Overloaded
from p2l_engine.serve.service import Refused

if TYPE_CHECKING:
    from p2l_engine.serve.server import Server

# What semantic-router sends as the query: the name of the decision that matched, and the models that it may choose from.
QUERY = re.compile(r"\ATask: (?P<task>.*)\nAvailable models: (?P<models>[^\n]*)\Z", re.S)


def routes(server: Server) -> list[BaseRoute]:
    """The selector's paths."""

    async def route(request: Request) -> Response:
        server.running += 1
        try:
            return Response(orjson.dumps(await _selected(server, request)), media_type="application/json")
        except ClientLeft:
            return Response(status_code=400)  # the client is gone
        except Unauthorized as error:
            return _error(401, str(error))
        except BadRequest as error:
            return _error(error.status, error.message)
        except Refused as error:
            return _error(error.status, error.message, error.retry_after)
        except Overloaded as error:
            return _error(503, str(error), error.retry_after)
        finally:
            server.running -= 1

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if server.ready else JSONResponse({"status": "shutting down"}, 503)

    return [Route("/route", route, methods=["POST"]), Route("/health", health)]


async def _selected(server: Server, request: Request) -> dict[str, Any]:
    service = server.service
    key = service.gate.caller(request.headers)
    serve = service.plan.serve
    task, models = _query(await read_body(request.receive, request.headers, int(serve.body_mb * 2**20), serve.timeouts.idle))
    options: dict[str, Any] = {}
    if models is not None:
        known = [name for name in models if name in service.plan.index]
        if not known:
            raise BadRequest(f"Available models: expected one of the catalog at least, got {', '.join(models)}"[:500])
        options["models"] = known
    body = {"messages": [{"role": "user", "content": task}], "p2l": options}
    call = await service.call(APIS["chat"], body, request.headers, key, "route")
    first = await service.decide(call)
    server.finished(call.record(200, "decision", None, None, None, False))
    name = call.plan.names[first.model]
    found = {"id": call.id, "win_rate": first.rate, "expected_cost": first.cost, "fallbacks": call.fallbacks()}
    return {"selected_model": name, "thinking": call.why(first), "full_response": orjson.dumps(found).decode()}


def _query(body: bytes) -> tuple[str, list[str] | None]:
    """The text that is routed, and the models to choose from; None: all."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"expected a body of JSON in UTF-8: {error}") from None
    query = found.get("query") if isinstance(found, dict) else None
    if not isinstance(query, str) or not query.strip():
        raise BadRequest("query: expected text that is not empty")
    match = QUERY.match(query)
    if match is None:
        return query, None
    return match["task"], [name.strip() for name in match["models"].split(",") if name.strip()]


def _error(status: int, message: str, after: float | None = None) -> Response:
    """Semantic-router logs the body and falls back to its own choice."""
    headers = {} if after is None else {"retry-after": str(int(after + 1))}
    return JSONResponse({"error": message}, status, headers)
