"""A few rows of a file, and checks that the readers of all formats share."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from p2l_engine.tables.storage import File

if TYPE_CHECKING:
    import pyarrow as pa

BEYOND, FINE = b"beyond", b"fine"  # metadata of a column of INT96: has years that nanoseconds do not hold; has nanoseconds
MIXED = b"mixed"  # metadata of a file's schema: the places in its columns with values of several kinds
AT_ONCE, AT_ONCE_BYTES = 512, 8 << 20  # rows that are read together, fewer where they are longer


class EmptyFileError(ValueError):
    """A file holds nothing where its format has a header."""


class InvalidRow(NamedTuple):
    """A row (or a prompt's cell) that cannot be read: why, by a reason that other rows may share; and how the row begins."""

    reason: str
    detail: str = ""
    text: str = ""

    @property
    def why(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Rows(NamedTuple):
    """Consecutive rows of one file: the number of the first (from 0, a header not counted), the prompts' cells (or an
    ``InvalidRow`` each), the kept columns, how much of the file was read, 0 to 1, and why cells of kept columns cannot be
    stored, by their rows' places in ``prompts``: these cells are null."""

    file: File
    first: int
    prompts: list[Any]
    kept: pa.Table
    read: float
    problems: Mapping[int, str] = MappingProxyType({})


class ValueRows(NamedTuple):
    """Consecutive rows as Python values: the names of the file's columns as far as they are known, and each row: a dict by
    column, an ``InvalidRow``, or (jsonl only) another JSON value."""

    names: Sequence[str]
    rows: list[Any]


@contextmanager
def readable(file: File, row: int | None = None) -> Iterator[None]:
    """Turns the exceptions of files that are damaged, or not of the format that their ending says, into a ValueError. row: the
    last one read."""
    try:
        yield
    except unreadable() as error:
        raise unreadable_error(file, error, row) from error


def unreadable() -> tuple[type[Exception], ...]:
    """The exceptions that libraries raise for files that cannot be read."""
    arrow = sys.modules.get("pyarrow")  # where it was not imported, nothing raises its exceptions
    return (OSError, OverflowError, UnicodeDecodeError, *((arrow.ArrowException,) if arrow else ()))


def unreadable_error(file: File, error: Exception, row: int | None = None) -> ValueError:
    after = "" if row is None else f" after row {row}"
    remedy = "; Arrow does not know this type: write the column as another" if "not implemented" in str(error) else ""
    return ValueError(f"{file.shown}: cannot be read{after}: {error}{remedy}")


def wanted_columns(file: File, names: Sequence[str], column: str, keep: Sequence[str] | None) -> list[str]:
    """The kept columns (None: all but ``column``), as far as the file has them. Raises ValueError if ``column`` is missing, or
    two of these have the same name."""
    there, wanted = set(names), {column, *(keep or ())}
    check_names(file, [name for name in names if keep is None or name in wanted])
    if column not in there:
        raise ValueError(missing_columns(file.shown, [column], names))
    return [name for name in names if name != column] if keep is None else [name for name in keep if name in there]


def missing_columns(shown: str, wanted: Sequence[str], names: Sequence[str]) -> str:
    """What to say of a file with the columns ``names``. shown: its name."""
    sign = next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None)
    remedy = "" if sign is None else f"; if its values are separated by {sign!r}, write them with commas"
    return f"{shown}: expected the columns {listed(wanted)}; it has {listed(names)}{remedy}"


def check_names(file: File, names: Sequence[str]) -> None:
    """Raises ValueError if two columns have the same name."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"{file.shown}: expected columns of different names, got {listed(twice)} twice")


def listed(names: Sequence[str]) -> str:
    text = ", ".join(name or "''" for name in names) or "none"
    return text if len(text) < 1000 else f"{text[:1000]} ..."


def column_values(column: pa.ChunkedArray) -> list[Any]:
    """Python values; an ``InvalidRow`` for text that is not UTF-8, and for times beyond the year 9999."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return InvalidRow("expected UTF-8 text", str(error))
    except (ValueError, OverflowError) as error:
        return InvalidRow("expected a value that Python can hold", str(error))


def row_dicts(table: pa.Table, names: Collection[str]) -> list[dict[str, Any] | InvalidRow]:
    """A dict for each row, of those columns of ``names`` that there are; an ``InvalidRow`` where a value is one."""
    columns = {name: column_values(table.column(name)) for name in table.column_names if name in names}
    if not columns:
        return [{} for _ in range(len(table))]
    rows = zip(*columns.values(), strict=True)
    dicts: list[dict[str, Any] | InvalidRow] = [dict(zip(columns, row, strict=True)) for row in rows]
    for values in columns.values():
        if InvalidRow in set(map(type, values)):
            dicts = [value if isinstance(value, InvalidRow) else each for value, each in zip(values, dicts, strict=True)]
    return dicts


def check_text(file: File, numbers: Sequence[int], table: pa.Table) -> None:
    """Raises ValueError where a text is not UTF-8. numbers: of the table's rows."""
    from pyarrow import ArrowInvalid

    try:
        table.validate(full=True)
    except ArrowInvalid:
        for name in table.column_names:
            for number, value in zip(numbers, column_values(table.column(name)), strict=True):
                if isinstance(value, InvalidRow):
                    raise ValueError(f"{file.shown}: row {number}: column {name!r}: {value.why}") from None
        raise
