"""The APIs that the server speaks, by name."""

from __future__ import annotations

from p2l_engine.apis.api import Api
from p2l_engine.apis.ask import ApiName
from p2l_engine.apis.chat import Chat
from p2l_engine.apis.messages import Messages
from p2l_engine.apis.responses import Responses

APIS: dict[ApiName, Api] = {api.name: api for api in (Chat(), Responses(), Messages())}


def shaped_like(body: dict[str, object]) -> Api:
    """The API of a body that does not say by its path which one it is."""
    if "input" in body:
        return APIS["responses"]
    messages = body.get("messages")
    blocks = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    own = ("tool_use", "tool_result", "image", "document")
    anthropic = "system" in body or any(
        isinstance(part, dict) and part.get("type") in own
        for content in blocks
        if isinstance(content, list)
        for part in content
    )
    return APIS["messages"] if anthropic and "max_tokens" in body else APIS["chat"]
