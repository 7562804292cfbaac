"""Python values as Arrow columns whose types the first rows decide; values that a type would change are refused."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from p2l_engine.tables.storage import File


def infer(file: File, columns: dict[str, list[Any]]) -> pa.Schema:
    """The columns' types; text for those without values. Raises ValueError if a column has values of different types."""
    fields = []
    for name, values in columns.items():
        try:
            name.encode()
            kind = pa.infer_type(values)
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise ValueError(f"{file.shown}: column {name!r}: values of different types: {error}") from None
        fields.append(pa.field(name, pa.string() if pa.types.is_null(kind) else kind))
    return pa.schema(fields)


def typed_column(file: File, first: int, field: pa.Field, values: list[Any]) -> pa.Array:
    """The values, of rows from ``first`` on, as a column of the field's type. Raises ValueError with the row whose value the
    type would change."""
    try:
        found = pa.array(values, field.type)
        if pa.infer_type(values) in (field.type, pa.null()) or all(map(_same, values, found.to_pylist())):
            return found
        raise pa.ArrowInvalid("a value would change")
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        for i, value in enumerate(values):
            try:
                if not _same(value, pa.array([value], field.type)[0].as_py()):
                    raise pa.ArrowInvalid("a value would change")
            except (pa.ArrowException, OverflowError, UnicodeEncodeError):
                raise ValueError(
                    f"{file.shown}: row {first + i}: column {field.name!r}: expected {field.type} as in the first rows, "
                    f"got {value!r:.60}; leave the column out with --keep"
                ) from None
        raise


def _same(value: Any, stored: Any) -> bool:
    """Whether nothing was lost: among integers Arrow turns 2.5 into 2, and it drops keys that it does not know."""
    if isinstance(value, dict) and isinstance(stored, dict):
        return all(item is None or (key in stored and _same(item, stored[key])) for key, item in value.items())
    if isinstance(value, list) and isinstance(stored, list):
        return len(value) == len(stored) and all(map(_same, value, stored))
    return bool(value == stored) or (value != value and stored != stored)
