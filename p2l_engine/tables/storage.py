"""Places of files: local paths and URIs (s3://, gs://, file:// ...), found by folder and glob, written whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.utils import glob_translate
from pyarrow import fs

logger = logging.getLogger(__name__)

ENDINGS = (".parquet", ".csv", ".csv.gz", ".csv.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, slots=True)
class Place:
    """A path on a file system, and the way the user wrote it."""

    system: Any
    path: str
    shown: str

    @classmethod
    def of(cls, uri: str) -> Place:
        """A local path, or a URI: what pyarrow knows (file, s3, gs ...), anything else through fsspec. Raises ValueError."""
        if not uri:
            raise ValueError("expected a path or a URI, got ''")
        if "://" not in uri:
            return cls(fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri)), uri)
        shown = re.sub("//([^/@]*|[^@]*:[^@]*)@", "//", uri.partition("?")[0])  # without a store's options, keys and secrets
        if uri.startswith("file:") and any(sign in uri for sign in "?#"):
            raise ValueError(f"{uri}: expected %3F for a question mark, and %23 for #, in a URI")
        try:
            system, path = fs.FileSystem.from_uri(uri)
        except pa.ArrowInvalid as error:
            if "Unrecognized filesystem" not in str(error):
                raise ValueError(f"{shown}: {str(error).replace(uri, shown)}") from None
            system, path = _through_fsspec(uri, shown)
        return cls(system, path, shown)

    @property
    def is_local(self) -> bool:
        return isinstance(self.system, fs.LocalFileSystem)

    def holds(self, other: Place) -> bool:
        """Whether the other is this place, or within it."""
        mine, its = (os.path.realpath(place.path) if place.is_local else place.path for place in (self, other))
        return self.system.equals(other.system) and f"{its}/".startswith(f"{mine.rstrip('/')}/")

    def __truediv__(self, name: str) -> Place:
        return Place(self.system, f"{self.path.rstrip('/')}/{name}", f"{self.shown.rstrip('/')}/{name}")

    def exists(self) -> bool:
        return bool(self.system.get_file_info(self.path).type != fs.FileType.NotFound)

    def names(self) -> list[str]:
        """What a folder holds, sorted; nothing where there is no such folder."""
        return list(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Of what a folder holds, in bytes, by name, sorted; a folder's is 0."""
        infos = self.system.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return {info.base_name: int(info.size or 0) for info in sorted(infos, key=lambda info: info.base_name)}

    def read(self) -> bytes:
        with self.system.open_input_stream(self.path, compression=None) as stream:
            return bytes(stream.read())

    def write(self, data: bytes | memoryview) -> None:
        """The whole file or nothing: a local file is renamed into place once it is on the disk, an object is put at once."""
        if not self.is_local:
            with self.system.open_output_stream(self.path, compression=None) as stream:
                stream.write(data)
            return
        write_local(Path(self.path), data)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this local folder is nobody else's; a store has no such locks. Raises RuntimeError."""
        if not self.is_local:
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise RuntimeError(f"{self.shown}: another run is writing here; wait for its end, or name another folder") from None
        finally:
            os.close(folder)

    def make_folder(self) -> None:
        self.system.create_dir(self.path, recursive=True)

    def remove(self) -> None:
        self.system.delete_file(self.path)


@dataclass(frozen=True, slots=True)
class File:
    """An input file as it was found: size in bytes, modified in nanoseconds since 1970 (None where the store does not say)."""

    place: Place
    size: int
    modified: int | None

    @property
    def ending(self) -> str:
        return next(ending for ending in sorted(ENDINGS, key=len, reverse=True) if self.place.path.endswith(ending))


