"""All rows of several files in order, in bounded memory, with the same typed columns from each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from p2l_engine.tables.formats import FORMATS, Reader, kind_of
from p2l_engine.tables.partitions import check_partitions, with_columns, with_fields
from p2l_engine.tables.read_share import ReadShare, Told, untold
from p2l_engine.tables.rows import BEYOND, FINE, MIXED, EmptyFileError, Rows, listed, readable, unreadable, unreadable_error
from p2l_engine.tables.storage import File

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

AT_THE_SAME_TIME = 8  # files whose heads are read
LARGE = 1 << 30  # bytes of files that take long to be read


def reader_of(file: File) -> Reader:
    """The reader of the file's format."""
    return FORMATS[kind_of(file.location.path)].reader


def read_rows(
    files: Sequence[File], column: str, keep: Sequence[str] | None = None, schema: pa.Schema | None = None
) -> Iterator[Rows]:
    """column: the prompts'; keep: other columns (None: all); schema: what ``kept_schema`` returned for these (None: it is
    called). Raises ValueError with file and row where a file cannot be read, or lacks the column of prompts."""
    from p2l_engine.tables.typed import typed_table

    schema = kept_schema(files, column, keep) if schema is None else schema
    for file in files:
        last = None
        try:
            for rows in reader_of(file).rows(file, column, keep, schema):
                kept, problems = typed_table(rows.kept, schema)
                problems |= rows.problems
                last = rows.first + len(rows.prompts) - 1
                yield with_columns(rows._replace(kept=kept, problems=dict(sorted(problems.items()))), column, keep)
        except unreadable() as error:
            raise unreadable_error(file, error, last) from error
        except ValueError:
            if last is not None or has_rows(file):  # else it may lack columns
                raise


def kept_schema(files: Sequence[File], column: str, keep: Sequence[str] | None = None, told: Told = untold) -> pa.Schema:
    """The columns that are kept of all files, with types that hold every value of each: found before hours are spent on the
    first file. A column that a file lacks is null in its rows; files without rows have no say.

    Reads the heads of parquet and csv files, and all rows of jsonl files. told: called with how much was read. Raises
    ValueError where a file cannot be read or lacks the column of prompts, where no file has a column of ``keep``, or where a
    column's types have none in common.
    """

    check_partitions(files, keep)
    large = sum(file.size for file in files if kind_of(file.location.path) == "jsonl")
    if large > LARGE and keep != []:
        logger.warning("%.1f GB of jsonl are read for the types of the kept columns; --keep '' leaves that out", large / 1e9)

    share = ReadShare(files)

    def head(file: File) -> pa.Schema | ValueError | None:
        try:
            with readable(file):
                schema = reader_of(file).schema(file, column, keep, lambda read: told(share.after(file, read)))
            told(share.after(file, 1.0))
            return None if schema is None else with_fields(file, schema, column, keep)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(AT_THE_SAME_TIME) as pool:  # stores answer slowly
        found = list(zip(files, pool.map(head, files), strict=True))
    errors = [(file, error) for file, error in found if isinstance(error, ValueError)]
    heads = [(file, schema) for file, schema in found if schema is not None and not isinstance(schema, ValueError)]
    for file, error in errors:
        if len(errors) == len(found) or has_rows(file):
            raise error
    _say_skipped([file for file, _ in errors])
    try:
        return _common(heads, column, keep)
    except ValueError:
        filled = [has_rows(file) for file, _ in heads]
        if all(filled) or not any(filled):
            raise
    _say_skipped([file for (file, _), some in zip(heads, filled, strict=True) if not some])
    return _common([head for head, some in zip(heads, filled, strict=True) if some], column, keep)


def _say_missing(heads: Sequence[tuple[File, pa.Schema]], names: Sequence[str]) -> None:
    """One line for the columns that some files lack."""
    lacking = dict[tuple[int, ...], list[str]]()
    there = [set(schema.names) for _, schema in heads]
    for name in names:
        lacking.setdefault(tuple(i for i, some in enumerate(there) if name not in some), []).append(name)
    each = [f"{listed(missing)} in {_named([heads[i][0] for i in where])}" for where, missing in lacking.items() if where]
    if each:
        logger.warning("columns that are missing and so null in the rows of some files: %s", "; ".join(each)[:1000])


