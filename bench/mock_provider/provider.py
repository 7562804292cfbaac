"""The provider itself: reads requests, chooses faults, keeps the bill and the last requests."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import orjson

from bench.mock_provider.api import Api, BadRequest, Call, Json, prefixes
from bench.mock_provider.bill import Bill, Price
from bench.mock_provider.chat import Chat
from bench.mock_provider.connection import Connection, Headers
from bench.mock_provider.faults import QUIRKS
from bench.mock_provider.messages import Messages
from bench.mock_provider.prompt_cache import PromptCache
from bench.mock_provider.reply import Reply
from bench.mock_provider.responses import Responses
from bench.mock_provider.rules import Rule, Rules, harm
from bench.mock_provider.text import example, sentences, tokens_of

APIS: dict[str, Api] = {api.path: api for api in (Chat(), Responses(), Messages())}


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came. body: parsed, or the bytes where it was no JSON object."""

    id: int
    path: str
    raw_headers: Headers
    body: Json | bytes
    fault: str | None

    @property
    def headers(self) -> dict[str, str]:
        """By lower-case name."""
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.raw_headers}

    def json(self) -> Json:
        """As a JSON object."""
        body = self.body.decode("utf-8", "replace") if isinstance(self.body, bytes) else self.body
        return {"id": self.id, "path": self.path, "headers": self.headers, "body": body, "fault": self.fault}


