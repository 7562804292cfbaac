"""JSON lines: one JSON value a line; empty lines are no rows. Local files are read without pyarrow."""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from p2l_engine.strict_json import DuplicateKeyError, parsed
from p2l_engine.tables.rows import AT_ONCE, AT_ONCE_BYTES, InvalidRow, Rows, ValueRows, wanted_columns
from p2l_engine.tables.storage import File

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


def schema(file: File, column: str, _: Sequence[str] | None) -> None:
    """See ``formats.Reader``: types are known only from the rows."""
    for lines, _read in _lines(file):
        _check(file, [_parsed(line) for line in lines], column)
        return


def rows(file: File, column: str, keep: Sequence[str] | None, schema: pa.Schema | None) -> Iterator[Rows]:
    """See ``formats.Reader``. The kept columns' types are those of the first rows that have values in them; a line that is no
    JSON object is an ``InvalidRow``."""
    import pyarrow as pa

    from p2l_engine.tables.typed import infer, typed_column

    first, known = 0, set[str]()
    for lines, read in _lines(file):
        rows = [_object(_parsed(line)) for line in lines]
        names = _names(rows)
        if not first:
            _check(file, rows, column)
        if schema is None:
            wanted = wanted_columns(file, names, column, keep)
            columns = {name: [_cell(row, name) for row in rows] for name in wanted}
            empty = {name for name, values in columns.items() if all(value is None for value in values)}
            schema = infer(file, columns | _first_values(file, empty))
        late = [name for name in names if name not in known | {column, *schema.names}] if keep is None else []
        if late:
            logger.warning("%s: %s: not in the first rows, and so not in the output", file.shown, ", ".join(map(repr, late)))
        known.update(names)
        arrays = [typed_column(file, first, field, [_cell(row, field.name) for row in rows]) for field in schema]
        prompts = [row if isinstance(row, InvalidRow) else row.get(column) for row in rows]
        yield Rows(file, first, prompts, pa.table(arrays, schema=schema), read)
        first += len(rows)


def values(file: File, _: Collection[str]) -> Iterator[ValueRows]:
    """See ``formats.Reader``: all columns; lines that are no JSON are invalid, other JSON than objects is returned as it is."""
    names: dict[str, None] = {}
    yield ValueRows([], [])
    for lines, _read in _lines(file):
        rows = [_parsed(line) for line in lines]
        names |= dict.fromkeys(_names(rows))
        yield ValueRows(list(names), rows)


def not_an_object(value: Any) -> InvalidRow:
    """A row whose JSON value is no object."""
    return InvalidRow("expected a JSON object", f"got {type(value).__name__}", f"{json.dumps(value):.60}")


def _names(rows: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))


def _check(file: File, rows: Sequence[Any], column: str) -> None:
    names, first = _names(rows), _object(rows[0])
    if isinstance(first, InvalidRow) and not names:
        raise ValueError(f"{file.shown}: no line of its first {len(rows)} is a JSON object: row 0: {first.why}")
    wanted_columns(file, names, column, None)


def _lines(file: File) -> Iterator[tuple[list[bytes], float]]:
    """Lines that are not empty, a few at a time, and how much of the file was read."""
    with file.text() as (opened, raw):
        begun, lines, size = list[bytes](), list[bytes](), 0  # begun: pieces of a line whose end was not read yet
        while chunk := opened.read(1 << 20):
            *whole, rest = chunk.split(b"\n")
            if whole:
                whole[0] = b"".join([*begun, whole[0]])
                begun = []
            begun.append(rest)
            for line in whole:
                if line.strip():
                    lines.append(line)
                    size += len(line)
                if len(lines) == AT_ONCE or size >= AT_ONCE_BYTES:
                    yield lines, file.share(raw)
                    lines, size = [], 0
        last = b"".join(begun)
        lines += [last] if last.strip() else []
        if lines:
            yield lines, 1.0


def _parsed(line: bytes) -> Any:
    """A line's JSON value, or an ``InvalidRow``."""
    try:
        return parsed(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        return InvalidRow("expected UTF-8 text", str(error), line[:60].decode(errors="replace"))
    except DuplicateKeyError as error:
        return InvalidRow("expected each key of an object once", str(error), line[:60].decode(errors="replace"))
    except (ValueError, RecursionError) as error:
        return InvalidRow("expected a line of JSON", str(error), line[:60].decode(errors="replace"))


def _object(value: Any) -> dict[str, Any] | InvalidRow:
    return value if isinstance(value, dict | InvalidRow) else not_an_object(value)


def _cell(row: dict[str, Any] | InvalidRow, name: str) -> Any:
    return row.get(name) if isinstance(row, dict) else None


def _first_values(file: File, names: set[str]) -> dict[str, list[Any]]:
    """Values of columns that have none in the first rows, from the first lines that do: another pass over the file."""
    found: dict[str, list[Any]] = {}
    for lines, _ in _lines(file) if names else ():
        rows = [_object(_parsed(line)) for line in lines]
        for name in names - found.keys():
            values = [_cell(row, name) for row in rows]
            if any(value is not None for value in values):
                found[name] = values
        if len(found) == len(names):
            break
    return found
