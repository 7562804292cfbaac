"""A prompt in a table's cell, to the user's turns: text, turns, messages as any API or data set writes them, and requests.

What a request's messages say is read as the server reads it (``apis``): an image is "[image]", and a tool's result is no turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from p2l_engine.apis.ask import BadRequest, TurnsAlone
from p2l_engine.apis.registry import ANTHROPIC, of_parts, shaped_like
from p2l_engine.errors import PromptError
from p2l_engine.prompts.parse import user_turns
from p2l_engine.strict_json import DuplicateKeyError, parsed
from p2l_engine.tables.nested import as_object

HUMAN = ("user", "human")  # the second is ShareGPT's
USUAL_ROLES = ("user", "assistant", "system")
CHATS = ("/chat/completions", "/responses", "/messages")  # what the url of a chat model's request has in it
URL = "url"  # the column of a batch file that says which API a request is for
OF_REQUESTS = ("messages", "input")  # where the APIs' bodies have the conversation
# Kinds of parts of a content, and of items of the Responses API that are no messages, beside the calls of tools.
PARTS = ANTHROPIC | {"text", "refusal", "image_url", "file", "input_audio", "input_text", "input_image", "input_file"}
ITEMS = ("reasoning", "item_reference", "compaction", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response")


def cell_turns(cell: object, plain_text: bool = False, as_served: bool = False) -> tuple[str, ...]:
    """The user's turns of a prompt in a table's cell.

    A cell is text; a list of user turns, of messages ({"role", "content"}, or ShareGPT's {"from", "value"}), or of the parts of
    one message's content; or, unless plain_text, text that is such a list as JSON. A content is text, or parts that are text.
    as_served: also a request's body, and parts that are no text; what a user asks a server may have them, what votes compare
    may not. Raises ValueError; the caller knows the row.
    """
    if cell is None:
        raise ValueError("prompt: expected a prompt, got nothing")
    if isinstance(cell, str) and not plain_text:
        items = listed_in(cell)
        cell = cell if items is None else items
    try:
        if isinstance(cell, str):
            return tuple(user_turns(cell))
        cell = as_object(cell)
        if as_served and isinstance(cell, Mapping) and any(cell.get(name) is not None for name in OF_REQUESTS):
            return _of_request(cell)
        return tuple(user_turns(_messages(cell, as_served) if isinstance(cell, list | tuple) else cell))
    except PromptError as error:
        raise ValueError(f"prompt: {error.problem}") from None
    except DuplicateKeyError as error:
        raise ValueError(f"prompt: expected each key of an object once, {error}") from None
    except RecursionError:
        raise ValueError("prompt: nested too deeply") from None


def is_chat(url: object) -> bool:
    """Whether a request's url may be that of a chat model."""
    return not isinstance(url, str) or any(part in url for part in CHATS)


def not_a_chat(url: object) -> str:
    """Why a request with this url has no prompt."""
    return f"{URL}: expected a request to a chat model ({', '.join(CHATS)}), got {url!r:.60}"


def listed_in(text: str) -> list[object] | None:
    """The turns or messages that a text lists as JSON, if it does. A null among them is a turn that is missing: no prompt.
    Raises ValueError for a key that is named twice."""
    if not text.startswith("["):
        return None
    try:
        found = parsed(text)
    except DuplicateKeyError as error:
        raise ValueError(f"prompt: expected each key of an object once, {error}") from None
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or lists nested without end
        return None
    return found if isinstance(found, list) and all(isinstance(item, str | dict | None) for item in found) else None


def _of_request(body: Mapping[str, Any]) -> tuple[str, ...]:
    """As the server: without what agents put in, and where the user says nothing, the instructions."""
    reader = TurnsAlone()
    if all(body.get(name) is not None for name in OF_REQUESTS):
        raise PromptError(0, f"expected a request with {' or '.join(OF_REQUESTS)}, got both")
    try:
        request: dict[str, Any] = without_nulls(body)
        shaped_like(request).read(reader, request)
    except BadRequest as error:
        raise PromptError(0, error.message) from None
    except UnicodeEncodeError as error:
        raise PromptError(0, f"invalid Unicode: lone surrogate in a message: {error.reason}") from None
    if not (reader.turns or reader.instructions or reader.others):
        raise PromptError(0, "expected at least one user turn, got none")
    return tuple(user_turns(list(reader.of_user())))


def _messages(items: Sequence[object], as_served: bool) -> Sequence[object]:
    """A list of turns or messages as ``user_turns`` takes it, in the same places."""
    if all(map(_is_usual, items)):
        return items
    found = [as_object(item) for item in items]
    if found and all(isinstance(item, Mapping) and _is_part(item) for item in found):
        found = [{"role": "user", "content": found}]
    return [_message(item, place, as_served) if isinstance(item, Mapping) else item for place, item in enumerate(found)]


def _message(message: Mapping[str, Any], place: int, as_served: bool) -> Mapping[str, Any]:
    role, content, kind = message.get("role"), message.get("content"), message.get("type")
    if role is None and message.get("from") is not None:
        role, content = message["from"], message.get("value")
    if as_served and role is None and isinstance(kind, str) and (kind in ITEMS or "call" in kind):
        return {"role": kind}
    if role not in HUMAN:
        return {"role": role}
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        return {"role": "user", "content": content}
    parts = [without_nulls(part) for part in content]
    if not as_served or all(isinstance(part, Mapping) and part.get("type", "text") == "text" for part in parts):
        return {"role": "user", "content": [_as_text(part) for part in parts]}
    try:
        text = of_parts(parts).said(parts)
    except (BadRequest, UnicodeEncodeError) as error:
        raise PromptError(0, f"message {place}: {error}") from None
    return {"role": "tool"} if text is None else {"role": "user", "content": text}


def _as_text(part: Any) -> Any:
    """OpenAI's other API has another name for text."""
    return {**part, "type": "text"} if isinstance(part, Mapping) and part.get("type") == "input_text" else part


def _is_usual(item: object) -> bool:
    """Whether it is taken as it is."""
    if isinstance(item, dict):
        return isinstance(item.get("content"), str) and item.get("role") in USUAL_ROLES
    return isinstance(item, str)


def _is_part(item: Mapping[str, Any]) -> bool:
    kind = item.get("type")
    return isinstance(kind, str) and kind in PARTS and item.get("role") is None and item.get("from") is None


def without_nulls(value: Any) -> Any:
    """Without the nulls that a column's common type puts where an object lacks a key; the pairs of maps as dicts."""
    value = as_object(value)
    if isinstance(value, Mapping):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
