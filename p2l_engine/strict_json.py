"""JSON whose objects name each key once."""

from __future__ import annotations

import json
from typing import Any


class DuplicateKeyError(ValueError):
    """An object names a key twice: readers differ in which value they keep (RFC 8259, section 4)."""

    def __init__(self, key: str) -> None:
        super().__init__(f"got {key!r} twice")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these keys and values. Raises DuplicateKeyError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        for name, _ in pairs:
            if name in seen:
                raise DuplicateKeyError(name)
            seen.add(name)
    return found


INFINITIES = (float("inf"), float("-inf"))  # what "Infinity" and "-Infinity" are read as; 1e400 is read as another object
_constants = {"NaN": float("nan"), "Infinity": INFINITIES[0], "-Infinity": INFINITIES[1]}
_decoder = json.JSONDecoder(object_pairs_hook=unique, parse_constant=_constants.__getitem__)


def parsed(text: str) -> Any:
    """A JSON text's value. Raises ValueError where it is no JSON, its subclass DuplicateKeyError for an object, at any depth,
    that names a key twice, and RecursionError."""
    return _decoder.decode(text)
