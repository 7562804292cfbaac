"""Readers of parquet, csv and jsonl files: a few rows at a time, in bounded memory."""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from p2l_engine.batch.places import File

logger = logging.getLogger(__name__)

AT_ONCE, AT_ONCE_BYTES = 512, 8 << 20  # rows that are read together, fewer where they are longer
LONGEST = 1 << 30  # bytes of a csv file's row


class Unroutable(NamedTuple):
    """Why a row cannot be routed, and the file and row (from 0) that it is."""

    why: str
    where: str = ""


class Some(NamedTuple):
    """A few rows of one file: the number of the first (from 0), prompts as they were found, kept columns, and how much of the
    file was read by then."""

    file: File
    first: int
    prompts: list[Any]
    kept: pa.Table
    read: float

    def since(self, row: int) -> Some:
        """Without the rows before this one."""
        skip = max(0, row - self.first)
        return Some(self.file, self.first + skip, self.prompts[skip:], self.kept[skip:], self.read)


def _parquet(file: File, column: str, keep: Sequence[str] | None, _: pa.Schema | None) -> Iterator[Some]:
    with file.place.system.open_input_file(file.place.path) as opened:
        parquet = pq.ParquetFile(opened, pre_buffer=False, buffer_size=1 << 20)  # row groups may be large
        names = parquet.schema_arrow.names
        wanted = _wanted(file, names, column, keep)
        columns, first = [column, *(name for name in wanted if name != column)], 0
        for group in range(parquet.num_row_groups):
            about = parquet.metadata.row_group(group)
            at_once = max(1, min(AT_ONCE, AT_ONCE_BYTES * about.num_rows // max(about.total_byte_size, 1)))
            for batch in parquet.iter_batches(at_once, row_groups=[group], columns=columns):
                table = pa.Table.from_batches([batch])
                read = (first + len(batch)) / parquet.metadata.num_rows
                yield Some(file, first, _values(table.column(column)), table.select(wanted), read)
                first += len(batch)


def _csv(file: File, column: str, keep: Sequence[str] | None, schema: pa.Schema | None) -> Iterator[Some]:
    """In pieces of a megabyte, as long as no row is longer: then the file is begun again in larger ones, from the row after
    those that were read."""
    piece, done = 1 << 20, 0
    while True:
        try:
            for some in _csv_pieces(file, column, keep, schema, piece):
                schema, end = some.kept.schema, some.first + len(some.prompts)
                if end > done:
                    yield some.since(done)
                    done = end
            return
        except pa.ArrowInvalid as error:
            if "CSV parse error: Expected" in str(error):
                raise ValueError(f"{file.place.shown}: {_ragged(file) or error}") from None
            if "straddling" not in str(error):
                raise
            if piece >= LONGEST:
                raise ValueError(
                    f"{file.place.shown}: a row after row {done - 1} is longer than 1 GiB: is a quote not closed?"
                ) from None
            piece = min(8 * piece, LONGEST)


def _csv_pieces(file: File, column: str, keep: Sequence[str] | None, schema: pa.Schema | None, piece: int) -> Iterator[Some]:
    parse, pieces = pa.csv.ParseOptions(newlines_in_values=True), pa.csv.ReadOptions(block_size=piece)
    with _opened(file) as (opened, _), pa.csv.open_csv(opened, read_options=pieces, parse_options=parse) as header:
        names = header.schema.names
    wanted = _wanted(file, names, column, keep)
    # All is the text that stands there: 007 stays 007, NA is a word, and nothing is what is not even quoted.
    known = dict.fromkeys(names, pa.string()) | ({} if schema is None else {field.name: field.type for field in schema})
    convert = pa.csv.ConvertOptions(
        column_types=known | {column: pa.string()}, include_columns=list(dict.fromkeys([column, *wanted])),
        null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False, check_utf8=False,
    )  # fmt: skip
    first = 0
    with _opened(file) as (opened, raw):
        for batch in pa.csv.open_csv(opened, read_options=pieces, parse_options=parse, convert_options=convert):
            table = pa.Table.from_batches([batch])
            table.select(wanted).validate(full=True)  # of UTF-8; a prompt that is not has an error of its own
            for start in range(0, len(table), AT_ONCE):
                part = table[start : start + AT_ONCE]
                yield Some(file, first + start, _values(part.column(column)), part.select(wanted), raw.tell() / file.size)
            first += len(table)


def _ragged(file: File) -> str | None:
    """The first row of a csv file that has not as many values as there are columns; Arrow does not say where it stands."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _opened(file) as (opened, _), io.TextIOWrapper(opened, "latin-1", newline="") as text:
            rows = (row for row in csv.reader(text) if row)
            columns = len(next(rows))
            for number, row in enumerate(rows):
                if len(row) != columns:
                    return f"row {number}: expected {columns} values, one for each column, got {len(row)}: {','.join(row):.60}"
    finally:
        csv.field_size_limit(limit)
    return None


def _jsonl(file: File, column: str, keep: Sequence[str] | None, schema: pa.Schema | None) -> Iterator[Some]:
    """The kept columns' types are those of the first rows; a line that is no JSON object is a row that cannot be routed."""
    first, known = 0, set[str]()
    for lines, read in _lines(file):
        rows = [_object(line) for line in lines]
        names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
        if not first:
            if isinstance(rows[0], Unroutable) and not names:
                raise ValueError(f"{file.place.shown}: no line of its first {len(rows)} is a JSON object: row 0: {rows[0].why}")
            _wanted(file, names, column, None)
        if schema is None:
            wanted = _wanted(file, names, column, keep)
            schema = _typed({name: [_of(row, name) for row in rows] for name in wanted}, file)
        late = [name for name in names if name not in known | {column, *schema.names}] if keep is None else []
        if late:
            logger.warning(
                "%s: %s: not in the first rows, and so not in the output", file.place.shown, ", ".join(map(repr, late))
            )
        known.update(names)
        columns = [_column(file, first, field, [_of(row, field.name) for row in rows]) for field in schema]
        table = pa.table(columns, schema=schema)
        prompts = [row if isinstance(row, Unroutable) else row.get(column) for row in rows]
        yield Some(file, first, prompts, table, read)
        first += len(rows)


READERS: dict[str, Callable[[File, str, Sequence[str] | None, pa.Schema | None], Iterator[Some]]] = {
    "parquet": _parquet,
    "csv": _csv,
    "jsonl": _jsonl,
}


@contextmanager
def _opened(file: File) -> Iterator[tuple[pa.NativeFile, pa.NativeFile]]:
    """A file's text, and the file as it stands there, which says how much of it was read."""
    squeezed = {"gz": "gzip", "zst": "zstd"}.get(file.ending.rsplit(".", 1)[1])
    if squeezed and not file.size:
        raise pa.ArrowInvalid(f"expected a {squeezed} stream, got nothing")  # even one of no text has a header
    with file.place.system.open_input_file(file.place.path) as raw:
        yield (pa.CompressedInputStream(raw, squeezed) if squeezed else raw), raw


def _lines(file: File) -> Iterator[tuple[list[bytes], float]]:
    """Lines that hold something, a few at a time, and how much of the file was read by then."""
    with _opened(file) as (opened, raw):
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


def _values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Unroutable(f"expected UTF-8 text: {error}")


def _wanted(file: File, names: Sequence[str], column: str, keep: Sequence[str] | None) -> list[str]:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"{file.place.shown}: expected columns of different names, got {', '.join(twice)} twice")
    missing = [name for name in (column, *(keep or ())) if name not in names]
    if missing:
        raise ValueError(f"{file.place.shown}: expected the columns {', '.join(missing)}; it has {', '.join(names) or 'none'}")
    return [name for name in names if name != column] if keep is None else list(keep)
