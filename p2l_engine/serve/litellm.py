"""A plugin for the LiteLLM proxy: requests for the model ``auto`` go to the model that P2L chooses.

This file imports nothing of p2l_engine, and litellm only where LiteLLM asks for the callback, so that it can be copied next to
the proxy's ``config.yaml``, from where LiteLLM loads a single file. ``callbacks: p2l_router.router`` takes its settings from
the environment (``SETTINGS``); another module may call ``callback(...)`` instead. See docs/gateways.md.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp

logger = logging.getLogger("p2l_engine.litellm")

# The environment variable of each setting.
SETTINGS = {"url": "P2L_URL", "key": "P2L_KEY", "fallback": "P2L_FALLBACK", "alias": "P2L_ALIAS", "timeout": "P2L_TIMEOUT"}
# The calls that P2L can choose a model for.
CALLS = frozenset({"completion", "acompletion", "responses", "aresponses", "anthropic_messages", "aanthropic_messages"})
# What of a request a decision depends on.
READ = (
    "messages", "input", "instructions", "system", "tools", "functions", "response_format", "text", "output_config",
    "output_format", "modalities", "audio", "n", "max_tokens", "max_completion_tokens", "max_output_tokens", "prompt_cache_key",
    "previous_response_id",
)  # fmt: skip
# The headers that tell which conversation a request belongs to, beside those that begin with x-p2l-.
SESSION_HEADERS = (
    "x-session-id", "x-conversation-id", "x-openwebui-chat-id", "x-librechat-conversation-id", "x-claude-code-session-id",
)  # fmt: skip
LOOKS = ("dry_run", "explain")  # wishes for a decision alone, which LiteLLM cannot give
CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f]")  # no HTTP client sends these in a header
MODELS_SECONDS = 60.0  # for which the router's list of models is taken to be the same
EXPLAINED = ("policy", "propensity", "propensity_error", "expected_cost", "win_rate", "why")  # of a decision, for logs
REFUSED = (400, 402, 413)  # what the router says of the request itself; any other error is the router's own
NOT_KEPT = ("previous_response_not_found", "not_found")  # codes of a 404 that is the request's too
EVERY_MODEL = frozenset({"*", "all-proxy-models", "all-team-models"})


class Refusal(Exception):
    """The request itself cannot be routed; it is answered with this status. status: HTTP; param: what is wrong with it."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class RouterFailed(Exception):
    """No decision could be had from the router."""


class Decided(dict[str, Any]):
    """A decision in a request's metadata: what a client writes there itself is none."""


class AutoChoice(ABC):
    """Sets the model of LiteLLM's requests; how a decision is had is left to its classes.

    alias: the model name whose requests are routed; others are left alone. fallback: the model that takes requests while the
    router fails, which is logged once for each outage; None: they are refused with 503. names: {P2L's name: LiteLLM's
    ``model_name``} of models that LiteLLM calls otherwise. timeout: seconds that a decision may take. pause: seconds after a
    failure in which the router is not asked. fallbacks: whether LiteLLM is told which models come next, where the request does
    not say so itself. Raises ValueError.
    """

    def __init__(
        self,
        *,
        alias: str = "auto",
        fallback: str | None = None,
        names: Mapping[str, str] | None = None,
        timeout: float = 2.0,
        pause: float = 5.0,
        fallbacks: bool = True,
    ) -> None:
        if fallback == alias:
            raise ValueError(f"fallback: expected a model of LiteLLM's, got the alias {alias!r} itself")
        self.alias, self.fallback, self.names = alias, fallback, dict(names or {})
        self.timeout, self.pause, self.fallbacks = timeout, pause, fallbacks
        self._asked_again_at, self._failing = 0.0, False

    @abstractmethod
    async def models(self) -> list[str]:
        """The router's models. Raises RouterFailed."""

    @abstractmethod
    async def decide(
        self, data: Mapping[str, Any], wishes: Mapping[str, Any], headers: Mapping[str, str], allowed: list[str] | None
    ) -> Decided:
        """The decision for a request, among the models ``allowed`` (None: any). wishes, headers: what it asks of the router.
        Raises Refusal, RouterFailed."""

    async def set_model(self, data: dict[str, Any], call_type: str, own: Iterable[str] = ()) -> None:
        """Replaces the alias in a request by a model, and notes the decision in its metadata under ``p2l``.

        own: the models of the caller's key, patterns among them; with none but the alias, any. Raises Refusal.
        """
        if data.get("model") != self.alias or call_type not in CALLS:
            return
        own = [] if set(own) <= {self.alias} or EVERY_MODEL & set(own) else list(own)
        wishes = _wishes(data)
        try:
            decision = await self._decision(data, wishes, own)
        except RouterFailed as failed:
            if self._asked_again_at <= time.monotonic():
                self._asked_again_at = time.monotonic() + self.pause
            wished = [self.theirs(name) for name in wishes.get("models") or ()]
            if self.fallback is None or not _permitted(self.fallback, own) or (wished and self.fallback not in wished):
                raise Refusal(503, f"the router of {self.alias!r} is not available: {failed}") from None
            if not self._failing:
                logger.warning("the router failed (%s): requests for %r go to %r", failed, self.alias, self.fallback)
            self._failing, decision = True, Decided(model=self.fallback, fallbacks=[], why="the router failed")
        else:
            if self._failing:
                logger.warning("the router decides again: requests for %r are routed", self.alias)
            self._failing = False
        data["model"] = decision["model"]
        if self.fallbacks and decision["fallbacks"]:
            data.setdefault("fallbacks", decision["fallbacks"])
        metadata_of(data)["p2l"] = decision

    async def _decision(self, data: Mapping[str, Any], wishes: dict[str, Any], own: list[str]) -> Decided:
        if self._asked_again_at > time.monotonic():
            raise RouterFailed("it failed a moment ago")
        headers, wished = _headers(data), wishes.get("models")
        allowed = None if not own and wished is None else await self._allowed(own, wished)
        return await self.decide(data, wishes, headers, allowed)

    async def _allowed(self, own: list[str], wished: list[str] | None) -> list[str]:
        """The router's models that a key may use and its request wishes for. Raises Refusal."""
        known = await self.models()
        allowed = [name for name in known if _permitted(self.theirs(name), own)]
        if not allowed:
            raise Refusal(400, f"{self.alias}: the router knows none of the models that this key may use")
        if wished is not None:
            allowed = [name for name in allowed if name in wished]
            if not allowed or not set(wished) <= set(known):
                raise Refusal(400, "p2l.models: expected models that the router knows and this key may use", "p2l.models")
        return allowed

    def theirs(self, name: str) -> str:
        """LiteLLM's name of a model."""
        return self.names.get(name, name)


