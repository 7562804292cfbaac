"""Some columns of files, folders and hub data sets in memory."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2l_engine.tables.chunked import reader_of
from p2l_engine.tables.find import find_each
from p2l_engine.tables.jsonl import not_an_object
from p2l_engine.tables.nested import MISSING, split_column, splits, value_at
from p2l_engine.tables.partitions import with_values
from p2l_engine.tables.rows import AT_ONCE, EmptyFileError, InvalidRow, ValueRows, readable, row_dicts
from p2l_engine.tables.storage import File, shown

if TYPE_CHECKING:
    from pyarrow import Table as ArrowTable

logger = logging.getLogger(__name__)

SAVED = ("state.json", "dataset_dict.json")  # in folders that datasets' save_to_disk wrote


@dataclass(frozen=True, slots=True)
class Table:
    """Columns in memory.

    shown: what was read, for messages. names: of all columns of the files. columns: those that were wanted, a value for each
    row, None where a row has none. invalid: the rows that cannot be read, by index. rows: each row's file ("" if there is
    only one) and number in it.
    """

    shown: str
    names: tuple[str, ...]
    columns: Mapping[str, list[Any]]
    invalid: Mapping[int, InvalidRow]
    rows: Sequence[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """The file (if there are several) and row, for messages."""
        file, number = self.rows[index]
        return f"{file}: row {number}" if file else f"row {number}"

    def located(self, index: int) -> str:
        """The file and row, for messages."""
        file, number = self.rows[index]
        return f"{file or self.shown}: row {number}"

    def take(self, indices: Sequence[int]) -> Table:
        """Only these rows."""
        return replace(
            self,
            columns={name: [values[i] for i in indices] for name, values in self.columns.items()},
            invalid={i: self.invalid[index] for i, index in enumerate(indices) if index in self.invalid},
            rows=[self.rows[i] for i in indices],
        )

    def with_numbers_as_text(self, prompts: Collection[str] = ()) -> Table:
        """In columns that hold text, numbers are text too: another file, or row, may have written them as such. prompts:
        columns of prompts, which no number is."""
        columns = {name: values if name in prompts else _texts(values) for name, values in self.columns.items()}
        return replace(self, columns=columns)

    def renamed(self, names: Mapping[str, str]) -> Table:
        """names: the new name of a column to its old one. A column of that new name is dropped."""
        moved = {new: self.columns[old] for new, old in names.items()}
        kept = [name for name in self.names if name not in names and name not in names.values()]
        columns = {name: values for name, values in self.columns.items() if name in kept} | moved
        return replace(self, names=(*kept, *names), columns=columns)


def _texts(values: list[Any]) -> list[Any]:
    if not any(isinstance(value, str) for value in values):
        return values
    return [_text(value) if isinstance(value, int | float) else value for value in values]


def _text(value: int | float) -> str:
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15  # 7.0, which pandas makes of 7
    return json.dumps(int(value) if whole else value)


def read_table(
    path: str | Path | Sequence[str | Path],
    names: Collection[str],
    bare: str | None = None,
    heads: bool = False,
    csv_escape: str | None = None,
    again: bool = False,
) -> Table:
    """The columns ``names``, also nested ones (``body.messages``), as far as there are such, of files, folders, globs and URIs
    (see ``find``), of the split ``train`` of a hub data set or of a folder that datasets' ``save_to_disk`` wrote, or of several
    of these one after the other, each file once.

    bare: the column for values of jsonl lines that are no object; without it, these rows are invalid. heads: only the first
    rows of each file. csv_escape: see ``find_each``. again: whether files that are skipped were said before. Raises ValueError
    where a file is missing or cannot be read, or if a quote of a csv file is not closed.
    """
    paths = [str(each) for each in ([path] if isinstance(path, str | Path) else path)]
    if not paths:
        raise ValueError("path: expected at least one file, folder or data set, got none")
    dotted = [name for name in names if "." in name]
    wanted = {*names, *(beginning for name in dotted for beginning, _ in splits(name))}
    parts = _parts(paths, wanted, bare, csv_escape, logger.debug if again else logger.warning)
    found: dict[str, None] = {}
    columns: dict[str, list[Any]] = {}
    invalid: dict[int, InvalidRow] = {}
    rows: list[tuple[str, int]] = []
    empty: list[EmptyFileError] = []

    def add_columns(new: Sequence[str]) -> None:
        for name in new:
            if name not in found and name in names:
                columns[name] = [None] * len(rows)
            found[name] = None

    for place, chunks in parts:
        first, has_columns = len(rows), False
        for chunk in islice(_unless_empty(chunks, empty), 2 if heads else None):
            add_columns(chunk.names)
            nested = [name for name in dotted if split_column(name, chunk.names)[1]]
            has_columns = has_columns or bool(chunk.names)
            kept: list[dict[str, Any]] = []
            for number, row in enumerate(chunk.rows, start=len(rows)):
                if not isinstance(row, dict):
                    invalid[number] = row if isinstance(row, InvalidRow) else not_an_object(row)
                    row = {}
                elif bare is None and not (_is_ascii(row) or _is_text(row)):
                    invalid[number] = InvalidRow("expected valid Unicode", "a lone surrogate", f"{row!r:.60}")
                    row = {}
                elif nested:
                    try:
                        row |= _nested_values(row, nested)
                    except ValueError as error:
                        invalid[number] = InvalidRow(str(error))
                        row = {}
                    add_columns([name for name in nested if name in row])
                kept.append(row)
            for name, values in columns.items():
                values += [row.get(name) for row in kept]
            shown_place = place if len(parts) > 1 else ""
            rows += [(shown_place, number - first) for number in range(len(rows), len(rows) + len(kept))]
        if first in invalid and not has_columns and bare is None:
            raise ValueError(f"{place}: expected a JSON object on each line, found none: row 0: {invalid[first].why}")
    if not found and bare is None and not empty:
        raise ValueError(f"{', '.join(map(shown, paths))}: expected a JSON object on each line, found none")
    if not found and empty:
        raise empty[0]
    return Table(", ".join(map(shown, paths)), tuple(found), columns, invalid, rows)


def _unless_empty(chunks: Iterator[ValueRows], empty: list[EmptyFileError]) -> Iterator[ValueRows]:
    """Without the error for an empty file, which goes to ``empty``: beside other files it has no rows."""
    try:
        yield from chunks
    except EmptyFileError as error:
        empty.append(error)


def _nested_values(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Of the nested columns that a row has. Raises ValueError where a column is no object."""
    found = {name: value_at(row, name, MISSING) for name in names}
    return {name: value for name, value in found.items() if value is not MISSING}