def _say_mixed(heads: Sequence[tuple[File, pa.Schema]]) -> None:
    """One line for the columns with odd cells."""
    mixed = [(file, schema.metadata[MIXED].decode()) for file, schema in heads if MIXED in (schema.metadata or {})]
    if mixed:
        logger.warning(
            "%s: values of several kinds; a row whose value is not of the most common one will have an error, unless its "
            "column is left out with --keep: %s", _named([file for file, _ in mixed]), mixed[0][1],
        )  # fmt: skip


def has_rows(file: File) -> bool:
    """Whether the file has a row, valid or not."""
    try:
        with readable(file):
            return any(chunk.rows for chunk in reader_of(file).values(file, ()))
    except EmptyFileError:
        return False


def _say_skipped(files: Sequence[File]) -> None:
    if files:
        logger.warning("skipped, without rows and with other columns than the other files: %s", _named(files))


def _named(files: Sequence[File]) -> str:
    return f"{files[0].shown} and {len(files) - 1:,} more" if len(files) > 1 else files[0].shown


def _common(heads: Sequence[tuple[File, pa.Schema]], column: str, keep: Sequence[str] | None) -> pa.Schema:
    """One schema of several files, of which all values are known to be exact in it."""
    import pyarrow as pa

    from p2l_engine.tables.common_types import always_exact, common_type, conflict, with_text_for_nulls

    types, first = dict[str, pa.DataType](), dict[str, File]()
    beyond = {field.name for _, schema in heads for field in schema if BEYOND in (field.metadata or {})}
    heads = [(file, _without_nanoseconds(schema, beyond)) for file, schema in heads]
    for file, schema in heads:
        for field in schema:
            known = types.get(field.name, pa.null())
            found = common_type(known, field.type)
            if found is None:
                place, other, here = conflict(known, field.type, field.name)
                raise ValueError(
                    f"{file.shown}: column {place!r} is {here!s:.200}, in {first[field.name].shown} {other!s:.200}: no type "
                    "holds the values of both; leave the column out with --keep"
                )
            types[field.name] = found
            if field.name not in first or pa.types.is_null(known):
                first[field.name] = file
    unknown = [name for name in keep or () if name not in types]
    if heads and unknown:
        there = reader_of(heads[0][0]).schema(heads[0][0], column, None)
        names = [column, *(there.names if there is not None else ())]
        raise ValueError(f"{heads[0][0].shown}: expected the columns {listed(unknown)}; it has {listed(names)}")
    common = pa.schema([(name, with_text_for_nulls(types.get(name, pa.null()))) for name in (types if keep is None else keep)])
    _say_missing(heads, common.names)
    _say_mixed(heads)
    for file, schema in heads:
        inexact = [field.name for field in schema if not always_exact(field.type, common.field(field.name).type)]
        if inexact:
            _check_exact(file, column, schema, pa.schema([common.field(name) for name in inexact]))
    return common


def _without_nanoseconds(schema: pa.Schema, beyond: set[str]) -> pa.Schema:
    """With microseconds in columns of INT96 times of which other files have years that nanoseconds do not hold: rows with
    nanoseconds cannot be stored then."""
    from p2l_engine.tables.common_types import in_unit

    for i, field in enumerate(schema):
        if field.name in beyond and FINE in (field.metadata or {}):
            schema = schema.set(i, field.with_type(in_unit(field.type, "us")))
    return schema


def _check_exact(file: File, column: str, own: pa.Schema, common: pa.Schema) -> None:
    """Raises ValueError where a value of the file is none of the common type's."""
    for rows in read_rows([file], column, common.names, common):
        for row, problem in sorted(rows.problems.items()):
            types = ", ".join(f"{field.name!r} is {own.field(field.name).type}" for field in common)
            raise ValueError(f"{file.shown}: row {rows.first + row}: {problem}: here {types}, and in other files another type")
