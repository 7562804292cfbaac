"""How decided rows become files: the formats and contents of a run's parts.

A part is written whole or not at all, and its bytes depend only on its rows, so that a resumed run finds what it would write.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from p2l_engine.batch.blocks import Block
from p2l_engine.batch.config import FormatName
from p2l_engine.batch.json_values import json_text
from p2l_engine.batch.kept import pieces
from p2l_engine.batch.parts import part_name, part_of
from p2l_engine.tables.common_types import with_inner
from p2l_engine.tables.storage import Location

logger = logging.getLogger(__name__)

Written = bytes | memoryview
Metadata = Mapping[str, str]  # stored in parts of parquet


class PartFiles:
    """The files of a run in its output. run: its own folder, where a file is until it is whole. written: bytes of each, by
    name. to_keep: called before the first is written, or at the end: the parts that an earlier run left, and need not be
    written again, with their sizes."""

    def __init__(self, output: Location, run: Location, to_keep: Callable[[], Mapping[str, int]]) -> None:
        self.output, self.run = output, run
        self.written: dict[str, int] = {}
        self._to_keep = to_keep
        self._found: Mapping[str, int] | None = None

    def put(self, name: str, data: Written) -> None:
        """Writes a file, unless it is there already. Raises OSError."""
        found = self._kept()
        self.written[name] = size = len(data)
        if found.get(name) != size:
            if name in found:
                logger.warning("%s: its size has changed, written again", (self.output / name).shown)
            (self.output / name).write(data, self.run)

    def finish(self) -> None:
        """All were written."""
        self._kept()

    def _kept(self) -> Mapping[str, int]:
        if self._found is None:
            self._found = self._to_keep()
        return self._found


class TableWriter:
    """One file for each block, or piece of one; or, split, one for each of its models, and one for its rows without a model.
    Without rows it is one file either way."""

    def __init__(self, files: PartFiles, format_name: FormatName = "parquet", split: bool = False) -> None:
        self._files, self._format, self._split = files, format_name, split
        self._number = 0  # of the next part

    def add(self, block: Block, table: pa.Table, metadata: Metadata) -> None:
        """Writes a block's rows, in several parts where the kept columns are large. Raises OSError."""
        for piece in pieces(len(table), block.kept):
            self._add(table[piece], metadata)
            self._number += 1

    def _add(self, table: pa.Table, metadata: Metadata) -> None:
        if not (self._split and len(table)):
            self._put(part_name(self._number, self._format), table, metadata)
            return
        for model in pc.unique(table.column("model")).to_pylist():
            chosen = pc.equal(table.column("model"), model) if model is not None else pc.is_null(table.column("model"))
            self._put(part_of(model, self._number, self._format), table.filter(chosen).combine_chunks(), metadata)

    def finish(self) -> None:
        """Every block was added."""

    def _put(self, name: str, table: pa.Table, metadata: Metadata) -> None:
        self._files.put(name, FORMATS[self._format](table, metadata))


def check_format(format_name: FormatName, schema: pa.Schema) -> None:
    """Refuses, before anything is computed, kept columns that the format cannot hold. Raises ValueError."""
    for field in schema:
        try:
            if format_name != "parquet":
                _json_type(field.type)
        except ValueError as error:
            raise ValueError(
                f"column {field.name!r}: {error} cannot be written as {format_name}: choose the columns to keep with --keep, "
                "or --format parquet"
            ) from None


def not_for_spark(schema: pa.Schema) -> list[str]:
    """The columns, with their types, of which Spark 4 opens no parquet; one of them keeps it from opening the whole file."""
    return [f"{field.name} ({field.type})" for field in schema if any(map(_not_for_spark, _leaves(field.type)))]


def _not_for_spark(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_time(kind) or types.is_decimal256(kind) or (types.is_timestamp(kind) and kind.unit == "ns"))


def _leaves(kind: pa.DataType) -> Iterator[pa.DataType]:
    """The types of the values within a type."""
    if pa.types.is_dictionary(kind):
        yield from _leaves(kind.value_type)
    elif pa.types.is_nested(kind):
        for i in range(kind.num_fields):
            yield from _leaves(kind.field(i).type)
    else:
        yield kind


