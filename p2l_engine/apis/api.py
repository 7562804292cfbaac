"""What the server must know of a provider's API: how its bodies are read, what its streams say, how its errors look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from p2l_engine.apis.ask import ApiName, Ask, Contents

UNREADABLE = "an event that is no JSON"  # the error of a stream whose rest was not read


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a provider counted. tokens_in: all of the input; of these, cached ones were read from its prompt cache and
    written ones were written to it, and of these lasting ones for an hour, at prices of their own. reasoning: output that was
    not shown. calls: of tools that the provider runs. audio_in, image_in and audio_out: what of the input and the output has
    prices of its own."""

    tokens_in: int
    tokens_out: int
    cached: int = 0
    written: int = 0
    lasting: int = 0
    reasoning: int = 0
    calls: int = 0
    audio_in: int = 0
    image_in: int = 0
    audio_out: int = 0


class Stream(Protocol):
    """Reads the events of one streamed answer, in order.

    usage: what was reported so far. written: bytes of text so far. ended: whether the event came that ends a complete
    answer. error: what the provider said went wrong. kept: as ``Api.kept``.
    """

    usage: Usage | None
    written: int
    ended: bool
    error: str | None
    kept: list[str]

    def read(self, event: bytes) -> bool:
        """Takes a complete event; returns whether the client should see it."""


class Progress:
    """What every ``Stream`` begins with."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.written = 0
        self.ended = False
        self.error: str | None = None
        self.kept = list[str]()


class Api(Protocol):
    """An API of chat models. name: as in the configuration; path: below a provider's base_url."""

    name: ApiName
    path: str

    def ask(self, body: dict[str, Any]) -> Ask:
        """Reads a request. Raises BadRequest."""

    def read(self, reader: Contents, body: dict[str, Any]) -> None:
        """Reads what a request's instructions and messages say. Raises BadRequest."""

    def said(self, content: object) -> str | None:
        """What a user's message of this content says; None: nothing, as a tool's result. Raises BadRequest."""

    def outgoing(self, ask: Ask, model: str, stream_usage: bool) -> dict[str, Any]:
        """The body for a deployment: as it came, except for what the deployment needs. model: its name there; stream_usage:
        whether it reports usage in streams when asked to."""

    def headers(self, key: str | None, given: dict[str, str]) -> dict[str, str]:
        """The headers for a deployment: its key, and those of the client's that the API defines."""

    def usage(self, answer: dict[str, Any]) -> Usage | None:
        """What a whole answer reports; None: nothing that can be read."""

    def fault(self, answer: object) -> str | None:
        """What is wrong with a whole answer of status 200; None: nothing."""

    def kept(self, answer: dict[str, Any]) -> list[str]:
        """The ids under which the provider keeps a whole answer, and parts of it, for later requests."""

    def stream(self, ask: Ask) -> Stream:
        """A reader of this request's stream."""

    def error(self, status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
        """An error's body."""

    def error_event(self, message: str) -> bytes:
        """An event that ends a stream which cannot continue."""


def forwarded(ask: Ask, model: str) -> dict[str, Any]:
    """A request's body as it came, but for the model's name, without the field that is the router's own."""
    body = {**ask.body, "model": model}
    body.pop("p2l", None)
    return body


def bearer(key: str | None) -> dict[str, str]:
    """The header with a key of OpenAI's APIs."""
    return {} if key is None else {"authorization": f"Bearer {key}"}


def count(value: object) -> int:
    """A number of tokens as providers write it; anything else is 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def size(text: object) -> int:
    """The bytes of a text; of anything else, none."""
    return 0 if not isinstance(text, str) else len(text) if text.isascii() else len(text.encode())


def mapping(value: object) -> dict[str, Any]:
    """The value if it is an object, else an empty one: providers leave out, or null, what they do not report."""
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def error_text(answer: object) -> str | None:
    """The message of an error's body, in any of the shapes that providers use; None where it is none."""
    error = mapping(answer).get("error")
    if error is None:
        return None
    message = mapping(error).get("message") if isinstance(error, dict) else error
    return str(message or error)[:500]


def openai_error(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """An error of OpenAI's APIs."""
    kinds = {401: "authentication_error", 402: "insufficient_quota", 403: "permission_error", 404: "invalid_request_error"}
    kind = kinds.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
