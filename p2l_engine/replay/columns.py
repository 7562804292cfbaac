"""Columns of files as arrow tables, for a million rows in seconds: parquet directly, other formats by their readers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from p2l_engine.replay.mixture import Float64
from p2l_engine.strict_json import parsed
from p2l_engine.tables import parquet
from p2l_engine.tables.find import find
from p2l_engine.tables.formats import kind_of
from p2l_engine.tables.nested import split_column, value_at
from p2l_engine.tables.partitions import with_columns
from p2l_engine.tables.rows import Rows, listed, readable
from p2l_engine.tables.storage import File
from p2l_engine.tables.turns import cell_turns
from p2l_engine.tables.whole import Table, read_table

logger = logging.getLogger(__name__)

Int64 = npt.NDArray[np.int64]
MOST = 1e50  # of rewards and costs, and of weights: sums of squares of their products are finite
PROMPT = "prompt"
MODELS = b"p2l.models"  # the metadata in which a batch run names the models of its theta, a line each
POLICY = pa.list_(pa.struct([("model", pa.string()), ("probability", pa.float64())]))


def column_names(path: str | Path, csv_escape: str | None = None) -> list[str]:
    """The names of a file's columns (of a folder's or glob's first file). Raises ValueError where it cannot be read."""
    file = find([path], logger.debug)[0]
    if kind_of(file.location.path) != "parquet":
        return list(read_table([path], (), csv_escape=csv_escape, again=True).names)
    with readable(file):
        names = parquet.names_of(file)
    return [*names, *(name for name, _ in file.partitions if name not in names)]


def read_columns(
    path: str | Path, names: Collection[str], csv_escape: str | None = None, column: str | None = None
) -> pa.Table:
    """The columns ``names``, as far as there are such, of a file, folder, glob or URI; with the models of a batch run in the
    metadata, if they are those of all files. csv_escape: see ``tables.find.find_each``. column: which one is returned as
    ``prompt``, also one within another (``body.messages``); None: prompt, which may be missing. Raises ValueError where it
    cannot be read, has no row, has rows that are invalid, or lacks ``column``."""
    files = find([path])
    prompts = PROMPT if column is None or PROMPT not in names else column
    if all(kind_of(file.location.path) == "parquet" for file in files):
        parts = [_of_parquet(file, names, prompts) for file in files]
        try:
            table = pa.concat_tables(parts, promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"{path}: its files have columns of different types: {error}") from None
        said = {(part.schema.metadata or {}).get(MODELS, b"") for part in parts}
        table = table.replace_schema_metadata({MODELS: said.pop()} if len(said) == 1 else None)
    else:
        found = read_table([path], {*names, prompts}, csv_escape=csv_escape, again=True)
        for index, row in sorted(found.invalid.items()):
            raise ValueError(f"{found.located(index)}: {row.why}: {row.text}")
        table = pa.table({name: _array(found, name) for name in found.columns if name in names and name != PROMPT})
        if prompts in found.columns:
            table = table.append_column(PROMPT, _prompts(found.columns[prompts], found.located))
    if prompts != PROMPT and PROMPT not in table.column_names:
        raise ValueError(f"{path}: expected the columns {prompts!r}; it has {listed(column_names(path, csv_escape))}")
    if not len(table):
        raise ValueError(f"{path}: expected rows, it has none")
    return table


def required(table: pa.Table, path: str | Path, *names: str) -> None:
    """Raises ValueError where the table lacks a column."""
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: expected the columns {listed(missing)}; it has {listed(table.column_names)}")


def numbers(table: pa.Table, name: str, path: str | Path, rows: Int64 | None = None) -> Float64:
    """A column of numbers, or of numbers as text [N]; NaN where there is none. rows [N]: their numbers in the file, None: 0, 1
    and so on. Raises ValueError, with the row, for other values; true and false are none."""
    column = table.column(name).combine_chunks()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(column, ""), None, column)
    try:
        found = pc.cast(_without_booleans(column), pa.float64(), safe=False)  # rounded, where a double has fewer digits
    except (pa.ArrowException, TypeError):
        wrong = next((i for i, value in enumerate(column.to_pylist()) if value is not None and not _is_number(value)), 0)
        row = wrong if rows is None else rows[wrong]
        raise ValueError(f"{path}: row {row}: {name}: expected a number, got {column[wrong].as_py()!r:.60}") from None
    return np.array(found.fill_null(np.nan).to_numpy(zero_copy_only=False), np.float64)


