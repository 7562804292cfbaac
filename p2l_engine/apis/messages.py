"""Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from p2l_engine.apis.api import UNREADABLE, Progress, Usage, count, error_text, forwarded, mapping, sequence, size
from p2l_engine.apis.ask import (
    ApiName,
    Ask,
    BadRequest,
    Contents,
    TurnsAlone,
    count_field,
    flag_field,
    list_field,
    text_field,
)
from p2l_engine.apis.events import data_of
from p2l_engine.apis.extras import Extras, size_of_fields, tier_of

VERSION = "2023-06-01"  # of the API, where the client names none
THREAD_NOT_FOUND = "thread_not_found"  # at which Anthropic's SDKs send the whole conversation again
COUNTED = ("messages", "system", "tools", "output_format", "output_config")
CLIENTS = ("custom", "bash_", "text_editor_", "computer_", "memory_")  # how the types of tools begin that the client runs
FORWARDED = ("anthropic-version", "anthropic-beta")
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


class MessagesStream(Progress):
    """A stream of typed events. See ``api.Stream``."""

    def read(self, event: bytes) -> bool:
        data = data_of(event)
        if not data:
            return True
        try:
            found = mapping(orjson.loads(data))
        except orjson.JSONDecodeError:
            self.error = UNREADABLE
            return False
        kind = found.get("type")
        if kind == "error" or found.get("error"):
            self.error = error_text(found) or "an error without a message"
            return False
        if kind == "content_block_delta":
            delta = mapping(found.get("delta"))
            texts = (delta.get(name) for name in ("text", "partial_json", "thinking"))
            self.written += sum(map(size, texts))
        elif kind == "message_start":
            self._add(mapping(found.get("message")))
            self.kept += _container(mapping(found.get("message")))
        elif kind == "message_delta":
            self._add(found)
            self.kept += _container(mapping(found.get("delta")))
        elif kind == "message_stop":
            self.ended = True
        return True

    def _add(self, found: dict[str, Any]) -> None:
        """Usage comes in two parts: the input first, the output, and what changed of the input, last."""
        part, before = usage_of(found), self.usage
        if part is None or before is None:
            self.usage = part or before
            return
        input_too = part.tokens_in > 0
        newer = part if input_too else before
        out, calls = max(part.tokens_out, before.tokens_out), max(part.calls, before.calls)
        self.usage = Usage(newer.tokens_in, out, newer.cached, newer.written, newer.lasting, 0, calls)


class Messages:
    """See ``api.Api``."""

    name: ApiName = "messages"
    path = "/messages"

    def ask(self, body: dict[str, Any]) -> Ask:
        if (most := count_field(body, "max_tokens", least=0)) is None:  # 0 fills the prompt cache and writes nothing
            raise BadRequest("max_tokens: expected a whole number of at least 0, got nothing", "max_tokens")
        reader = Contents()
        _opening(reader, body)
        if tools := list_field(body, "tools"):
            reader.needs.add("tools")
            reader.message("tools", "", orjson.dumps(tools))
        _conversation(reader, body)
        schema = body.get("output_format") or mapping(body.get("output_config")).get("format")
        if mapping(schema).get("type") == "json_schema":
            reader.needs.add("json_schema")
            reader.message("schema", "", orjson.dumps(schema))
        extras = Extras(
            tuple(reader.unseen), size_of_fields(body, COUNTED), 0, *_hosted(body, tools),
            tier_of(body.get("service_tier"), body.get("speed")),
            mapping(body.get("thinking")).get("type") not in (None, "disabled"),
            reader.lasting or any(map(_lasts, [body, *tools])),
        )  # fmt: skip
        return Ask(
            self.name, body, text_field(body, "model"), flag_field(body, "stream"), reader.of_user(), tuple(reader.texts),
            reader.images, frozenset(reader.needs), most, reader.session(),
            sealed=reader.sealed, extras=extras, pictures=tuple(reader.pictures), references=tuple(_container(body)),
        )  # fmt: skip

    def read(self, reader: Contents, body: dict[str, Any]) -> None:
        _opening(reader, body)
        _conversation(reader, body)

    def said(self, content: object) -> str | None:
        text, _, said = _content(TurnsAlone(), content, "content")
        return text if said else None

    def outgoing(self, ask: Ask, model: str, stream_usage: bool) -> dict[str, Any]:
        return forwarded(ask, model)

    def headers(self, key: str | None, given: dict[str, str]) -> dict[str, str]:
        found = {name: given[name] for name in FORWARDED if name in given}
        found.setdefault("anthropic-version", VERSION)
        return found if key is None else {**found, "x-api-key": key}

    def usage(self, answer: dict[str, Any]) -> Usage | None:
        return usage_of(answer)

    def fault(self, answer: object) -> str | None:
        if (error := error_text(answer)) is not None:
            return error
        return None if isinstance(mapping(answer).get("content"), list) else "an answer without content"

    def kept(self, answer: dict[str, Any]) -> list[str]:
        return _container(answer)

    def stream(self, ask: Ask) -> MessagesStream:
        return MessagesStream()

    def error(self, status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
        kind = KINDS.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
        error: dict[str, Any] = {"type": kind, "message": message}
        if code == THREAD_NOT_FOUND:
            error["details"] = {"error_code": code}
        return {"type": "error", "error": error}

    def error_event(self, message: str) -> bytes:
        return b"event: error\ndata: " + orjson.dumps(self.error(502, message)) + b"\n\n"


def usage_of(answer: dict[str, Any]) -> Usage | None:
    """The usage that an answer reports. input_tokens leaves out what the prompt cache gave and took."""
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    # Where the provider has read the input several times, the sum is what it bills.
    rounds = [mapping(part) for part in sequence(usage.get("iterations"))]

    def total(name: str, of: Callable[[dict[str, Any]], object] | None = None) -> int:
        read = of or (lambda part: part.get(name))
        return max(count(read(usage)), sum(count(read(part)) for part in rounds))

    cached, written = total("cache_read_input_tokens"), total("cache_creation_input_tokens")
    lasting = total("", lambda part: mapping(part.get("cache_creation")).get("ephemeral_1h_input_tokens"))
    calls = sum(map(count, mapping(usage.get("server_tool_use")).values()))
    found = Usage(
        total("input_tokens") + cached + written, total("output_tokens"), cached, written, min(lasting, written), 0, calls
    )
    return found if found.tokens_in or found.tokens_out else None


def _hosted(body: dict[str, Any], tools: list[Any]) -> tuple[tuple[str, ...], int | None]:
    """The tools that the provider runs, and how often at most; None: any number of times."""
    own = [tool for tool in tools if isinstance(tool.get("type"), str) and not tool["type"].startswith(CLIENTS)]
    edits = sequence(mapping(body.get("context_management")).get("edits"))
    others = [name for name in ("mcp_servers", "container") if body.get(name)]
    others += [kind for edit in edits if (kind := str(mapping(edit).get("type"))).startswith("compact")]
    uses = [count(tool.get("max_uses")) for tool in own]
    return (*(tool["type"] for tool in own), *others), sum(uses) if all(uses) and not others else None


def _container(found: dict[str, Any]) -> list[str]:
    """The id of the container in which the provider's tools run: a request names it, or gives it as an object."""
    container = found.get("container")
    given = mapping(container).get("id") if isinstance(container, dict) else container
    return [given] if isinstance(given, str) else []


