"""What the router must know of a request, whichever API it came by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from p2l_engine.apis.extras import NOTHING, Extras
from p2l_engine.apis.pictures import Picture, picture_of
from p2l_engine.apis.sounds import seconds_of
from p2l_engine.prompts.parse import Turns

AUTO = "auto"
ApiName = Literal["chat", "responses", "messages"]
Capability = Literal["text", "image", "audio", "tools", "json_schema"]
# How text begins and ends that agents put into their users' messages: Claude Code, Codex CLI, Cline. The user did not write it.
AGENTS_OWN = (
    ("<system-reminder>", "</system-reminder>"),
    ("<local-command-caveat>", "</local-command-caveat>"),
    ("<local-command-stdout>", "</local-command-stdout>"),
    ("# AGENTS.md instructions for ", "</INSTRUCTIONS>"),
    ("<user_instructions>", "</user_instructions>"),
    ("<environment_context>", "</environment_context>"),
    ("<environment_details>", "</environment_details>"),
)


PAGE = 70_000  # characters of a page in a document's Base64


class BadRequest(ValueError):
    """A body that is not what its API expects. param: the field; status: of the answer."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, read.

    turns: the user's turns; where there are none, the instructions. texts: the text of each message in order, instructions and
    tools first, from which tokens are counted. images: how many there are; a document is as many as it may have pages.
    pictures: what is known of them, of some or all. needs:
    what a model must accept. max_tokens: the caller's bound on the output. session: what identifies the conversation where no
    header does.
    """

    api: ApiName
    body: dict[str, Any]
    model: str
    stream: bool
    turns: Turns
    texts: tuple[bytes, ...]
    images: int
    needs: frozenset[Capability]
    max_tokens: int | None
    session: str
    outputs: int = 1  # how many answers are wanted, each of up to max_tokens
    previous: str | None = None  # the id of the answer that this request continues at its provider
    sealed: bool = False  # whether it has what only the provider that wrote it can read: encrypted reasoning, references
    extras: Extras = NOTHING
    pictures: tuple[Picture, ...] = ()
    sound: float = 0.0  # seconds of audio in its input
    spoken: bool = False  # whether its answer is to be audio
    references: tuple[str, ...] = ()  # ids of what else its provider keeps of earlier answers: items, containers, audio


class Contents:
    """Collects what an API's messages contain, message by message."""

    def __init__(self) -> None:
        self.turns, self.instructions, self.others = list[str](), list[str](), list[str]()
        self.texts = list[bytes]()
        self.images = 0
        self.sound = 0.0
        self.pictures = list[Picture]()
        self.needs: set[Capability] = {"text"}
        self.sealed = self.lasting = False
        self.unseen, self.references = list[str](), list[str]()
        self._sources = b""
        self._opening: list[str] | None = None  # the instructions before the first turn

    def message(self, role: str, text: str, extra: bytes = b"") -> None:
        """A message's text for counting; extra: what else it holds, as JSON."""
        self.texts.append(f"{role}\n{text}".encode() + extra + self._sources)
        self._sources = b""

    def packed(self, value: object) -> bytes:
        """What a message holds beside its text, as JSON, for counting."""
        return orjson.dumps(value)

    def turn(self, text: str) -> None:
        """What a user's message says; where an agent alone speaks, it is no turn."""
        said = without(text, AGENTS_OWN)
        if said is text or (said := said.strip()):
            if self._opening is None:
                self._opening = list(self.instructions)
            self.turns.append(said)

    def refer(self, *ids: object) -> None:
        """Notes ids of what the provider keeps; what is no text is none."""
        self.references += [found for found in ids if isinstance(found, str)]

    def image(self, source: object) -> str:
        """Notes an image of the message that is read; returns what stands for it in the text."""
        self.images += 1
        self.pictures.append(picture_of(source))
        self.needs.add("image")
        self.sealed |= isinstance(source, dict) and source.get("file_id") is not None
        self._sources += digest([repr(source).encode()])[:12].encode()  # tells this message from one with another image
        return "[image]"

    def audio(self, source: object) -> None:
        """Notes audio of the message that is read: its provider alone knows how many tokens it has."""
        self.needs.add("audio")
        self.sound += seconds_of(source)

    def document(self, source: object) -> str:
        """Notes a document, whose tokens its provider alone can count: about those of an image for each of its pages."""
        size = len(repr(source)) if isinstance(source, dict | str) else 0
        self.images += size // PAGE
        self.unseen.append("a document")
        return self.image(source)

    def of_user(self) -> Turns:
        """What P2L reads: the user's turns; without any, the instructions, or whatever else was said."""
        return Turns(self.turns or self.instructions or self.others or [""])

    def session(self) -> str:
        """What stays the same throughout a conversation: the instructions at its beginning and the first turn."""
        opening = self.instructions if self._opening is None else self._opening
        return digest([part.encode() for part in (*opening, "\0", *self.turns[:1])])


class TurnsAlone(Contents):
    """Collects who said what and counts nothing, so that only what P2L reads can be at fault."""

    def message(self, role: str, text: str, extra: bytes = b"") -> None:
        """Counts nothing."""

    def packed(self, value: object) -> bytes:
        """Nothing: it would only be counted."""
        return b""

    def image(self, source: object) -> str:
        """What stands for an image."""
        return "[image]"

    document = image


def without(text: str, marks: Sequence[tuple[str, str]]) -> str:
    """A text without what stands between these marks; the same object where there is none of it."""
    for begin, end in marks:
        kept, at = list[str](), 0
        while (start := text.find(begin, at)) >= 0 and (stop := text.find(end, start)) >= 0:
            kept.append(text[at:start])
            at = stop + len(end)
        if at:
            text = "".join([*kept, text[at:]])
    return text


def digest(parts: Sequence[bytes]) -> str:
    """A hash of texts, in hex; it tells ["ab", "c"] from ["a", "bc"]."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def text_field(body: dict[str, Any], name: str, default: str | None = None) -> str:
    """A field of text. Raises BadRequest."""
    value = body.get(name, default)
    if not isinstance(value, str):
        raise BadRequest(f"{name}: expected text, got {_kind(value)}", name)
    return value


def flag_field(body: dict[str, Any], name: str) -> bool:
    """A field that is true or false; null and absent are false. Raises BadRequest."""
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise BadRequest(f"{name}: expected true or false, got {_kind(value)}", name)
    return value


def count_field(body: dict[str, Any], *names: str, least: int = 1) -> int | None:
    """The largest of these fields, each a whole number of at least ``least``; null is absent. A provider may know any of them.
    Raises BadRequest."""
    found = None
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadRequest(f"{name}: expected a whole number of at least {least}, got {value!r:.40}", name)
        found = value if found is None else max(found, value)
    return found


def list_field(body: dict[str, Any], name: str, required: bool = False) -> list[Any]:
    """A field that is a list of objects; null and absent are empty. Raises BadRequest."""
    value = body.get(name)
    if value is None and not required:
        return []
    if not isinstance(value, list):
        raise BadRequest(f"{name}: expected a list of objects, got {_kind(value) if name in body else 'nothing'}", name)
    if required and not value:
        raise BadRequest(f"{name}: expected at least one message, got none", name)
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise BadRequest(f"{name}[{i}]: expected an object, got {_kind(item)}", f"{name}[{i}]")
    return value


def _kind(value: object) -> str:
    names = {"dict": "an object", "list": "a list", "str": "text", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")
