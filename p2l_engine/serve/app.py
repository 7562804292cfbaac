"""The HTTP interface: which path does what."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from p2l_engine.apis.api import Api
from p2l_engine.apis.ask import BadRequest
from p2l_engine.apis.registry import APIS
from p2l_engine.decision_log.log import DecisionLog
from p2l_engine.decision_log.record import Record
from p2l_engine.errors import PromptError
from p2l_engine.prompts.parse import user_turns
from p2l_engine.serve import selector
from p2l_engine.serve.endpoint import Endpoint, answer
from p2l_engine.serve.relay import Relay
from p2l_engine.serve.replay import Keeper
from p2l_engine.serve.server import Server
from p2l_engine.serve.service import Refused
from p2l_engine.serve.settings import Key
from p2l_engine.serve.status import (
    failed,
    front_page,
    healthz,
    model,
    models,
    not_found,
    p2l_models,
    readyz,
    status,
    told,
    wrong_method,
)
from p2l_engine.serve.upstream import KEPT_HEADERS

logger = logging.getLogger(__name__)

FEEDBACK = ("score", "against", "preference", "label")
MOST_PROMPTS = 1_000  # of one request for coefficients


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
        await answer(send, {"input_tokens": call.bill.tokens_in()})


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
        value: dict[str, Any] = {"models": found[0].models, "feedback": found[0].feedback.name, "theta": theta, "eta": eta}
        if found[0].deviation is not None:
            value["deviation"] = np.concatenate([one.deviation for one in found if one.deviation is not None])
        if found[0].kept is not None:
            value["kept"] = np.concatenate([one.kept for one in found if one.kept is not None])
        usages = [one.usage for one in found if one.usage is not None]
        if usages:
            value["tokens_out"] = np.concatenate([usage.tokens_out for usage in usages])
            seconds = [usage.seconds for usage in usages if usage.seconds is not None]
            value["seconds"] = np.concatenate(seconds) if seconds else None
        await answer(send, value)


class Predict(Endpoint):
    """lmarena/p2l's own endpoint: coefficients of one prompt. See its serve_p2l.py."""

    async def handle(self, api: Api, body: dict[str, Any], headers: Mapping[str, str], key: Key | None, send: Send) -> None:
        prompt = body.get("prompt")
        if not isinstance(prompt, str | list):
            raise BadRequest("prompt: expected a list of the user's turns, or text", "prompt")
        coefficients, _ = await self.server.service.scorer.coefficients(_turns(prompt, 0))
        eta = None if coefficients.eta is None else float(coefficients.eta[0])
        await answer(send, {"coefs": coefficients.theta[0].tolist(), "eta": eta})


class GiveFeedback(Endpoint):
    """What a user thinks of a decision: see ``DecisionLog.feedback``."""

    async def handle(self, api: Api, body: dict[str, Any], headers: Mapping[str, str], key: Key | None, send: Send) -> None:
        log = self.server.log
        if log is None:
            raise Refused(404, "this server keeps no log: name a file under serve.store")
        if not isinstance(body.get("id"), str) or not set(body) <= {"id", *FEEDBACK}:
            raise BadRequest(
                f"expected 'id' and one of score, label, or preference with against; got {', '.join(sorted(body))}"[:300]
            )
        given = {name: body[name] for name in FEEDBACK if body.get(name) is not None}
        result, kind = "stored", next((name for name in ("score", "preference", "label") if name in given), "other")
        try:
            await asyncio.to_thread(lambda: self._store(log, body["id"], key, given))
        except ValueError as error:
            result = "wrong"
            raise BadRequest(str(error)) from None
        except LookupError as error:
            result = "unknown"
            raise Refused(404, str(error)) from None
        except (TimeoutError, SQLAlchemyError) as error:
            result = "failed"
            logger.error("feedback cannot be stored: %s", type(error).__name__)
            raise Refused(503, "feedback cannot be stored now; try again", retry_after=5) from None
        finally:
            self.server.metrics.feedback.labels(kind, result).inc()
        await answer(send, {"id": body["id"], "stored": True})

    def _store(self, log: DecisionLog, id: str, key: Key | None, given: dict[str, Any]) -> None:
        if self.server.learning is not None:
            self.server.learning.flush()  # stored before the feedback is, so that it can be learned from after a restart
        log.feedback(id, key.id if key else None, **given)


class Direct:
    """Takes what is posted to an endpoint past Starlette's router and its handlers of errors: an endpoint has its own."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint]) -> None:
        self._app, self._endpoints = app, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        posted = scope["type"] == "http" and scope["method"] == "POST"
        found = self._endpoints.get(scope["path"]) if posted else None
        await (found or self._app)(scope, receive, send)


def application(server: Server) -> Starlette:
    """The whole application."""
    endpoints = {
        "/v1/chat/completions": Completion(server, APIS["chat"]),
        "/v1/responses": Completion(server, APIS["responses"]),
        "/v1/messages": Completion(server, APIS["messages"]),
        "/v1/messages/count_tokens": CountTokens(server, APIS["messages"]),
        "/v1/route": Completion(server, None, "route"),
        "/v1/coefficients": CoefficientsOf(server, None),
        "/v1/feedback": GiveFeedback(server, None),
        "/predict": Predict(server, None),
    }
    routes: list[BaseRoute] = [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()),  # other methods are 405
        Route("/models", told(server, p2l_models)),
        Route("/v1/models", told(server, models)),
        Route("/v1/models/{name:path}", model(server)),
        Route("/v1/status", told(server, status)),
        Route("/metrics", told(server, lambda server, key: server.metrics.text())),
        Route("/healthz", healthz),
        Route("/readyz", readyz(server)),
    ]
    routes += selector.routes(server)
    if server.service.plan.serve.page:
        routes.append(Route("/", front_page))
    cors = server.service.plan.serve.cors
    own = ["x-p2l-decision", "x-p2l-model", "x-p2l-expected-cost", "x-p2l-win-rate", "x-p2l-attempts", "x-p2l-cache"]
    shown = [*own, "retry-after", *KEPT_HEADERS]
    allowing = Middleware(CORSMiddleware, allow_origins=cors, allow_methods=["*"], allow_headers=["*"], expose_headers=shown)
    return Starlette(
        routes=routes,
        middleware=[*([allowing] if cors else []), Middleware(Direct, endpoints)],
        exception_handlers={404: not_found, 405: wrong_method, Exception: failed},
    )


def _turns(prompt: object, index: int) -> Any:
    try:
        return user_turns(prompt, index)
    except PromptError as error:
        raise BadRequest(str(error), f"prompts[{index}]") from None
