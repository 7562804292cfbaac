"""The reader of jsonl files: a few lines at a time, in bounded memory; the kept columns' types come from the values."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from p2l_engine.tables.rows import AT_ONCE, AT_ONCE_BYTES, Some, Unroutable, text_of, wanted_columns
from p2l_engine.tables.storage import File

logger = logging.getLogger(__name__)


def read_jsonl(file: File, column: str, keep: Sequence[str] | None, schema: pa.Schema | None) -> Iterator[Some]:
    """The kept columns' types are those of the first rows that have values in them; a line that is no JSON object is a row that
    cannot be routed."""
    first, known = 0, set[str]()
    for lines, read in _lines(file):
        rows = [_object(line) for line in lines]
        names = _names(rows)
        if not first:
            _check(file, rows, column)
        if schema is None:
            wanted = wanted_columns(file, names, column, keep)
            columns = {name: [_of(row, name) for row in rows] for name in wanted}
            empty = {name for name, values in columns.items() if all(value is None for value in values)}
            schema = _typed(columns | _later(file, empty), file)
        late = [name for name in names if name not in known | {column, *schema.names}] if keep is None else []
        if late:
            logger.warning(
                "%s: %s: not in the first rows, and so not in the output", file.place.shown, ", ".join(map(repr, late))
            )
        known.update(names)
        arrays = [_column(file, first, field, [_of(row, field.name) for row in rows]) for field in schema]
        table = pa.table(arrays, schema=schema)
        prompts = [row if isinstance(row, Unroutable) else row.get(column) for row in rows]
        yield Some(file, first, prompts, table, read)
        first += len(rows)


def check_jsonl(file: File, column: str) -> None:
    """Raises ValueError where the first rows have no such column; nothing where there are no rows."""
    for lines, _ in _lines(file):
        rows = [_object(line) for line in lines]
        _check(file, rows, column)
        return


def _names(rows: list[dict[str, Any] | Unroutable]) -> list[str]:
    return list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))


def _check(file: File, rows: list[dict[str, Any] | Unroutable], column: str) -> None:
    names = _names(rows)
    if isinstance(rows[0], Unroutable) and not names:
        raise ValueError(f"{file.place.shown}: no line of its first {len(rows)} is a JSON object: row 0: {rows[0].why}")
    wanted_columns(file, names, column, None)


def _lines(file: File) -> Iterator[tuple[list[bytes], float]]:
    """Lines that hold something, a few at a time, and how much of the file was read by then."""
    with text_of(file) as (opened, raw):
        rest, lines, size = b"", list[bytes](), 0
        while chunk := opened.read(1 << 20):
            *whole, rest = (rest + chunk).split(b"\n") if b"\n" in chunk else (rest + chunk,)
            for line in whole:
                if line.strip():
                    lines.append(line)
                    size += len(line)
                if len(lines) == AT_ONCE or size >= AT_ONCE_BYTES:
                    yield lines, raw.tell() / file.size
                    lines, size = [], 0
        lines += [rest] if rest.strip() else []
        if lines:
            yield lines, 1.0


def _object(line: bytes) -> dict[str, Any] | Unroutable:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Unroutable(f"expected UTF-8 text: {error}")
    except (ValueError, RecursionError) as error:
        return Unroutable(f"expected a line of JSON: {error}")
    return row if isinstance(row, dict) else Unroutable(f"expected a JSON object, got {type(row).__name__}")


def _of(row: dict[str, Any] | Unroutable, name: str) -> Any:
    return row.get(name) if isinstance(row, dict) else None


def _later(file: File, names: set[str]) -> dict[str, list[Any]]:
    """Values of columns that have none in the first rows, from the first lines that do: a pass over the file, where need be."""
    found: dict[str, list[Any]] = {}
    for lines, _ in _lines(file) if names else ():
        rows = [_object(line) for line in lines]
        for name in names - found.keys():
            values = [_of(row, name) for row in rows]
            if any(value is not None for value in values):
                found[name] = values
        if len(found) == len(names):
            break
    return found


def _typed(columns: dict[str, list[Any]], file: File) -> pa.Schema:
    fields = []
    for name, values in columns.items():
        try:
            name.encode()
            kind = pa.infer_type(values)
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise ValueError(f"{file.place.shown}: column {name!r}: values of different types: {error}") from None
        fields.append(pa.field(name, pa.string() if pa.types.is_null(kind) else kind))
    return pa.schema(fields)


def _column(file: File, first: int, field: pa.Field, values: list[Any]) -> pa.Array:
    try:
        found = pa.array(values, field.type)
        if pa.infer_type(values) in (field.type, pa.null()) or all(map(_same, values, found.to_pylist())):
            return found
        raise pa.ArrowInvalid("a value would not be what it was")
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        for i, value in enumerate(values):
            try:
                if not _same(value, pa.array([value], field.type)[0].as_py()):
                    raise pa.ArrowInvalid("a value would not be what it was")
            except (pa.ArrowException, OverflowError, UnicodeEncodeError):
                raise ValueError(
                    f"{file.place.shown}: row {first + i}: column {field.name!r}: expected {field.type} as in the first rows, "
                    f"got {value!r:.60}; "
                    "leave the column out with --keep"
                ) from None
        raise


def _same(value: Any, stored: Any) -> bool:
    """Whether nothing is lost: Arrow makes 2 of 2.5 among integers, and leaves out keys that it does not know."""
    if isinstance(value, dict) and isinstance(stored, dict):
        return all(item is None or (key in stored and _same(item, stored[key])) for key, item in value.items())
    if isinstance(value, list) and isinstance(stored, list):
        return len(value) == len(stored) and all(map(_same, value, stored))
    return bool(value == stored) or (value != value and stored != stored)
