"""Records as rows of the log's tables, and back. Any text can be stored: what a database refuses is escaped."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from p2l_engine.decision_log.record import Attempt, Feedback, Record, check_id

KEY = 200  # characters of a key's id at most: it is in an index
LATEST = 2.5e11  # seconds since 1970: the year 9892
_UNSTORABLE = re.compile("[\\\\\x00\ud800-\udfff]")
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")
_SURROGATE = re.compile("[\ud800-\udfff]")


def escaped(text: str) -> str:
    r"""The text with NUL, halves of surrogate pairs and the backslash itself as JSON escapes them (``\u005c``)."""
    return _UNSTORABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def unescaped(text: str) -> str:
    """What ``escaped`` was given."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text) if "\\" in text else text


def row_of(record: Record) -> dict[str, Any]:
    """Raises ValueError, which names the field and not its value, where one cannot be stored."""
    row = {}
    for name, write in _WRITE.items():
        value = getattr(record, name)
        try:
            row[name] = None if value is None and name in _OPTIONAL else write(value)
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise ValueError(f"{name}: a {type(value).__name__} that cannot be stored") from None
    return row


def record_of(row: Mapping[Any, Any]) -> Record:
    """The record of a row of all columns."""
    values: dict[str, Any] = {name: None if row[name] is None else _READ.get(name, _same)(row[name]) for name in _WRITE}
    return Record(**values)


def feedback_row(feedback: Feedback) -> dict[str, Any]:
    """Its fields; a label as stored text."""
    row = {name: getattr(feedback, name) for name in ("decision", "time", "score", "against", "preference")}
    return {**row, "label": None if feedback.label is None else escaped(feedback.label)}


def feedback_of(row: Mapping[Any, Any]) -> Feedback:
    """The feedback of a row of all columns but its number."""
    return Feedback(**{**row, "label": None if row["label"] is None else unescaped(row["label"])})


def _same(value: Any) -> Any:
    return value


def _id(value: str) -> str:
    check_id(value, "id")
    return value


def _text(value: str) -> str:
    if not isinstance(value, str):
        raise TypeError
    return escaped(value)


def _key(value: str) -> str:
    if len(value) > KEY:
        raise ValueError
    return _text(value)


def _number(value: float) -> float:
    number = float(value)
    if number != number:  # SQLite has none
        raise ValueError
    return number


def _time(value: float) -> float:
    if not 0 <= value < LATEST:
        raise ValueError
    return float(value)


def _whole(value: int) -> int:
    number = operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError
    return number


def _json(value: Any) -> str:
    text = _TO_JSON.encode(value)  # it escapes NUL
    return text if text.isascii() or not _SURROGATE.search(text) else json.dumps(value, default=_fields)


def _fields(value: object) -> object:
    if isinstance(value, Attempt):
        return {name: getattr(value, name) for name in Attempt.__slots__}
    return float(value)  # type: ignore[arg-type]  # numbers of numpy; a TypeError for all else


_TO_JSON = json.JSONEncoder(ensure_ascii=False, default=_fields)


def _tuple(text: str) -> tuple[Any, ...]:
    return tuple(json.loads(text))


def _attempts(text: str) -> tuple[Attempt, ...]:
    return tuple(Attempt(**fields) for fields in json.loads(text))


_WRITE: dict[str, Callable[[Any], Any]] = {
    "id": _id, "time": _time, "key": _key, "session": _text, "turns_hash": _text, "turns": _json, "api": _text,
    "asked": _text, "chosen": _text, "model": _text, "policy": _json, "propensity": _number,
    "propensity_error": _number, "candidates": _json,
    "win_rate": _number, "score": _number, "budget": _number, "expected_cost": _number, "cost": _number,
    "estimated": bool, "tokens_in": _whole, "tokens_cached": _whole, "tokens_out": _whole, "streamed": bool,
    "status": _whole, "outcome": _text, "attempts": _json, "latency": _json,
}  # fmt: skip
_OPTIONAL = {"key", "turns", "win_rate", "score", "budget", "cost", "tokens_in", "tokens_cached", "tokens_out"}
_READ: dict[str, Callable[[Any], Any]] = {
    **{name: unescaped for name, write in _WRITE.items() if write in (_text, _key)},
    "policy": json.loads, "latency": json.loads, "turns": _tuple, "candidates": _tuple, "attempts": _attempts,
}  # fmt: skip
