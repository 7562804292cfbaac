"""Prompts as people give them: arguments, standard input, or files, with each prompt's weight and category."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from p2l_engine.prompts.parse import Prompt
from p2l_engine.tables.find import names_tables
from p2l_engine.tables.layouts import PROMPT, PromptColumn
from p2l_engine.tables.layouts import read_prompts as read_table_of_prompts
from p2l_engine.tables.rows import listed
from p2l_engine.tables.storage import Location, shown
from p2l_engine.tables.whole import Table

CATEGORY = ("category", "task")  # the first that is there


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of a file, and a value for each prompt of the columns weight, category and task.

    A table (parquet, csv, jsonl; also a folder, glob or URI of such files, see ``tables.find``) has a column of prompts, or,
    in jsonl, lines that are a prompt themselves: text, a list of user turns, or a list of messages. Any other file has a prompt
    on each line. A prompt of one turn is given as that text, of several as a tuple of them.
    """

    name: str
    prompts: list[Prompt]
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    rows: Sequence[str] = ()

    @classmethod
    def read(cls, file: str | Path, column: str | None = None, csv_escape: str | None = None) -> PromptFile:
        """column: of the prompts; None: see ``layouts.prompt_column``. csv_escape: see ``find.find_each``. Raises ValueError
        with the row (from 0) that cannot be read or has no prompt, or if there is no prompt at all."""
        if names_tables(file):
            table, where = read_table_of_prompts(file, column, ("weight", *CATEGORY), bare=True, csv_escape=csv_escape)
            return _some(_from_table(table, where))
        check_no_column(column)
        return _some(cls(shown(str(file)), _lines(read_text(file))))

    def weights(self) -> list[float] | None:
        """Each prompt's weight, or None if the file has no weights."""
        given = self.columns.get("weight", [])
        if all(value is None for value in given):
            return None
        found = []
        for where, value in zip(self.rows, given, strict=True):
            try:
                weight = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError, OverflowError):
                weight = math.nan
            if not 0 <= weight < math.inf:
                expected = "expected a finite number >= 0 for every prompt, or for none"
                raise ValueError(f"{where}: weight: {expected}: got {value!r}")
            found.append(weight)
        return found

    def categories(self) -> list[str] | None:
        """Each prompt's category (the column category, or else task; "none" for prompts without), or None if the file has no
        categories."""
        for name in CATEGORY:
            given = self.columns.get(name, [])
            if any(value not in (None, "") for value in given):
                return ["none" if value in (None, "") else str(value) for value in given]
        return None


def read_prompts(
    given: list[str] | None, file: str | Path | None, column: str | None = None, csv_escape: str | None = None
) -> list[Prompt]:
    """From the arguments, a file (see ``PromptFile``), or standard input, one a line."""
    if given and file is not None:
        raise typer.BadParameter("give prompts as arguments or a file, not both", param_hint="--file")
    if file is not None:
        return PromptFile.read(file, column, csv_escape).prompts
    check_no_column(column)
    if given:
        return list(given)
    return _some(PromptFile("standard input", _lines(read_stdin()))).prompts


def check_no_column(column: str | None) -> None:
    """Raises BadParameter for a column of prompts that come from no table."""
    if column not in (None, PROMPT):
        raise typer.BadParameter(
            f"expected a table of prompts (parquet, csv, jsonl) that has the column {column!r}", param_hint="--column"
        )


def read_text(file: str | Path) -> str:
    """A text file, or the URI of one. Raises ValueError if there is none, or if it is not UTF-8."""
    try:
        return Location.of(file).read().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{shown(str(file))}: no such file or folder") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(str(file))}: expected UTF-8 text: {error}") from None


def read_stdin() -> str:
    """All of standard input; a BadParameter if there is nothing, a ValueError if it is not UTF-8."""
    if sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, a file, or text on standard input", param_hint="prompts")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: expected UTF-8 text: {error}") from None
    if not text.strip():
        raise typer.BadParameter("standard input holds no prompt", param_hint="prompts")
    return text


def _some(found: PromptFile) -> PromptFile:
    if not found.prompts:
        raise typer.BadParameter(f"{found.name} holds no prompt", param_hint="prompts")
    return found


def _from_table(table: Table, where: PromptColumn) -> PromptFile:
    for index, row in sorted(table.invalid.items()):
        raise ValueError(f"{table.located(index)}: {row.why}: {row.text}")
    if table.names and where.column not in table.columns:
        raise ValueError(f"{table.shown}: expected the columns {listed([where.column])}; it has {listed(table.names)}")
    prompts: list[Prompt] = []
    for i, cell in enumerate(table.columns.get(where.column, [])):
        try:
            turns = where.turns(cell)
        except ValueError as error:
            raise ValueError(f"{table.located(i)}: {error}") from None
        prompts.append(turns if len(turns) > 1 else turns[0])
    return PromptFile(table.shown, prompts, table.columns, [table.located(i) for i in range(len(table))])


def _lines(text: str) -> list[Prompt]:
    # Only "\n" ends a line: str.splitlines also breaks at characters that prompts may hold.
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]
