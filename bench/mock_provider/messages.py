"""Anthropic's messages: POST /v1/messages.

https://docs.claude.com/en/api/messages and /messages-streaming
"""

from __future__ import annotations

from typing import Any

import orjson

from bench.mock_provider.api import Api, BadRequest, Call, Events, Json, event
from bench.mock_provider.text import encoded

_ERRORS = {
    400: ("invalid_request_error", "messages: Input should be a valid list"),
    401: ("authentication_error", "invalid x-api-key"),
    403: ("permission_error", "Your API key does not have permission to use the specified resource."),
    404: ("not_found_error", "The requested resource could not be found."),
    408: ("timeout_error", "Request timed out."),
    413: ("request_too_large", "Request exceeds the maximum size"),
    422: ("invalid_request_error", "Unprocessable entity"),
    429: ("rate_limit_error", "This request would exceed your organization's rate limit of 50 requests per minute."),
    500: ("api_error", "Internal server error"),
    502: ("api_error", "Bad gateway"),
    503: ("api_error", "Service unavailable"),
    529: ("overloaded_error", "Overloaded"),
}


class Messages(Api):
    """Input tokens that come from the cache are not among input_tokens; max_tokens is required."""

    name, path, id_header = "messages", "/v1/messages", b"request-id"

    def messages(self, body: Json) -> list[tuple[str, Any]]:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages: Field required")
        system = [("system", body["system"])] if body.get("system") else []
        return [*system, *((_role(message), message) for message in messages)]

    def cap(self, body: Json) -> object:
        if body.get("max_tokens") is None:
            raise BadRequest("max_tokens: Field required")
        return body["max_tokens"]

    def tool(self, tool: Json) -> tuple[str | None, Any]:
        return tool.get("name"), tool.get("input_schema")

    def schema(self, body: Json) -> Any:
        form = (body.get("output_config") or {}).get("format") or {}
        return form.get("schema") if form.get("type") == "json_schema" else None

    def user(self, body: Json) -> str | None:
        return (body.get("metadata") or {}).get("user_id")

    def whole(self, call: Call) -> Json:
        block: Json = {"type": "text", "text": call.text, "citations": None}
        if call.tool is not None:  # arguments that the limit cut are no JSON
            block = {**_tool_use(call), "input": {} if call.capped else orjson.loads(call.text)}
        content = [] if call.empty else [block]
        found = {**_message(call), "content": content, "stop_reason": _stop_reason(call), "stop_sequence": None}
        return {**found, "usage": _usage(call, call.tokens_out)} if call.usage_told else found

    def events(self, call: Call) -> Events:
        told = call.usage_told
        start: Json = {**_message(call), "content": [], "stop_reason": None, "stop_sequence": None}
        if told:
            start["usage"] = _usage(call, 1)
        if call.tool is None:
            block: Json = {"type": "text", "text": ""}
            around = b'{"type":"text_delta","text":\0}'
        else:
            block = {**_tool_use(call), "input": {}}
            around = b'{"type":"input_json_delta","partial_json":\0}'
        head = event({"type": "message_start", "message": start})
        head += event({"type": "content_block_start", "index": 0, "content_block": block}) + event({"type": "ping"})
        before, after = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":%b}\n\n' % around
        ).split(b"\0")
        words = [before + encoded(word) + after for word in call.words]
        delta: Json = {"type": "message_delta", "delta": {"stop_reason": _stop_reason(call), "stop_sequence": None}}
        if told:
            delta["usage"] = _usage(call, call.tokens_out)
        tail = [{"type": "content_block_stop", "index": 0}, delta, {"type": "message_stop"}]
        return Events(head, words, b"".join(map(event, tail)))

    def error(self, status: int, message: str | None = None, param: str | None = None, code: str | None = None) -> Json:
        kind, text = _ERRORS.get(status, _ERRORS[500 if status >= 500 else 400])
        return {"type": "error", "error": {"type": kind, "message": message or text}, "request_id": "req_mock"}

    def error_event(self, status: int) -> bytes:
        return event(self.error(status))

    def too_long(self, tokens: int, most: int) -> Json:
        return self.error(400, f"prompt is too long: {tokens} tokens > {most} maximum")


def _role(message: Json) -> str:
    """A user's message that holds the result of a tool is the tool's."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    tool = any(isinstance(part, dict) and part.get("type") == "tool_result" for part in parts)
    return "tool" if tool else str(message.get("role"))


def _message(call: Call) -> Json:
    return {"id": f"msg_{call.id}", "type": "message", "role": "assistant", "model": call.model}


def _tool_use(call: Call) -> Json:
    return {"type": "tool_use", "id": f"toolu_{call.id}", "name": call.tool}


def _stop_reason(call: Call) -> str:
    return "max_tokens" if call.capped else "end_turn" if call.tool is None else "tool_use"


def _usage(call: Call, tokens_out: int) -> Json:
    return {
        "input_tokens": call.tokens_in - call.tokens_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": call.tokens_cached,
        "output_tokens": tokens_out,
        "service_tier": "standard",
    }
