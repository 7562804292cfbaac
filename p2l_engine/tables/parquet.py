"""Parquet files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from p2l_engine.tables.common_types import as_nullable, common_type, in_unit
from p2l_engine.tables.read_share import Told, untold
from p2l_engine.tables.rows import (
    AT_ONCE,
    AT_ONCE_BYTES,
    BEYOND,
    FINE,
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
from p2l_engine.tables.typed import REMEDY, typed_table

INT96 = "where times are stored as INT96"
NANOSECONDS = InvalidRow(f"expected microseconds {INT96}, beside years before 1678 or after 2261", "got nanoseconds")
YEARS = InvalidRow(f"expected the years 1678 to 2261 {INT96}, beside nanoseconds", "got another")


class FineTimes(NamedTuple):
    """A column of times of which some have nanoseconds: the column in nanoseconds, in which years before 1678 and after 2261
    wrap around; these rows; and the rows that are no microseconds."""

    column: pa.ChunkedArray
    beyond: list[int]
    inexact: list[int]


def schema(file: File, column: str, keep: Sequence[str] | None, told: Told = untold) -> pa.Schema:
    """See ``formats.Reader``. Times that are stored as INT96 are microseconds, or nanoseconds where a file has them and no year
    that these do not hold: such columns are read for it."""
    with _opened(file) as opened:
        found = opened.schema_arrow
        fields = {name: found.field(name) for name in wanted_columns(file, found.names, column, keep)}
        _check_no_intervals(file, opened, fields)
        int96 = sorted(_int96_columns(file, opened).intersection(fields))
        beyond, fine = set[str](), dict[str, pa.DataType]()
        for first, table, times in _tables(file, opened, int96) if int96 else ():
            told(first / opened.metadata.num_rows)
            fine |= {name: each.column.type for name, each in times.items()}
            others = [name for name in int96 if name not in beyond]
            beyond |= {name for name in others if (times[name].beyond if name in times else _beyond(table.column(name)))}
    for name in beyond:
        fields[name] = fields[name].with_metadata({BEYOND: b""})
    for name in fine.keys() - beyond:
        fields[name] = fields[name].with_type(fine[name]).with_metadata({FINE: b""})
    return pa.schema(list(fields.values()))


def rows(file: File, column: str, keep: Sequence[str] | None, schema: pa.Schema) -> Iterator[Rows]:
    """See ``formats.Reader``."""
    with _opened(file) as opened:
        total = opened.metadata.num_rows
        wanted = wanted_columns(file, opened.schema_arrow.names, column, keep) if total else []
        columns = [column, *(name for name in wanted if name != column)]
        for first, table, fine in _tables(file, opened, columns):
            prompts, problems = column_values(table.column(column)), dict[int, str]()
            for name in fine:
                if name in schema.names:
                    table, odd = _of_type(table, name, fine[name], schema.field(name).type)
                    problems |= odd
            yield Rows(file, first, prompts, table.select(wanted), (first + len(table)) / total, problems)


def values(file: File, names: Collection[str]) -> Iterator[ValueRows]:
    """See ``formats.Reader``. A row is invalid where a time is beyond the year 9999, or one has nanoseconds and another a year
    that these do not hold."""
    with _opened(file) as opened:
        found = opened.schema_arrow.names
        columns = [name for name in found if name in names]
        check_names(file, columns)
        yield ValueRows(found, [])
        if not columns:
            yield ValueRows(found, [{}] * opened.metadata.num_rows)
        for first, table, fine in _tables(file, opened, columns) if columns else ():
            check_text(file, range(first, first + len(table)), table)
            dicts = row_dicts(table, columns)
            for name, times in fine.items():
                exact = row_dicts(pa.table({name: times.column}), [name])
                for row in times.inexact:
                    one, other = dicts[row], NANOSECONDS if row in times.beyond else exact[row]
                    if isinstance(one, dict):
                        dicts[row] = one | other if isinstance(other, dict) else other
            yield ValueRows(found, dicts)


def names_of(file: File) -> list[str]:
    """The names of the file's columns."""
    with _opened(file) as opened:
        return list(opened.schema_arrow.names)


def whole(file: File, names: Collection[str]) -> pa.Table:
    """The columns ``names`` that the file has, in memory. Raises ValueError with the row where times of a column are stored as
    INT96, one has nanoseconds, and one is of a year that these do not hold."""
    with _opened(file) as opened:
        found = opened.schema_arrow.names
        columns = [name for name in found if name in names]
        check_names(file, columns)
        table = opened.read(columns)
        int96 = sorted(_int96_columns(file, opened).intersection(table.column_names))
    if int96:
        with _opened(file, "ns") as again:
            exact = again.read(int96)
        for name, times in _fine_times(table, exact).items():
            if times.beyond:
                raise ValueError(f"{file.shown}: row {times.inexact[0]}: column {name!r}: {NANOSECONDS.why}")
            table = table.set_column(table.column_names.index(name), name, times.column)
    return table


