r"""Quotes of csv files in which a backslash escapes them, as Spark writes them: ``"a \"b\""``, and ``\\`` within quotes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

DOUBLED = '"'  # what standard csv escapes a quote with
BOM = b"\xef\xbb\xbf"
PIECE = 1 << 20  # bytes that are read at once; more where a row is longer
SEEN = rb"\""
REMEDY = (
    r"""it has \" in it: use --csv-escape '\' if a backslash escapes quotes, as Spark writes them, """
    """or --csv-escape '"' if quotes are doubled"""
)


def check_escape(escape: str | None) -> None:
    """Raises ValueError for what cannot escape quotes."""
    if escape is not None and (len(escape) != 1 or not " " < escape < "\x7f" or escape == ","):
        raise ValueError(
            f"csv_escape: expected one character such as '\\', or '\"' for quotes that are doubled, got {escape!r}"
        )


class OddQuotes(NamedTuple):
    """Where quotes are not as expected: the row's number, from 0, without the header; what is wrong; and how the row begins."""

    row: int
    why: str
    text: str

    def __str__(self) -> str:
        place = "the column names" if self.row < 0 else f"row {self.row}"
        return f"{place}: {self.why}: {self.text.splitlines()[0]:.60}"


class Unescaped:
    """The bytes of a csv file with its quotes doubled, as a stream.

    stream: of bytes. Outside quotes a backslash is itself; within them it is, unless a quote or another one follows. Raises
    ValueError in ``read`` where quotes are not as Spark writes them.
    """

    def __init__(self, stream: Any, escape: str, shown: str) -> None:
        self._rows, self._shown, self._escape = _rows(stream, escape), shown, escape.encode()
        self._data, self._at = b"", 0

    def read(self, size: int) -> bytes:
        """So many bytes, fewer at the end."""
        length = len(self._data) - self._at
        if length < size:
            pieces = [self._data[self._at :]]
            while length < size and (row := next(self._rows, None)) is not None:
                if isinstance(row, OddQuotes):
                    raise ValueError(f"{self._shown}: {row}")
                pieces.append(self._doubled(row) if self._escape in row else row)
                length += len(pieces[-1])
            self._data, self._at = b"".join(pieces), 0
        found = self._data[self._at : self._at + size]
        self._at += len(found)
        return found

    def _doubled(self, row: bytes) -> bytes:
        escape = self._escape

        def doubled(cell: re.Match[bytes]) -> bytes:
            text = cell[0]
            if text[:1] != b'"' or escape not in text:
                return text
            return escape.join(part.replace(escape + b'"', b'""') for part in text.split(2 * escape))

        return _patterns(escape.decode()).cell.sub(doubled, row)


def problem_of(stream: Any) -> OddQuotes | None:
    """The first of a file's rows whose quotes standard csv does not have."""
    return next((row for row in _rows(stream, DOUBLED) if isinstance(row, OddQuotes)), None)


class _Patterns(NamedTuple):
    """Of the cells of a row up to its end or the first that is odd; of a cell; of one whose quote is not closed yet."""

    cells: re.Pattern[bytes]
    cell: re.Pattern[bytes]
    begun: re.Pattern[bytes]


@cache
def _patterns(escape: str) -> _Patterns:
    sign = re.escape(escape.encode())
    inner = rb'(?:[^"]++|"")*+' if escape == DOUBLED else rb'(?:[^"%b]++|%b.)*+' % (sign, sign)
    quoted, plain = b'"%b"' % inner, rb'[^",\r\n][^",\r\n]*+'
    cell = rb'(?:%b(?=[,\r\n]|\Z)|%b(?!"))' % (quoted, plain)
    return _Patterns(
        re.compile(rb"(?:%b)?+(?:,(?:%b)?+)*+" % (cell, cell), re.DOTALL),
        re.compile(rb"%b|%b" % (quoted, plain), re.DOTALL),
        re.compile(rb'"%b%b?\Z' % (inner, sign), re.DOTALL),
    )


def _rows(stream: Any, escape: str) -> Iterator[bytes | OddQuotes]:
    """Each row with its line break; the last one may be a problem."""
    patterns = _patterns(escape)
    data, start, number, ended = b"", 0, -1, False  # number: of the header
    while True:
        end = patterns.cells.match(data, start).end()  # type: ignore[union-attr]  # it matches nothing, too
        rest = data[end : end + 2]
        if rest[:1] in (b"\n", b"\r") and (len(rest) == 2 or ended):
            after = end + (2 if rest == b"\r\n" else 1)
            yield data[start:after]
            number += end > start  # an empty line is no row
            start = after
        elif not ended and (end >= len(data) - 1 or patterns.begun.match(data, end)):
            more = stream.read(max(PIECE, len(data) - start))
            data, ended = data[start:] + more, not more
            start = len(BOM) if number < 0 and start == 0 and data.startswith(BOM) else 0
            if start:
                yield BOM
        elif end == len(data):
            if end > start:
                yield data[start:]
            return
        else:
            yield _problem(data, start, end, number, bool(patterns.begun.match(data, end)))
            return


def _problem(data: bytes, start: int, end: int, number: int, is_open: bool) -> OddQuotes:
    text = data[start : start + 200].decode(errors="replace")
    if is_open:
        return OddQuotes(number, "a quote is not closed by the end of the file", text)
    closed = data[end : end + 1] == b'"'
    return OddQuotes(number, "more after a value's closing quote" if closed else "a quote within a value without quotes", text)
