"""OpenAI's Chat Completions API."""

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

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
COUNTED = ("messages", "tools", "functions", "response_format", "prediction")
OF_MESSAGES = frozenset(("role", "content", "tool_calls", "function_call", "tool_call_id"))
SEARCHES = ("web_search_options", "search_parameters", "plugins")  # fields by which a provider runs tools of its own


class ChatStream(Progress):
    """A stream of chat.completion.chunk objects. See ``api.Stream``."""

    def __init__(self, usage_wanted: bool) -> None:
        super().__init__()
        self._usage_wanted = usage_wanted

    def read(self, event: bytes) -> bool:
        """Drops the event that has only the usage where the client did not ask for it."""
        data = data_of(event)
        if not data:
            return True
        if not data.startswith(b"{") and data.strip() == b"[DONE]":
            self.ended = True
            return True
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            self.error = UNREADABLE
            return False
        chunk = mapping(chunk)
        if chunk.get("error") is not None:
            self.error = error_text(chunk)
            return False
        choices = chunk.get("choices")
        for choice in sequence(choices):
            delta = mapping(mapping(choice).get("delta"))
            self.written += size(delta.get("content"))
            if len(delta) > 1 or "content" not in delta:  # most have a word alone
                self._read_others(delta)
        found = usage_of(chunk)
        self.usage = found or self.usage
        return not (found and not choices) or self._usage_wanted

    def _read_others(self, delta: dict[str, Any]) -> None:
        self.kept += _audio(delta)
        self.written += size(delta.get("refusal"))
        self.written += size(delta.get("reasoning_content")) or size(delta.get("reasoning"))
        for call in (delta.get("function_call"), *sequence(delta.get("tool_calls"))):
            self.written += size(mapping(mapping(call).get("function", call)).get("arguments"))


class Chat:
    """See ``api.Api``."""

    name: ApiName = "chat"
    path = "/chat/completions"

    def ask(self, body: dict[str, Any]) -> Ask:
        reader = Contents()
        if tools := [*list_field(body, "tools"), *list_field(body, "functions")]:
            reader.needs.add("tools")
            reader.message("tools", "", orjson.dumps(tools))
        self.read(reader, body)
        if mapping(body.get("response_format")).get("type") == "json_schema":
            reader.needs.add("json_schema")
            reader.message("schema", "", orjson.dumps(body["response_format"]))
        if spoken := bool(body.get("audio")) or "audio" in sequence(body.get("modalities")):
            reader.needs.add("audio")
        if body.get("chat_template"):  # vLLM's: it may write any prompt
            reader.unseen.append("chat_template")
        hosted = [str(tool["type"]) for tool in tools if tool.get("type") not in (None, "function", "custom")]
        effort = body.get("reasoning_effort") or mapping(body.get("reasoning")).get("effort")
        extras = Extras(
            tuple(reader.unseen), size_of_fields(body, COUNTED), len(orjson.dumps(body.get("prediction") or "")) - 2,
            (*hosted, *(name for name in SEARCHES if body.get(name) is not None)), None,
            tier_of(body.get("service_tier"), "models" if body.get("models") else None), effort not in (None, "none"),
        )  # fmt: skip
        return Ask(
            self.name, body, text_field(body, "model"), flag_field(body, "stream"), reader.of_user(), tuple(reader.texts),
            reader.images, frozenset(reader.needs), count_field(body, "max_completion_tokens", "max_tokens"), reader.session(),
            count_field(body, "n", "best_of") or 1, sealed=reader.sealed, extras=extras, pictures=tuple(reader.pictures),
            sound=reader.sound, spoken=spoken, references=tuple(reader.references),
        )  # fmt: skip

    def read(self, reader: Contents, body: dict[str, Any]) -> None:
        for i, message in enumerate(list_field(body, "messages", required=True)):
            _message(reader, message, f"messages[{i}]")

    def said(self, content: object) -> str | None:
        return _content(TurnsAlone(), content, "content")

    def outgoing(self, ask: Ask, model: str, stream_usage: bool) -> dict[str, Any]:
        body = forwarded(ask, model)
        if ask.stream and stream_usage:
            body["stream_options"] = {**mapping(body.get("stream_options")), "include_usage": True}
        return body

    def headers(self, key: str | None, given: dict[str, str]) -> dict[str, str]:
        return bearer(key)

    def usage(self, answer: dict[str, Any]) -> Usage | None:
        return usage_of(answer)

    def fault(self, answer: object) -> str | None:
        if (error := error_text(answer)) is not None:
            return error
        choices = mapping(answer).get("choices")
        return None if isinstance(choices, list) and choices else "an answer without choices"

    def kept(self, answer: dict[str, Any]) -> list[str]:
        return [
            found for choice in sequence(answer.get("choices")) for found in _audio(mapping(mapping(choice).get("message")))
        ]

    def stream(self, ask: Ask) -> ChatStream:
        return ChatStream(bool(mapping(ask.body.get("stream_options")).get("include_usage")))

    def error(self, status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
        return openai_error(status, message, param, code)

    def error_event(self, message: str) -> bytes:
        return b"data: " + orjson.dumps(openai_error(502, message, None, "upstream_error")) + b"\n\n"


def usage_of(answer: dict[str, Any]) -> Usage | None:
    """The usage that an answer or a chunk reports."""
    usage = answer.get("usage")
    if not isinstance(usage, dict) or not (count(usage.get("prompt_tokens")) or count(usage.get("completion_tokens"))):
        return None
    details, written = mapping(usage.get("prompt_tokens_details")), mapping(usage.get("completion_tokens_details"))
    cached = count(details.get("cached_tokens"))
    cached = cached or count(usage.get("prompt_cache_hit_tokens"))  # DeepSeek's
    given, out = count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))
    # Some providers leave reasoning out of completion_tokens, and bill it.
    out = max(out, count(usage.get("total_tokens")) - given)
    audio = min(count(details.get("audio_tokens")), given)
    return Usage(
        given, out, cached, reasoning=count(written.get("reasoning_tokens")), audio_in=audio,
        image_in=min(count(details.get("image_tokens")), given - audio), audio_out=min(count(written.get("audio_tokens")), out),
    )  # fmt: skip


