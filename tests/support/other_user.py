"""Calls as a user who is not root: root may read and write whatever the permissions are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

UNPRIVILEGED = 65534


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter, as pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def problem_of_other_user(call: Callable[[], object]) -> str:
    """The type and text of the OSError or ValueError that a call raises for a user who is not root, in a forked child; "" for
    none."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        found = "the child failed"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(UNPRIVILEGED)
                os.setuid(UNPRIVILEGED)
            call()
            found = ""
        except (OSError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, found.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        found = stream.read()
    os.waitpid(child, 0)
    return found
