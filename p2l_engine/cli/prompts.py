"""Prompts as people give them: arguments, standard input, or a file, with what a file's other columns say of each."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from p2l_engine.errors import PromptError
from p2l_engine.prompts.parse import Prompt, user_turns

CATEGORY = ("category", "task")  # the first that is there


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of a file: .jsonl (text, turns, messages, or an object whose key ``column`` holds one), .csv or .parquet
    (that column; needs pyarrow), else one a line. columns: the others that anything here reads, a value for each prompt."""

    name: str
    prompts: list[Prompt]
    columns: Mapping[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, column: str = "prompt") -> PromptFile:
        """Raises ValueError with the row or line that holds no prompt, or where there is none."""
        if file.suffix in (".parquet", ".csv"):
            found = _table(file, column)
        elif file.suffix == ".jsonl":
            found = _objects(str(file), read_text(file), column)
        else:
            found = cls(str(file), [line for _, line in _lines(read_text(file))])
        return _some(found)

    def weights(self) -> list[float] | None:
        """Each prompt's weight, where the file has any."""
        given = self.columns.get("weight", [])
        if all(value is None for value in given):
            return None
        found = []
        for i, value in enumerate(given):
            try:
                weight = float(value)
            except (TypeError, ValueError, OverflowError):
                weight = math.nan
            if not 0 <= weight < math.inf:
                expected = "expected a finite number >= 0 for every prompt, or for none"
                raise ValueError(f"{self.name}: row {i}: weight: {expected}: got {value!r}")
            found.append(weight)
        return found

    def categories(self) -> list[str] | None:
        """Each prompt's category, where the file has any: its column category, or task; "none" for those without."""
        for name in CATEGORY:
            given = self.columns.get(name, [])
            if any(value not in (None, "") for value in given):
                return ["none" if value in (None, "") else str(value) for value in given]
        return None


def read_prompts(given: list[str] | None, file: Path | None, column: str = "prompt") -> list[Prompt]:
    """From the arguments, a file, or standard input, one a line."""
    if given and file:
        raise typer.BadParameter("give prompts as arguments or a file, not both", param_hint="--file")
    if given:
        return list(given)
    if file:
        return PromptFile.read(file, column).prompts
    return _some(PromptFile("standard input", [line for _, line in _lines(read_stdin())])).prompts


def _some(found: PromptFile) -> PromptFile:
    if not found.prompts:
        raise typer.BadParameter(f"{found.name} holds no prompt", param_hint="prompts")
    return found


def _table(file: Path, column: str) -> PromptFile:
    from p2l_engine.tables.whole import BROKEN, read_table, turns

    table = read_table(str(file))
    if BROKEN in table.column_names:
        row = next(i for i, text in enumerate(table.column(BROKEN).to_pylist()) if text is not None)
        got = table.column(BROKEN)[row].as_py()
        raise ValueError(f"{file}: row {row}: expected a cell for each column {table.column_names[:-1]}, got {got!r}")
    if column not in table.column_names:
        raise ValueError(f"{file}: expected a column {column!r}, got {table.column_names}")
    prompts: list[Prompt] = []
    for i, value in enumerate(table.column(column).to_pylist()):
        try:
            prompts.append(turns(value))
        except ValueError as error:
            raise ValueError(f"{file}: row {i}: {error}") from None
    kept = [name for name in ("weight", *CATEGORY) if name in table.column_names]
    return PromptFile(str(file), prompts, {name: table.column(name).to_pylist() for name in kept})


def _objects(where: str, text: str, column: str) -> PromptFile:
    prompts: list[Prompt] = []
    rows: list[dict[str, Any]] = []
    for number, line in _lines(text):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: line {number}: expected JSON: {error}") from None
        rows.append(value if isinstance(value, dict) else {})
        if isinstance(value, dict):
            if column not in value:
                raise ValueError(f"{where}: line {number}: expected the key {column!r}, got {sorted(value)}")
            value = value[column]
        try:
            user_turns(value)
        except PromptError as error:
            raise ValueError(f"{where}: line {number}: {error.problem}") from None
        prompts.append(value)
    return PromptFile(where, prompts, {name: [row.get(name) for row in rows] for name in ("weight", *CATEGORY)})


def _lines(text: str) -> list[tuple[int, str]]:
    # Only "\n" ends a line: str.splitlines also breaks at characters that JSON strings and prompts may hold.
    return [(i, line.rstrip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text: {error}") from None


def read_stdin() -> str:
    if sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, a file, or text on standard input", param_hint="prompts")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: expected UTF-8 text: {error}") from None