def _lasts(block: dict[str, Any]) -> bool:
    return mapping(block.get("cache_control")).get("ttl") == "1h"


def _opening(reader: Contents, body: dict[str, Any]) -> None:
    if mapping(body.get("thread")).get("type") == "continue":
        # What is in the thread is not known here: not whose turn it is, nor how much it costs, nor who may read it.
        raise BadRequest("thread: kept by one provider alone; send the whole conversation", "thread", 404, THREAD_NOT_FOUND)
    if body.get("system") is not None:
        text = _content(reader, body["system"], "system")[0]
        reader.instructions.append(text)
        reader.message("system", text)


def _conversation(reader: Contents, body: dict[str, Any]) -> None:
    for i, message in enumerate(list_field(body, "messages", required=True)):
        _message(reader, message, f"messages[{i}]")


def _message(reader: Contents, message: dict[str, Any], where: str) -> None:
    role = message.get("role")
    if role not in ("user", "assistant", "system"):
        raise BadRequest(f"{where}.role: expected user or assistant, got {role!r:.40}", f"{where}.role")
    text, extra, said = _content(reader, message.get("content"), f"{where}.content")
    if role == "user" and said:
        reader.turn(text)
    elif role != "user":
        (reader.others if role == "assistant" else reader.instructions).append(text)
    reader.message(role, text, extra)


def _content(reader: Contents, content: object, where: str) -> tuple[str, bytes, bool]:
    """The text, what else there is as JSON, and whether the user said something: a tool's result is not a turn."""
    if isinstance(content, str):
        return content, b"", True
    if not isinstance(content, list):
        raise BadRequest(f"{where}: expected text or a list of blocks, got {type(content).__name__}", where)
    parts, extra, said = [], b"", False
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise BadRequest(f"{where}[{i}]: expected a block with a 'type'", f"{where}[{i}]")
        reader.lasting |= _lasts(block)
        if kind == "text":
            if not isinstance(text := block.get("text"), str):
                raise BadRequest(f"{where}[{i}].text: expected text", f"{where}[{i}].text")
            parts.append(text)
            said = True
        elif kind == "image":
            parts.append(reader.image(block.get("source")))
            said = True
        elif kind == "document":
            source = mapping(block.get("source"))
            if source.get("type") == "text" and isinstance(text := source.get("data"), str):
                parts.append(text)
            elif source.get("type") == "content" and (inner := source.get("content")) is not None:
                text, more, _ = _content(reader, inner, f"{where}[{i}].source.content")
                parts.append(text)
                extra += more
            else:
                parts.append(reader.document(source))
            said = True
        elif kind == "tool_result":
            reader.needs.add("tools")
            inner = block.get("content")
            text, more, _ = ("", b"", False) if inner is None else _content(reader, inner, f"{where}[{i}].content")
            extra += str(block.get("tool_use_id")).encode() + text.encode() + more
        else:
            if kind == "tool_use":
                reader.needs.add("tools")
            reader.sealed |= kind == "redacted_thinking" or (kind == "thinking" and bool(block.get("signature")))
            if kind == "container_upload":
                reader.unseen.append(kind)
            extra += reader.packed(block)
    return "\n".join(parts), extra, said