def write_local(path: Path, data: bytes | memoryview) -> None:
    """Renamed into place once all of it is on the disk."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)  # still there only where something failed
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def find(inputs: Iterable[str], said: Callable[..., object] = logger.warning) -> list[File]:
    """The files that these paths, URIs, folders and globs (of files and folders) name: in the given order, each folder's and
    glob's by name, each file once. said is told of what folders and globs hold besides. Raises ValueError where one names
    nothing, or a file of another kind."""
    found: dict[str, list[File]] = {}
    files = []
    for given in inputs:
        place = Place.of(given)
        try:
            here = _find(place, said)
        except UnicodeError as error:
            raise ValueError(f"{place.shown!r}: expected names of files in UTF-8: {error}; rename those") from None
        for file in here:
            same = found.setdefault(os.path.realpath(file.place.path) if file.place.is_local else file.place.path, [])
            if not any(file.place.system.equals(other.place.system) for other in same):
                same.append(file)
                files.append(file)
    return files


def _find(place: Place, said: Callable[..., object]) -> list[File]:
    base = place.path
    info = place.system.get_file_info(place.path)
    if info.type == fs.FileType.File:
        if not place.path.endswith(ENDINGS):
            raise ValueError(f"{place.shown}: expected a file that ends in {', '.join(ENDINGS)}")
        return [_file(place, info)]
    if info.type == fs.FileType.Directory:
        infos, what = _within(place.system, place.path), "in this folder"
    elif any(sign in place.path for sign in "*?["):
        (infos, base), what = _matching(place), "that match"
        infos += [inner for info in infos if info.type == fs.FileType.Directory for inner in _within(place.system, info.path)]
    else:
        raise ValueError(f"{place.shown}: no such file or folder")
    seen = {info.path: info for info in infos if info.type != fs.FileType.Directory and not _is_bookkeeping(info, base)}
    chosen = [seen[path] for path in sorted(seen) if path.endswith(ENDINGS) and seen[path].type == fs.FileType.File]
    others = sorted(seen.keys() - {info.path for info in chosen})
    if others:
        said(
            "%s: left out, for want of a file that ends in %s: %s",
            place.shown,
            ", ".join(ENDINGS),
            _some(map(os.path.basename, others)),
        )
    if not chosen:
        raise ValueError(f"{place.shown}: expected files {what} that end in {', '.join(ENDINGS)}, found none")
    return [_file(place, info) for info in chosen]


def _within(system: Any, folder: str) -> list[Any]:
    return list(system.get_file_info(fs.FileSelector(folder, recursive=True)))


def _is_bookkeeping(info: Any, base: str) -> bool:
    # As everywhere in the field: what starts with a dot or an underscore is somebody's.
    return any(part.startswith((".", "_")) for part in info.path.removeprefix(base).split("/"))


def _some(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others):,} more" if others else first


def _fixed(path: str) -> str:
    """Of a glob, the folder below which it chooses."""
    return re.split("[*?[]", path, maxsplit=1)[0].rpartition("/")[0]


def _matching(place: Place) -> tuple[list[Any], str]:
    """What matches a glob, and the folder below which it does."""
    if place.is_local:  # as it was written: the working folder is no pattern
        pattern = place.path if "://" in place.shown else os.path.expanduser(place.shown)
        paths = sorted(map(os.path.abspath, glob.glob(pattern, recursive=True)))
        return list(place.system.get_file_info(paths)) if paths else [], os.path.abspath(_fixed(pattern))
    infos = place.system.get_file_info(fs.FileSelector(_fixed(place.path), recursive=True, allow_not_found=True))
    matches = re.compile(glob_translate(place.path)).fullmatch  # as local globs: * stays within a folder, ** does not
    return [info for info in infos if matches(info.path)], _fixed(place.path)


def _file(given: Place, info: Any) -> File:
    scheme = "" if given.is_local else given.shown[: given.shown.index("://") + 3]
    return File(Place(given.system, info.path, scheme + info.path), int(info.size or 0), info.mtime_ns)


def _through_fsspec(uri: str, shown: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{shown}: {error}") from None
    return fs.PyFileSystem(fs.FSSpecHandler(system)), path
