"""Kept columns of a block's rows: in memory, or where they are large, in a nameless file that is mapped into memory."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

BYTES = 32 << 20  # of a block's kept columns, beyond which they go to disk, and its rows to several parts


class KeptColumns:
    """Collects tables of the same columns. folder: a local one for the file; None: all stay in memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._tables: list[pa.Table] = []
        self._bytes = 0
        self._on_disk: _Stream | None = None

    def add(self, table: pa.Table) -> None:
        """Raises OSError where the disk is full."""
        self._tables.append(table)
        self._bytes += table.nbytes
        if self._bytes > BYTES and self._folder is not None:
            self._on_disk = self._on_disk or _Stream(self._folder, table.schema)
            self._on_disk.write(self._tables)
            self._tables, self._bytes = [], 0

    def table(self) -> pa.Table:
        """All of them as one."""
        if self._on_disk is None:
            return pa.concat_tables(self._tables)
        self._on_disk.write(self._tables)
        return self._on_disk.read()


class _Stream:
    """Tables in a file, which the system frees with the last table that is read from it, or with the process."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed when it is mapped)
        self._writer = pa.ipc.new_stream(self._file, schema)

    def write(self, tables: Sequence[pa.Table]) -> None:
        for table in tables:
            self._writer.write_table(table)

    def read(self) -> pa.Table:
        self._writer.close()
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()
        return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()


def pieces(rows: int, kept: pa.Table) -> Iterator[slice]:
    """The rows of a block in slices whose kept columns have about ``BYTES`` at most; one slice where there are no rows."""
    at_once = max(1, -(-rows // max(1, -(-kept.nbytes // BYTES))))
    for first in range(0, max(rows, 1), at_once):
        yield slice(first, first + at_once)
