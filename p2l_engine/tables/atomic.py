"""Files and folders written whole or not at all. Standard library only."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path


def write_file(path: str | Path, data: bytes | memoryview | str | Sequence[memoryview], work: Path | None = None) -> None:
    """Writes a file of a unique name in the folder ``work`` (None: beside ``path``), flushes it to the disk and renames it to
    ``path``. A crash leaves the old file or the new one; several threads and processes may write the same path. text: UTF-8; a
    sequence: its parts, one after the other. What is no regular file, such as /dev/stdout, is written in place. Where ``work``
    is on another disk, the file is written beside ``path``. Raises OSError."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    parts = [data] if isinstance(data, bytes | memoryview) else data
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            stream.writelines(parts)
        return
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = (work or path.parent) / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        with temporary.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if work is None or error.errno != errno.EXDEV:
            raise
        write_file(path, data)
    finally:
        temporary.unlink(missing_ok=True)  # it exists only after a failure
    folder = os.open(path.parent, os.O_RDONLY)  # the new name must reach the disk too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_folder(folder: Path, fill: Callable[[Path], None], replace: bool = True) -> bool:
    """``fill`` writes into an empty folder beside ``folder``, which then takes its name. If it raises, nothing changes.
    replace: whether a folder that exists by then, and is not empty, is replaced, instead of kept. Returns whether the new one
    is there."""
    folder = Path(os.path.realpath(folder))  # a link stays one
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        work.chmod(0o755)
        fill(work)
        return _put(work, folder, replace)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put(work: Path, folder: Path, replace: bool) -> bool:
    """Renames ``work`` to ``folder``, see ``write_folder``; where others do the same, the last one stays."""
    away: list[Path] = []
    try:
        while True:
            try:
                work.rename(folder)  # there is none, or an empty one
                return True
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if not replace:
                    return False
            old = folder.parent / f"{work.name}-old{len(away)}"
            try:
                folder.rename(old)
            except FileNotFoundError:  # another writer is at the same point
                continue
            away.append(old)
    except OSError:
        if away and not folder.exists():
            away.pop().rename(folder)
        raise
    finally:
        for old in away:
            shutil.rmtree(old, ignore_errors=True)