@contextmanager
def _opened(file: File, unit: str = "us") -> Iterator[pq.ParquetFile]:
    """unit: of times that are stored as INT96, which is Spark's default: those of Arrow's, ns, end in 2262 and begin again."""
    with file.location.system.open_input_file(file.location.path) as stream:
        yield pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20, coerce_int96_timestamp_unit=unit)


def _tables(file: File, opened: pq.ParquetFile, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table, dict[str, FineTimes]]]:
    """A few rows at a time, the number of the first, and by name the columns whose times are not all microseconds."""
    first, int96 = 0, sorted(_int96_columns(file, opened).intersection(columns))
    with _opened(file, "ns") if int96 else nullcontext() as again:
        for group in range(opened.num_row_groups):
            about = opened.metadata.row_group(group)
            at_once = max(1, min(AT_ONCE, AT_ONCE_BYTES * about.num_rows // max(about.total_byte_size, 1)))
            fine = iter(() if again is None else again.iter_batches(at_once, row_groups=[group], columns=int96))
            for batch in opened.iter_batches(at_once, row_groups=[group], columns=columns):
                table = pa.Table.from_batches([batch])
                yield first, table, _fine_times(table, pa.Table.from_batches([next(fine)])) if int96 else {}
                first += len(batch)


def _int96_columns(file: File, opened: pq.ParquetFile) -> set[str]:
    """The columns with such times, also within lists and objects. Paths of leaves do not tell: names may have dots."""
    if all(opened.schema.column(leaf).physical_type != "INT96" for leaf in range(len(opened.schema.names))):
        return set()
    with _opened(file, "ns") as again:
        pairs = zip(opened.schema_arrow, again.schema_arrow, strict=True)
        return {field.name for field, fine in pairs if not field.type.equals(fine.type)}


def _check_no_intervals(file: File, opened: pq.ParquetFile, names: Collection[str]) -> None:
    """Raises ValueError for a column with intervals, as DuckDB writes them: Arrow takes them for 12 bytes of no meaning."""
    of_file = opened.schema
    for leaf in map(of_file.column, range(len(of_file.names))):
        if leaf.converted_type == "INTERVAL":
            name = max((name for name in opened.schema_arrow.names if f"{leaf.path}.".startswith(f"{name}.")), key=len)
            if name in names:
                raise ValueError(
                    f"{file.shown}: column {name!r}: it has parquet's INTERVAL, whose months, days and milliseconds would be "
                    "read as bytes; leave the column out with --keep, or write it as a number or text"
                )


def _fine_times(coarse: pa.Table, fine: pa.Table) -> dict[str, FineTimes]:
    """The columns whose times in nanoseconds are not those in microseconds: both wrap around alike."""
    found = dict[str, FineTimes]()
    for name in fine.column_names:
        column, exact = coarse.column(name).combine_chunks(), fine.column(name).combine_chunks()
        wrapped = column.cast(exact.type, safe=False)
        if not wrapped.equals(exact):
            inexact = [i for i in range(len(exact)) if not wrapped[i : i + 1].equals(exact[i : i + 1])]
            found[name] = FineTimes(fine.column(name), _beyond(coarse.column(name)), inexact)
    return found


def _beyond(column: pa.ChunkedArray) -> list[int]:
    """The rows with times, in microseconds, that nanoseconds do not hold."""
    return sorted(typed_table(pa.table({"": column}), pa.schema([("", in_unit(column.type, "ns"))]))[1])


def _of_type(table: pa.Table, name: str, times: FineTimes, kind: pa.DataType) -> tuple[pa.Table, dict[int, str]]:
    """The table with a column of times as one that its type can hold; why rows are null in it that this does not."""
    is_fine = common_type(kind, times.column.type) == as_nullable(kind)
    column, odd, why = (times.column, times.beyond, YEARS) if is_fine else (table.column(name), times.inexact, NANOSECONDS)
    left = set(odd)
    column = column.take(pa.array([None if i in left else i for i in range(len(column))], pa.int64()))
    problems = {row: f"column {name!r}: {why.why}{REMEDY}" for row in odd}
    return table.set_column(table.column_names.index(name), name, column), problems
