"""Arrays with an entry for each prompt: in memory, or in nameless files, so that memory does not grow with the prompts.

The system writes a file's pages to the disk when it needs their memory, and frees the file with the last array that reads it,
or with the process.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", bound=np.generic)

PART = 1 << 16  # entries that are read at once; sums over the parts do not depend on where the arrays are
SMALL = 1 << 20  # bytes of an array that is in memory in any case


def parts(n: int) -> Iterator[slice]:
    """The entries 0 to n in consecutive slices."""
    return (slice(start, min(start + PART, n)) for start in range(0, n, PART))


def total_of(weights: npt.NDArray[np.float64], values: npt.NDArray[Any] | None = None) -> float:
    """The weights' sum [N], or that of their products with values [N]."""
    some = (weights[i] if values is None else weights[i] * values[i] for i in parts(len(weights)))
    return math.fsum(float(part.sum()) for part in some)


def _reserve(file: Any, size: int) -> None:
    """Room on the disk for a file: a page that finds it full later would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:  # macOS
        for start in range(0, size, SMALL):
            file.write(bytes(min(SMALL, size - start)))
        file.flush()


class Scratch:
    """Where arrays are: in files of a local ``folder``; None: in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def empty(self, shape: int | tuple[int, ...], kind: type[T]) -> npt.NDArray[T]:
        """A new array, its entries arbitrary. Raises OSError where the disk is full."""
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        if self.folder is None or size <= SMALL:
            return np.empty(shape, kind)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            _reserve(file, size)
            return np.frombuffer(mmap.mmap(file.fileno(), size), kind).reshape(shape)

    def full(self, n: int, value: float) -> npt.NDArray[np.float64]:
        """n times a number."""
        found = self.empty(n, np.float64)
        found[:] = value
        return found

    def column(self, kind: type[T]) -> Column[T]:
        """A new array of a length that is not known yet."""
        return Column(self, kind)


class Column(Generic[T]):
    """An array [n] to which entries are added at the end."""

    def __init__(self, scratch: Scratch, kind: type[T]) -> None:
        self._scratch, self._kind = scratch, kind
        self._waiting: list[npt.NDArray[T]] = []  # in memory, and their bytes
        self._bytes = 0
        self._file: Any = None

    def add(self, entries: npt.NDArray[T]) -> None:
        """Raises OSError where the disk is full."""
        self._waiting.append(np.ascontiguousarray(entries, self._kind))
        self._bytes += self._waiting[-1].nbytes
        if self._scratch.folder is not None and self._bytes > SMALL:
            self._write()

    def array(self) -> npt.NDArray[T]:
        """All entries; then there is nothing to add any more."""
        if self._file is None:
            waiting, self._waiting = self._waiting, []
            return np.concatenate([np.zeros(0, self._kind), *waiting])
        self._write()
        with self._file:
            self._file.flush()
            return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), self._kind)

    def _write(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._scratch.folder)  # noqa: SIM115 (``array`` closes it)
        for entries in self._waiting:
            self._file.write(entries.data)
        self._waiting, self._bytes = [], 0
