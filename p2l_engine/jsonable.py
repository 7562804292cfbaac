"""Dataclasses as JSON, and back, by their types: nested dataclasses, tuples, mappings with string keys, Literals, None and
plain values.

A field is a key of the JSON object. A field that is None has no key, unless its metadata are NULL or ``null_with``. The
entries of a mapping with the metadata SPREAD are written as keys next to the other fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

NULL = {"null": True}
SPREAD = {"spread": True}


def null_with(name: str) -> dict[str, str]:
    """Metadata of a field that is null in the JSON, instead of missing, where the field ``name`` is given."""
    return {"null": name}


def to_json(value: Any) -> Any:
    """A dataclass as objects, lists, strings and numbers: what ``json.dumps`` takes."""
    if is_dataclass(value):
        found: dict[str, Any] = {}
        for each in fields(value):
            inner, null = getattr(value, each.name), each.metadata.get("null", False)
            if each.metadata.get("spread"):
                found |= to_json(inner)
            elif inner is not None or null is True or (null and getattr(value, null) is not None):
                found[each.name] = to_json(inner)
        return found
    if isinstance(value, Mapping):
        return {name: to_json(inner) for name, inner in value.items()}
    return [to_json(inner) for inner in value] if isinstance(value, tuple) else value


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """A ``kind`` from what ``to_json`` made of one. Keys that are no field's are ignored; a missing key gives the field's
    default. Raises KeyError for a missing key without a default, and TypeError for a value of another type; both name the key's
    path. where: the path of ``value`` itself."""
    found: T = _read(kind, value, where)
    return found


def _read(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return _object(kind, value, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _read(next(of for of in inner if of is not NoneType), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(inner[0], each, f"{where}[{i}]") for i, each in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {name: _read(inner[1], each, f"{where}.{name}") for name, each in value.items()}
    if origin is Literal and value in inner:
        return value
    accepted = (int, float) if kind is float else kind
    if origin is None and isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
        return value
    raise TypeError(f"{where.lstrip('.')}: expected {getattr(kind, '__name__', kind)}, got {value!r:.80}")


def _object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{where.lstrip('.') or 'report'}: expected an object, got {value!r:.80}")
    kinds, arguments = _kinds(kind), {}
    named = {each.name for each in fields(kind) if not each.metadata.get("spread")}
    for each in fields(kind):
        if each.metadata.get("spread"):
            others = {name: of for name, of in value.items() if name not in named}
            arguments[each.name] = _read(kinds[each.name], others, where)
        elif each.name in value:
            arguments[each.name] = _read(kinds[each.name], value[each.name], f"{where}.{each.name}")
        elif each.default is MISSING:
            raise KeyError(f"{where}.{each.name}".lstrip("."))
    return kind(**arguments)


_kinds = cache(get_type_hints)
