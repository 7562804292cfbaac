"""What a caller may ask of the router: the body's field ``p2l``, or headers ``x-p2l-...``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from p2l_engine.apis.ask import BadRequest, digest
from p2l_engine.routing import Objective
from p2l_engine.serve.settings import Key

FIELDS = ("budget", "models", "session", "objective", "dry_run", "explain")
HEADERS = {f"x-p2l-{name.replace('_', '-')}": name for name in FIELDS}
# Where agents and chat interfaces say which conversation a request belongs to.
SESSION_HEADERS = (
    "x-session-id", "session_id", "x-conversation-id", "conversation_id", "x-openwebui-chat-id", "x-librechat-conversation-id",
    "x-thread-id", "helicone-session-id", "x-claude-code-session-id", "thread-id", "session-id",
)  # fmt: skip
SESSION_FIELDS = ("prompt_cache_key", "chat_id", "conversation_id", "session_id")  # the same in bodies


@dataclass(frozen=True, slots=True)
class Options:
    """budget: upper bound on this request's expected cost, USD. models: those that the caller allows. dry_run: decide, and send
    nothing. explain: say everything."""

    budget: float | None = None
    models: frozenset[str] | None = None
    session: str | None = None
    objective: Objective | None = None
    dry_run: bool = False
    explain: bool = False


NOTHING_ASKED = Options()


def options_of(body: Mapping[str, Any], headers: Mapping[str, str]) -> Options:
    """Reads the options; the body's come before the headers'. Raises BadRequest."""
    given = body.get("p2l")
    if given is None:
        if headers.keys().isdisjoint(HEADERS):
            return NOTHING_ASKED
        given = {}
    if not isinstance(given, dict):
        raise BadRequest(f"p2l: expected an object, got {type(given).__name__}", "p2l")
    for name in given:
        if name not in FIELDS:
            raise BadRequest(f"p2l: unknown field {name!r:.40}, expected {', '.join(FIELDS)}", f"p2l.{name:.40}")
    own = {name: given[name] for name in FIELDS if given.get(name) is not None}
    for header_name, name in HEADERS.items():
        header = headers.get(header_name)
        if header is not None and name not in own:
            own[name] = _from_header(name, header)
    models = own.get("models")
    if models is not None and not (isinstance(models, list) and models and all(isinstance(name, str) for name in models)):
        raise BadRequest("p2l.models: expected a list of names of models", "p2l.models")
    budget = own.get("budget")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget < math.inf):
        raise BadRequest(f"p2l.budget: expected USD >= 0, got {budget!r:.40}", "p2l.budget")
    session = own.get("session")
    if session is not None and not isinstance(session, str):
        raise BadRequest("p2l.session: expected text", "p2l.session")
    objective = own.get("objective")
    if objective not in (None, "bt", "half-ties", "not-bad"):
        raise BadRequest(f"p2l.objective: expected 'bt', 'half-ties' or 'not-bad', got {objective!r:.40}", "p2l.objective")
    for name in ("dry_run", "explain"):
        if not isinstance(own.get(name, False), bool):
            raise BadRequest(f"p2l.{name}: expected true or false", f"p2l.{name}")
    return Options(
        None if budget is None else float(budget), None if models is None else frozenset(models), session, objective,
        own.get("dry_run", False), own.get("explain", False),
    )  # fmt: skip


def session_of(options: Options, body: Mapping[str, Any], headers: Mapping[str, str], key: Key | None, otherwise: str) -> str:
    """A hash of the conversation that a request belongs to; of each caller's own."""
    named = options.session or None
    if named is None and any(name in headers for name in SESSION_HEADERS):
        named = next((headers[name] for name in SESSION_HEADERS if headers.get(name)), None)
    if named is None:
        metadata = body.get("metadata")
        user = metadata.get("user_id") if isinstance(metadata, dict) else None
        # Claude Code names its session there, other clients the user alone.
        given = [user] if isinstance(user, str) and "session" in user else [body.get(name) for name in SESSION_FIELDS]
        named = next((name for name in given if isinstance(name, str) and name), None)
    name = otherwise if named is None else named
    return of_caller(key, name)


def of_caller(key: Key | None, name: str) -> str:
    """A hash of a name, or of an id, that is each caller's own."""
    return digest([(key.id if key else "").encode(), name.encode("utf-8", "replace")])


def _from_header(name: str, text: str) -> Any:
    if name == "budget":
        try:
            return float(text)
        except ValueError:
            raise BadRequest(f"x-p2l-budget: expected USD >= 0, got {text!r:.40}", "x-p2l-budget") from None
    if name == "models":
        return [part.strip() for part in text.split(",") if part.strip()]
    if name in ("dry_run", "explain"):
        if text.lower() not in ("true", "false", "1", "0"):
            raise BadRequest(f"x-p2l-{name.replace('_', '-')}: expected true or false, got {text!r:.40}")
        return text.lower() in ("true", "1")
    return text