def _parquet(table: pa.Table, metadata: Metadata) -> memoryview:
    written = io.BytesIO()
    for i, field in enumerate(table.schema):
        kind = _without_float16(field.type)
        if kind != field.type:  # of some types Arrow has no cast, not even to themselves
            table = table.set_column(i, field.with_type(kind), table.column(i).cast(kind))
    pq.write_table(table.replace_schema_metadata(dict(metadata)), written, compression="zstd")
    return written.getbuffer()


def _jsonl(table: pa.Table, _: Metadata) -> bytes:
    """One object a line. JSON has no NaN and no infinity: they are null."""
    names, columns = table.column_names, [_json_values(column) for column in table.columns]
    lines = [json_text(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]
    return "".join(f"{line}\n" for line in lines).encode()


def _csv(table: pa.Table, _: Metadata) -> memoryview:
    """Lists and objects are JSON; null is nothing, and a text, also an empty one, is in quotes (RFC 4180)."""
    columns = []
    for column in table.columns:
        plain = _json_type(column.type)
        if pa.types.is_nested(plain):
            texts = [None if value is None else json_text(value) for value in _json_values(column)]
            columns.append(pa.array(texts, pa.large_string()))
        elif _of_text(column.type):
            columns.append(pa.array(_json_values(column), plain))
        else:
            columns.append(column.cast(plain))
    written = io.BytesIO()
    pa.csv.write_csv(pa.table(columns, table.column_names), written)
    return written.getbuffer()


FORMATS: dict[FormatName, Callable[[pa.Table, Metadata], Written]] = {"parquet": _parquet, "jsonl": _jsonl, "csv": _csv}


def _without_float16(kind: pa.DataType) -> pa.DataType:
    """The type with float32, which holds the same values, for float16, which Spark cannot read."""
    if pa.types.is_float16(kind):
        return pa.float32()
    return with_inner(kind, lambda field: field.with_type(_without_float16(field.type)))


def _json_values(column: pa.ChunkedArray) -> list[Any]:
    if not any(map(_of_text, _leaves(column.type))):
        return list(column.cast(_json_type(column.type)).to_pylist())
    texts = _as_text(column.type)  # Arrow has no cast from them
    column = pa.chunked_array([_texts(chunk.to_pylist(), texts) for chunk in column.chunks], texts)
    return list(column.cast(_json_type(texts)).to_pylist())


def _of_text(kind: pa.DataType) -> bool:
    """UUIDs and JSON, as DuckDB writes them."""
    return isinstance(kind, pa.UuidType | pa.JsonType)


def _as_text(kind: pa.DataType) -> pa.DataType:
    return pa.large_string() if _of_text(kind) else with_inner(kind, lambda field: field.with_type(_as_text(field.type)))


def _texts(values: Any, kind: pa.DataType) -> pa.Array:
    def told(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: told(item) for key, item in value.items()}
        if isinstance(value, list):
            return [told(item) for item in value]
        return str(value) if isinstance(value, UUID) else value

    return pa.array(told(values), kind)


def _json_type(kind: pa.DataType) -> pa.DataType:
    """The type whose values JSON has: times, decimals, UUIDs and JSON become texts. Raises ValueError for one that has none."""
    types = pa.types
    if types.is_dictionary(kind):
        return _json_type(kind.value_type)
    if types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        if len(set(names)) < len(names):
            raise ValueError("an object that names a key twice")
        return pa.struct([(field.name, _json_type(field.type)) for field in kind])
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pa.list_(_json_type(kind.value_type))
    if types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind) or kind in (pa.float32(), pa.float64()):
        return kind
    if types.is_float16(kind):
        return pa.float32()
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    times = (types.is_date, types.is_timestamp, types.is_time, types.is_decimal)
    if _of_text(kind) or any(is_such(kind) for is_such in (*texts, *times)):
        return pa.large_string()
    raise ValueError(f"the type {kind}")
