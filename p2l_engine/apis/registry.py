"""The APIs that the server speaks, by name."""

from __future__ import annotations

from collections.abc import Iterable

from p2l_engine.apis.api import Api
from p2l_engine.apis.ask import ApiName
from p2l_engine.apis.chat import Chat
from p2l_engine.apis.messages import Messages
from p2l_engine.apis.responses import Responses

APIS: dict[ApiName, Api] = {api.name: api for api in (Chat(), Responses(), Messages())}


ANTHROPIC = frozenset(("tool_use", "tool_result", "image", "document", "thinking", "redacted_thinking"))  # kinds of blocks


def shaped_like(body: dict[str, object]) -> Api:
    """The API of a body that does not say by its path which one it is."""
    if "input" in body:
        return APIS["responses"]
    messages = body.get("messages")
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parted = [content for content in contents if isinstance(content, list)]
    anthropic = "system" in body or any(of_parts(content) is APIS["messages"] for content in parted)
    return APIS["messages"] if anthropic and "max_tokens" in body else APIS["chat"]


def of_parts(parts: Iterable[object]) -> Api:
    """The API that writes a message's content in such parts; Chat Completions where several would."""
    kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)}
    if kinds & ANTHROPIC:
        return APIS["messages"]
    return APIS["responses"] if kinds & {"input_text", "input_image", "input_file", "output_text"} else APIS["chat"]