class ModelChoice(AutoChoice):
    """Asks a running p2l-engine server. url: its address, without /v1; key: one of its keys; settings: see ``AutoChoice``."""

    def __init__(self, url: str | None = None, key: str | None = None, **settings: Any) -> None:
        if url is None:
            raise ValueError("expected the url of a p2l-engine server (P2L_URL), got none")
        super().__init__(**settings)
        self.url, self.key = url.rstrip("/"), key
        self._session: aiohttp.ClientSession | None = None
        self._known, self._known_until = list[str](), -math.inf

    async def close(self) -> None:
        """Closes the connections to the router."""
        if self._session is not None:
            await self._session.close()

    async def _decision(self, data: Mapping[str, Any], wishes: dict[str, Any], own: list[str]) -> Decided:
        began = time.monotonic()
        try:
            return await super()._decision(data, wishes, own)
        except Refusal as refusal:
            named = own or wishes.get("models") is not None
            if refusal.param != "p2l.models" or not named or self._known_until >= began + MODELS_SECONDS:
                raise
            self._known_until = -math.inf  # its models may be others by now
            return await super()._decision(data, wishes, own)

    async def decide(
        self, data: Mapping[str, Any], wishes: Mapping[str, Any], headers: Mapping[str, str], allowed: list[str] | None
    ) -> Decided:
        """See ``AutoChoice``."""
        body = {name: data[name] for name in READ if data.get(name) is not None}
        metadata = data.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("user_id"), str):
            body["metadata"] = {"user_id": metadata["user_id"]}
        sent = wishes if allowed is None else {**wishes, "models": allowed}
        found = await self._ask("POST", "/v1/route", {**body, "model": "auto", "p2l": sent}, headers)
        model, after = found.get("model"), found.get("fallbacks")
        if not isinstance(model, str) or not model:
            raise RouterFailed("its answer names no model")
        after = [self.theirs(name) for name in after if isinstance(name, str)] if isinstance(after, list) else []
        kept = ("id", *EXPLAINED)
        explained = {name: found[name] for name in kept if name in found}
        return Decided(model=self.theirs(model), fallbacks=after, **explained)

    async def models(self) -> list[str]:
        """The router's models, asked for once a minute."""
        if time.monotonic() >= self._known_until:
            entries = (await self._ask("GET", "/v1/models")).get("data")
            entries = entries if isinstance(entries, list) else []
            names = [entry.get("id") for entry in entries if isinstance(entry, dict)]
            self._known = [name for name in names if isinstance(name, str) and name != "auto"]
            self._known_until = time.monotonic() + MODELS_SECONDS
        return self._known

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The router's answer. Raises Refusal, RouterFailed."""
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self.timeout))
        own = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        try:
            text = None if body is None else json.dumps(body, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise Refusal(400, f"the request cannot be written as JSON ({type(error).__name__})") from None
        sent = {**(headers or {}), **own, **({} if text is None else {"content-type": "application/json"})}
        try:
            async with self._session.request(method, f"{self.url}{path}", data=text, headers=sent) as answer:
                found, status = await answer.json(content_type=None), answer.status
        except TimeoutError:
            raise RouterFailed(f"no answer within {self.timeout:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError, TypeError) as error:
            raise RouterFailed(f"{type(error).__name__}: {error}") from None
        found = found if isinstance(found, dict) else {}
        if status == 200:
            return found
        problem = found.get("error")
        problem = problem if isinstance(problem, dict) else {}
        message = str(problem.get("message", f"status {status}"))[:500]
        if status in REFUSED or (status == 404 and problem.get("code") in NOT_KEPT):
            raise Refusal(status, message, problem.get("param"))
        raise RouterFailed(f"{path} answered {status}: {message}")


def metadata_of(data: dict[str, Any]) -> dict[str, Any]:
    """Where LiteLLM keeps what it notes of a request; the API's own ``metadata`` is the caller's."""
    name = "litellm_metadata" if isinstance(data.get("litellm_metadata"), dict) else "metadata"
    if not isinstance(data.get(name), dict):
        data[name] = {}
    found: dict[str, Any] = data[name]
    return found


def _permitted(name: str, own: list[str]) -> bool:
    """Whether one of a key's models, or of their patterns, is this one; without any, every model is."""
    return not own or any(fnmatch.fnmatchcase(name, pattern) for pattern in own)


def _headers(data: Mapping[str, Any]) -> dict[str, str]:
    """Of the client's headers, those that the router reads. Raises Refusal."""
    found = {name: value for name, value in _given(data).items() if name.startswith("x-p2l-") or name in SESSION_HEADERS}
    for name, value in found.items():
        if CONTROL.search(value):
            raise Refusal(400, f"{name}: expected text without control characters", name)
    return found


def _given(data: Mapping[str, Any]) -> dict[str, str]:
    request = data.get("proxy_server_request")
    given = request.get("headers") if isinstance(request, dict) else None
    return {str(name).lower(): str(value) for name, value in given.items()} if isinstance(given, dict) else {}


def _wishes(data: dict[str, Any]) -> dict[str, Any]:
    """What a request asks of the router, taken out of its body: no provider knows it. Raises Refusal."""
    found, given = data.pop("p2l", None), _given(data)
    if not isinstance(found, dict | None):
        raise Refusal(400, f"p2l: expected an object, got {type(found).__name__}", "p2l")
    wishes = {name: value for name, value in (found or {}).items() if value is not None}
    if "models" not in wishes and "x-p2l-models" in given:
        wishes["models"] = [name.strip() for name in given["x-p2l-models"].split(",") if name.strip()]
    models = wishes.get("models", [])
    if not (isinstance(models, list) and all(isinstance(name, str) for name in models)):
        raise Refusal(400, "p2l.models: expected a list of names of models", "p2l.models")
    for name in LOOKS:
        if wishes.get(name) or given.get(f"x-p2l-{name.replace('_', '-')}", "").lower() in ("true", "1"):
            raise Refusal(400, f"p2l.{name}: LiteLLM sends what it routes; ask the router itself, at /v1/route", f"p2l.{name}")
    session = data.get("litellm_session_id") or given.get("x-litellm-session-id")
    if session and "session" not in wishes and "x-p2l-session" not in given:  # any text, which no header may be
        wishes["session"] = str(session).encode("utf-8", "replace").decode()
    return wishes


def callback(choice: AutoChoice | None = None, **settings: Any) -> Any:
    """A LiteLLM callback: an instance of ``litellm.integrations.custom_logger.CustomLogger``.

    settings: those of ``ModelChoice``; without any, those of the environment. Raises ValueError.
    """
    from litellm.integrations.custom_logger import CustomLogger

    chosen = choice or ModelChoice(**(settings or from_environment(os.environ)))

    class P2LRouter(CustomLogger):  # type: ignore[misc]
        """Chooses before each call, and says so in the answer's headers."""

        async def async_pre_call_hook(
            self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
        ) -> dict[str, Any]:
            from fastapi import HTTPException

            own = getattr(user_api_key_dict, "models", None) or getattr(user_api_key_dict, "team_models", None) or ()
            try:
                await chosen.set_model(data, getattr(call_type, "value", call_type), own)
            except Refusal as refusal:
                raise HTTPException(refusal.status, {"error": str(refusal)}) from None
            return data

        async def async_post_call_response_headers_hook(
            self, data: dict[str, Any], user_api_key_dict: Any, response: Any, request_headers: Any = None, **more: Any
        ) -> dict[str, str] | None:
            decision = metadata_of(data).get("p2l")
            if not isinstance(decision, Decided):
                return None
            shown = {"x-p2l-model": decision["model"], "x-p2l-decision": decision.get("id")}
            return {k: str(v).encode("ascii", "backslashreplace").decode() for k, v in shown.items() if v is not None}

    return P2LRouter()


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings that environment variables give. Raises ValueError."""
    found: dict[str, Any] = {name: environment[variable] for name, variable in SETTINGS.items() if environment.get(variable)}
    if "timeout" in found:
        try:
            found["timeout"] = float(found["timeout"])
        except ValueError:
            raise ValueError(f"P2L_TIMEOUT: expected seconds, got {found['timeout']!r}") from None
    return found


def __getattr__(name: str) -> Any:
    """``router``: the callback with the environment's settings, made on first use."""
    if name != "router":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["router"] = found = callback()
    return found
