"""Parquet files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pyarrow as pa
import pyarrow.parquet as pq

from p2l_engine.tables.rows import (
    AT_ONCE,
    AT_ONCE_BYTES,
    InvalidRow,
    Rows,
    ValueRows,
    check_names,
    check_text,
    column_values,
    row_dicts,
    wanted_columns,
)
from p2l_engine.tables.storage import File
from p2l_engine.tables.typed import REMEDY

NANOSECONDS = InvalidRow("expected times in microseconds where they are stored as INT96", "got nanoseconds")


def schema(file: File, column: str, keep: Sequence[str] | None) -> pa.Schema:
    """See ``formats.Reader``."""
    with _opened(file) as opened:
        found = opened.schema_arrow
    return pa.schema([found.field(name) for name in wanted_columns(file, found.names, column, keep)])


def rows(file: File, column: str, keep: Sequence[str] | None, _: pa.Schema) -> Iterator[Rows]:
    """See ``formats.Reader``."""
    with _opened(file) as opened:
        total = opened.metadata.num_rows
        wanted = wanted_columns(file, opened.schema_arrow.names, column, keep) if total else []
        columns = [column, *(name for name in wanted if name != column)]
        for first, table, inexact in _tables(file, opened, columns):
            read = (first + len(table)) / total
            problems = {row: f"column {name!r}: {NANOSECONDS.why}{REMEDY}" for name in inexact for row in inexact[name]}
            yield Rows(file, first, column_values(table.column(column)), table.select(wanted), read, problems)


def values(file: File, names: Collection[str]) -> Iterator[ValueRows]:
    """See ``formats.Reader``. A row is invalid where a time is not exact, or beyond the year 9999."""
    with _opened(file) as opened:
        found = opened.schema_arrow.names
        columns = [name for name in found if name in names]
        check_names(file, columns)
        yield ValueRows(found, [])
        if not columns:
            yield ValueRows(found, [{}] * opened.metadata.num_rows)
        for first, table, inexact in _tables(file, opened, columns) if columns else ():
            check_text(file, range(first, first + len(table)), table)
            dicts = row_dicts(table, columns)
            for row in {row for rows in inexact.values() for row in rows}:
                dicts[row] = NANOSECONDS
            yield ValueRows(found, dicts)


def names_of(file: File) -> list[str]:
    """The names of the file's columns."""
    with _opened(file) as opened:
        return list(opened.schema_arrow.names)


def whole(file: File, names: Collection[str]) -> pa.Table:
    """The columns ``names`` that the file has, in memory. Raises ValueError with the row where a time is not exact."""
    with _opened(file) as opened:
        found = opened.schema_arrow.names
        columns = [name for name in found if name in names]
        check_names(file, columns)
        table = opened.read(columns)
        int96 = sorted(_int96_columns(file, opened).intersection(table.column_names))
    if int96:
        with _opened(file, "ns") as again:
            exact = again.read(int96)
        for name in int96:
            for row in _different(table.column(name).combine_chunks(), exact.column(name).combine_chunks()):
                raise ValueError(f"{file.shown}: row {row}: column {name!r}: {NANOSECONDS.why}")
    return table


@contextmanager
def _opened(file: File, unit: str = "us") -> Iterator[pq.ParquetFile]:
    """unit: of times that are stored as INT96, which is Spark's default: those of Arrow's, ns, end in 2262 and begin again."""
    with file.location.system.open_input_file(file.location.path) as stream:
        yield pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20, coerce_int96_timestamp_unit=unit)


def _tables(file: File, opened: pq.ParquetFile, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table, dict[str, list[int]]]]:
    """A few rows at a time, the number of the first, and by column the rows whose times are not exact."""
    first, int96 = 0, sorted(_int96_columns(file, opened).intersection(columns))
    with _opened(file, "ns") if int96 else nullcontext() as again:
        for group in range(opened.num_row_groups):
            about = opened.metadata.row_group(group)
            at_once = max(1, min(AT_ONCE, AT_ONCE_BYTES * about.num_rows // max(about.total_byte_size, 1)))
            fine = iter(() if again is None else again.iter_batches(at_once, row_groups=[group], columns=int96))
            for batch in opened.iter_batches(at_once, row_groups=[group], columns=columns):
                exact = next(fine) if int96 else None
                inexact = {name: _different(batch.column(name), exact.column(name)) for name in int96} if exact else {}
                yield first, pa.Table.from_batches([batch]), inexact
                first += len(batch)


def _int96_columns(file: File, opened: pq.ParquetFile) -> set[str]:
    """The columns with such times, also within lists and objects. Paths of leaves do not tell: names may have dots."""
    if all(opened.schema.column(leaf).physical_type != "INT96" for leaf in range(len(opened.schema.names))):
        return set()
    with _opened(file, "ns") as again:
        pairs = zip(opened.schema_arrow, again.schema_arrow, strict=True)
        return {field.name for field, fine in pairs if not field.type.equals(fine.type)}


def _different(coarse: pa.Array, fine: pa.Array) -> list[int]:
    """The rows whose times in nanoseconds are not those in microseconds: both wrap around alike."""
    wrapped = coarse.cast(fine.type, safe=False)
    return [] if wrapped.equals(fine) else [i for i in range(len(fine)) if not wrapped[i : i + 1].equals(fine[i : i + 1])]
