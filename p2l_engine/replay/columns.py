"""Columns of files as arrow tables, for a million rows in seconds: parquet directly, other formats by their readers."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from p2l_engine.replay.mixture import Float64
from p2l_engine.tables.find import find
from p2l_engine.tables.formats import kind_of
from p2l_engine.tables.rows import listed, readable
from p2l_engine.tables.whole import read_table

POLICY = pa.list_(pa.struct([("model", pa.string()), ("probability", pa.float64())]))


def column_names(path: str | Path) -> list[str]:
    """The names of a file's columns (of a folder's or glob's first file). Raises ValueError where it cannot be read."""
    file = find([path])[0]
    if kind_of(file.location.path) != "parquet":
        return list(read_table([path], ()).names)
    with readable(file), file.location.system.open_input_file(file.location.path) as stream:
        return list(pq.ParquetFile(stream).schema_arrow.names)


def read_columns(path: str | Path, names: Collection[str]) -> pa.Table:
    """The columns ``names``, as far as there are such, of a file, folder, glob or URI. Raises ValueError where it
    cannot be read, has no row, or has rows that are invalid."""
    files = find([path])
    if all(kind_of(file.location.path) == "parquet" for file in files):
        parts = []
        for file in files:
            with readable(file), file.location.system.open_input_file(file.location.path) as stream:
                opened = pq.ParquetFile(stream)
                wanted = [name for name in opened.schema_arrow.names if name in names]
                parts.append(opened.read(wanted))
        try:
            table = pa.concat_tables(parts, promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"{path}: its files have columns of different types: {error}") from None
    else:
        found = read_table([path], names)
        for index, row in sorted(found.invalid.items()):
            raise ValueError(f"{found.located(index)}: {row.why}: {row.text}")
        table = pa.table({name: _array(name, values) for name, values in found.columns.items()})
    if not len(table):
        raise ValueError(f"{path}: expected rows, it has none")
    return table


def required(table: pa.Table, path: str | Path, *names: str) -> None:
    """Raises ValueError where the table lacks a column."""
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: expected the columns {listed(missing)}; it has {listed(table.column_names)}")


def numbers(table: pa.Table, name: str, path: str | Path) -> Float64:
    """A column of numbers, or of numbers as text [N]; NaN where there is none. Raises ValueError for other values."""
    column = table.column(name).combine_chunks()
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.if_else(pc.equal(column, ""), None, column)
        found = pc.cast(column, pa.float64())
    except pa.ArrowException as error:
        raise ValueError(f"{path}: {name}: expected numbers: {error}") from None
    return np.array(found.fill_null(np.nan).to_numpy(zero_copy_only=False), np.float64)


def texts(table: pa.Table, name: str, path: str | Path) -> pa.Array:
    """A column of text. Raises ValueError for other values."""
    try:
        return pc.cast(table.column(name), pa.string()).combine_chunks()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: {name}: expected text: {error}") from None


def lists(table: pa.Table, name: str, kind: pa.DataType, path: str | Path) -> pa.ListArray:
    """A column of lists of this type: lists, or text that holds them as JSON; a policy may also be {model: probability}. Raises
    ValueError for other values."""
    column = table.column(name).combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        try:
            return pc.cast(column, kind)
        except pa.ArrowException as error:
            raise ValueError(f"{path}: {name}: expected lists of {kind.value_type}: {error}") from None
    found = []
    for row, value in enumerate(column.to_pylist()):
        try:
            value = json.loads(value) if isinstance(value, str) and value else value or None
            if kind == POLICY and isinstance(value, dict):
                value = [{"model": model, "probability": p} for model, p in value.items() if p is not None]
            found.append(pa.scalar(value, kind).as_py())
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise ValueError(f"{path}: row {row}: {name}: expected a list, got {value!r:.60} ({error})") from None
    return pa.array(found, kind)


def first(wrong: npt.NDArray[np.bool_]) -> int:
    """The number of the first row that is wrong."""
    return int(np.argmax(wrong))


def _array(name: str, values: list[Any]) -> pa.Array:
    """jsonl may mix whole numbers with others, and lists with texts: what no arrow type holds becomes JSON text."""
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError):
        pass
    if all(isinstance(value, int | float | None) for value in values):
        return pa.array([None if value is None else float(value) for value in values])
    return pa.array([value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False) for value in values])
