"""OpenAI's Responses API."""

from __future__ import annotations

from typing import Any

import orjson

from p2l_engine.apis.api import UNREADABLE, Progress, Usage, bearer, count, error_text, forwarded, mapping, openai_error
from p2l_engine.apis.ask import ApiName, Ask, BadRequest, Contents, count_field, flag_field, list_field, text_field
from p2l_engine.apis.events import data_of

LAST = ("response.completed", "response.incomplete")  # the events that end a complete answer


class ResponsesStream(Progress):
    """A stream of typed events. See ``api.Stream``. answer_id: of the answer, which later requests may continue."""

    def __init__(self) -> None:
        super().__init__()
        self.answer_id: str | None = None

    def read(self, event: bytes) -> bool:
        data = data_of(event)
        if not data or data.strip() == b"[DONE]":
            return True
        try:
            found = mapping(orjson.loads(data))
        except orjson.JSONDecodeError:
            self.error = UNREADABLE
            return False
        kind = str(found.get("type"))
        if kind == "error" or kind == "response.failed" or found.get("error"):
            response = mapping(found.get("response"))
            self.error = error_text(found) or error_text(response) or str(found.get("message") or kind)[:500]
            return False
        if kind.endswith(".delta"):
            self.characters += len(delta) if isinstance(delta := found.get("delta"), str) else 0
        elif kind in LAST or kind == "response.created":
            response = mapping(found.get("response"))
            self.answer_id = response.get("id") if isinstance(response.get("id"), str) else self.answer_id
            self.usage = usage_of(response) or self.usage
            self.ended = kind in LAST
        return True


class Responses:
    """See ``api.Api``."""

    name: ApiName = "responses"
    path = "/responses"

    def ask(self, body: dict[str, Any]) -> Ask:
        if body.get("background"):
            raise BadRequest("background: expected false; what runs in the background cannot be held to a budget", "background")
        if body.get("conversation"):
            raise BadRequest("conversation: is kept by one provider alone; send the whole input", "conversation")
        reader = Contents()
        if (instructions := body.get("instructions")) is not None:
            reader.instructions.append(text_field(body, "instructions"))
            reader.message("system", instructions)
        if tools := list_field(body, "tools"):
            reader.needs.add("tools")
            reader.message("tools", "", orjson.dumps(tools))
        previous = None if body.get("previous_response_id") is None else text_field(body, "previous_response_id")
        given = body.get("input")
        if isinstance(given, str):
            reader.turn(given)
            reader.message("user", given)
        else:
            for i, item in enumerate(list_field(body, "input", required=True)):
                _item(reader, item, f"input[{i}]")
        schema = mapping(mapping(body.get("text")).get("format"))
        if schema.get("type") == "json_schema":
            reader.needs.add("json_schema")
            reader.message("schema", "", orjson.dumps(schema))
        return Ask(
            self.name, body, text_field(body, "model"), flag_field(body, "stream"), reader.of_user(), tuple(reader.texts),
            reader.images, frozenset(reader.needs), count_field(body, "max_output_tokens"), reader.session(), 1, previous,
            reader.sealed,
        )  # fmt: skip

    def outgoing(self, ask: Ask, model: str, stream_usage: bool) -> dict[str, Any]:
        return forwarded(ask, model)

    def headers(self, key: str | None, given: dict[str, str]) -> dict[str, str]:
        return bearer(key)

    def usage(self, answer: dict[str, Any]) -> Usage | None:
        return usage_of(answer)

    def fault(self, answer: object) -> str | None:
        if (error := error_text(answer)) is not None:
            return error
        found = mapping(answer)
        if found.get("status") in ("failed", "cancelled"):
            return f"an answer whose status is {found['status']!r}"
        return None if isinstance(found.get("output"), list) else "an answer without output"

    def stream(self, ask: Ask) -> ResponsesStream:
        return ResponsesStream()

    def error(self, status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
        return openai_error(status, message, param, code)

    def error_event(self, message: str) -> bytes:
        # The fields as documented, and once more in an object, which is where OpenAI's SDKs look for an error to raise.
        error = {"code": "upstream_error", "message": message, "param": None}
        found = {"type": "error", **error, "sequence_number": 0, "error": {"type": "server_error", **error}}
        return b"event: error\ndata: " + orjson.dumps(found) + b"\n\n"


def usage_of(answer: dict[str, Any]) -> Usage | None:
    """The usage that an answer reports."""
    usage = answer.get("usage")
    if not isinstance(usage, dict) or not (count(usage.get("input_tokens")) or count(usage.get("output_tokens"))):
        return None
    cached = count(mapping(usage.get("input_tokens_details")).get("cached_tokens"))
    return Usage(count(usage.get("input_tokens")), count(usage.get("output_tokens")), cached)


def _item(reader: Contents, item: dict[str, Any], where: str) -> None:
    """One item of the input: a message, or what an agent's tools were asked and said."""
    kind = item.get("type", "message")
    if not isinstance(kind, str):
        raise BadRequest(f"{where}.type: expected text", f"{where}.type")
    if kind != "message":
        if "call" in kind:
            reader.needs.add("tools")
        reader.sealed |= bool(item.get("encrypted_content"))
        reader.message(kind, "", orjson.dumps(item))
        return
    role = item.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise BadRequest(f"{where}.role: expected system, developer, user or assistant, got {role!r:.40}", f"{where}.role")
    text = _content(reader, item.get("content"), f"{where}.content")
    if role == "user":
        reader.turn(text)
    else:
        (reader.others if role == "assistant" else reader.instructions).append(text)
    reader.message(role, text)


def _content(reader: Contents, content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise BadRequest(f"{where}: expected text or a list of parts, got {type(content).__name__}", where)
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise BadRequest(f"{where}[{i}]: expected a part with a 'type'", f"{where}[{i}]")
        if kind in ("input_text", "output_text", "text", "refusal"):
            text = part.get("refusal" if kind == "refusal" else "text")
            if not isinstance(text, str):
                raise BadRequest(f"{where}[{i}].text: expected text", f"{where}[{i}].text")
            parts.append(text)
        elif kind in ("input_image", "input_file"):
            parts.append(reader.image(part))
        else:
            if kind == "input_audio":
                reader.needs.add("audio")
            parts.append(f"[{kind[:40]}]")
    return "\n".join(parts)
