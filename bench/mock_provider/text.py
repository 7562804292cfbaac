"""The text of an answer: readable words, one token each, and arguments that fit a JSON schema."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import orjson

SENTENCES = """\
A leaderboard of one prompt says which model answers it best, and by how much.
Short questions are cheap to answer, and most models answer them well.
The café on the corner opens at seven, so the naïve plan is to be there at six.
Three of the four steps are independent → they can run at the same time.
If the budget is small, a mixture of two models is better than either alone.
Numbers such as 3.14 or 2,718 are written here so that the text is not all letters.
The Greek word λόγος means reason, and the Japanese word 言葉 means word.
Nothing in this paragraph is true of the world, but every sentence of it can be read.
Measure first, change one thing, and measure again 🙂 before you believe it.
A cache that is never emptied is a leak, and a queue without a bound is another one.
What a request costs is known when the last token has arrived, not before.
In short: ask the model that knows, pay for what it says, and keep the receipt."""

encoded = lru_cache(maxsize=4096)(orjson.dumps)
"""A word as a JSON string, in UTF-8."""


def tokens_of(text: str) -> list[str]:
    """Words with the space in front of them: joined, they are the text."""
    return re.findall(r"\s*\S+", text)


_WORDS = [f" {word}" for word in SENTENCES.split()]
_STARTS = [0, *(place + 1 for place, word in enumerate(_WORDS) if word.endswith("."))][:-1]


def sentences(choice: int, count: int) -> list[str]:
    """Words of sentences, count of them. choice: any number, chooses the first sentence."""
    start = _STARTS[choice % len(_STARTS)]
    words = _WORDS[start : start + count]
    while len(words) < count:
        words += _WORDS[: count - len(words)]
    if words:
        words[0] = words[0][1:]
    return words


def example(schema: Any) -> Any:
    """A value that a JSON schema allows: its first choice of everything, with all properties that it requires."""
    if not isinstance(schema, dict):
        return "something"
    for word in ("const", "default"):
        if word in schema:
            return schema[word]
    for word in ("enum", "examples"):
        if schema.get(word):
            return schema[word][0]
    for word in ("anyOf", "oneOf", "allOf"):
        if schema.get(word):
            return example(schema[word][0])
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        properties: dict[str, Any] = schema.get("properties") or {}
        required: list[str] = schema.get("required") or list(properties)
        return {name: example(properties.get(name)) for name in required}
    if kind == "array":
        return [example(schema.get("items"))] * max(1, schema.get("minItems", 1))
    return {"integer": max(1, schema.get("minimum", 1)), "number": 1.5, "boolean": True, "null": None}.get(
        kind, "a café in Zürich"
    )
