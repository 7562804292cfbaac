"""OpenAI's responses: POST /v1/responses.

https://platform.openai.com/docs/api-reference/responses and /responses-streaming
"""

from __future__ import annotations

from typing import Any

from bench.mock_provider.api import Api, BadRequest, Call, Events, Json, event
from bench.mock_provider.chat import openai_error
from bench.mock_provider.text import encoded


class Responses(Api):
    """Every event has a number; usage is in the response of the last one."""

    name, path, id_header = "responses", "/v1/responses", b"x-request-id"

    def messages(self, body: Json) -> list[tuple[str, Any]]:
        found = body.get("input")
        if not isinstance(found, str | list) or not found:
            raise BadRequest("Missing required parameter: 'input'.", param="input", code="missing_required_parameter")
        system = [("system", body["instructions"])] if body.get("instructions") else []
        items = [{"role": "user", "content": found}] if isinstance(found, str) else found
        return [*system, *((_role(item), item) for item in items)]

    def cap(self, body: Json) -> object:
        return body.get("max_output_tokens")

    def tool(self, tool: Json) -> tuple[str | None, Any]:
        return tool.get("name"), tool.get("parameters")

    def schema(self, body: Json) -> Any:
        form = (body.get("text") or {}).get("format") or {}
        return form.get("schema", {"type": "object"}) if form.get("type") in ("json_schema", "json_object") else None

    def whole(self, call: Call) -> Json:
        output = [] if call.empty else [_item(call, "incomplete" if call.capped else "completed", call.text)]
        return _response(call, "incomplete" if call.capped else "completed", output)

    def events(self, call: Call) -> Events:
        name = _item_id(call).encode()
        place = {"item_id": name.decode(), "output_index": 0}
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
        head: list[Json] = [
            {"type": "response.created", "response": _response(call, "in_progress", [])},
            {"type": "response.in_progress", "response": _response(call, "in_progress", [])},
            {"type": "response.output_item.added", "output_index": 0, "item": _item(call, "in_progress", None)},
        ]
        whole = self.whole(call)
        last = "response.incomplete" if call.capped else "response.completed"
        tail: list[Json] = [
            {"type": "response.output_item.done", "output_index": 0, "item": whole["output"][0]},
            {"type": last, "response": whole},
        ]
        if call.tool is None:
            place["content_index"] = 0
            full = {**part, "text": call.text}
            head.append({"type": "response.content_part.added", **place, "part": part})
            tail.insert(0, {"type": "response.content_part.done", **place, "part": full})
            tail.insert(0, {"type": "response.output_text.done", **place, "text": call.text, "logprobs": []})
            kind, rest = b"response.output_text.delta", b'"content_index":0,"logprobs":[]'
        else:
            done = {"type": "response.function_call_arguments.done", **place, "name": call.tool, "arguments": call.text}
            tail.insert(0, done)
            kind, rest = b"response.function_call_arguments.delta", b'"obfuscation":""'
        before = b'event: %b\ndata: {"type":"%b","item_id":"%b","output_index":0,%b,"sequence_number":' % (
            kind,
            kind,
            name,
            rest,
        )
        count, words = len(head), call.words
        for number, entry in [*enumerate(head), *enumerate(tail, count + len(words))]:
            entry["sequence_number"] = number
        deltas = [b'%b%d,"delta":%b}\n\n' % (before, number, encoded(word)) for number, word in enumerate(words, count)]
        return Events(b"".join(map(event, head)), deltas, b"".join(map(event, tail)))

    def error(self, status: int, message: str | None = None, param: str | None = None, code: str | None = None) -> Json:
        return openai_error(status, message, param, code)

    def error_event(self, status: int) -> bytes:
        error = openai_error(status, None, None, None)["error"]
        code = error["code"] or error["type"]
        return event({"type": "error", "code": code, "message": error["message"], "param": None, "sequence_number": 0})

    def too_long(self, tokens: int, most: int) -> Json:
        message = "Your input exceeds the context window of this model. Please adjust your input and try again."
        return openai_error(400, message, "input", "context_length_exceeded")


def _role(item: Json) -> str:
    """Results of tools have a type of their own instead of a role."""
    return "tool" if item.get("type") == "function_call_output" else str(item.get("role", item.get("type")))


def _item_id(call: Call) -> str:
    return f"msg_{call.id}" if call.tool is None else f"fc_{call.id}"


def _item(call: Call, status: str, text: str | None) -> Json:
    """The only item of the output; a message without content where text is None."""
    if call.tool is not None:
        item = {"type": "function_call", "call_id": f"call_{call.id}", "name": call.tool, "arguments": text or ""}
        return {"id": _item_id(call), "status": status, **item}
    content = [] if text is None else [{"type": "output_text", "annotations": [], "logprobs": [], "text": text}]
    return {"id": _item_id(call), "type": "message", "status": status, "role": "assistant", "content": content}


def _response(call: Call, status: str, output: list[Json]) -> Json:
    body = call.body
    usage = None if status == "in_progress" or not call.usage_told else _usage(call)
    return {
        "id": f"resp_{call.id}",
        "object": "response",
        "created_at": call.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": call.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": usage,
        "metadata": {},
    }


def _usage(call: Call) -> Json:
    return {
        "input_tokens": call.tokens_in,
        "input_tokens_details": {"cached_tokens": call.tokens_cached, "cache_write_tokens": 0},
        "output_tokens": call.tokens_out,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": call.tokens_in + call.tokens_out,
    }
