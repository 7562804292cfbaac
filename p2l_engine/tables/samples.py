"""The first rows of a file that say what it is: its columns' names, and cells that are not empty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from p2l_engine.tables.chunked import reader_of
from p2l_engine.tables.rows import EmptyFileError, InvalidRow, readable
from p2l_engine.tables.storage import File


def sample_names(file: File, enough: Callable[[Sequence[str]], bool]) -> Sequence[str]:
    """The names of a file's columns; of jsonl, whose rows may lack any, those of its first rows, up to one with which they are
    enough. None for a file without rows."""
    names: Sequence[str] = ()
    try:
        for chunk in reader_of(file).values(file, ()):
            names = chunk.names or names
            if enough(names):
                break
    except EmptyFileError:
        return ()
    return names


def sample_cells(file: File, name: str) -> list[Any]:
    """The first cells of a column of a file, up to one that has something in it."""
    import pyarrow as pa

    with readable(file):
        chunks = (rows.prompts for rows in reader_of(file).rows(file, name, [], pa.schema([])))
        return next((cells for cells in chunks if has_content(cells)), [])


def has_content(cells: Iterable[Any]) -> bool:
    """Whether one of the cells has something in it, also as JSON."""
    return any(cell and cell not in ("[]", "{}", "null") and not isinstance(cell, InvalidRow) for cell in cells)
