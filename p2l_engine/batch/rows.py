"""Rows of input files, in order and in blocks of bounded size: the prompt, and the columns that the output keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from p2l_engine.batch.places import File
from p2l_engine.votes.files import turns

ROWS = 8192  # of a block: what is computed, written and resumed together
BYTES = 32 << 20  # of a block's prompts, beyond which it ends early
AT_ONCE = 512  # rows that are read together


class Unroutable(NamedTuple):
    """Why a row cannot be routed, and the file and row (from 0) that it is."""

    why: str
    where: str = ""


Turns = tuple[str, ...] | Unroutable


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows: the block's number, its first row's (from 0, over all files), each row's user turns, kept columns; and
    how much of all input bytes was read by then, 0 to 1."""

    number: int
    first: int
    prompts: list[Turns]
    kept: pa.Table
    read: float = 1.0


class _Some(NamedTuple):
    """A few rows of one file: the number of the first (from 0), prompts as they were found, kept columns, and how much of the
    file was read by then."""

    file: File
    first: int
    prompts: list[Any]
    kept: pa.Table
    read: float


def blocks(files: Sequence[File], column: str, keep: Sequence[str] | None = None, rows: int = ROWS) -> Iterator[Block]:
    """All rows of all files. column: the prompts' (text, a list of user turns, a list of messages, or such a list as JSON);
    keep: the columns that the output repeats (None: all others).

    A prompt that is none becomes an ``Unroutable``. Raises ValueError with file and row (from 0) where a file cannot be read,
    lacks a column, or has other columns than the first.
    """
    number = first = size = 0
    prompts: list[Turns] = []
    kept: list[pa.Table] = []
    schema: pa.Schema | None = None
    sizes = np.array([file.size for file in files], float)
    before = dict(zip((file.place.shown for file in files), sizes.cumsum() - sizes, strict=True))
    read = 0.0
    for some in _every(files, column, keep):
        read = float((before[some.file.place.shown] + some.read * some.file.size) / max(sizes.sum(), 1.0))
        if schema is None:
            schema = some.kept.schema
        elif not some.kept.schema.equals(schema):
            raise ValueError(
                f"{some.file.place.shown}: {_difference(schema, some.kept.schema)}: expected those of the first file"
            )
        start = 0
        for i, prompt in enumerate(some.prompts):
            found = turns_of(prompt)
            if isinstance(found, Unroutable):
                found = found._replace(where=f"{some.file.place.shown}: row {some.first + i}")
            prompts.append(found)
            size += sum(map(len, found))
            if len(prompts) == rows or size >= BYTES:
                kept.append(some.kept[start : i + 1])
                yield Block(number, first, prompts, pa.concat_tables(kept), read)
                number, first, start, size = number + 1, first + len(prompts), i + 1, 0
                prompts, kept = [], []
        kept.append(some.kept[start:])
    if prompts:
        yield Block(number, first, prompts, pa.concat_tables(kept))


def turns_of(prompt: Any) -> Turns:
    """The user turns of a prompt as it was found in a file, or why there are none."""
    if isinstance(prompt, Unroutable):
        return prompt
    if prompt is None:
        return Unroutable("prompt: expected a prompt, got nothing")
    try:
        return turns(prompt)
    except ValueError as error:
        return Unroutable(str(error))


def _every(files: Sequence[File], column: str, keep: Sequence[str] | None) -> Iterator[_Some]:
    schema: pa.Schema | None = None
    for file in files:
        read = READERS[file.ending.split(".")[1]]
        row = 0
        try:
            for some in read(file, column, keep, schema):
                schema = some.kept.schema if schema is None else schema
                row = some.first + len(some.prompts)
                yield some
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            after = f" after row {row - 1}" if row else ""
            raise ValueError(f"{file.place.shown}: cannot be read{after}: {error}") from error


def _parquet(file: File, column: str, keep: Sequence[str] | None, _: pa.Schema | None) -> Iterator[_Some]:
    with file.place.system.open_input_file(file.place.path) as opened:
        parquet = pq.ParquetFile(opened)
        names = parquet.schema_arrow.names
        wanted = _wanted(file, names, column, keep)
        first = 0
        for batch in parquet.iter_batches(AT_ONCE, columns=[column, *(name for name in wanted if name != column)]):
            table = pa.Table.from_batches([batch])
            read = (first + len(batch)) / parquet.metadata.num_rows
            yield _Some(file, first, _values(table.column(column)), table.select(wanted), read)
            first += len(batch)


