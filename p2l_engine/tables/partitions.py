"""Hive partitions: columns that are written as names of folders, ``lang=en/``, between what was named and the file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from p2l_engine.tables.rows import InvalidRow, Rows, ValueRows, column_values, listed
from p2l_engine.tables.storage import File, Partitions

if TYPE_CHECKING:
    import pyarrow as pa

NULL = "__HIVE_DEFAULT_PARTITION__"  # as Hive and Spark write it
REMEDY = "--no-partitions of batch leaves the folders' names out, as naming each folder does"


def partitions_of(folders: Iterable[str]) -> Partitions:
    """Names and values of these folders, URL-decoded. Other folders than ``name=value`` say nothing. Raises ValueError for a
    name with two values, and for one that is not UTF-8."""
    found: dict[str, str | None] = {}
    for folder in folders:
        name, sign, value = folder.partition("=")
        if not (name and sign):
            continue
        try:
            name, decoded = unquote(name, errors="strict"), None if value == NULL else unquote(value, errors="strict")
        except UnicodeDecodeError as error:
            raise ValueError(f"the folder {folder}: expected UTF-8 after %-decoding: {error}; {REMEDY}") from None
        if found.setdefault(name, decoded) != decoded:
            raise ValueError(f"the folder {folder}: expected one value of {name}, got {found[name]} above it; {REMEDY}")
    return tuple(found.items())


def check_partitions(files: Sequence[File], keep: Sequence[str] | None) -> None:
    """Raises ValueError where files have other partitions than the first, among those that are kept (None: all)."""
    for file in files:
        first, here = ({name for name, _ in _kept(each, keep)} for each in (files[0], file))
        if here != first:
            raise ValueError(
                f"{file.shown}: expected the partitions of {files[0].shown}, {listed(sorted(first))}; "
                f"got {listed(sorted(here))}; {REMEDY}"
            )


def with_fields(file: File, schema: pa.Schema, column: str, keep: Sequence[str] | None) -> pa.Schema:
    """The kept columns' types with those of the partitions that are no columns of the file: null, for text or what another
    file's column of that name has."""
    import pyarrow as pa

    for name, _ in _kept(file, keep):
        if name not in (column, *schema.names):
            schema = schema.append(pa.field(name, pa.null()))
    return schema


def with_columns(rows: Rows, column: str, keep: Sequence[str] | None) -> Rows:
    """The rows, whose kept columns have their types, with the folder's value where a partition's column is null; as text where
    there is none. Raises ValueError with the row where it says otherwise than the folder, and where its type does not hold the
    folder's value."""
    file, kept = rows.file, rows.kept
    for name, value in _kept(file, keep):
        if name not in (column, *kept.column_names):
            kept = kept.append_column(name, _text_of_nulls(len(kept)))
        found = None if name == column else kept.column(name)
        if found is None or found.null_count < len(found):
            cells = rows.prompts if found is None else column_values(found)
            valid = (i for i, prompt in enumerate(rows.prompts) if not isinstance(prompt, InvalidRow))
            _check_agrees(file, name, value, ((rows.first + i, cells[i]) for i in valid))
        if found is not None and found.null_count and value is not None:
            kept = kept.set_column(kept.column_names.index(name), name, _filled(file, name, found, value))
    return rows._replace(kept=kept)


def with_values(file: File, first: int, rows: ValueRows, names: Collection[str]) -> ValueRows:
    """The same for rows as Python values. first: the number of the first; names: the columns that are wanted."""
    if not (file.partitions and rows.names):  # jsonl has no names before its first object
        return rows
    wanted = {name: value for name, value in file.partitions if name in names}
    dicts = [(first + i, row) for i, row in enumerate(rows.rows) if isinstance(row, dict)]
    for name, value in wanted.items():
        _check_agrees(file, name, value, ((number, row[name]) for number, row in dicts if name in row))
    found = [_with_nulls_filled(row, wanted) if isinstance(row, dict) else row for row in rows.rows]
    return ValueRows([*rows.names, *(name for name, _ in file.partitions if name not in rows.names)], found)


def _text_of_nulls(rows: int) -> pa.Array:
    import pyarrow as pa

    return pa.nulls(rows, pa.string())


def _filled(file: File, name: str, column: pa.ChunkedArray, value: str) -> pa.ChunkedArray:
    """The column with the folder's value for nulls."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        filled = pc.fill_null(column, pa.scalar(value).cast(column.type))
    except pa.ArrowException:
        filled = None
    if filled is None or not _agrees(filled[column.is_null().index(True).as_py()].as_py(), value):
        raise ValueError(f"{file.shown}: column {name!r} is {column.type}, its folder says {value!r}; {REMEDY}")
    return filled


def _with_nulls_filled(row: dict[str, Any], folders: Mapping[str, str | None]) -> dict[str, Any]:
    return row | {name: value for name, value in folders.items() if row.get(name) is None}


def _check_agrees(file: File, name: str, value: str | None, cells: Iterable[tuple[int, Any]]) -> None:
    for row, cell in cells:
        if not _agrees(cell, value):
            raise ValueError(
                f"{file.shown}: row {row}: column {name!r}: expected {value!r}, as its folder says, got {cell!r:.60}; {REMEDY}"
            )


def _kept(file: File, keep: Sequence[str] | None) -> Iterator[tuple[str, str | None]]:
    return ((name, value) for name, value in file.partitions if keep is None or name in keep)


def _agrees(cell: Any, value: str | None) -> bool:
    """Whether a column's value is the folder's: 7 is 07, and true is True."""
    if cell is None or value is None:
        return cell is None
    if isinstance(cell, bool):
        return value.lower() == str(cell).lower()
    if isinstance(cell, int | float | Decimal):
        try:
            return bool(cell == type(cell)(value))
        except (ValueError, ArithmeticError):
            return False
    return str(cell) == value
