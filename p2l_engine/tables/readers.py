"""Readers of parquet, csv and jsonl files: a few rows at a time, in bounded memory."""

from __future__ import annotations

import csv
import io
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from p2l_engine.tables.jsonl import check_jsonl, read_jsonl
from p2l_engine.tables.rows import AT_ONCE, AT_ONCE_BYTES, Some, Unroutable, text_of, wanted_columns
from p2l_engine.tables.storage import File

LONGEST = 1 << 30  # bytes of a csv file's row
HEADER = 1 << 17  # of its column names
END = "\x1c the end of the file \x1c"  # a line that no file has


def _parquet(file: File, column: str, keep: Sequence[str] | None, _: pa.Schema | None) -> Iterator[Some]:
    with file.place.system.open_input_file(file.place.path) as opened:
        parquet = pq.ParquetFile(opened, pre_buffer=False, buffer_size=1 << 20)  # row groups may be large
        names = parquet.schema_arrow.names
        wanted = wanted_columns(file, names, column, keep)
        columns, first = [column, *(name for name in wanted if name != column)], 0
        for group in range(parquet.num_row_groups):
            about = parquet.metadata.row_group(group)
            at_once = max(1, min(AT_ONCE, AT_ONCE_BYTES * about.num_rows // max(about.total_byte_size, 1)))
            for batch in parquet.iter_batches(at_once, row_groups=[group], columns=columns):
                table = pa.Table.from_batches([batch])
                read = (first + len(batch)) / parquet.metadata.num_rows
                yield Some(file, first, _values(table.column(column)), table.select(wanted), read)
                first += len(batch)


def _csv(file: File, column: str, keep: Sequence[str] | None, _: pa.Schema | None) -> Iterator[Some]:
    """In pieces of a megabyte, as long as no row is longer: then the file is begun again in larger ones, from the row after
    those that were read."""
    piece, done = 1 << 20, 0
    while True:
        try:
            for some in _csv_pieces(file, column, keep, piece):
                end = some.first + len(some.prompts)
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


def _csv_pieces(file: File, column: str, keep: Sequence[str] | None, piece: int) -> Iterator[Some]:
    parse, pieces = pa.csv.ParseOptions(newlines_in_values=True), pa.csv.ReadOptions(block_size=piece)
    names, rows_follow = _header(file)
    wanted = wanted_columns(file, names, column, keep)
    if not rows_follow:  # which Arrow refuses where no line end follows either
        return
    # All is the text that stands there: 007 stays 007, NA is a word, and nothing is what is not even quoted.
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        include_columns=list(dict.fromkeys([column, *wanted])),
        null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False, check_utf8=False,
    )  # fmt: skip
    first = 0
    with text_of(file) as (opened, raw):
        quotes = _Quotes(opened)
        for batch in pa.csv.open_csv(
            pa.PythonFile(quotes, "r"), read_options=pieces, parse_options=parse, convert_options=convert
        ):
            table = pa.Table.from_batches([batch])
            _check_text(file, first, table.select(wanted))  # a prompt that is none has an error of its own
            for start in range(0, len(table), AT_ONCE):
                part = table[start : start + AT_ONCE]
                yield Some(file, first + start, _values(part.column(column)), part.select(wanted), raw.tell() / file.size)
            first += len(table)
    if quotes.odd and (unclosed := _unclosed(file)):
        raise ValueError(f"{file.place.shown}: {unclosed}")


class _Quotes(io.RawIOBase):
    """A stream, and whether an odd number of quotes was read of it: Arrow takes the end of a file for a quote's."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.stream, self.odd = stream, False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.stream.read(size)
        self.odd ^= bool(data.count(b'"') % 2)
        return data


def _check_text(file: File, first: int, kept: pa.Table) -> None:
    try:
        kept.validate(full=True)
    except pa.ArrowInvalid:
        for name in kept.column_names:
            for i, value in enumerate(_values(kept.column(name))):
                if isinstance(value, Unroutable):
                    raise ValueError(
                        f"{file.place.shown}: row {first + i}: column {name!r}: {value.why}; leave the column out with --keep"
                    ) from None
        raise


def _header(file: File) -> tuple[list[str], bool]:
    """Names of columns, and whether anything follows them."""
    with text_of(file) as (opened, _):
        head = opened.read(HEADER)
    rows = filter(None, csv.reader(io.StringIO(head.decode("utf-8-sig", "replace"), newline="")))
    header, following = next(rows, None), next(rows, None)
    if header is None:
        raise pa.ArrowInvalid("expected a line of column names, got nothing")
    if following is None and len(head) == HEADER:
        raise pa.ArrowInvalid(f"expected column names within {HEADER:,} bytes: is a quote not closed?")
    if "\ufffd" in "".join(header):
        raise pa.ArrowInvalid(f"expected column names in UTF-8, got {','.join(header):.300}")
    return header, following is not None


def _ragged(file: File) -> str | None:
    """The first row of a csv file that has not as many values as there are columns; Arrow does not say where it stands."""
    with closing(_values_of_rows(file)) as rows:
        columns = len(next(rows))
        for number, row in enumerate(rows):
            if len(row) != columns:
                return f"row {number}: expected {columns} values, one for each column, got {len(row)}: {','.join(row):.60}"
    return None


def _unclosed(file: File) -> str | None:
    """The last row of a csv file, where its end is within quotes."""
    with closing(_values_of_rows(file, END)) as rows:
        number, last = deque(enumerate(rows, -1), maxlen=1)[0]  # the header's is -1
    return None if last == [END] else f"row {number}: a quote is not closed by the end of the file: {','.join(last):.60}"


def _values_of_rows(file: File, *more: str) -> Generator[list[str], None, None]:
    """Of a csv file's header and rows, and of more lines after them, one by one: slower than Arrow, and of any length."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with text_of(file) as (opened, _), io.TextIOWrapper(opened, "utf-8-sig", errors="replace", newline="") as text:
            yield from filter(None, csv.reader(chain(text, more)))
    finally:
        csv.field_size_limit(limit)


READERS: dict[str, Callable[[File, str, Sequence[str] | None, pa.Schema | None], Iterator[Some]]] = {
    "parquet": _parquet,
    "csv": _csv,
    "jsonl": read_jsonl,
}


def check_columns(file: File, column: str, keep: Sequence[str] | None) -> pa.Schema | None:
    """Reads the head of a file alone: the kept columns' types, where the head tells. Raises ValueError where it lacks a column,
    and what its reader raises."""
    kind = kind_of(file)
    if kind == "jsonl":
        check_jsonl(file, column)
        return None
    if kind == "csv":
        return pa.schema([(name, pa.string()) for name in wanted_columns(file, _header(file)[0], column, keep)])
    with file.place.system.open_input_file(file.place.path) as opened:
        schema = pq.ParquetFile(opened, pre_buffer=False).schema_arrow
    return pa.schema([schema.field(name) for name in wanted_columns(file, schema.names, column, keep)])


def kind_of(file: File) -> str:
    """Parquet, csv or jsonl."""
    return file.ending.split(".")[1]


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
