"""CSV files. All cells are text: 007 stays 007 and NA is a word; an empty cell is null, unless it is quoted."""

from __future__ import annotations

import csv
import io
import re
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.csv

from p2l_engine.tables.quotes import DOUBLED, REMEDY, SEEN, Unescaped, problem_of
from p2l_engine.tables.read_share import Told, untold
from p2l_engine.tables.rows import (
    AT_ONCE,
    EmptyFileError,
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

PIECE, LONGEST = 1 << 20, 1 << 30  # bytes that are parsed together; of the longest row
HEADER = 1 << 17  # bytes of the column names
UNTOLD = re.compile(r"CSV parse error: Row #(\d+): Expected (\d+) columns, got (\d+)")  # rows whose text Arrow cannot hand on
END = "\x1c the end of the file \x1c"  # a cell that no file has


def schema(file: File, column: str, keep: Sequence[str] | None, _: Told = untold) -> pa.Schema:
    """See ``formats.Reader``."""
    return pa.schema([(name, pa.string()) for name in wanted_columns(file, _header(file), column, keep)])


def rows(file: File, column: str, keep: Sequence[str] | None, _: pa.Schema) -> Iterator[Rows]:
    """See ``formats.Reader``. A row of too many or too few cells is an ``InvalidRow`` without values; but a ValueError if a
    quote may be to blame: then the rows after it cannot be trusted either."""
    names = _header(file)
    wanted = wanted_columns(file, names, column, keep)
    read_ones = {column, *wanted}
    parser = _Parser(file, names, [name for name in names if name in read_ones])
    for first, chunk, table, read in parser.chunks():
        kept = table.select(wanted)
        cells = column_values(table.column(column))
        prompts = [cells[row] if isinstance(row, int) else row for row in chunk]
        if len(table) < len(chunk):
            kept = kept.take(pa.array([row if isinstance(row, int) else None for row in chunk], pa.int64()))
        for start in range(0, len(chunk), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            yield Rows(file, first + start, prompts[part], kept[part], read)


def values(file: File, names: Collection[str]) -> Iterator[ValueRows]:
    """See ``formats.Reader``. Invalid are the rows that ``rows`` says."""
    found = _header(file)
    wanted = [name for name in found if name in names]
    check_names(file, wanted)
    yield ValueRows(found, [])
    for first, chunk, table, _ in _Parser(file, found, wanted or found).chunks():
        check_text(file, [first + i for i, row in enumerate(chunk) if isinstance(row, int)], table)
        dicts = row_dicts(table, names)
        yield ValueRows(found, [dicts[row] if isinstance(row, int) else row for row in chunk])


@contextmanager
def _text(file: File) -> Iterator[tuple[Any, Any]]:
    """As ``File.text``, with quotes doubled."""
    with file.text() as (opened, raw):
        standard = file.csv_escape in (None, DOUBLED)
        yield opened if standard else Unescaped(opened, str(file.csv_escape), file.shown), raw


def _header(file: File) -> list[str]:
    """The names of the columns. Raises EmptyFileError, and ArrowInvalid for names that cannot be read."""
    with _text(file) as (opened, _):
        head = opened.read(HEADER)
    lines = filter(None, csv.reader(io.StringIO(head.decode("utf-8-sig", "replace"), newline="")))
    header, following = next(lines, None), next(lines, None)
    if header is None:
        raise EmptyFileError(f"{file.shown}: cannot be read: expected a line of column names, got nothing")
    if following is None and len(head) < HEADER and head.count(b'"') % 2:
        raise pa.ArrowInvalid("a quote in the column names is not closed by the end of the file")
    if following is None and len(head) == HEADER:
        raise pa.ArrowInvalid(f"expected column names within {HEADER:,} bytes: is a quote not closed?")
    if "\ufffd" in "".join(header):
        raise pa.ArrowInvalid(f"expected column names in UTF-8, got {','.join(header):.300}; write the file in UTF-8")
    return header


@dataclass(slots=True)
class _Parser:
    """Arrow's parser over a file, with row numbers. columns: those to convert, in the file's order. row: the number of the next
    row to return; invalid: rows of too many or too few cells from there on, by number; skipped: how many were found."""

    file: File
    names: Sequence[str]
    columns: Sequence[str]
    row: int = 0
    invalid: dict[int, InvalidRow] = field(default_factory=dict)
    skipped: int = 0
    problem: str | None = None
    remedy: str = ""  # where quotes may be escaped otherwise

    def chunks(self) -> Iterator[tuple[int, list[int | InvalidRow], pa.Table, float]]:
        """Consecutive rows: the number of the first; each row's index in the table that follows, or why it is invalid; how much
        of the file was read."""
        for table, read in self._tables():
            first, chunk = self.row, self._invalid_ones()
            for index in range(len(table)):
                self.row += 1
                chunk += [index, *self._invalid_ones()]
            if chunk:
                yield first, chunk, table, read

    def _invalid_ones(self) -> list[int | InvalidRow]:
        """Those that come next."""
        found = list[int | InvalidRow]()
        while self.row in self.invalid:
            found.append(self.invalid.pop(self.row))
            self.row += 1
        return found

    def _tables(self) -> Iterator[tuple[pa.Table, float]]:
        """Valid rows, and how much of the file was read. Begins with pieces of a megabyte; where a row is longer, the file is
        read again in larger pieces, from the row after those that were returned."""
        piece, done = PIECE, 0
        while True:
            try:
                for first, table, read in self._parsed(piece):
                    yield table[max(0, done - first) :], read
                    done = max(done, first + len(table))
                return
            except pa.ArrowInvalid as error:
                if self.problem is not None:
                    raise ValueError(f"{self.file.shown}: {self.problem}") from None
                if odd := UNTOLD.search(str(error)):
                    number, expected, got = map(int, odd.groups())
                    raise ValueError(
                        f"{self.file.shown}: row {number - 2}: expected {expected} values, one for each column, got {got}, "
                        "in text that is not UTF-8; write the file in UTF-8 (or is a quote not closed?)"
                    ) from None
                if "straddling" not in str(error):
                    raise
                if piece >= LONGEST:
                    raise ValueError(
                        f"{self.file.shown}: a row after row {self.row - 1} is longer than 1 GiB: is a quote not closed?"
                    ) from None
                piece = min(8 * piece, LONGEST)

    def _parsed(self, piece: int) -> Iterator[tuple[int, pa.Table, float]]:
        convert = pa.csv.ConvertOptions(
            column_types=dict.fromkeys(self.names, pa.string()), include_columns=list(self.columns), null_values=[""],
            strings_can_be_null=True, quoted_strings_can_be_null=False, check_utf8=False,
        )  # fmt: skip
        with _text(self.file) as (opened, raw):
            watch = self._check_quotes if self.file.csv_escape is None else None
            stream = _WithLastLine(opened, f"\n{','.join([END] * len(self.names))}\n", watch)
            handle, released, batches = _Handle(stream.read), threading.Event(), None
            weakref.finalize(handle, released.set)
            try:
                batches = pa.csv.open_csv(
                    pa.PythonFile(handle, "r"),
                    read_options=pa.csv.ReadOptions(block_size=piece, use_threads=False),  # with threads, rows have no numbers
                    parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=self._on_invalid),
                    convert_options=convert,
                )
                first, text, self.skipped = 0, "", 0
                for batch in batches:
                    table = pa.Table.from_batches([batch])
                    last = [value for column in table[-1:].columns for value in column_values(column) if isinstance(value, str)]
                    text, ended = ",".join(last), last[:1] == [END]
                    table = table[:-1] if ended else table
                    if ended or END not in text:
                        yield first, table, self.file.share(raw)
                    first += len(table)
                    if ended:
                        return
            finally:
                stream.stopped = True
                del handle, batches
                released.wait()  # Arrow reads ahead in a thread: if Python ended meanwhile, the process would abort
        raise ValueError(f"{self.file.shown}: {_unclosed(first + self.skipped - 1, text.partition(END)[0])}")

    def _check_quotes(self) -> None:
        """For a file with \\" in it."""
        if not self.remedy:
            with self.file.text() as (opened, _):
                found = problem_of(opened)
            if found:
                raise ValueError(f"{self.file.shown}: {found}; {REMEDY}")
            self.remedy = f"; {REMEDY}"

    def _on_invalid(self, row: Any) -> str:
        number = row.number - 2  # counted from 1, the header included
        if END in row.text:
            self.problem = _unclosed(number, _cells(row.text.partition(END)[0]))
        elif row.text.count('"') % 2 or ('"' in row.text and "\n" in row.text):
            self.problem = f"row {number}: {_expected(row)}; is a quote not closed? {row.text:.60}{self.remedy}"
        else:
            detail = f"expected {row.expected_columns}, got {row.actual_columns}"
            self.skipped += 1
            if number >= self.row:  # else it was returned before the file was read again
                self.invalid[number] = InvalidRow("expected a value for each column", detail, row.text[:60])
            return "skip"
        return "error"


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Handle:
    """A stream, as Arrow holds it until it reads no more. An error in ``read`` keeps the frames of ``read``, but not this."""

    read: Callable[[int], bytes]
    closed: bool = False

    def close(self) -> None:
        self.closed = True


class _WithLastLine:
    """A stream, and then one more line: where Arrow does not find it as a row, the file ends within quotes. watch: called where
    there may be escaped quotes.

    No piece ends between "\\r" and "\\n": Arrow skips the line feed at the beginning of the next piece, also within quotes,
    where it belongs to the value.
    """

    def __init__(self, stream: Any, line: str, watch: Callable[[], None] | None = None) -> None:
        self.stream, self.line, self.held, self.watch = stream, line.encode(), b"", watch
        self.last = b""
        self.stopped = False  # nothing more is needed

    def read(self, size: int) -> bytes:
        if self.stopped:
            return b""
        data = bytearray(self.held)
        while len(data) < size and (more := self.stream.read(size - len(data))):
            data += more
            if self.watch is not None and (SEEN in more or self.last + more[:1] == SEEN):
                self.watch()
            self.last = more[-1:]
        rest = size - len(data)  # only at the end of the file; in the same piece, as Arrow needs a row beside the header
        data += self.line[:rest]
        self.line = self.line[rest:]
        self.held = b"\r" if data.endswith(b"\r") else b""  # never the end: the last line has none
        return bytes(data[:-1] if self.held else data)


def _unclosed(number: int, text: str) -> str:
    return f"row {number}: a quote is not closed by the end of the file: {text.rstrip():.60}"


def _expected(row: Any) -> str:
    return f"expected {row.expected_columns} values, one for each column, got {row.actual_columns}"


def _cells(text: str) -> str:
    """How a row begins, without its quotes."""
    return ",".join(next(csv.reader(io.StringIO(text[:1000], newline="")), []))
