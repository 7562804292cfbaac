"""Finds input files: paths, URIs, folders and globs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from p2l_engine.tables.formats import EXPECTED, is_plain_json, is_table
from p2l_engine.tables.listing import Entry, folder_entries, glob_entries, is_glob, problem_of
from p2l_engine.tables.partitions import partitions_of
from p2l_engine.tables.quotes import check_escape
from p2l_engine.tables.storage import File, Location, shown

logger = logging.getLogger(__name__)

HIDDEN = 'names that start with "." or "_" are skipped unless a pattern spells them out'
HEAD = 1 << 20  # bytes of a .json file in which its first two lines are looked for


def find(
    inputs: Iterable[str | Path],
    warn: Callable[..., object] = logger.warning,
    partitions: bool = True,
    csv_escape: str | None = None,
) -> list[File]:
    """The files that these paths, URIs, folders and globs (of files and folders) name: in the given order, within a folder or
    glob by name, each file once. See ``find_each``."""
    return [file for files in find_each(inputs, warn, partitions, csv_escape) for file in files]


def find_each(
    inputs: Iterable[str | Path],
    warn: Callable[..., object] = logger.warning,
    partitions: bool = True,
    csv_escape: str | None = None,
) -> list[list[File]]:
    """The files that each input names, without those that an earlier one named. partitions: whether names of folders are
    columns (see ``partitions``). csv_escape: what escapes quotes in csv files (see ``quotes``); None for doubled ones.

    In folders and globs, files and folders whose names start with "." or "_" are skipped (see ``listing``), as are files of
    other formats and what cannot be read, of which ``warn`` names the first. ``.json`` files beside other tables are skipped
    unless they hold one JSON object a line.
    Raises ValueError where an input names nothing, or is a file of another format.
    """
    check_escape(csv_escape)
    found: dict[str, list[File]] = {}
    files = list[list[File]]()
    for given in inputs:
        try:
            here = _find(_located(given), warn, partitions)
        except UnicodeError as error:
            raise ValueError(f"{shown(str(given))!r}: expected names of files in UTF-8: {error}; rename those") from None
        files.append([])
        for file in here:
            path = os.path.realpath(file.location.path) if file.location.is_local else file.location.path
            same = found.setdefault(path, [])
            if not any(file.location.system.equals(other.location.system) for other in same):
                same.append(file)
                files[-1].append(file if csv_escape is None else replace(file, csv_escape=csv_escape))
    return files


def names_tables(given: str | Path) -> bool:
    """Whether an input is a table's file, a folder, a glob of neither, or a URI of a table; other files are plain text."""
    location = _located(given)
    if is_table(location.path):
        return True
    if not location.is_local:
        info = location.info()
        return is_glob(location) or bool(info.type == info.type.Directory)
    return os.path.isdir(location.path) or (is_glob(location) and not os.path.exists(location.path))


def _find(location: Location, warn: Callable[..., object], partitions: bool) -> list[File]:
    if location.is_local:  # without pyarrow
        location.path.encode()  # raises UnicodeEncodeError
        if os.path.isfile(location.path):
            _check_ending(location)
            status = os.stat(location.path)
            name = os.path.basename(location.path)
            return [File(Location(location.path, location.path), status.st_size, status.st_mtime_ns, within=name)]
        folder = os.path.isdir(location.path)
    else:
        info = location.info()
        if info.type == info.type.File:
            _check_ending(location)
            return [_file(location, Entry(info.path, (), int(info.size or 0), info.mtime_ns), partitions)]
        folder = info.type == info.type.Directory
    if not folder and not is_glob(location):
        problem = problem_of(location.path) if location.is_local else None
        if problem:
            raise ValueError(f"{location.shown}: expected a file or folder, got {problem}")
        absent = "no such file, or no answer" if location.shown.startswith("http") else "no such file or folder"
        raise ValueError(f"{location.shown}: {absent}")
    found = folder_entries(location) if folder else glob_entries(location)
    seen = {entry.path: entry for entry in found}
    problems = [f"{os.path.basename(path)} ({entry.problem})" for path, entry in seen.items() if entry.problem]
    if problems:
        warn("%s: skipped, cannot be read: %s", location.shown, _first(sorted(problems)))
    tables = [path for path in sorted(seen) if is_table(path) and not seen[path].problem]
    files = _without_documents([_file(location, seen[path], partitions) for path in tables])
    chosen = {file.location.path for file in files}
    documents = [os.path.basename(path) for path in tables if path not in chosen]
    if documents:
        warn("%s: skipped, beside other tables and not an object on each line: %s", location.shown, _first(documents))
    others = sorted(path for path, entry in seen.items() if not is_table(path) and not entry.problem)
    if others:
        warn("%s: skipped, expected files that end in %s: %s", location.shown, EXPECTED, _first(map(os.path.basename, others)))
    if not files:
        what = "files in this folder" if folder else "matching files"
        raise ValueError(f"{location.shown}: expected {what} that end in {EXPECTED}, found none; {HIDDEN}")
    return files


def _located(given: str | Path) -> Location:
    """Keys of stores are what is written, or else what it says with %20 for a space."""
    if "%" in str(given) and "://" in str(given):
        literal = Location.of(given, literal=True)
        if not literal.is_local and (literal.exists() or (is_glob(literal) and any(True for _ in glob_entries(literal)))):
            return literal
    return Location.of(given)


def _check_ending(location: Location) -> None:
    if not is_table(location.path):
        raise ValueError(f"{location.shown}: expected a file that ends in {EXPECTED}")


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


def _first(names: Iterable[str]) -> str:
    first, *others = names
    first = os.fsencode(first).decode(errors="backslashreplace")
    return f"{first} and {len(others):,} more" if others else first


def _file(given: Location, entry: Entry, partitions: bool) -> File:
    scheme = "" if given.is_local else given.shown[: given.shown.index("://") + 3]
    entry.path.encode()  # raises UnicodeEncodeError
    location = Location(entry.path, scheme + entry.path, given.store)
    try:
        values = partitions_of(entry.folders) if partitions else ()
    except ValueError as error:
        raise ValueError(f"{location.shown}: {error}") from None
    within = "/".join([*entry.folders, os.path.basename(entry.path)])
    return File(location, entry.size, entry.modified, values, within=within)
