"""Locks on local folders, against other processes. Standard library only."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_lock(folder: str | Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Keeps a folder from everybody else who locks it. waiting: called before it waits for another's lock; None: it does not
    wait. Raises BlockingIOError where it does not wait and another has the lock, and OSError."""
    opened, owner = os.open(folder, os.O_RDONLY), os.getpid()
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise
            waiting()
            fcntl.flock(opened, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Processes that were forked meanwhile share the lock: it would last as long as the last of them, and none of them
            # may end it.
            if os.getpid() == owner:
                fcntl.flock(opened, fcntl.LOCK_UN)
    finally:
        os.close(opened)
