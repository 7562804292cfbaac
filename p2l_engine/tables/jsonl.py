"""JSON lines: one JSON value a line; empty lines are no rows. Local files are read without pyarrow."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from p2l_engine.strict_json import DuplicateKeyError, parsed
from p2l_engine.tables.read_share import Told, untold
from p2l_engine.tables.rows import AT_ONCE, AT_ONCE_BYTES, MIXED, InvalidRow, Rows, ValueRows, listed, wanted_columns
from p2l_engine.tables.storage import File

if TYPE_CHECKING:
    import pyarrow as pa

BLANK = codecs.BOM_UTF8 + b" \t\r\n\v\f"  # the bytes of lines that are no rows
DOCUMENT = re.compile(
    rb"(?:%b)?\s*(?:\[\s*(?:\{|$)|\{\s*$)" % codecs.BOM_UTF8
)  # how the first line of a list, or object, begins
AS_LINES = "write an object a line: with jq -c '.[]' of a list, or to_json(orient='records', lines=True) of pandas"


def schema(file: File, column: str, keep: Sequence[str] | None, told: Told = untold) -> pa.Schema | None:
    """See ``formats.Reader``. Reads all rows where columns are kept. Raises ValueError if no value of a column can be stored,
    the columns have more than ``MAX_PLACES`` different keys, or objects more than ``MAX_SPARSE``, of which each has few."""
    import pyarrow as pa

    from p2l_engine.tables.shapes import LEAST_FILLED, MAX_PLACES, MAX_SPARSE, Shape, by_key, sparse_keys

    shapes, names = dict[str, Shape](), dict[str, None]()
    begun, objects = False, 0
    for lines, read in _lines(file):
        told(read)
        rows = [_parsed(line) for line in lines]
        names |= dict.fromkeys(_names(rows))
        if not begun:
            _check_objects(file, rows, names)
            begun = True
        if keep is not None and not keep:
            if column in names:
                break
            continue
        dicts = [row for row in rows if isinstance(row, dict)]
        objects += len(dicts)
        for name, found in by_key(dicts).items():
            if name != column if keep is None else name in keep:
                shapes.setdefault(name, Shape()).add(found)
        if sum(shape.places() for shape in shapes.values()) > MAX_PLACES:
            most = max(shapes, key=lambda name: shapes[name].places())
            raise ValueError(
                f"{file.shown}: expected at most {MAX_PLACES:,} different keys in all columns, got more, most of them in "
                f"{most!r}; name the columns to keep with --keep"
            )
    if begun:
        wanted_columns(file, list(names), column, None)
    sparse = [place for name, shape in shapes.items() for place in shape.sparse(name)]
    sparse += sparse_keys("rows", objects, shapes) if keep is None else []  # else the user has named each
    if sparse:
        raise ValueError(
            f"{file.shown}: expected objects of at most {MAX_SPARSE:,} different keys, or with {LEAST_FILLED:.0%} of them "
            f"each, got {listed(sparse)}: write objects whose keys are data as text, or name the columns to keep with --keep"
        )
    types = {name: shape.type() for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if shape.kinds and pa.types.is_null(types[name]):
            raise ValueError(f"{file.shown}: column {name!r}: not one value can be stored; leave the column out with --keep")
    mixed = [line for name, shape in shapes.items() for line in shape.mixed(name)]
    return pa.schema(list(types.items()), {MIXED: listed(mixed)} if mixed else None) if begun else None


def rows(file: File, column: str, keep: Sequence[str] | None, schema: pa.Schema) -> Iterator[Rows]:
    """See ``formats.Reader``. A line that is no JSON object is an ``InvalidRow``."""
    import pyarrow as pa

    from p2l_engine.tables.shapes import is_name
    from p2l_engine.tables.typed import REMEDY, typed_column

    first = 0
    for lines, read in _lines(file):
        rows = [_object(_parsed(line)) for line in lines]
        arrays, problems = list[pa.Array](), dict[int, str]()
        for field in schema:
            array, odd = typed_column(field, [_cell(row, field.name) for row in rows])
            arrays.append(array)
            problems = odd | problems
        unnamed = {name for name in _names(rows) if not is_name(name)} if keep is None else set[str]()
        for i, row in enumerate(rows) if unnamed else ():
            if isinstance(row, dict) and not unnamed.isdisjoint(row):
                problems.setdefault(i, f"expected keys in valid Unicode: got half a surrogate pair{REMEDY}")
        prompts = [row if isinstance(row, InvalidRow) else row.get(column) for row in rows]
        yield Rows(file, first, prompts, pa.table(arrays, schema=schema), read, problems)
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


def _check_objects(file: File, rows: Sequence[Any], names: Collection[str]) -> None:
    """Raises ValueError if none of the first rows is an object. names: theirs."""
    first = _object(rows[0])
    if isinstance(first, InvalidRow) and not names:
        remedy = f"; {AS_LINES}" if isinstance(rows[0], list) else ""
        raise ValueError(f"{file.shown}: no line of its first {len(rows)} is a JSON object: row 0: {first.why}{remedy}")


def _check_no_document(file: File, lines: Sequence[bytes]) -> None:
    """Raises ValueError if the first lines are the beginning of a list or an object that goes over many."""
    begun = DOCUMENT.match(lines[0]) and isinstance(_parsed(lines[0]), InvalidRow)
    whole = lines[0].strip(BLANK) == b"[" and lines[-1].strip(BLANK) == b"]"  # as DuckDB writes a list, also of one object
    if begun and len(lines) > 1 and (whole or isinstance(_parsed(lines[1]), InvalidRow)):
        raise ValueError(f"{file.shown}: expected a JSON object on each line, got one document over many lines; {AS_LINES}")


def _lines(file: File) -> Iterator[tuple[list[bytes], float]]:
    """Lines that are not empty, a few at a time, and how much of the file was read. Raises ValueError for one document."""
    for i, (lines, read) in enumerate(_any_lines(file)):
        if not i:
            _check_no_document(file, lines)
        yield lines, read


def _any_lines(file: File) -> Iterator[tuple[list[bytes], float]]:
    with file.text() as (opened, raw):
        begun, lines, size = list[bytes](), list[bytes](), 0  # begun: pieces of a line whose end was not read yet
        while chunk := opened.read(1 << 20):
            *whole, rest = chunk.split(b"\n")
            if whole:
                whole[0] = b"".join([*begun, whole[0]])
                begun = []
            begun.append(rest)
            for line in whole:
                if line.strip(BLANK):
                    lines.append(line)
                    size += len(line)
                if len(lines) == AT_ONCE or size >= AT_ONCE_BYTES:
                    yield lines, file.share(raw)
                    lines, size = [], 0
        last = b"".join(begun)
        lines += [last] if last.strip(BLANK) else []
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
