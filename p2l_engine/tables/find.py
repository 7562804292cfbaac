"""Finds input files: paths, URIs, folders and globs."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from p2l_engine.tables.formats import EXPECTED, is_plain_json, is_table
from p2l_engine.tables.partitions import partitions_of
from p2l_engine.tables.storage import File, Location

logger = logging.getLogger(__name__)

HEAD = 1 << 20  # bytes of a .json file in which its first two lines are looked for


def find(inputs: Iterable[str | Path], warn: Callable[..., object] = logger.warning) -> list[File]:
    """The files that these paths, URIs, folders and globs (of files and folders) name: in the given order, within a folder or
    glob by name, each file once. See ``find_each``."""
    return [file for files in find_each(inputs, warn) for file in files]


def find_each(inputs: Iterable[str | Path], warn: Callable[..., object] = logger.warning) -> list[list[File]]:
    """The files that each input names, without those that an earlier one named.

    In folders and globs, files and folders whose names start with "." or "_" are skipped, as are files of other formats, of
    which ``warn`` names the first. ``.json`` files beside other tables are skipped unless they hold one JSON object a line.
    Raises ValueError where an input names nothing, or is a file of another format.
    """
    found: dict[str, list[File]] = {}
    files = list[list[File]]()
    for given in inputs:
        location = Location.of(given)
        try:
            here = _find(location, warn)
        except UnicodeError as error:
            raise ValueError(f"{location.shown!r}: expected names of files in UTF-8: {error}; rename those") from None
        files.append([])
        for file in here:
            path = os.path.realpath(file.location.path) if file.location.is_local else file.location.path
            same = found.setdefault(path, [])
            if not any(file.location.system.equals(other.location.system) for other in same):
                same.append(file)
                files[-1].append(file)
    return files


def names_tables(given: str | Path) -> bool:
    """Whether an input is a table's file, a folder, a glob of neither, or a URI of a table; other files are plain text."""
    location = Location.of(given)
    if is_table(location.path):
        return True
    if not location.is_local:
        from pyarrow import fs

        return _is_glob(location) or bool(location.system.get_file_info(location.path).type == fs.FileType.Directory)
    return os.path.isdir(location.path) or (_is_glob(location) and not os.path.exists(location.path))


def _find(location: Location, warn: Callable[..., object]) -> list[File]:
    if location.is_local and os.path.isfile(location.path):  # without pyarrow
        _check_ending(location)
        status = os.stat(location.path)
        return [File(Location(location.path, location.path), status.st_size, status.st_mtime_ns)]
    from pyarrow import fs

    base = location.path
    info = location.system.get_file_info(location.path)
    if info.type == fs.FileType.File:
        _check_ending(location)
        return [_file(location, info, info.path.rpartition("/")[0])]
    if info.type == fs.FileType.Directory:
        infos, what = _within(location.system, location.path), "in this folder"
    elif _is_glob(location):
        (infos, base), what = _matching(location), "that match"
        folders = [info.path for info in infos if info.type == fs.FileType.Directory]
        infos += [inner for folder in folders for inner in _within(location.system, folder)]
    else:
        raise ValueError(f"{location.shown}: no such file or folder")
    seen = {info.path: info for info in infos if info.type != fs.FileType.Directory and not _is_hidden(info.path, base)}
    tables = [seen[path] for path in sorted(seen) if is_table(path) and seen[path].type == fs.FileType.File]
    files = _without_documents([_file(location, info, base) for info in tables])
    chosen = {file.location.path for file in files}
    others = sorted(path for path in seen if path not in chosen)
    if others:
        warn("%s: skipped, expected files that end in %s: %s", location.shown, EXPECTED, _first(map(os.path.basename, others)))
    if not files:
        raise ValueError(f"{location.shown}: expected files {what} that end in {EXPECTED}, found none")
    return files


def _check_ending(location: Location) -> None:
    if not is_table(location.path):
        raise ValueError(f"{location.shown}: expected a file that ends in {EXPECTED}")


def _is_glob(location: Location) -> bool:
    written = location.shown if location.is_local else location.path  # the working folder's name is no pattern
    return any(sign in written for sign in "*?[")


def _without_documents(files: list[File]) -> list[File]:
    """Without .json files that are one document, such as a data set's description: where there are other tables."""
    if all(is_plain_json(file.location.path) for file in files):
        return files
    return [file for file in files if not is_plain_json(file.location.path) or _is_json_lines(file)]


def _is_json_lines(file: File) -> bool:
    """Whether the first two lines are JSON objects."""
    try:
        with file.text() as (stream, _):
            head = stream.read(HEAD)
        first, second = (json.loads(line) for line in [line for line in head.split(b"\n") if line.strip()][:2])
    except (ValueError, RecursionError, OSError):
        return False
    return isinstance(first, dict) and isinstance(second, dict)


def _within(system: Any, folder: str) -> list[Any]:
    from pyarrow import fs

    return list(system.get_file_info(fs.FileSelector(folder, recursive=True)))


def _is_hidden(path: str, base: str) -> bool:
    """As everywhere: ``.ipynb_checkpoints/``, ``_temporary/``, ``._copy.csv``; but not the partition ``_day=3/``."""
    parts = path.removeprefix(base).split("/")
    return any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in parts)


def _first(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others):,} more" if others else first


def _folder_of(pattern: str) -> str:
    """The folder below which a glob chooses."""
    return re.split("[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]


def _matching(location: Location) -> tuple[list[Any], str]:
    """What matches a glob, and the folder below which it does."""
    if location.is_local:  # as it was written: the working folder's name is no pattern
        pattern = location.path if "://" in location.shown else os.path.expanduser(location.shown)
        paths = sorted(map(os.path.abspath, glob.glob(pattern, recursive=True)))
        return list(location.system.get_file_info(paths)) if paths else [], os.path.abspath(_folder_of(pattern))
    from fsspec.utils import glob_translate
    from pyarrow import fs

    folder = _folder_of(location.path)
    infos = location.system.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    matches = re.compile(glob_translate(location.path)).fullmatch  # as local globs: * stays within a folder, ** does not
    return [info for info in infos if matches(info.path)], folder


def _file(given: Location, info: Any, base: str) -> File:
    scheme = "" if given.is_local else given.shown[: given.shown.index("://") + 3]
    location = Location(info.path, scheme + info.path, given.store)
    try:
        partitions = partitions_of(info.path.removeprefix(base).split("/")[:-1])
    except ValueError as error:
        raise ValueError(f"{location.shown}: {error}") from None
    return File(location, int(info.size or 0), info.mtime_ns, partitions)
