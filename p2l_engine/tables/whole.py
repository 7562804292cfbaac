"""Tables from files, folders and hub data sets, and the prompts in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from p2l_engine.errors import PromptError
from p2l_engine.prompts.parse import user_turns

# A column of csv and jsonl tables where there are such rows: what stands there instead.
BROKEN = "row: expected a JSON object of valid text, or in csv a cell for each column"


def _read_csv(file: Path) -> pa.Table:
    """All columns as text: a type that is guessed from most rows would make the file unreadable for the sake of one cell. Rows
    with too many or too few cells stand in the column BROKEN, unless a quote may be to blame: what follows it is not to be
    trusted."""
    broken: dict[int, str] = {}

    def ragged(row: Any) -> str:
        if row.text.count('"') % 2 or ('"' in row.text and "\n" in row.text):
            return "error"
        broken[row.number - 2] = row.text[:60]  # counted from 1, the header too
        return "skip"

    header = pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda _: "skip")
    with pa.csv.open_csv(file, parse_options=header) as reader:
        names = reader.schema.names
    table = pa.csv.read_csv(
        file,
        read_options=pa.csv.ReadOptions(use_threads=False),  # with several, rows have no numbers
        parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=ragged),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    if not broken:
        return table
    good = iter(range(table.num_rows))
    places = [None if i in broken else next(good) for i in range(table.num_rows + len(broken))]
    texts = pa.array([broken.get(i) for i in range(len(places))], pa.string())
    return table.take(pa.array(places, pa.int64())).append_column(BROKEN, texts)


def _read_jsonl(file: Path) -> pa.Table:
    """By Arrow; where a line is no JSON object, or a column's values are of several types, line by line."""
    try:
        return pa.json.read_json(file)
    except pa.ArrowInvalid:
        return _line_by_line(file)


def _line_by_line(file: Path) -> pa.Table:
    """Columns of several types become text: what is none, as JSON. Lines that are no JSON object stand in the column BROKEN."""
    rows: list[dict[str, Any]] = []
    for line in file.read_bytes().split(b"\n"):
        if line.strip():
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # lone surrogates are no text
            except (ValueError, RecursionError):
                row = None
            rows.append(row if isinstance(row, dict) else {BROKEN: line[:60].decode(errors="replace")})
    if all(BROKEN in row for row in rows):
        raise ValueError(f"{file}: expected a JSON object on each line, found none")
    return pa.table({name: _column([row.get(name) for row in rows]) for name in {key: None for row in rows for key in row}})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values], pa.string())


READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".parquet": pa.parquet.read_table,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


def read_table(path: str | Sequence[str]) -> pa.Table:
    """The rows of a parquet, jsonl or csv file, of a folder of files of one of these kinds (in order of their names), or of the
    split ``train`` of a hub data set; or of several such, one after the other. Raises ValueError with the file that cannot be
    read, and where the columns of several are not of the same types."""
    if not isinstance(path, str):
        if not path:
            raise ValueError("path: expected at least one file, folder or data set, got none")
        return _joined(", ".join(path), [read_table(each) for each in path])
    place = Path(path).expanduser()
    if place.suffix in READERS and place.is_file():
        return _read(place)
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix in READERS)
        if not files:
            raise ValueError(f"{path}: expected {_kinds()} files in this folder, found none")
        return _joined(path, [_read(file) for file in files])
    if place.is_file() or (place.suffix and not place.exists()):
        found = "another kind of file" if place.exists() else "no such file"
        raise ValueError(f"{path}: expected a {_kinds()} file, a folder of such files or a data set's name; found {found}")
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(path, split="train").data.table
    except (DatasetNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: no file or folder here, and no data set could be had from the hub: {first}") from error


def turns(prompt: Any) -> tuple[str, ...]:
    """The user's turns of a table's prompt: text, a list of turns, a list of messages, or such a list as JSON.

    Raises ValueError, without a place: the caller knows the row.
    """
    if isinstance(prompt, str) and prompt.startswith("["):
        try:
            parsed = json.loads(prompt)
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or lists within lists without end
            parsed = None
        if isinstance(parsed, list) and all(isinstance(turn, str | dict) for turn in parsed):
            prompt = parsed
    try:
        return tuple(user_turns(prompt))
    except PromptError as error:
        raise ValueError(f"prompt: {error.problem}") from None


def _joined(path: str, tables: Sequence[pa.Table]) -> pa.Table:
    texts = {field.name for table in tables for field in table.schema if pa.types.is_string(field.type)}
    try:
        return pa.concat_tables([_as_text(table, texts) for table in tables], promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{path}: the files' columns are not of the same types: {error}") from error


def _as_text(table: pa.Table, names: set[str]) -> pa.Table:
    """Numbers in columns that are text in another file: csv files know nothing else."""
    for i, field in enumerate(table.schema):
        if field.name in names and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type)):
            table = table.set_column(i, field.name, table.column(i).cast(pa.string()))
    return table


def _read(file: Path) -> pa.Table:
    try:
        table = READERS[file.suffix](file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: expected a readable {file.suffix} file: {error}") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise ValueError(f"{file}: expected columns of different names, got {table.column_names}")
    return table


def _kinds() -> str:
    return ", ".join(kind.removeprefix(".") for kind in READERS)
