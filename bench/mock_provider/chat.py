"""OpenAI's chat completions: POST /v1/chat/completions.

https://platform.openai.com/docs/api-reference/chat and /chat-streaming
"""

from __future__ import annotations

from typing import Any

import orjson

from bench.mock_provider.api import Api, BadRequest, Call, Events, Json
from bench.mock_provider.text import encoded

_ERRORS = {
    400: ("invalid_request_error", None, "We could not parse the JSON body of your request."),
    401: (
        "invalid_request_error",
        "invalid_api_key",
        "Incorrect API key provided: sk-****. You can find your API key in the settings.",
    ),
    403: ("invalid_request_error", "unsupported_country_region_territory", "Country, region, or territory not supported"),
    404: ("invalid_request_error", "model_not_found", "The model does not exist or you do not have access to it."),
    408: ("server_error", None, "Request timed out."),
    413: ("invalid_request_error", "request_too_large", "Request body too large."),
    422: ("invalid_request_error", None, "Unprocessable entity."),
    429: (
        "requests",
        "rate_limit_exceeded",
        "Rate limit reached for requests per min (RPM): Limit 500, Used 500, Requested 1.",
    ),
    500: ("server_error", None, "The server had an error while processing your request. Sorry about that!"),
    502: ("server_error", None, "Bad gateway."),
    503: ("service_unavailable_error", None, "The engine is currently overloaded, please try again later."),
    529: ("server_error", None, "Overloaded."),
}


def openai_error(status: int, message: str | None, param: str | None, code: str | None) -> Json:
    """OpenAI's body of an error, in all of its APIs."""
    kind, usual, text = _ERRORS.get(status, _ERRORS[500 if status >= 500 else 400])
    found = code or (usual if message is None else None)
    return {"error": {"message": message or text, "type": kind, "param": param, "code": found}}


class Chat(Api):
    """Usage comes on a last chunk without choices, when stream_options asks for it."""

    name, path, id_header = "chat", "/v1/chat/completions", b"x-request-id"

    def messages(self, body: Json) -> list[tuple[str, Any]]:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("Missing required parameter: 'messages'.", param="messages", code="missing_required_parameter")
        return [(str(message.get("role")), message) for message in messages]

    def cap(self, body: Json) -> object:
        cap = body.get("max_completion_tokens")
        return body.get("max_tokens") if cap is None else cap

    def tool(self, tool: Json) -> tuple[str | None, Any]:
        function = tool.get("function") or {}
        return function.get("name"), function.get("parameters")

    def schema(self, body: Json) -> Any:
        return _schema(body.get("response_format"))

    def copies(self, body: Json) -> object:
        return body.get("n") or 1

    def streams_usage(self, body: Json) -> bool:
        return bool((body.get("stream_options") or {}).get("include_usage"))

    def whole(self, call: Call) -> Json:
        content: Json = {"content": call.text}
        if call.tool is not None:
            content = {"content": None, "tool_calls": [_tool_call(call, call.text)]}
        message = {"role": "assistant", **content, "refusal": None, "annotations": []}
        end = {"logprobs": None, "finish_reason": _finish_reason(call)}
        found = {
            "id": f"chatcmpl-{call.id}",
            "object": "chat.completion",
            "created": call.created,
            "model": call.model,
            "choices": [] if call.empty else [{"index": index, "message": message, **end} for index in range(call.copies)],
            "service_tier": "default",
            "system_fingerprint": "fp_mock",
        }
        return {**found, "usage": _usage(call, call.tokens_out)} if call.usage_told else found

    def events(self, call: Call) -> Events:
        asked = call.usage_told
        model = orjson.dumps(call.model)
        start = (
            b'data: {"id":"chatcmpl-%d","object":"chat.completion.chunk","created":%d,"model":%b,"service_tier":"default",'
            b'"system_fingerprint":"fp_mock","choices":[' % (call.id, call.created, model)
        )
        end = b'],"usage":null}\n\n' if asked else b"]}\n\n"
        usage = orjson.dumps(_usage(call, call.tokens_out))

        def chunk(index: int, delta: bytes, finish_reason: bytes = b"null") -> bytes:
            choice = b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":%b}' % (index, delta, finish_reason)
            return start + choice + end

        role: Json = {"role": "assistant", "content": "", "refusal": None}
        if call.tool is not None:
            role = {**role, "content": None, "tool_calls": [{"index": 0, **_tool_call(call, "")}]}
        head = b"".join(chunk(index, orjson.dumps(role)) for index in range(call.copies))
        if "empty_choices" in call.quirks:
            head = start + end + head
        words: list[bytes] = []
        for index in range(call.copies):
            around = b'{"content":\0}' if call.tool is None else b'{"tool_calls":[{"index":0,"function":{"arguments":\0}}]}'
            before, after = chunk(index, around).split(b"\0")
            words += [before + encoded(word) + after for word in call.words]
        if asked and "usage_in_every_chunk" in call.quirks:
            so_far = [b'"usage":' + orjson.dumps(_usage(call, count)) for count in range(1, len(words) + 1)]
            words = [word.replace(b'"usage":null', found) for word, found in zip(words, so_far, strict=True)]
        finished = [chunk(index, b"{}", b'"%b"' % _finish_reason(call).encode()) for index in range(call.copies)]
        if asked and "usage_with_choices" in call.quirks:
            finished[-1] = finished[-1].replace(b'"usage":null', b'"usage":' + usage)
        elif asked:
            finished.append(start + b'],"usage":%b}\n\n' % usage)
        return Events(head, words, b"".join(finished) + b"data: [DONE]\n\n")

    def error(self, status: int, message: str | None = None, param: str | None = None, code: str | None = None) -> Json:
        return openai_error(status, message, param, code)

    def error_event(self, status: int) -> bytes:
        return b"data: %b\n\n" % orjson.dumps(openai_error(status, None, None, None))

    def too_long(self, tokens: int, most: int) -> Json:
        message = (
            f"This model's maximum context length is {most} tokens. However, your messages resulted in {tokens} tokens. "
            "Please reduce the length of the messages."
        )
        return openai_error(400, message, "messages", "context_length_exceeded")


def _schema(form: Any) -> Any:
    if not isinstance(form, dict) or form.get("type") not in ("json_schema", "json_object"):
        return None
    return (form.get("json_schema") or {}).get("schema", {"type": "object"})


def _tool_call(call: Call, arguments: str) -> Json:
    return {"id": f"call_{call.id}", "type": "function", "function": {"name": call.tool, "arguments": arguments}}


def _finish_reason(call: Call) -> str:
    return "length" if call.capped else "stop" if call.tool is None else "tool_calls"


def _usage(call: Call, tokens_out: int) -> Json:
    return {
        "prompt_tokens": call.tokens_in,
        "completion_tokens": tokens_out,
        "total_tokens": call.tokens_in + tokens_out,
        "prompt_tokens_details": {"cached_tokens": call.tokens_cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
