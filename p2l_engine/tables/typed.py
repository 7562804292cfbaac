"""Values as columns of given types; a value that its type would change is left out, and why it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from types import NoneType
from typing import Any

import pyarrow as pa

from p2l_engine.strict_json import INFINITIES
from p2l_engine.tables.rows import InvalidRow

REMEDY = "; leave the column out with --keep"
UNFIT = (pa.ArrowException, OverflowError, UnicodeEncodeError)  # what Arrow raises for values of other types


def typed_column(field: pa.Field, values: Sequence[Any]) -> tuple[pa.Array, dict[int, str]]:
    """JSON values as a column of the field's type, and why those that the type would change are null in it, by place."""
    try:
        return _array(values, field.type), {}
    except UNFIT:
        stored, problems = list(values), dict[int, str]()
        for i, value in enumerate(values):
            if not _is_stored(value, field.type):
                place, kind, odd = _misfit(value, field.type, field.name)
                stored[i], problems[i] = None, problem(place, kind, f"{odd!r:.60}")
        return _array(stored, field.type), problems


def typed_table(table: pa.Table, schema: pa.Schema) -> tuple[pa.Table, dict[int, str]]:
    """The columns of the schema, those that the table lacks null, and why cells are null that their types would change, or
    whose text is not UTF-8, by row."""
    columns, problems = list[pa.ChunkedArray](), dict[int, str]()
    there = set(table.column_names)
    for field in schema:
        if field.name not in there:
            columns.append(pa.chunked_array([pa.nulls(len(table), field.type)]))
            continue
        column, odd = _cast(table.column(field.name), field)
        columns.append(column)
        problems = odd | problems  # the first column's
    return pa.table(columns, schema=schema), problems


def problem(place: str, kind: pa.DataType, got: str) -> str:
    """Why a cell of a kept column cannot be stored. place: the column, or a place within it."""
    return InvalidRow(f"expected {kind!s:.200} in the column {place!r}", f"got {got}{REMEDY}").why


def _cast(column: pa.ChunkedArray, field: pa.Field) -> tuple[pa.ChunkedArray, dict[int, str]]:
    try:
        column.validate(full=True)
        return column if column.type.equals(field.type) else column.cast(field.type), {}
    except UNFIT:
        rows, problems = list[int | None](range(len(column))), dict[int, str]()
        for i in range(len(column)):
            try:
                alone = column[i : i + 1].combine_chunks().take(pa.array([0]))  # a slice of maps has all their values
                alone.validate(full=True)
                alone.cast(field.type)
            except UNFIT as error:
                rows[i], problems[i] = None, problem(field.name, field.type, _shown(column[i], error))
        if len(problems) == len(rows):  # of some types Arrow casts nothing, no nulls either
            return pa.chunked_array([pa.nulls(len(rows), field.type)]), problems
        return column.take(pa.array(rows, pa.int64())).cast(field.type), problems


def _shown(scalar: pa.Scalar, error: Exception) -> str:
    try:
        return f"{scalar.as_py()!r:.60}"
    except UnicodeDecodeError as undecodable:
        return f"text that is not UTF-8: {undecodable}"
    except (ValueError, OverflowError):  # a time that Python does not know
        return f"{error}"


def _is_stored(value: Any, kind: pa.DataType) -> bool:
    try:
        _array([value], kind)
    except UNFIT:
        return False
    return True


def _misfit(value: Any, kind: pa.DataType, place: str) -> tuple[str, pa.DataType, Any]:
    """The innermost place of a value that its type would change, its type, and what is there."""
    inner = list[tuple[str, pa.DataType, Any]]()
    if isinstance(value, dict) and pa.types.is_struct(kind):
        inner = [(f"{place}.{field.name}", field.type, value.get(field.name)) for field in kind]
    elif isinstance(value, list) and pa.types.is_list(kind):
        inner = [(f"{place}[]", kind.value_type, item) for item in value]
    for name, its, item in inner:
        if not _is_stored(item, its):
            return _misfit(item, its, name)
    return place, kind, value


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if not _fit(values, kind):
        raise pa.ArrowInvalid("a value would change")
    return pa.array(values, kind)


def _fit(values: Sequence[Any], kind: pa.DataType) -> bool:
    """Whether JSON values are of the type's kind: Arrow would turn false into 0.0, 2.5 into 2 and drop keys without a word. It
    checks ranges itself."""
    kinds = set(map(type, values)) - {NoneType}
    if pa.types.is_struct(kind):
        objects = [value for value in values if value is not None]
        if not kinds <= {dict}:
            return False
        known = {field.name for field in kind}
        others = set(chain.from_iterable(objects)) - known
        return all(value.get(name) is None for name in others for value in objects) and all(
            _fit([value.get(field.name) for value in objects], field.type) for field in kind
        )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lists = (value for value in values if value is not None)
        return kinds <= {list} and _fit(list(chain.from_iterable(lists)), kind.value_type)
    return kinds <= _python_kinds(kind) and not _overflown(values, kinds)


def _overflown(values: Sequence[Any], kinds: set[type]) -> bool:
    """Whether a number like 1e400 has become infinite."""
    if float not in kinds or not any(infinity in values for infinity in INFINITIES):
        return False
    infinite = (value for value in values if value in INFINITIES)
    return not all(any(value is infinity for infinity in INFINITIES) for value in infinite)


def _python_kinds(kind: pa.DataType) -> set[type]:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return {str}
    if pa.types.is_integer(kind) or pa.types.is_decimal(kind):
        return {int}
    return {int, float} if pa.types.is_float64(kind) else {bool} if pa.types.is_boolean(kind) else set()
