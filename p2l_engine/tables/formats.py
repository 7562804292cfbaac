"""The file formats: their endings, and the module that reads each. A new format is one module and one line in ``FORMATS``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from p2l_engine.tables.compression import COMPRESSED, compression_of, without_compression
from p2l_engine.tables.read_share import Told, untold

if TYPE_CHECKING:
    import pyarrow as pa

    from p2l_engine.tables.rows import Rows, ValueRows
    from p2l_engine.tables.storage import File


class Reader(Protocol):
    """The functions of a format's module."""

    def schema(self, file: File, column: str, keep: Sequence[str] | None, told: Told = untold) -> pa.Schema | None:
        """The types of the kept columns that the file has, null where it has no values; None for a file without rows, as far as
        that is known. Reads the head of the file, and all rows where only they tell; then ``told`` is called. Raises
        ValueError if the column of prompts is missing."""
        ...

    def rows(self, file: File, column: str, keep: Sequence[str] | None, schema: pa.Schema) -> Iterator[Rows]:
        """A few rows at a time, in order: the column of prompts, and the kept columns (None: all others), as far as the file
        has them. schema: of all files, for values that have no types of their own."""
        ...

    def values(self, file: File, names: Collection[str]) -> Iterator[ValueRows]:
        """A few rows at a time as Python values: at least those columns of ``names`` that the file has. Invalid rows are
        returned as ``InvalidRow``. A file without rows gives one empty ``ValueRows``."""
        ...


class Format(NamedTuple):
    """Endings in lower case; the reader's module; whether files may be compressed (``.csv.gz``)."""

    endings: tuple[str, ...]
    module: str
    compressed: bool = False

    @property
    def reader(self) -> Reader:
        """Imported on first use: pyarrow is heavy."""
        return cast(Reader, import_module(self.module))


FORMATS = {
    "parquet": Format((".parquet",), "p2l_engine.tables.parquet"),
    "csv": Format((".csv",), "p2l_engine.tables.csv", compressed=True),
    "jsonl": Format((".jsonl", ".ndjson", ".json"), "p2l_engine.tables.jsonl", compressed=True),
}

EXPECTED = ", ".join(ending for each in FORMATS.values() for ending in each.endings) + (
    f" ({', '.join(name for name, each in FORMATS.items() if each.compressed)} also with {' or '.join(COMPRESSED)})"
)


def is_table(path: str) -> bool:
    """Whether a file of this name is of one of the formats; capital letters do not matter."""
    return _kind(path) is not None


def is_plain_json(path: str) -> bool:
    """Whether the ending is .json, which files of one JSON document have too."""
    return without_compression(path).endswith(".json")


def kind_of(path: str) -> str:
    """A key of ``FORMATS``, for a path for which ``is_table`` holds."""
    kind = _kind(path)
    if kind is None:
        raise ValueError(f"{path}: expected a file that ends in {EXPECTED}")
    return kind


def _kind(path: str) -> str | None:
    inner, compressed = without_compression(path), compression_of(path) is not None
    for name, each in FORMATS.items():
        if inner.endswith(each.endings) and (each.compressed or not compressed):
            return name
    return None