def _message(reader: Contents, message: dict[str, Any], where: str) -> None:
    role = message.get("role")
    if role not in ROLES:
        raise BadRequest(f"{where}.role: expected one of {', '.join(ROLES)}, got {role!r:.40}", f"{where}.role")
    text = _content(reader, message.get("content"), f"{where}.content")
    reader.refer(*_audio(message))
    extra = b""
    if message.get("tool_calls") or message.get("function_call") or role in ("tool", "function"):
        reader.needs.add("tools")
        extra = reader.packed([message.get("tool_calls"), message.get("function_call"), message.get("tool_call_id")])
    if len(message) > 2 and (others := {name: value for name, value in message.items() if value and name not in OF_MESSAGES}):
        extra += reader.packed(others)
    if role == "user":
        reader.turn(text)
    else:
        (reader.instructions if role in ("system", "developer") else reader.others).append(text)
    reader.message(role, text, extra)


def _audio(message: dict[str, Any]) -> list[str]:
    """The id of a message's audio, by which its provider knows it."""
    found = mapping(message.get("audio")).get("id")
    return [found] if isinstance(found, str) else []


def _content(reader: Contents, content: object, where: str) -> str:
    """A message's text; images and other parts are noted by their kind."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where}: expected text, a list of parts or null, got {type(content).__name__}", where)
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise BadRequest(f"{where}[{i}]: expected a part with a 'type'", f"{where}[{i}]")
        if kind in ("text", "refusal"):
            if not isinstance(text := part.get(kind), str):
                raise BadRequest(f"{where}[{i}].{kind}: expected text", f"{where}[{i}].{kind}")
            parts.append(text)
        elif kind == "image_url":
            parts.append(reader.image(part.get(kind)))
        elif kind == "file":
            parts.append(reader.document(part.get(kind)))
        else:
            if kind == "input_audio":
                reader.audio(part.get(kind))
            reader.unseen.append(kind[:40])
            text = part.get("text")
            parts.append(text if isinstance(text, str) else f"[{kind[:40]}]")
    return "\n".join(parts)