def texts(table: pa.Table, name: str, path: str | Path) -> pa.Array:
    """A column of text. Raises ValueError for other values than texts and numbers."""
    try:
        return pc.cast(_without_booleans(table.column(name).combine_chunks()), pa.string())
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{path}: {name}: expected text: {error}") from None


def comparable(cells: pa.Array) -> pa.Array:
    """Prompts (texts, lists of turns or of messages) as texts that differ where they do."""
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        return cells.cast(pa.string())
    return pa.array([None if cell is None else repr(cell) for cell in cells.to_pylist()], pa.string())


def matrix(table: pa.Table, name: str, width: int, rows: Int64) -> npt.NDArray[np.float32]:
    """Lists of so many numbers [R, width] in these rows of a column; NaN where a row has none, or another number of them."""
    column = table.column(name).take(pa.array(rows)).combine_chunks()
    found = np.full((len(rows), width), np.nan, np.float32)
    usable = np.array(pc.equal(pc.list_value_length(column), width).fill_null(False).to_numpy(zero_copy_only=False), bool)
    values = pc.list_flatten(column.filter(pa.array(usable)))
    found[usable] = np.asarray(values.to_numpy(zero_copy_only=False), np.float32).reshape(-1, width)
    return found


def lists(table: pa.Table, name: str, kind: pa.DataType, path: str | Path, rows: Int64) -> pa.ListArray:
    """A column of lists of this type: lists, or text that holds them as JSON; a policy may also be {model: probability}.
    rows [N]: their numbers in the file. Raises ValueError, with the row where it can be said, for other values."""
    column = table.column(name).combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        try:
            _without_booleans(column.flatten())
            return pc.cast(column, kind)
        except (pa.ArrowException, TypeError) as error:
            raise ValueError(f"{path}: {name}: expected lists of {kind.value_type}: {error}") from None
    cells = column.to_pylist()

    def refused(row: int, error: Exception) -> ValueError:
        return ValueError(f"{path}: row {rows[row]}: {name}: expected a list, got {cells[row]!r:.60} ({error})")

    found = []
    for row, cell in enumerate(cells):
        try:
            found.append(_listed(parsed(cell) if isinstance(cell, str) and cell else cell, kind))
        except (ValueError, TypeError) as error:
            raise refused(row, error) from None
    try:
        return pa.array(found, kind)
    except (pa.ArrowException, TypeError):
        for row, value in enumerate(found):  # which one
            try:
                pa.scalar(value, kind)
            except (pa.ArrowException, TypeError) as error:
                raise refused(row, error) from None
        raise


def bounded(of: Float64, name: str, path: str | Path, rows: Int64 | None = None, least: float = -MOST) -> Float64:
    """The numbers [N], which may be NaN. Raises ValueError, with the row, for others below ``least``, or beyond ``MOST``."""
    wrong = (of < least) | (np.abs(of) > MOST)
    if wrong.any():
        bad = first(wrong)
        expected = "a finite number >= 0" if least == 0 else "a finite number"
        row = bad if rows is None else rows[bad]
        raise ValueError(f"{path}: row {row}: {name}: expected {expected}, to {MOST:g}, got {of[bad]:g}")
    return of


def first(wrong: npt.NDArray[np.bool_]) -> int:
    """The number of the first row that is wrong."""
    return int(np.argmax(wrong))


def _listed(value: Any, kind: pa.DataType) -> list[Any] | None:
    """One cell of a column of lists."""
    if value is None or value == "":
        return None
    if kind == POLICY and isinstance(value, dict | list) and all(isinstance(entry, tuple) for entry in value):
        value = dict(value)  # of an arrow map
    if kind == POLICY and isinstance(value, dict):
        value = [{"model": model, "probability": p} for model, p in value.items() if p is not None]
    if not isinstance(value, list):
        raise TypeError(f"it is {type(value).__name__}")
    if _has_booleans(value):
        raise TypeError("true and false are no numbers")
    return value