def _is_ascii(row: Mapping[str, Any]) -> bool:
    """Whether a row holds ASCII text, numbers and nothing else, as most do: found sooner than by ``_is_text``."""
    for value in row.values():
        if value is None or type(value) in (float, int):
            continue
        if type(value) is not str or not value.isascii():
            return False
    return True


def _is_text(value: Any) -> bool:
    """Whether all texts within a value, however deep, can be encoded: JSON may hold half a surrogate pair."""
    within: list[dict[str, Any] | list[Any]] = [[value]]
    while within:
        value = within.pop()
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            if isinstance(part, str):
                if not part.isascii():
                    try:
                        part.encode()
                    except UnicodeEncodeError:
                        return False
            elif isinstance(part, dict | list):
                within.append(part)
    return True


def _parts(
    paths: Sequence[str],
    names: Collection[str],
    bare: str | None,
    csv_escape: str | None,
    warn: Callable[..., object],
) -> list[tuple[str, Iterator[ValueRows]]]:
    """Each file, and each data set, with its values."""
    sets = {path: [(path, _saved_values(path, names))] for path in paths if _is_saved(path)}
    sets |= {path: [(path, _hub_values(path, names))] for path in paths if _is_hub_name(path)}
    others = list(dict.fromkeys(path for path in paths if path not in sets))
    found = sets | {
        path: [(file.shown, _values(file, names, bare)) for file in files]
        for path, files in zip(others, find_each(others, warn, csv_escape=csv_escape), strict=True)
    }
    return [part for path in dict.fromkeys(paths) for part in found[path]]


def _is_saved(path: str) -> bool:
    return any((Path(path).expanduser() / name).is_file() for name in SAVED)


def _is_hub_name(path: str) -> bool:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        return False
    local = Path(path)
    return not (local.exists() or re.search(r"\.[A-Za-z]\w*$", path))


def _values(file: File, names: Collection[str], bare: str | None) -> Iterator[ValueRows]:
    first = 0
    with readable(file):
        for chunk in reader_of(file).values(file, names):
            if bare is not None and any(not isinstance(row, dict | InvalidRow) for row in chunk.rows):
                found = [row if isinstance(row, dict | InvalidRow) else {bare: row} for row in chunk.rows]
                chunk = ValueRows([*chunk.names, *(name for name in (bare,) if name not in chunk.names)], found)
            yield with_values(file, first, chunk, names)
            first += len(chunk.rows)


def _hub_values(path: str, names: Collection[str]) -> Iterator[ValueRows]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        found = load_dataset(path, split="train")
    except (DatasetNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: no such file or folder, and the hub provided no data set: {first}") from error
    yield from _data_set_values(found.data.table, names)


def _saved_values(path: str, names: Collection[str]) -> Iterator[ValueRows]:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(Path(path).expanduser())
        part = found["train"] if isinstance(found, DatasetDict) else found
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: expected a data set, or its split train, saved by datasets: {error}") from error
    yield from _data_set_values(part.data.table, names)


def _data_set_values(table: ArrowTable, names: Collection[str]) -> Iterator[ValueRows]:
    import pyarrow as pa

    for batch in table.to_batches(AT_ONCE):
        yield ValueRows(table.column_names, row_dicts(pa.Table.from_batches([batch]), names))
