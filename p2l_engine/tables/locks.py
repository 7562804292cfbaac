"""Locks on local folders, against other processes. Standard library only."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

TOLD_AFTER = 5.0  # seconds
BETWEEN = 0.02  # seconds between two tries


@contextmanager
def folder_lock(folder: str | Path, wait: float = 0.0, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Locks a folder against other processes that lock it. wait: seconds for another's lock to end, which a stopped process
    keeps; waiting: called once some of them have passed. Raises BlockingIOError where they are over, and OSError."""
    opened, owner = os.open(folder, os.O_RDONLY), os.getpid()
    try:
        _lock(opened, wait, waiting)
        try:
            yield
        finally:
            # Processes that were forked meanwhile share the lock: it would last as long as the last of them, and none of them
            # may end it.
            if os.getpid() == owner:
                fcntl.flock(opened, fcntl.LOCK_UN)
    finally:
        os.close(opened)


def _lock(opened: int, wait: float, waiting: Callable[[], object] | None) -> None:
    start = monotonic()
    while True:
        try:
            return fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = monotonic() - start
            if waited >= wait:
                raise
        if waiting is not None and waited >= TOLD_AFTER:
            waiting()
            waiting = None
        sleep(BETWEEN)
