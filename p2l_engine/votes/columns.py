"""The columns of votes in a table: under this project's names, without the rows to leave out."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from p2l_engine.tables.whole import Table, read_table
from p2l_engine.votes.cells import LABELS, seconds_of
from p2l_engine.votes.scores import SCORES

PROMPTS = ("prompt", "conversation", "conversation_a")
OTHER = "conversation_b"  # the other answers of the Arena's conversation_a, with the same turns of the user
COLUMNS = {"model_a", "model_b", "model", "value", "score", "weight", "timestamp", "category", "task", *PROMPTS, *LABELS}


def vote_table(
    path: str | Path | Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    leave_out: Mapping[str, Sequence[Any]] | None = None,
    weighted: bool = True,
    also: Collection[str] = (),
    csv_escape: str | None = None,
) -> Table:
    """The table of these files, under this project's names. The arguments are those of ``read``. also: other columns to keep,
    where the files have them."""
    unknown = sorted(set(columns or {}) - COLUMNS)
    if unknown:
        raise ValueError(f"columns: expected some of {', '.join(sorted(COLUMNS))}, got {', '.join(unknown)}")
    table = read_table(path, {*COLUMNS, OTHER, *(columns or {}).values(), *(leave_out or {}), *also}, csv_escape=csv_escape)
    table = table.with_numbers_as_text({*PROMPTS, *(theirs for ours, theirs in (columns or {}).items() if ours in PROMPTS)})
    for name, values in (leave_out or {}).items():
        table = _without(table, name, values)
    for ours, theirs in (columns or {}).items():
        if theirs not in table.names:
            raise ValueError(f"{table.shown}: columns: expected one of {list(table.names)} for {ours!r}, got {theirs!r}")
    table = table.renamed(columns or {})
    if not weighted:
        table = replace(table, names=tuple(name for name in table.names if name != "weight"))
    return table


def has_scores(table: Table) -> bool:
    """Whether votes of this table, unless they are values, are made from every model's scores."""
    found = set(table.names)
    return set(SCORES) <= found and not found & {*LABELS}


def _without(table: Table, name: str, values: Sequence[Any]) -> Table:
    """Only the rows whose column has none of these values. Raises ValueError if there is no such column, or no row has one of
    them: a misspelt value would be trained on."""
    if name not in table.names:
        raise ValueError(f"{table.shown}: leave_out: expected one of {list(table.names)}, got {name!r}")
    column = table.columns[name]
    is_text = any(isinstance(value, str) for value in column)
    wanted = set()
    for value in values:
        if not (value is None or isinstance(value, str | int | float | date)):
            kind = "string" if is_text else "a number, a date or text"
            raise ValueError(f"{table.shown}: leave_out: {name}: expected values of the type {kind}, got {value!r}")
        wanted.add(_comparable(str(value) if is_text and value is not None else value))
    if is_text and "" in values:
        column = ["" if value is None else value for value in column]  # an empty csv cell is null
    found = [_comparable(value) for value in column]
    missing = sorted(str(value) for _, value in wanted - set(found))
    if missing:
        raise ValueError(f"{table.shown}: leave_out: no row's {name} is {', '.join(missing)}")
    return table.take([i for i, value in enumerate(found) if value not in wanted])


def _comparable(value: Any) -> tuple[str, Any]:
    """Equal for equal values of one kind: True is not 1, and dates equal times."""
    if isinstance(value, date):
        return "time", seconds_of(value)
    if isinstance(value, list | dict):
        return "nested", json.dumps(value, default=str)
    return ("truth" if isinstance(value, bool) else "value"), value
