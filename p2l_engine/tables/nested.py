"""Values within nested columns, by names joined with dots: ``body.messages``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from p2l_engine.strict_json import DuplicateKeyError, parsed, unique

MISSING = object()


def split_column(column: str, names: Sequence[str]) -> tuple[str, str]:
    """A column that a file has, and the path within its cells ("": the cells themselves). A column whose own name has the dots
    comes first, then the longest name; a name that no column begins with is returned as it is."""
    if column in names:
        return column, ""
    return next(((name, rest) for name, rest in splits(column) if name in names), (column, ""))


def value_at(cell: Any, path: str, default: Any = None) -> Any:
    """The value in an object, in the objects within it, or in text that is such an object as JSON; ``default`` where there is
    none. As for columns, a key whose own name has the dots comes first. Raises ValueError for a cell that is no object."""
    if cell is None:
        return default
    found = object_of(cell)
    if path in found:
        return found[path]
    problem: ValueError | None = None
    for key, rest in splits(path):
        if key not in found:
            continue
        try:
            value = value_at(found[key], rest, MISSING)
        except ValueError as error:
            problem = problem or error
            continue
        if value is not MISSING:
            return value
    if problem is not None:
        raise problem
    return default


def object_of(cell: Any) -> Mapping[str, Any]:
    """A cell that is an object: a dict, the pairs that parquet has for a map, or a JSON object as text. Raises ValueError."""
    try:
        value = parsed(cell) if isinstance(cell, str) else as_object(cell)
    except DuplicateKeyError as error:
        raise ValueError(f"expected each key of an object once, {error}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"expected an object, or one as JSON, got the text {cell!r:.60}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def as_object(value: Any) -> Any:
    """The pairs of a map as a dict; anything else as it is. Raises DuplicateKeyError for a map that has a key twice."""
    is_map = isinstance(value, list) and bool(value) and all(map(_is_pair, value))
    return unique(value) if is_map else value


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def splits(path: str) -> Iterator[tuple[str, str]]:
    """A path cut in two names at each of its dots, the longest beginning first."""
    for at in range(len(path) - 2, 0, -1):
        if path[at] == ".":
            yield path[:at], path[at + 1 :]
