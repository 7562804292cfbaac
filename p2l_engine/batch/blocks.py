"""Rows of input files, in order and in blocks of bounded size: the prompts' turns, and the columns that the output keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from p2l_engine.batch.config import ROWS_PER_PART
from p2l_engine.batch.json_values import json_text
from p2l_engine.batch.kept import KeptColumns
from p2l_engine.batch.requests import request_body
from p2l_engine.tables.chunked import kept_schema, read_rows
from p2l_engine.tables.formats import kind_of
from p2l_engine.tables.layouts import PromptColumn, prompt_column
from p2l_engine.tables.nested import object_of
from p2l_engine.tables.read_share import ReadShare
from p2l_engine.tables.rows import InvalidRow
from p2l_engine.tables.storage import File
from p2l_engine.tables.turns import URL, is_chat, listed_in, not_a_chat

AS_IT_IS = PromptColumn()  # a cell that is the prompt
NO_URL = f"expected {pa.string()} in the column {URL!r}: "  # how ``typed.problem`` begins for a url that is no text
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
    share = ReadShare(files)
    where = prompt_column(files, column, plain_text)
    only_read = where.cells == "requests" and keep is not None and URL not in keep
    if keep is not None and only_read:
        schema = (kept_schema(files, where.column, keep) if schema is None else schema).append(pa.field(URL, pa.string()))
        keep = [*keep, URL]
    number = first = 0
    begun, read = _BegunBlock(folder, requests), 0.0
    for some in read_rows(files, where.column, keep, schema):
        file, start = some.file, 0
        read = share.after(file, some.read)
        others = _not_chats(some.kept) if where.cells == "requests" else {}
        kept, problems = some.kept, some.problems
        if only_read:
            kept = kept.drop_columns([URL])
            problems = {i: why for i, why in problems.items() if not why.startswith(NO_URL)}
        for i, cell in enumerate(some.prompts):
            turns, body, problem = turns_of(cell, plain_text, where), None, problems.get(i) or others.get(i)
            if requests and not isinstance(turns, Unroutable):
                body, no_body = _body(file, where, cell, turns, plain_text)
                problem = problem or no_body
            begun.add(turns, body, problem, file, some.first + i)
            if len(begun.prompts) == rows or begun.letters >= LETTERS:
                begun.add_columns(file, some.first + start, kept[start : i + 1], i + 1 - start)
                yield begun.block(number, first, read)
                number, first, start = number + 1, first + len(begun.prompts), i + 1
                begun = _BegunBlock(folder, requests)
        if start < len(some.prompts):
            begun.add_columns(file, some.first + start, kept[start:], len(some.prompts) - start)
    if begun.prompts:
        yield begun.block(number, first, 1.0)


class _BegunBlock:
    """The rows of a block that has not ended. letters: of its user turns."""

    def __init__(self, folder: Path | None, requests: bool) -> None:
        self.prompts: list[RowTurns] = []
        self.letters = 0
        self._problems: dict[int, Unroutable] = {}
        self._sources: list[Span] = []
        self._kept = KeptColumns(folder)
        self._bodies = KeptColumns(folder) if requests else None
        self._new_bodies: list[str | None] = []  # of the rows whose columns are not there yet

    def add(self, turns: RowTurns, body: str | None, problem: str | None, file: File, row: int) -> None:
        """A row: its user turns, its request's body, why its other cells or its body cannot be written, and where it is."""
        if problem is not None:
            self._problems[len(self.prompts)] = Unroutable(problem, f"{file.shown}: row {row}")
        if isinstance(turns, Unroutable):
            turns = turns._replace(where=f"{file.shown}: row {row}")
        else:
            self.letters += sum(map(len, turns))
        self.prompts.append(turns)
        self._new_bodies.append(body)

    def add_columns(self, file: File, first: int, kept: pa.Table, rows: int) -> None:
        """The kept columns of the last rows, which are those of a file from ``first`` on. Raises OSError."""
        self._sources.append(Span(file, first, rows))
        self._kept.add(kept)
        if self._bodies is not None:
            self._bodies.add(pa.table({"body": pa.array(self._new_bodies, pa.large_string())}))
        self._new_bodies = []

    def block(self, number: int, first: int, read: float) -> Block:
        """The block, which has ended. See ``Block``."""
        bodies = None if self._bodies is None else self._bodies.table().column("body")
        return Block(number, first, self.prompts, self._kept.table(), self._sources, read, self._problems, bodies)


def turns_of(cell: Any, plain_text: bool = False, where: PromptColumn = AS_IT_IS) -> RowTurns:
    """The user turns of a cell of the column that has the prompts, or why there are none."""
    if isinstance(cell, InvalidRow):
        return Unroutable(cell.why)
    try:
        return where.turns(cell, plain_text)
    except ValueError as error:
        return Unroutable(str(error))


def _not_chats(kept: pa.Table) -> dict[int, str]:
    """What is wrong with the rows whose request is for no chat model."""
    urls = kept.column(URL).to_pylist() if URL in kept.column_names else []
    return {i: not_a_chat(url) for i, url in enumerate(urls) if not is_chat(url)}


def _body(
    file: File, where: PromptColumn, cell: Any, turns: tuple[str, ...], plain_text: bool
) -> tuple[str | None, str | None]:
    """The body of a row's request as JSON, or why it has none."""
    try:
        prompt = object_of(cell) if where.of_requests else where.value(cell)
        if isinstance(prompt, str) and not plain_text:
            prompt = listed_in(prompt) or prompt
        with_nulls = isinstance(cell, str) or kind_of(file.location.path) != "parquet"
        return json_text(request_body(prompt, turns, with_nulls)), None
    except ValueError as error:
        return None, f"prompt: {error}"
