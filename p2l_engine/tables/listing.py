"""What is below a folder, or matches a glob: on local disks and in stores."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from p2l_engine.tables.storage import Location

MAGIC = "*?["
KINDS = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))

LOGS = {
    "_delta_log": "the log of a Delta table, whose deleted rows are read",
    ".hoodie": "the log of a Hudi table, whose deleted rows are read",
}

State = frozenset[int]  # the parts of a pattern that may come next; their number where all have matched


class Entry(NamedTuple):
    """A file, or what cannot be read: its path, the folders between what was named and it, its size in bytes, when it was
    modified in nanoseconds since 1970 (None if the store does not say), and why it cannot be read."""

    path: str
    folders: tuple[str, ...]
    size: int = 0
    modified: int | None = None
    problem: str | None = None


def is_glob(location: Location) -> bool:
    """Whether the path, as it was written, has wildcards."""
    return any(sign in _written(location) for sign in MAGIC)


def folder_entries(location: Location) -> Iterator[Entry]:
    """The files below a folder; see ``glob_entries``."""
    return _below(location, location.path, [])


def glob_entries(location: Location) -> Iterator[Entry]:
    """The files that a glob matches, and those below the folders that it matches. The first parts that exist as they are
    written are no patterns.

    Names that start with "." or "_" are skipped, unless their part of the pattern starts with that character, too; but no
    partition such as ``_day=3``. Links are followed. Raises ValueError for a matched folder that cannot be listed.
    """
    written = _written(location)
    parts = [part for part in written.split("/") if part not in ("", ".")]
    base = "/" if written.startswith("/") else ""
    while parts and (not any(sign in parts[0] for sign in MAGIC) or location.at(_joined(base, parts[0])).exists()):
        base = _joined(base, parts.pop(0))
    if written.endswith("/") and parts:
        parts.append("**")
    if parts and parts[-1] == "**":
        parts.append("*")  # what is in the folders that match
    return _below(location, base, parts)


def problem_of(path: str) -> str | None:
    """Why what a local path names is neither a file nor a folder that this user can see; None if there is nothing, or one of
    these."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"{_unreadable(error)}: let this user enter its folder"
    try:
        return _kind(os.stat(path).st_mode)
    except OSError as error:
        return _unreadable(error)


def _written(location: Location) -> str:
    """The path as it was written: the working folder's name is no pattern."""
    return os.path.expanduser(location.shown) if location.is_local and "://" not in location.shown else location.path


def _joined(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder else name


def _below(location: Location, base: str, patterns: Sequence[str]) -> Iterator[Entry]:
    state = _closure(patterns, {0})
    if not location.is_local:
        return _listed(location, base, patterns, state)
    return _walk(base or ".", (), patterns, state, ()) if os.path.isdir(base or ".") else iter(())


def _walk(
    folder: str, folders: tuple[str, ...], patterns: Sequence[str], state: State, above: tuple[tuple[int, int], ...]
) -> Iterator[Entry]:
    """above: the folder's parents by device and inode, against links in a circle."""
    try:
        about = os.stat(folder)
        with os.scandir(folder) as found:
            here = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        if len(patterns) in state:
            raise ValueError(
                f"{folder}: cannot be listed: {error.strerror}; let this user read it, or name other folders"
            ) from None
        yield Entry(folder, folders, problem=_unreadable(error))
        return
    identity = (about.st_dev, about.st_ino)
    if identity in above:
        return
    names = {entry.name for entry in here}
    for entry in here:
        after = _step(patterns, state, entry.name, names)
        if entry.name in LOGS and len(patterns) in state:
            yield Entry(os.path.abspath(entry.path), folders, problem=LOGS[entry.name])
        if not after:
            continue
        path = os.path.abspath(entry.path)
        try:
            status = entry.stat()
        except OSError as error:
            gone = isinstance(error, FileNotFoundError) and not entry.is_symlink()
            yield Entry(path, folders, problem="removed meanwhile" if gone else _unreadable(error))
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(entry.path, (*folders, entry.name), patterns, after, (*above, identity))
        elif len(patterns) in after:
            yield Entry(path, folders, status.st_size, status.st_mtime_ns, _kind(status.st_mode))


def _listed(location: Location, base: str, patterns: Sequence[str], state: State) -> Iterator[Entry]:
    from pyarrow import fs

    from p2l_engine.tables.stores import reaching

    states: dict[tuple[str, ...], State] = {(): state}

    def state_of(names: tuple[str, ...]) -> State:
        if names not in states:
            states[names] = _step(patterns, state_of(names[:-1]), names[-1], ())
        return states[names]

    with reaching(location.shown):
        infos = location.system.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
    for info in infos:
        names = tuple(info.path.removeprefix(base).strip("/").split("/"))
        if info.type == fs.FileType.Directory:
            if names[-1] in LOGS and len(patterns) in state_of(names[:-1]):
                yield Entry(info.path, names[:-1], problem=LOGS[names[-1]])
        elif len(patterns) in _step(patterns, state_of(names[:-1]), names[-1], ()):
            problem = None if info.type == fs.FileType.File else "neither a file nor a folder"
            yield Entry(info.path, names[:-1], int(info.size or 0), info.mtime_ns, problem)


def _step(patterns: Sequence[str], state: State, name: str, literal: Collection[str]) -> State:
    """Which parts may come after a name. literal: the names beside it, which are no patterns."""
    hidden = name.startswith(".") or (name.startswith("_") and "=" not in name)
    after = set[int]()
    for i in state:
        if i == len(patterns) or patterns[i] == "**":
            after |= set() if hidden else {i}
        elif name == patterns[i] if patterns[i] in literal else fnmatchcase(name, patterns[i]):
            after |= {i + 1} if not hidden or patterns[i][0] == name[0] else set()
    return _closure(patterns, after)


def _closure(patterns: Sequence[str], state: set[int]) -> State:
    """With the parts after a ``**``, which may be no folder at all."""
    for i, part in enumerate(patterns):
        if i in state and part == "**":
            state.add(i + 1)
    return frozenset(state)


def _kind(mode: int) -> str | None:
    """What a path names that is neither a file nor a folder."""
    return next((kind for check, kind in KINDS if check(mode)), None)


def _unreadable(error: OSError) -> str:
    return "a link to nothing" if isinstance(error, FileNotFoundError) else str(error.strerror).lower()
