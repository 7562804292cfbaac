"""A prompt as callers write it, to the user's turns.

A prompt is a string, a list of user turns, or a list of {"role", "content"} messages, of which the user turns are used; a
content is text, or a list of {"type": "text", "text"} parts, which become lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from p2l_engine.errors import PromptError

Prompt = str | Sequence[str] | Sequence[Mapping[str, Any]]


class Turns(list[str]):
    """A prompt that ``user_turns`` has parsed and checked: parsing it again returns it unchanged."""


def user_turns(prompt: Prompt | object, index: int = 0) -> Turns:
    """The user's turns in order. Raises PromptError, naming ``index``, when there is none or a turn is no valid text."""
    if isinstance(prompt, Turns):
        return prompt
    if isinstance(prompt, str):
        turns = [prompt]
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        turns = [_turn(item, place, index) for place, item in enumerate(prompt) if not _is_other_role(item, place, index)]
    else:
        raise PromptError(index, f"expected a string, a list of user turns or a list of messages, got {type(prompt).__name__}")
    if not turns:
        raise PromptError(index, "expected at least one user turn, got none")
    for turn in turns:
        try:
            turn.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                index,
                f"invalid Unicode at character {error.start}: lone surrogate {turn[error.start]!r}; "
                "decode the text with errors='replace'",
            ) from None
    return Turns(turns)


def parse_batch(prompts: Sequence[Prompt]) -> list[Turns]:
    """The user turns of each prompt. Raises PromptError with the index of the first that cannot be read, and TypeError where
    ``prompts`` is no list of prompts."""
    if isinstance(prompts, str | Mapping):
        raise TypeError(f"prompts: expected a list of prompts, got a single {type(prompts).__name__}; wrap it in a list")
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: expected a list of prompts, got {type(prompts).__name__}; list(...) makes one of it")
    return [user_turns(prompt, i) for i, prompt in enumerate(prompts)]


def _is_other_role(item: object, place: int, index: int) -> bool:
    if not isinstance(item, Mapping):
        return False
    role = item.get("role")
    if not isinstance(role, str):
        raise PromptError(index, f"message {place}: expected a 'role' of type str, got {role!r}")
    return role != "user"


def _turn(item: object, place: int, index: int) -> str:
    text = item.get("content") if isinstance(item, Mapping) else item
    if isinstance(item, Mapping) and isinstance(text, Sequence) and not isinstance(text, str | bytes):
        return "\n".join(_text_of(part, place, i, index) for i, part in enumerate(text))
    if not isinstance(text, str):
        content = "a 'content' of type str or a list of text parts"
        what = content if isinstance(item, Mapping) else "a user turn of type str, or a message"
        raise PromptError(index, f"message {place}: expected {what}, got {type(text).__name__}")
    return text


def _text_of(part: object, place: int, i: int, index: int) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        got = f"the type {part.get('type')!r}" if isinstance(part, Mapping) else type(part).__name__
        raise PromptError(index, f"message {place}: part {i}: expected a 'text' part (images are not read), got {got}")
    return text
