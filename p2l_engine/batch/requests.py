"""A row's prompt as the body of a request of OpenAI's batch API, without its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from p2l_engine.strict_json import parsed

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool", "function")}
SHARED = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}  # ShareGPT's
KEYS = ("role", "content", "name", "refusal", "tool_calls", "tool_call_id", "function_call", "audio")  # of a message
PARTS = ("text", "refusal", "image_url", "input_audio", "file")  # of a message's content
TEXTS = ("text", "input_text", None)


def request_body(prompt: Any, turns: Sequence[str], with_nulls: bool = True) -> dict[str, Any]:
    """The body of a request: the prompt where it is one, an object with ``messages`` or ``input``; otherwise its messages, up
    to the last one of the user; otherwise the user's turns as messages.

    prompt: as its table holds it, lists and objects also as JSON. turns: what was read from it. with_nulls: whether nulls in it
    were written there; otherwise an object has nulls for the keys that others in its column have, and they are left out. Raises
    ValueError for messages that the API does not have.
    """
    if isinstance(prompt, str):
        prompt = _parsed(prompt)
    if not with_nulls:
        prompt = _without_nulls(prompt)
    if isinstance(prompt, Mapping):
        if "messages" not in prompt and "input" not in prompt:
            raise ValueError(f"body: expected messages or input, got {', '.join(map(repr, prompt)) or 'nothing'}")
        return dict(prompt)
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and any(isinstance(item, Mapping) for item in prompt):
        return {"messages": _messages(prompt)}
    return {"messages": [{"role": "user", "content": turn} for turn in turns]}


def endpoint(body: Mapping[str, Any], given: str | None = None) -> str:
    """The path of the API whose request this is. given: what the input says, which providers prefix in their own ways."""
    path = CHAT if "messages" in body else RESPONSES
    if given is not None and given.startswith("/") and given.endswith(path.removeprefix("/v1")):
        return given
    return path


def _messages(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages and single turns as messages, up to the last one of the user."""
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


def _parsed(text: str) -> Any:
    """The lists and objects that a text holds as JSON; otherwise the text."""
    try:
        return parsed(text) if text.lstrip().startswith(("[", "{")) else text
    except (ValueError, RecursionError):
        return text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
