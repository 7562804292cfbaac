"""CSV files. All cells are text: 007 stays 007 and NA is a word; an empty cell is null, unless it is quoted."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.csv

from p2l_engine.tables.rows import (
    AT_ONCE,
    InvalidRow,
    Rows,
    Values,
    check_names,
    check_text,
    column_values,
    row_dicts,
    wanted_columns,
)
from p2l_engine.tables.storage import File

PIECE, LONGEST = 1 << 20, 1 << 30  # bytes that are parsed together; of the longest row
HEADER = 1 << 17  # bytes of the column names
END = "\x1c the end of the file \x1c"  # a cell that no file has


def schema(file: File, column: str, keep: Sequence[str] | None) -> pa.Schema:
    """See ``formats.Reader``."""
    return pa.schema([(name, pa.string()) for name in wanted_columns(file, _header(file), column, keep)])


def rows(file: File, column: str, keep: Sequence[str] | None, _: pa.Schema | None) -> Iterator[Rows]:
    """See ``formats.Reader``. A row of too many or too few cells is a ValueError."""
    names = _header(file)
    wanted = wanted_columns(file, names, column, keep)
    parser = _Parser(file, names, [name for name in names if name in {column, *wanted}])
    for first, table, read in parser.tables():
        kept = table.select(wanted)
        check_text(
            file, range(first, first + len(kept)), kept, "; leave the column out with --keep"
        )  # an invalid prompt is an error of its row
        for start in range(0, len(table), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            yield Rows(file, first + start, column_values(table[part].column(column)), kept[part], read)


def values(file: File, names: Collection[str]) -> Iterator[Values]:
    """See ``formats.Reader``. Rows of too many or too few cells are invalid; but a ValueError if a quote may be to blame:
    then the rows after it cannot be trusted either."""
    found = _header(file)
    check_names(file, found)
    yield Values(found, [])
    parser, row = _Parser(file, found, found, skip=True), 0
    for _, table, _read in parser.tables():
        start, numbers = row, list[int]()
        for _row in range(len(table)):
            while row in parser.invalid:
                row += 1
            numbers.append(row)
            row += 1
        check_text(file, numbers, table)
        valid = dict(zip(numbers, row_dicts(table, names), strict=True))
        yield Values(found, [valid[n] if n in valid else parser.invalid[n] for n in range(start, row)])
    yield Values(found, [parser.invalid[n] for n in sorted(parser.invalid) if n >= row])


def _header(file: File) -> list[str]:
    """The names of the columns."""
    with file.text() as (opened, _):
        head = opened.read(HEADER)
    lines = filter(None, csv.reader(io.StringIO(head.decode("utf-8-sig", "replace"), newline="")))
    header, following = next(lines, None), next(lines, None)
    if header is None:
        raise pa.ArrowInvalid("expected a line of column names, got nothing")
    if following is None and len(head) == HEADER:
        raise pa.ArrowInvalid(f"expected column names within {HEADER:,} bytes: is a quote not closed?")
    if "\ufffd" in "".join(header):
        raise pa.ArrowInvalid(f"expected column names in UTF-8, got {','.join(header):.300}")
    return header


@dataclass(slots=True)
class _Parser:
    """Arrow's parser over a file, with row numbers. columns: those to convert, in the file's order. skip: rows of too many or
    too few cells go to ``invalid`` by number; else they are a ValueError."""

    file: File
    names: Sequence[str]
    columns: Sequence[str]
    skip: bool = False
    invalid: dict[int, InvalidRow] = field(default_factory=dict)
    problem: str | None = None

    def tables(self) -> Iterator[tuple[int, pa.Table, float]]:
        """Valid rows, the index of the first among them, and how much of the file was read. Begins with pieces of a megabyte;
        where a row is longer, the file is read again in larger pieces, from the row after those that were returned."""
        piece, done = PIECE, 0
        while True:
            try:
                for first, table, read in self._tables(piece):
                    if first + len(table) > done:
                        skip = max(0, done - first)
                        done = first + len(table)
                        yield first + skip, table[skip:], read
                return
            except pa.ArrowInvalid as error:
                if self.problem is not None:
                    raise ValueError(f"{self.file.shown}: {self.problem}") from None
                if "straddling" not in str(error):
                    raise
                if piece >= LONGEST:
                    raise ValueError(
                        f"{self.file.shown}: a row after row {done - 1} is longer than 1 GiB: is a quote not closed?"
                    ) from None
                piece = min(8 * piece, LONGEST)

    def _tables(self, piece: int) -> Iterator[tuple[int, pa.Table, float]]:
        convert = pa.csv.ConvertOptions(
            column_types=dict.fromkeys(self.names, pa.string()), include_columns=list(self.columns), null_values=[""],
            strings_can_be_null=True, quoted_strings_can_be_null=False, check_utf8=False,
        )  # fmt: skip
        with self.file.text() as (opened, raw):
            stream = _WithLastLine(opened, f"\n{','.join([END] * len(self.names))}\n")
            batches = pa.csv.open_csv(
                pa.PythonFile(stream, "r"),
                read_options=pa.csv.ReadOptions(block_size=piece, use_threads=False),  # with threads, rows have no numbers
                parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=self._on_invalid),
                convert_options=convert,
            )
            first, text = 0, ""
            for batch in batches:
                table = pa.Table.from_batches([batch])
                last = [value for column in table[-1:].columns for value in column_values(column) if isinstance(value, str)]
                text, ended = ",".join(last), last[:1] == [END]
                table = table[:-1] if ended else table
                if len(table) and (ended or END not in text):
                    yield first, table, self.file.share(raw)
                first += len(table)
                if ended:
                    return
        raise ValueError(f"{self.file.shown}: {_unclosed(first + len(self.invalid) - 1, text.partition(END)[0])}")

    def _on_invalid(self, row: Any) -> str:
        number = row.number - 2  # counted from 1, the header included
        if END in row.text:
            self.problem = _unclosed(number, _cells(row.text.partition(END)[0]))
        elif not self.skip:
            self.problem = f"row {number}: {_expected(row)}: {_cells(row.text):.60}"
        elif row.text.count('"') % 2 or ('"' in row.text and "\n" in row.text):
            self.problem = f"row {number}: {_expected(row)}; is a quote not closed? {row.text:.60}"
        else:
            detail = f"expected {row.expected_columns}, got {row.actual_columns}"
            self.invalid[number] = InvalidRow("expected a value for each column", detail, row.text[:60])
            return "skip"
        return "error"


class _WithLastLine(io.RawIOBase):
    """A stream, and then one more line: where Arrow does not find it as a row, the file ends within quotes."""

    def __init__(self, stream: Any, line: str) -> None:
        self.stream, self.line = stream, line.encode()

    def readable(self) -> bool:
        return True

    def read(self, size: int) -> bytes:  # type: ignore[override]
        data = bytearray()
        while len(data) < size and (more := self.stream.read(size - len(data))):
            data += more
        rest = size - len(data)  # only at the end of the file; in the same piece, as Arrow needs a row beside the header
        data += self.line[:rest]
        self.line = self.line[rest:]
        return bytes(data)


def _unclosed(number: int, text: str) -> str:
    return f"row {number}: a quote is not closed by the end of the file: {text.rstrip():.60}"


def _expected(row: Any) -> str:
    return f"expected {row.expected_columns} values, one for each column, got {row.actual_columns}"


def _cells(text: str) -> str:
    """How a row begins, without its quotes."""
    return ",".join(next(csv.reader(io.StringIO(text[:1000], newline="")), []))