def _has_booleans(value: Any) -> bool:
    """Whether it is true or false, or a list or an object with such values, or a list of such objects."""
    if isinstance(value, dict):
        return any(map(_has_booleans, value.values()))
    return any(map(_has_booleans, value)) if isinstance(value, list) else isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        pc.cast(pa.scalar(value), pa.float64(), safe=False)
    except (pa.ArrowException, OverflowError):
        return False
    return not isinstance(value, bool)


def _without_booleans(column: pa.Array) -> pa.Array:
    """The column. Raises TypeError for one of booleans, which arrow would make 0 and 1, or texts."""
    fields = [field.type for field in column.type] if pa.types.is_struct(column.type) else []
    if any(pa.types.is_boolean(of) for of in (column.type, *fields)):
        raise TypeError("true and false are neither numbers nor texts")
    return column


def _of_parquet(file: File, names: Collection[str], prompts: str) -> pa.Table:
    """The columns of one file; prompts: the one that is returned as ``prompt``."""
    with readable(file):
        own, within = split_column(prompts, [*parquet.names_of(file), *(name for name, _ in file.partitions)])
        wanted = [*(name for name in names if name not in (PROMPT, own)), own]
        part = _plain(parquet.whole(file, wanted))
    if file.partitions:
        part = with_columns(Rows(file, 0, [None] * len(part), part, 1.0), "", wanted).kept
    if own not in part.column_names:
        return part
    cells = part.column(own)
    part = part if own in names and own != PROMPT else part.drop_columns([own])
    if within:

        def located(row: int) -> str:
            return f"{file.shown}: row {row}"

        def inner(row: int, cell: Any) -> Any:
            try:
                return value_at(cell, within)
            except ValueError as error:
                raise ValueError(f"{located(row)}: {own}: {error}") from None

        cells = _prompts([inner(row, cell) for row, cell in enumerate(cells.to_pylist())], located)
    return part.append_column(PROMPT, cells)


def _prompts(cells: Sequence[Any], located: Callable[[int], str]) -> pa.Array:
    """Cells of prompts as text: lists, of turns or of messages, as JSON. Raises ValueError for cells that are no prompts."""
    found = list(cells)
    for row, cell in enumerate(found):
        if cell is not None and not isinstance(cell, str):
            try:
                found[row] = json.dumps(cell_turns(cell), ensure_ascii=False)
            except ValueError as error:
                raise ValueError(f"{located(row)}: {error}") from None
    return pa.array(found, pa.string())


def _plain(table: pa.Table) -> pa.Table:
    """Without dictionaries and views, for which arrow lacks some functions."""
    for i, field in enumerate(table.schema):
        plain = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        plain = pa.string() if pa.types.is_string_view(plain) else plain
        if plain != field.type:
            table = table.set_column(i, field.with_type(plain), table.column(i).cast(plain))
    return table


def _array(table: Table, name: str) -> pa.Array:
    """jsonl may mix whole numbers with others, and lists with texts: what no arrow type holds becomes JSON text."""
    values: Sequence[Any] = table.columns[name]
    kinds = set(map(type, values))
    if (bool in kinds and kinds - {bool, type(None)}) or kinds & {dict, list}:  # arrow makes numbers of some
        for i, value in enumerate(values):
            if _has_booleans(value):
                raise ValueError(f"{table.located(i)}: {name}: expected neither true nor false, got {value!r:.60}")
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, OverflowError):
        pass
    for i, value in enumerate(values):
        if isinstance(value, int) and not _is_number(value):
            raise ValueError(f"{table.located(i)}: {name}: expected a smaller number, got one of {len(str(value))} digits")
    if all(isinstance(value, int | float | None) for value in values):
        return pa.array([None if value is None else float(value) for value in values])
    return pa.array([value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False) for value in values])
