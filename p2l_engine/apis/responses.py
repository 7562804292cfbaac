"""OpenAI's Responses API."""

from __future__ import annotations

from typing import Any

import orjson

from p2l_engine.apis.api import (
    UNREADABLE,
    Progress,
    Usage,
    bearer,
    count,
    error_text,
    forwarded,
    mapping,
    openai_error,
    sequence,
    size,
)
from p2l_engine.apis.ask import (
    AUTO,
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

COUNTED = ("input", "instructions", "tools", "text", "prompt")
# Tools that the client runs, and the items of their calls; all others run at the provider.
CLIENTS = ("function", "custom", "namespace", "local_shell", "apply_patch", "computer_use_preview", "computer")
CLIENTS_CALLS = ("function_call", "custom_tool_call", "local_shell_call", "apply_patch_call", "computer_call")
LARGE = 4_096  # bytes of an item that may hold an image
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
            self.written += size(found.get("delta"))
        elif kind in LAST or kind == "response.created":
            response = mapping(found.get("response"))
            self.answer_id = response.get("id") if isinstance(response.get("id"), str) else self.answer_id
            self.kept = kept_of(response)
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
        reader = Contents()
        _opening(reader, body)
        if tools := list_field(body, "tools"):
            reader.needs.add("tools")
            reader.message("tools", "", orjson.dumps(tools))
            for tool in tools:
                reader.refer(tool.get("container"), *_containers(tool))
        previous = None if body.get("previous_response_id") is None else text_field(body, "previous_response_id")
        _input(reader, body)
        if body.get("prompt") is not None:
            if text_field(body, "model") == AUTO:
                raise BadRequest("prompt: is kept by one provider alone; name the model, or send the whole input", "prompt")
            reader.unseen.append("a stored prompt")
        schema = mapping(mapping(body.get("text")).get("format"))
        if schema.get("type") == "json_schema":
            reader.needs.add("json_schema")
            reader.message("schema", "", orjson.dumps(schema))
        hosted = tuple(str(tool.get("type")) for tool in tools if tool.get("type") not in CLIENTS)
        extras = Extras(
            tuple(reader.unseen), size_of_fields(body, COUNTED), 0, hosted, count_field(body, "max_tool_calls"),
            tier_of(body.get("service_tier")), mapping(body.get("reasoning")).get("effort") not in (None, "none"),
        )  # fmt: skip
        return Ask(
            self.name, body, text_field(body, "model"), flag_field(body, "stream"), reader.of_user(), tuple(reader.texts),
            reader.images, frozenset(reader.needs), count_field(body, "max_output_tokens"), reader.session(), 1, previous,
            reader.sealed, extras, tuple(reader.pictures), reader.sound, references=tuple(reader.references),
        )  # fmt: skip

    def read(self, reader: Contents, body: dict[str, Any]) -> None:
        if body.get("prompt") is not None:
            raise BadRequest("prompt: is kept by one provider alone; send the whole input", "prompt")
        _opening(reader, body)
        _input(reader, body)

    def said(self, content: object) -> str | None:
        return _content(TurnsAlone(), content, "content")

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

    def kept(self, answer: dict[str, Any]) -> list[str]:
        return kept_of(answer)

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
    details, written = mapping(usage.get("input_tokens_details")), mapping(usage.get("output_tokens_details"))
    given, out = count(usage.get("input_tokens")), count(usage.get("output_tokens"))
    audio = min(count(details.get("audio_tokens")), given)
    kinds = [str(mapping(item).get("type")) for item in sequence(answer.get("output"))]
    calls = sum(kind.endswith("_call") and kind not in CLIENTS_CALLS for kind in kinds)
    return Usage(
        given, out, count(details.get("cached_tokens")), reasoning=count(written.get("reasoning_tokens")), calls=calls,
        audio_in=audio, image_in=min(count(details.get("image_tokens")), given - audio),
        audio_out=min(count(written.get("audio_tokens")), out),
    )  # fmt: skip


def kept_of(answer: dict[str, Any]) -> list[str]:
    """The ids of an answer, of its items, and of the containers in which its tools ran."""
    items = [mapping(item) for item in sequence(answer.get("output"))]
    found = [answer.get("id"), *(item.get("id") for item in items), *(id for item in items for id in _containers(item))]
    return list(dict.fromkeys(id for id in found if isinstance(id, str)))


def _containers(item: dict[str, Any]) -> tuple[object, object]:
    """Where the tool of a call, or of a request, runs: a container that its provider keeps."""
    return item.get("container_id"), mapping(item.get("environment")).get("container_id")


def _opening(reader: Contents, body: dict[str, Any]) -> None:
    if body.get("conversation"):
        raise BadRequest("conversation: is kept by one provider alone; send the whole input", "conversation")
    if (instructions := body.get("instructions")) is not None:
        reader.instructions.append(text_field(body, "instructions"))
        reader.message("system", instructions)


def _input(reader: Contents, body: dict[str, Any]) -> None:
    given = body.get("input")
    if isinstance(given, str):
        reader.turn(given)
        reader.message("user", given)
        return
    for i, item in enumerate(list_field(body, "input", required=True)):
        _item(reader, item, f"input[{i}]")


def _item(reader: Contents, item: dict[str, Any], where: str) -> None:
    """One item of the input: a message, or what an agent's tools were asked and said."""
    kind = item.get("type", "message")
    if not isinstance(kind, str):
        raise BadRequest(f"{where}.type: expected text", f"{where}.type")
    if kind != "message":
        if "call" in kind:
            reader.needs.add("tools")
        reader.sealed |= bool(item.get("encrypted_content")) or kind == "item_reference"
        if kind == "item_reference":
            reader.unseen.append("an item that is referred to")
            reader.refer(item.get("id"))
        reader.refer(*_containers(item))
        data = reader.packed(item)
        if len(data) > LARGE:
            data = reader.packed(_without_media(reader, item))
        reader.message(kind, "", data)
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
        elif kind == "input_image":
            parts.append(reader.image(part))
        elif kind == "input_file":
            parts.append(reader.document(part))
        else:
            if kind == "input_audio":
                reader.audio(part.get(kind))
            reader.unseen.append(kind[:40])
            parts.append(f"[{kind[:40]}]")
    return "\n".join(parts)


def _without_media(reader: Contents, value: Any, kind: object = None) -> Any:
    """An item of the input whose images and documents are noted instead."""
    if isinstance(value, dict):
        kind = value.get("type")
        if kind == "input_file":
            return reader.document(value)
        return {name: _without_media(reader, inner, kind) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_media(reader, inner, kind) for inner in value]
    if isinstance(value, str) and (value.startswith("data:image/") or kind == "image_generation_call") and len(value) > LARGE:
        return reader.image(value)
    return value
