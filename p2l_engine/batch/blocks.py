"""Rows of input files, in order and in blocks of bounded size: the prompt, and the columns that the output keeps."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from p2l_engine.batch.config import ROWS_PER_PART
from p2l_engine.tables.readers import READERS, check_columns, kind_of
from p2l_engine.tables.rows import UNREADABLE, Some, Unroutable
from p2l_engine.tables.storage import File
from p2l_engine.tables.whole import turns

HEADS = 8  # of files that are read at the same time
BYTES = 32 << 20  # of a block's prompts and kept columns, beyond which it ends early

Turns = tuple[str, ...] | Unroutable


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows: the block's number, its first row's (from 0, over all files), each row's user turns, kept columns; and
    how much of all input bytes was read by then, 0 to 1."""

    number: int
    first: int
    prompts: list[Turns]
    kept: pa.Table
    read: float = 1.0


def blocks(
    files: Sequence[File], column: str, keep: Sequence[str] | None = None, rows: int = ROWS_PER_PART, plain_text: bool = False
) -> Iterator[Block]:
    """All rows of all files. column: the prompts' (text, a list of user turns, a list of messages, or, unless
    plain_text, such a list as JSON); keep: the columns that the output repeats (None: all others).

    A prompt that is none becomes an ``Unroutable``. Raises ValueError with file and row (from 0) where a file cannot be read,
    lacks a column, or has other columns than the first.
    """
    number = first = size = 0
    prompts: list[Turns] = []
    kept: list[pa.Table] = []
    schema: pa.Schema | None = None
    sizes = np.array([file.size for file in files], float)
    before = dict(zip(map(id, files), sizes.cumsum() - sizes, strict=True))
    read = 0.0
    for some in _every(files, column, keep):
        read = float((before[id(some.file)] + some.read * some.file.size) / max(sizes.sum(), 1.0))
        if schema is None:
            schema = some.kept.schema
            _check_writable(some.file, schema)
        _check_same(some.file, schema, some.kept.schema)
        start, kept_each = 0, some.kept.nbytes // max(len(some.prompts), 1)
        for i, prompt in enumerate(some.prompts):
            found = turns_of(prompt, plain_text)
            if isinstance(found, Unroutable):
                found = found._replace(where=f"{some.file.place.shown}: row {some.first + i}")
            prompts.append(found)
            size += sum(map(len, found)) + kept_each
            if len(prompts) == rows or size >= BYTES:
                kept.append(some.kept[start : i + 1])
                yield Block(number, first, prompts, pa.concat_tables(kept), read)
                number, first, start, size = number + 1, first + len(prompts), i + 1, 0
                prompts, kept = [], []
        kept.append(some.kept[start:])
    if prompts:
        yield Block(number, first, prompts, pa.concat_tables(kept))


def check_files(files: Sequence[File], column: str, keep: Sequence[str] | None = None) -> None:
    """Reads the head of every file, before hours are spent on those before it. Raises ValueError where one cannot be read,
    lacks a column, or has other columns than the first."""

    def check(file: File) -> pa.Schema | None:
        try:
            return check_columns(file, column, keep)
        except UNREADABLE as error:
            raise ValueError(f"{file.place.shown}: cannot be read: {error}") from error

    first: pa.Schema | None = None
    with ThreadPoolExecutor(HEADS) as pool:  # for stores, which answer slowly
        for file, schema in zip(files, pool.map(check, files), strict=True):
            first = schema if first is None else first
            _check_same(file, first, schema)


def turns_of(prompt: Any, plain_text: bool = False) -> Turns:
    """The user turns of a prompt as it was found in a file, or why there are none."""
    if isinstance(prompt, Unroutable):
        return prompt
    if prompt is None:
        return Unroutable("prompt: expected a prompt, got nothing")
    try:
        return turns([prompt] if plain_text and isinstance(prompt, str) else prompt)
    except ValueError as error:
        return Unroutable(str(error))


def _every(files: Sequence[File], column: str, keep: Sequence[str] | None) -> Iterator[Some]:
    schema: pa.Schema | None = None
    for file in files:
        read = READERS[kind_of(file)]
        row = 0
        try:
            for some in read(file, column, keep, schema):
                schema = some.kept.schema if schema is None else schema
                row = some.first + len(some.prompts)
                yield some
        except UNREADABLE as error:
            after = f" after row {row - 1}" if row else ""
            raise ValueError(f"{file.place.shown}: cannot be read{after}: {error}") from error


def _check_writable(file: File, schema: pa.Schema) -> None:
    """Before anything is computed: parquet has no empty objects, and no lists within lists without end."""
    written = io.BytesIO()
    try:
        pq.write_table(schema.empty_table(), written)
        pq.read_table(written)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file.place.shown}: a column cannot be written to parquet: {error}; leave it out with --keep"
        ) from None


def _check_same(file: File, first: pa.Schema | None, schema: pa.Schema | None) -> None:
    if first is not None and schema is not None and not schema.equals(first):
        raise ValueError(f"{file.place.shown}: {_difference(first, schema)}: expected those of the first file")


def _difference(first: pa.Schema, other: pa.Schema) -> str:
    was, now = ({field.name: str(field.type) for field in schema} for schema in (first, other))
    changed = [f"{name} is {now.get(name, 'missing')}, was {was.get(name, 'missing')}" for name in {**was, **now}
               if was.get(name) != now.get(name)]  # fmt: skip
    return f"column {'; '.join(changed)}" if changed else "the columns stand in another order"