def _csv(file: File, column: str, keep: Sequence[str] | None, schema: pa.Schema | None) -> Iterator[_Some]:
    with file.place.system.open_input_file(file.place.path) as opened:
        known = {} if schema is None else {field.name: field.type for field in schema}
        # A prompt is text even where all of a file's look like numbers.
        convert = pa.csv.ConvertOptions(column_types=known | {column: pa.string()}, strings_can_be_null=True)
        parse = pa.csv.ParseOptions(newlines_in_values=True)
        reader = pa.csv.open_csv(opened, parse_options=parse, convert_options=convert)
        wanted = _wanted(file, reader.schema.names, column, keep)
        first = 0
        for batch in reader:
            table = pa.Table.from_batches([batch])
            for start in range(0, len(table), AT_ONCE):
                part = table[start : start + AT_ONCE]
                yield _Some(file, first + start, _values(part.column(column)), part.select(wanted), opened.tell() / file.size)
            first += len(table)


def _jsonl(file: File, column: str, keep: Sequence[str] | None, schema: pa.Schema | None) -> Iterator[_Some]:
    """The kept columns' types are those of the first rows; a line that is no JSON object is a row that cannot be routed."""
    first = 0
    for lines, read in _lines(file):
        rows = [_object(line) for line in lines]
        if schema is None:
            # Columns that come later than the first few rows are none.
            names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
            wanted = _wanted(file, names, column, keep)
            schema = _typed({name: [_of(row, name) for row in rows] for name in wanted}, file)
        columns = [_column(file, first, field, [_of(row, field.name) for row in rows]) for field in schema]
        table = pa.table(columns, schema=schema)
        prompts = [row if isinstance(row, Unroutable) else row.get(column) for row in rows]
        yield _Some(file, first, prompts, table, read)
        first += len(rows)


READERS: dict[str, Callable[[File, str, Sequence[str] | None, pa.Schema | None], Iterator[_Some]]] = {
    "parquet": _parquet,
    "csv": _csv,
    "jsonl": _jsonl,
}


def _lines(file: File) -> Iterator[tuple[list[bytes], float]]:
    """Lines that hold something, a few at a time, and how much of the file was read by then."""
    squeezed = {"gz": "gzip", "zst": "zstd"}.get(file.ending.rsplit(".", 1)[1])
    with file.place.system.open_input_file(file.place.path) as raw:
        opened = pa.CompressedInputStream(raw, squeezed) if squeezed else raw
        rest, lines = b"", []
        while chunk := opened.read(1 << 20):
            *whole, rest = (rest + chunk).split(b"\n") if b"\n" in chunk else (rest + chunk,)
            lines += [line for line in whole if line.strip()]
            while len(lines) >= AT_ONCE:
                yield lines[:AT_ONCE], raw.tell() / file.size
                lines = lines[AT_ONCE:]
        lines += [rest] if rest.strip() else []
        if lines:
            yield lines, 1.0


def _object(line: bytes) -> dict[str, Any] | Unroutable:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Unroutable(f"expected UTF-8 text: {error}")
    except (json.JSONDecodeError, RecursionError) as error:
        return Unroutable(f"expected a line of JSON: {error}")
    return row if isinstance(row, dict) else Unroutable(f"expected a JSON object, got {type(row).__name__}")


def _of(row: dict[str, Any] | Unroutable, name: str) -> Any:
    return row.get(name) if isinstance(row, dict) else None


def _typed(columns: dict[str, list[Any]], file: File) -> pa.Schema:
    fields = []
    for name, values in columns.items():
        try:
            kind = pa.infer_type(values)
        except pa.ArrowException as error:
            raise ValueError(f"{file.place.shown}: column {name!r}: values of different types: {error}") from None
        fields.append(pa.field(name, pa.string() if pa.types.is_null(kind) else kind))
    return pa.schema(fields)


def _column(file: File, first: int, field: pa.Field, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, OverflowError):
        for i, value in enumerate(values):
            try:
                pa.array([value], field.type)
            except (pa.ArrowException, OverflowError):
                raise ValueError(
                    f"{file.place.shown}: row {first + i}: column {field.name!r}: expected {field.type} as in the first rows, "
                    f"got {value!r:.60}"
                ) from None
        raise


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


def _difference(first: pa.Schema, other: pa.Schema) -> str:
    was, now = ({field.name: str(field.type) for field in schema} for schema in (first, other))
    changed = [f"{name} is {now.get(name, 'missing')}, was {was.get(name, 'missing')}" for name in {**was, **now}
               if was.get(name) != now.get(name)]  # fmt: skip
    return f"column {'; '.join(changed)}" if changed else "the columns stand in another order"
