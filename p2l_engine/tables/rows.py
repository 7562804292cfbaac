"""A few rows of an input file, and what its readers have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa

from p2l_engine.tables.storage import File

# What is raised where a file is not what its ending says, or cannot be had.
UNREADABLE = (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError)

AT_ONCE, AT_ONCE_BYTES = 512, 8 << 20  # rows that are read together, fewer where they are longer


class Unroutable(NamedTuple):
    """Why a row cannot be routed, and the file and row (from 0) that it is."""

    why: str
    where: str = ""


class Some(NamedTuple):
    """A few rows of one file: the number of the first (from 0), prompts as they were found, kept columns, and how much of the
    file was read by then."""

    file: File
    first: int
    prompts: list[Any]
    kept: pa.Table
    read: float

    def since(self, row: int) -> Some:
        """Without the rows before this one."""
        skip = max(0, row - self.first)
        return Some(self.file, self.first + skip, self.prompts[skip:], self.kept[skip:], self.read)


@contextmanager
def text_of(file: File) -> Iterator[tuple[pa.NativeFile, pa.NativeFile]]:
    """A file's text, and the file as it stands there, which says how much of it was read."""
    squeezed = {"gz": "gzip", "zst": "zstd"}.get(file.ending.rsplit(".", 1)[1])
    if squeezed and not file.size:
        raise pa.ArrowInvalid(f"expected a {squeezed} stream, got nothing")  # even one of no text has a header
    with file.place.system.open_input_file(file.place.path) as raw:
        yield (pa.CompressedInputStream(raw, squeezed) if squeezed else raw), raw


def wanted_columns(file: File, names: Sequence[str], column: str, keep: Sequence[str] | None) -> list[str]:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"{file.place.shown}: expected columns of different names, got {_listed(twice)} twice")
    missing = [name for name in (column, *(keep or ())) if name not in names]
    if missing:
        raise ValueError(f"{file.place.shown}: expected the columns {', '.join(missing)}; it has {_listed(names)}")
    return [name for name in names if name != column] if keep is None else list(keep)


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(name or "''" for name in names) or "none"
    return text if len(text) < 1000 else f"{text[:1000]} ..."
