"""How much of several files was read, by their bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from p2l_engine.tables.storage import File

Told = Callable[[float], object]  # called with how much was read, 0 to 1


def untold(_: float) -> None:
    """Does nothing, for callers without a progress bar."""


class ReadShare:
    """Adds up what was read of each file. Safe to call from any thread."""

    def __init__(self, files: Sequence[File]) -> None:
        self._lock = threading.Lock()
        self._bytes, self._read = max(sum(file.size for file in files), 1), 0.0
        self._of = dict[int, float]()  # bytes of each file, by identity: a file may be read as two

    def after(self, file: File, share: float) -> float:
        """The share of all, 0 to 1, once so much of a file was read, 0 to 1."""
        with self._lock:
            before = self._of.get(id(file), 0.0)
            self._of[id(file)] = share * file.size
            self._read += share * file.size - before
            return min(self._read / self._bytes, 1.0)
