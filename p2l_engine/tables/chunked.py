"""All rows of several files in order, in bounded memory, with the same typed columns from each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from p2l_engine.tables.formats import FORMATS, Reader, kind_of
from p2l_engine.tables.partitions import check_partitions, with_columns, with_fields
from p2l_engine.tables.rows import Rows, readable, unreadable, unreadable_error
from p2l_engine.tables.storage import File

if TYPE_CHECKING:
    import pyarrow as pa

AT_THE_SAME_TIME = 8  # files whose heads are read


def reader_of(file: File) -> Reader:
    """The reader of the file's format."""
    return FORMATS[kind_of(file.location.path)].reader


def read_rows(files: Sequence[File], column: str, keep: Sequence[str] | None = None) -> Iterator[Rows]:
    """column: the prompts'; keep: other columns (None: all). Raises ValueError with file and row where a file cannot be read,
    lacks a column, or has columns of other types than the first file."""
    schema: pa.Schema | None = None
    typed: pa.Schema | None = None  # without columns that are partitions alone
    for file in files:
        last = None
        try:
            for read in reader_of(file).rows(file, column, keep, typed):
                typed = read.kept.schema if typed is None else typed
                rows = with_columns(read, column, keep)
                schema = rows.kept.schema if schema is None else schema
                _check_same(file, schema, rows.kept.schema)
                last = rows.first + len(rows.prompts) - 1
                yield rows
        except unreadable() as error:
            raise unreadable_error(file, error, last) from error


def check_files(files: Sequence[File], column: str, keep: Sequence[str] | None = None) -> None:
    """Reads the head of every file, before hours are spent on the first ones. Raises ValueError where one cannot be read,
    lacks a column, or has other columns than the first."""

    check_partitions(files, keep)

    def check(file: File) -> pa.Schema | None:
        with readable(file):
            schema = reader_of(file).schema(file, column, keep)
        return None if schema is None else with_fields(file, schema, column, keep)

    first: pa.Schema | None = None
    with ThreadPoolExecutor(AT_THE_SAME_TIME) as pool:  # stores answer slowly
        for file, schema in zip(files, pool.map(check, files), strict=True):
            first = schema if first is None else first
            _check_same(file, first, schema)


def _check_same(file: File, first: pa.Schema | None, schema: pa.Schema | None) -> None:
    if first is not None and schema is not None and not schema.equals(first):
        raise ValueError(f"{file.shown}: {_difference(first, schema)}: expected those of the first file")


def _difference(first: pa.Schema, other: pa.Schema) -> str:
    was, now = ({field.name: str(field.type) for field in schema} for schema in (first, other))
    changed = [f"{name} is {now.get(name, 'missing')}, was {was.get(name, 'missing')}" for name in {**was, **now}
               if was.get(name) != now.get(name)]  # fmt: skip
    return f"column {'; '.join(changed)}" if changed else "the columns are in another order"
