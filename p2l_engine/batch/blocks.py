"""Rows of input files, in order and in blocks of bounded size: the prompts' turns, and the columns that the output keeps."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from p2l_engine.batch.config import ROWS_PER_PART
from p2l_engine.batch.json_values import json_text
from p2l_engine.batch.kept import KeptColumns
from p2l_engine.batch.requests import request_body
from p2l_engine.tables.chunked import read_rows
from p2l_engine.tables.formats import kind_of
from p2l_engine.tables.layouts import PromptColumn, prompt_column
from p2l_engine.tables.nested import object_of
from p2l_engine.tables.rows import InvalidRow
from p2l_engine.tables.storage import File
from p2l_engine.tables.turns import listed_in

AS_IT_IS = PromptColumn()  # a cell that is the prompt
LETTERS = 32 << 20  # of a block's prompts, beyond which it ends early


class Unroutable(NamedTuple):
    """Why a row cannot be routed, and its file and row (from 0)."""

    why: str
    where: str = ""


RowTurns = tuple[str, ...] | Unroutable


class Span(NamedTuple):
    """Consecutive rows of one file, of which the first is its row ``first``, from 0."""

    file: File
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows: the block's number, its first row's (from 0, over all files), each row's user turns, the kept columns,
    where the rows come from, how much of all input bytes was read, 0 to 1, and the rows (by their place in the block) with a
    cell that the kept columns cannot hold: they are not routed, but their prompts are computed, so that coefficients do not
    depend on what is kept. bodies: of the rows' requests, one column of JSON (see ``requests.request_body``), where they are
    wanted."""

    number: int
    first: int
    prompts: list[RowTurns]
    kept: pa.Table
    sources: Sequence[Span] = ()
    read: float = 1.0
    problems: Mapping[int, Unroutable] = field(default_factory=dict)
    bodies: pa.ChunkedArray | None = None

    def where(self, row: int) -> str:
        """The file and row (from 0) of a row of the block."""
        for span in self.sources:
            if row < span.rows:
                return f"{span.file.shown}: row {span.first + row}"
            row -= span.rows
        raise IndexError(f"row: expected 0 to {len(self.prompts) - 1}, got {row}")


def blocks(
    files: Sequence[File],
    column: str | PromptColumn | None,
    keep: Sequence[str] | None = None,
    rows: int = ROWS_PER_PART,
    plain_text: bool = False,
    schema: pa.Schema | None = None,
    folder: Path | None = None,
    requests: bool = False,
) -> Iterator[Block]:
    """All rows of all files. column, plain_text: of the prompts, see ``layouts.prompt_column`` and ``turns.cell_turns``. keep:
    the columns that the output repeats (None: all others). schema: theirs, see ``read_rows``. folder: a local one for large
    kept columns (see ``kept``). requests: whether ``Block.bodies`` are wanted.

    Where a block ends depends on the prompts alone, so that coefficients can be used again with other kept columns. An invalid
    prompt becomes an ``Unroutable``. Raises ValueError with file and row (from 0) where a file cannot be read, or lacks the
    column of prompts, and what ``kept_schema`` raises.
    """
    number = first = size = 0
    prompts: list[RowTurns] = []
    problems: dict[int, Unroutable] = {}
    kept, bodies = KeptColumns(folder), KeptColumns(folder)
    sources: list[Span] = []
    sizes = np.array([file.size for file in files], float)
    before = dict(zip(map(id, files), sizes.cumsum() - sizes, strict=True))
    read, writable = 0.0, False
    where = prompt_column(files, column, plain_text)
    for record_batch in read_rows(files, where.column, keep, schema):
        file, columns = record_batch.file, record_batch.kept
        read = float((before[id(file)] + record_batch.read * file.size) / max(sizes.sum(), 1.0))
        if not writable:
            _check_writable(file, columns.schema)
            writable = True
        start, found = 0, list[str | None]()
        for i, cell in enumerate(record_batch.prompts):
            turns = turns_of(cell, plain_text, where)
            if isinstance(turns, Unroutable):
                turns = turns._replace(where=f"{file.shown}: row {record_batch.first + i}")
            else:
                size += sum(map(len, turns))
            if i in record_batch.problems:
                problems[len(prompts)] = Unroutable(record_batch.problems[i], f"{file.shown}: row {record_batch.first + i}")
            if requests:
                body, problem = _body(file, where, cell, turns, plain_text)
                found.append(body)
                if problem is not None:
                    problems.setdefault(len(prompts), Unroutable(problem, f"{file.shown}: row {record_batch.first + i}"))
            prompts.append(turns)
            if len(prompts) == rows or size >= LETTERS:
                kept.add(columns[start : i + 1])
                bodies.add(_column(found))
                sources.append(Span(file, record_batch.first + start, i + 1 - start))
                of_rows = bodies.table().column("body") if requests else None
                yield Block(number, first, prompts, kept.table(), sources, read, problems, of_rows)
                number, first, start, size, found = number + 1, first + len(prompts), i + 1, 0, []
                prompts, problems, kept, bodies, sources = [], {}, KeptColumns(folder), KeptColumns(folder), []
        if start < len(record_batch.prompts):
            kept.add(columns[start:])
            bodies.add(_column(found))
            sources.append(Span(file, record_batch.first + start, len(record_batch.prompts) - start))
    if prompts:
        of_rows = bodies.table().column("body") if requests else None
        yield Block(number, first, prompts, kept.table(), sources, problems=problems, bodies=of_rows)


def turns_of(cell: Any, plain_text: bool = False, where: PromptColumn = AS_IT_IS) -> RowTurns:
    """The user turns of a cell of the column that has the prompts, or why there are none."""
    if isinstance(cell, InvalidRow):
        return Unroutable(cell.why)
    try:
        return where.turns(cell, plain_text)
    except ValueError as error:
        return Unroutable(str(error))


def _body(file: File, where: PromptColumn, cell: Any, turns: RowTurns, plain_text: bool) -> tuple[str | None, str | None]:
    """The body of a row's request as JSON, or why it has none."""
    if isinstance(turns, Unroutable):
        return None, None
    try:
        prompt = object_of(cell) if where.of_requests else where.value(cell)
        if isinstance(prompt, str) and not plain_text:
            prompt = listed_in(prompt) or prompt
        with_nulls = isinstance(cell, str) or kind_of(file.location.path) != "parquet"
        return json_text(request_body(prompt, turns, with_nulls)), None
    except ValueError as error:
        return None, f"prompt: {error}"


def _column(bodies: list[str | None]) -> pa.Table:
    return pa.table({"body": pa.array(bodies, pa.large_string())})


def _check_writable(file: File, schema: pa.Schema) -> None:
    """Refuses, before anything is computed, what parquet cannot store: empty objects, and lists nested too deeply."""
    written = io.BytesIO()
    try:
        pq.write_table(schema.empty_table(), written)
        pq.read_table(written)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.shown}: a column cannot be written to parquet: {error}; leave it out with --keep") from None