class MockProvider:
    """A provider on a port of its own, while its context lasts.

    prices: USD for a million tokens (input, output, cached input) by model; only these models exist. None: any model, free.
    tokens_out: words of an answer, for all models or by name. first_byte: seconds before an answer. per_token: seconds before
    each token of a stream; 0 writes the stream at once. key: what a client must send, as Authorization: Bearer or x-api-key;
    None for no check. rules: faults. cache_seconds: how long a prefix of messages is cached after its last use. keep: requests
    that are remembered. port: 0 for any free one. clock: seconds, for the prompt cache.
    """

    def __init__(
        self,
        prices: Mapping[str, tuple[float | str, ...]] | None = None,
        *,
        tokens_out: int | Mapping[str, int] = 50,
        first_byte: float = 0.0,
        per_token: float = 0.0,
        seed: int = 0,
        key: str | None = None,
        rules: Iterable[Rule] = (),
        cache_seconds: float = 300.0,
        keep: int = 1000,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.known = None if prices is None else frozenset(prices)
        self.bill = Bill({model: Price.read(*price) for model, price in (prices or {}).items()})
        self.tokens_out, self.first_byte, self.per_token = tokens_out, first_byte, per_token
        self.seed, self.key, self.host, self.port = seed, key, host, port
        self.rules = Rules(seed, list(rules))
        self.cache = PromptCache(cache_seconds, clock)
        self.requests: deque[Received] = deque(maxlen=keep)
        self.connections: set[Connection] = set()
        self._count = 0

    async def __aenter__(self) -> MockProvider:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self, loop), self.host, self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        """Without /v1."""
        return f"http://{self.host}:{self.port}"

    def fail(self, fault: str, **settings: Any) -> Rule:
        """Adds a rule; its settings are those of Rule. Returns it: rule.times says how many requests it still meets."""
        rule = Rule(fault, **settings)
        self.rules.rules.append(rule)
        return rule

    # what connections ask

    def accepts(self) -> bool:
        return not self.rules.refuses()

    def reply(self, method: bytes, target: bytes, headers: Headers, body: bytes) -> Reply:
        path, _, query = target.decode("latin-1").partition("?")
        api = APIS.get(path)
        if path in _OWN:
            return self._own(method, path, query, body)
        self._count += 1
        if api is None:
            self.requests.append(Received(self._count, path, headers, body, None))
            return Reply.json(404, {"error": f"no {path} here: expected one of {', '.join([*APIS, *_OWN])}"})
        parsed: Any = None
        try:
            parsed = orjson.loads(body)
            reply = self._answer(api, headers, body, parsed)
        except orjson.JSONDecodeError:
            reply = Reply.json(400, api.error(400))
        except BadRequest as error:
            reply = Reply.json(error.status, api.error(error.status, str(error), error.param, error.code))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            reply = Reply.json(400, api.error(400, f"The request has a field of the wrong type: {error!r}"))
        known = parsed if isinstance(parsed, dict) else body
        self.requests.append(Received(self._count, path, headers, known, reply.fault))
        reply.headers.append((api.id_header, b"req_%d" % self._count))
        return reply

    def ended(self, reply: Reply, written: int, left: bool) -> None:
        entry = reply.entry(written, left)
        if entry is not None:
            self.bill.entries.append(entry)

    # answers

    def _answer(self, api: Api, headers: Headers, raw: bytes, body: Json) -> Reply:
        if not self._authorised(headers):
            raise BadRequest(api.error(401)["error"]["message"], 401, code="invalid_api_key")
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise BadRequest("you must provide a model parameter", param="model")
        if self.known is not None and model not in self.known:
            raise BadRequest(f"The model `{model}` does not exist.", 404, "model", "model_not_found")
        rule = self.rules.match(model, api.name)
        quirks = frozenset({rule.fault}) & QUIRKS if rule is not None else frozenset()
        reply = Reply.answer(self._call(api, model, raw, body, quirks))
        reply.delay, reply.gap = self.first_byte, self.per_token if reply.framing == "chunked" else 0.0
        if rule is not None:
            harm(reply, rule)
        return reply

    def _authorised(self, headers: Headers) -> bool:
        if self.key is None:
            return True
        given = {name.lower(): value for name, value in headers}
        key = self.key.encode()
        return given.get(b"authorization") == b"Bearer " + key or given.get(b"x-api-key") == key

    def _call(self, api: Api, model: str, raw: bytes, body: Json, quirks: frozenset[str]) -> Call:
        messages = api.messages(body)
        cap = api.cap(body)
        if cap is not None and (not isinstance(cap, int) or cap < 1):
            raise BadRequest(f"The maximum number of output tokens must be an integer of at least 1, got {cap!r}.")
        copies = api.copies(body)
        if not isinstance(copies, int) or not 1 <= copies <= 128:
            raise BadRequest(f"The number of answers must be an integer from 1 to 128, got {copies!r}.", param="n")
        tool, schema = _tool(api, body, last=messages[-1][0])
        if body.get("tools"):
            messages.insert(0, ("tools", orjson.dumps(body["tools"]).decode()))
        keys, tokens = prefixes(messages)
        held = self.cache.use(model, keys)
        if schema is None:
            count = self.tokens_out if isinstance(self.tokens_out, int) else self.tokens_out.get(model, 50)
            words = sentences(zlib.crc32(raw, self.seed), count)
        else:
            words = tokens_of(json.dumps(example(schema), ensure_ascii=False))
        return Call(
            id=self._count,
            api=api,
            model=model,
            body=body,
            stream=body.get("stream") is True,
            tokens_in=tokens[-1],
            tokens_cached=tokens[held - 1] if held else 0,
            words=words[:cap],
            tool=tool,
            capped=cap is not None and cap < len(words),
            copies=copies,
            created=int(time.time()),
            quirks=quirks,
        )

    # requests to the mock itself

    def _own(self, method: bytes, path: str, query: str, body: bytes) -> Reply:
        if method != (b"POST" if path == "/_control" else b"GET"):
            return Reply.json(405, {"error": "expected POST to /_control, GET of /_bill and /_requests"})
        try:
            if path == "/_bill":
                return Reply.json(200, self.bill.json())
            if path == "/_requests":
                first = len(self.requests) - int(dict(parse_qsl(query)).get("last", 100))
                return Reply.json(200, {"requests": [found.json() for found in list(self.requests)[max(first, 0) :]]})
            self.control(orjson.loads(body))
        except ValueError as error:
            return Reply.json(400, {"error": str(error)})
        return Reply.json(200, {})

    def control(self, settings: object) -> None:
        """Changes settings while the provider runs.

        settings: {"rules": [...]} replaces the rules and {"add": [...]} appends some, each an object of Rule's fields;
        {"reset": true} forgets bill, requests, cache and rules; "tokens_out", "first_byte", "per_token" and "key" as in the
        constructor. Raises ValueError.
        """
        allowed = {"rules", "add", "reset", "tokens_out", "first_byte", "per_token", "key"}
        if not isinstance(settings, dict) or not settings.keys() <= allowed:
            raise ValueError(f"control: expected an object with any of {', '.join(sorted(allowed))}, got {settings!r}")
        rules, added = ([Rule.read(rule) for rule in settings.get(name, [])] for name in ("rules", "add"))
        if settings.get("reset"):
            self.bill.entries.clear()
            self.requests.clear()
            self.cache.clear()
        if settings.get("reset") or "rules" in settings:
            self.rules.rules[:] = rules
        self.rules.rules += added
        for name in ("tokens_out", "first_byte", "per_token", "key"):
            if name in settings:
                setattr(self, name, settings[name])


def _tool(api: Api, body: Json, last: str) -> tuple[str | None, Any]:
    """The tool that the answer calls and the JSON schema of its arguments; without a tool, the schema of the answer, if any.

    The first function, or the one that tool_choice names, is called unless the last message is the result of a tool.
    """
    choice = body.get("tool_choice")
    named = choice if isinstance(choice, dict) else {"type": choice}
    wanted = named.get("name") or (named.get("function") or {}).get("name")
    forced = wanted is not None or named["type"] in ("required", "any")
    if named["type"] != "none" and (forced or last != "tool"):
        for tool in body.get("tools") or []:
            name, schema = api.tool(tool)
            if name is not None and wanted in (None, name):
                return name, schema or {"type": "object"}
    return None, api.schema(body)


_OWN = ("/_bill", "/_control", "/_requests")
