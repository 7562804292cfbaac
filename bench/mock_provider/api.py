"""What the three APIs have in common: a request as a provider understands it, the parts of an answer, the bodies of errors.

Tokens are counted so that a test can count them too. Input: a quarter of the UTF-8 bytes of all text, rounded up, and 4 for
each message; the tools and the system's text are a message each, in front. Output: a token for each word, in each copy of
the answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson

Json = dict[str, Any]

_TEXT = ("content", "text", "name", "tool_calls", "function", "arguments", "output", "thinking")


class BadRequest(Exception):
    """A request that a provider refuses.

    status: the HTTP status. param: the field that is wrong. code: OpenAI's, where it has one.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class Call(NamedTuple):
    """A request with the answer that it gets. quirks: names of faults that change what the answer contains."""

    id: int
    api: Api
    model: str
    body: Json
    stream: bool
    tokens_in: int  # cached ones included
    tokens_cached: int
    words: list[str]  # of the text, or of the JSON of the tool's arguments
    tool: str | None  # the tool that is called
    capped: bool  # whether the limit on output tokens ended the answer
    copies: int
    created: int  # seconds since 1970
    quirks: frozenset[str] = frozenset()

    @property
    def tokens_out(self) -> int:
        return 0 if self.empty else len(self.words) * self.copies

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def empty(self) -> bool:
        """Whether nothing is generated: an answer that is no stream, without choices, output or content."""
        return "empty_choices" in self.quirks and not self.stream

    @property
    def usage_told(self) -> bool:
        """Whether the answer states its usage."""
        return "no_usage" not in self.quirks and (not self.stream or self.api.streams_usage(self.body))


class Events(NamedTuple):
    """A stream: the events before the first token, one for each token, and those after the last."""

    head: bytes
    words: list[bytes]
    tail: bytes


class Api(ABC):
    """One of the providers' APIs: how it writes requests, answers, streams and errors."""

    name: str
    path: str
    id_header: bytes  # the response's header that names the request

    @abstractmethod
    def messages(self, body: Json) -> list[tuple[str, Any]]:
        """Role and content of each message of the input, in order. Raises BadRequest."""

    @abstractmethod
    def cap(self, body: Json) -> object:
        """The caller's limit on output tokens, None where it sets none. Raises BadRequest."""

    @abstractmethod
    def tool(self, tool: Json) -> tuple[str | None, Any]:
        """Name and JSON schema of a function among the tools that the caller offers; no name for tools of another kind."""

    @abstractmethod
    def schema(self, body: Json) -> Any:
        """The JSON schema that the answer must have, None for plain text."""

    def user(self, body: Json) -> str | None:
        """Whom the request names as its user."""
        return body.get("user")

    def copies(self, body: Json) -> object:
        """How many answers are asked for."""
        return 1

    def streams_usage(self, body: Json) -> bool:
        """Whether a stream ends with its usage."""
        return True

    @abstractmethod
    def whole(self, call: Call) -> Json:
        """The body of an answer that is no stream."""

    @abstractmethod
    def events(self, call: Call) -> Events:
        """The same answer as a stream."""

    @abstractmethod
    def error(self, status: int, message: str | None = None, param: str | None = None, code: str | None = None) -> Json:
        """The body of an error; without a message, the provider's usual one for the status."""

    @abstractmethod
    def error_event(self, status: int) -> bytes:
        """An error within a stream."""

    @abstractmethod
    def too_long(self, tokens: int, most: int) -> Json:
        """The body of the error that a prompt is longer than the model's context."""


def event(data: Json) -> bytes:
    """A server-sent event, named by its type."""
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), orjson.dumps(data))


def text_of(value: object) -> str:
    """All text in a message's content: strings, parts with text, calls of tools and their results; no images."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(text_of, value))
    if not isinstance(value, dict):
        return ""
    arguments = orjson.dumps(value["input"]).decode() if "input" in value else ""
    return "".join(text_of(value[name]) for name in _TEXT if name in value) + arguments


def prefixes(messages: Iterable[tuple[str, Any]]) -> tuple[list[int], list[int]]:
    """Of the first message, the first two, ...: a key that equal messages share, and their tokens."""
    keys, tokens = [], []
    key = size = 0
    for count, (role, content) in enumerate(messages, 1):
        text = text_of(content)
        key = hash((key, role, text))
        size += len(text) if text.isascii() else len(text.encode())
        keys.append(key)
        tokens.append(-(-size // 4) + 4 * count)
    return keys, tokens
