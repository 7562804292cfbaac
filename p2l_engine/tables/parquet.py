"""Parquet files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from p2l_engine.tables.rows import (
    AT_ONCE,
    AT_ONCE_BYTES,
    Rows,
    ValueRows,
    check_names,
    check_text,
    column_values,
    row_dicts,
    wanted_columns,
)
from p2l_engine.tables.storage import File


def schema(file: File, column: str, keep: Sequence[str] | None) -> pa.Schema:
    """See ``formats.Reader``."""
    with _opened(file) as opened:
        found = opened.schema_arrow
    return pa.schema([found.field(name) for name in wanted_columns(file, found.names, column, keep)])


def rows(file: File, column: str, keep: Sequence[str] | None, _: pa.Schema | None) -> Iterator[Rows]:
    """See ``formats.Reader``."""
    with _opened(file) as opened:
        wanted = wanted_columns(file, opened.schema_arrow.names, column, keep)
        columns, total = [column, *(name for name in wanted if name != column)], opened.metadata.num_rows
        for first, table in _tables(opened, columns):
            read = (first + len(table)) / total
            yield Rows(file, first, column_values(table.column(column)), table.select(wanted), read)


def values(file: File, names: Collection[str]) -> Iterator[ValueRows]:
    """See ``formats.Reader``."""
    with _opened(file) as opened:
        found = opened.schema_arrow.names
        check_names(file, found)
        columns = [name for name in found if name in names]
        yield ValueRows(found, [] if columns else [{}] * opened.metadata.num_rows)
        for first, table in _tables(opened, columns) if columns else ():
            check_text(file, range(first, first + len(table)), table)
            yield ValueRows(found, row_dicts(table, columns))


@contextmanager
def _opened(file: File) -> Iterator[pq.ParquetFile]:
    with file.location.system.open_input_file(file.location.path) as stream:
        yield pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)  # row groups may be large


def _tables(opened: pq.ParquetFile, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """A few rows at a time, and the number of the first."""
    first = 0
    for group in range(opened.num_row_groups):
        about = opened.metadata.row_group(group)
        at_once = max(1, min(AT_ONCE, AT_ONCE_BYTES * about.num_rows // max(about.total_byte_size, 1)))
        for batch in opened.iter_batches(at_once, row_groups=[group], columns=columns):
            yield first, pa.Table.from_batches([batch])
            first += len(batch)
