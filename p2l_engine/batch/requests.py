"""A row's prompt as the body of a request of OpenAI's batch API, without its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from p2l_engine.apis.registry import APIS, shaped_like
from p2l_engine.tables.nested import as_object
from p2l_engine.tables.turns import without_nulls

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool", "function")}
SHARED = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}  # ShareGPT's
# Keys of Anthropic's requests, and of those that are passed on under OpenAI's names.
SAME = {"max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "stop_sequences": "stop"}
ANTHROPIC_KEYS = ("model", "system", "messages", *SAME)
KEYS = ("role", "content", "name", "refusal", "tool_calls", "tool_call_id", "function_call", "audio")  # of a message
PARTS = ("text", "refusal", "image_url", "input_audio", "file")  # of a message's content
TEXTS = ("text", "input_text", None)


def request_body(prompt: Any, turns: Sequence[str], with_nulls: bool = True) -> dict[str, Any]:
    """The body of a request: the prompt where it is one, an object with ``messages`` or ``input``; otherwise its messages, up
    to the last one of the user; otherwise the user's turns as messages.

    prompt: text, a list, or a request's body, which may be one of Anthropic's. turns: what was read from it. with_nulls:
    whether nulls in it were written there; otherwise an object has nulls for the keys that others in its column have, and they
    are left out. Raises ValueError for what the API does not have.
    """
    if not with_nulls:
        prompt = without_nulls(prompt)
    if isinstance(prompt, Mapping):
        return _of_anthropic(prompt) if shaped_like(dict(prompt)) is APIS["messages"] else dict(prompt)
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and any(isinstance(item, Mapping) for item in prompt):
        return {"messages": _messages(prompt)}
    return {"messages": [{"role": "user", "content": turn} for turn in turns]}


def endpoint(body: Mapping[str, Any], given: str | None = None) -> str:
    """The path of the API whose request this is. given: what the input says, which providers prefix in their own ways."""
    path = CHAT if body.get("messages") is not None else RESPONSES
    if given is not None and given.startswith("/") and given.endswith(path.removeprefix("/v1")):
        return given
    return path


def _messages(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages and single turns as messages, up to the last one of the user."""
    items = [as_object(item) for item in items]
    if all(isinstance(item, Mapping) and "role" not in item and "from" not in item for item in items):
        items = [{"role": "user", "content": items}]  # the parts of one message
    found = [_message(item, place) for place, item in enumerate(items)]
    last = max((place for place, message in enumerate(found) if message["role"] == "user"), default=-1)
    return found[: last + 1]


def _message(item: Any, place: int) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        return {"role": "user", "content": item}
    message = {key: item[key] for key in KEYS if key in item}
    role, roles = message.get("role"), ROLES
    if role is None and item.get("from") is not None:
        role, roles = item["from"], SHARED
        message = {"role": role, "content": item.get("value")}
    if role not in roles:
        raise ValueError(f"message {place}: expected a role of {', '.join(roles)}, got {role!r}")
    message["role"] = roles[role]
    content = message.get("content")
    content = [content] if isinstance(content, Mapping) else content
    if isinstance(content, list):
        message["content"] = [_part(part, f"message {place}: part {i}") for i, part in enumerate(content)]
    return message


def _part(part: Any, where: str) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in TEXTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in PARTS:
        raise ValueError(f"{where}: expected a part of {', '.join(PARTS)}, got {kind!r}")
    return part


def _of_anthropic(body: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [key for key, value in body.items() if key not in ANTHROPIC_KEYS and value is not None]
    if unknown:
        raise ValueError(
            f"a request of Anthropic's API: expected {', '.join(ANTHROPIC_KEYS)}, got {', '.join(unknown)}, which OpenAI's has "
            "not, or not so"
        )
    system = [] if body.get("system") is None else [{"role": "system", "content": body["system"]}]
    messages = [*system, *body["messages"]]
    found = _messages(messages)
    if len(found) < len(messages):
        raise ValueError("a request of Anthropic's API: expected the user's message at its end, got the beginning of an answer")
    more = {SAME[key]: value for key, value in body.items() if key in SAME and value is not None}
    return {"messages": found, **more}
