"""Locations of files: local paths and URIs (s3://, gs://, file:// ...). Local files are opened without pyarrow."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from p2l_engine.tables.atomic import write_file
from p2l_engine.tables.compression import compression_of
from p2l_engine.tables.locks import folder_lock

Partitions = tuple[tuple[str, str | None], ...]


def shown(uri: str) -> str:
    """A path or URI as messages may show it: without a store's options, keys and secrets."""
    if "://" not in uri:
        return uri
    from p2l_engine.tables import stores

    return stores.shown(uri)


@dataclass(frozen=True, slots=True)
class Location:
    """A path, as the user wrote it (shown), and its store: a pyarrow file system, or None for this machine's files."""

    path: str
    shown: str
    store: Any = None

    @classmethod
    def of(cls, uri: str | Path, literal: bool = False) -> Location:
        """A local path, or a URI: through pyarrow (file, s3, gs ...) or else fsspec. literal: of a URI of a store, %20 is no
        space. Raises ValueError."""
        uri = str(uri)
        if not uri:
            raise ValueError("expected a path or a URI, got ''")
        if "://" not in uri:
            return cls(os.path.abspath(os.path.expanduser(uri)), uri)
        from pyarrow import fs

        from p2l_engine.tables.stores import store_of

        store, path = store_of(uri, literal)
        return cls(path, shown(uri), None if isinstance(store, fs.LocalFileSystem) else store)

    @property
    def is_local(self) -> bool:
        return self.store is None

    @property
    def system(self) -> Any:
        """The pyarrow file system."""
        return _local_system() if self.store is None else self.store

    def holds(self, other: Location) -> bool:
        """Whether the other is this location, or within it."""
        if self.is_local != other.is_local:
            return False
        mine, its = (os.path.realpath(each.path) if each.is_local else each.path for each in (self, other))
        same = self.is_local or self.store.equals(other.store)
        return same and f"{its}/".startswith(f"{mine.rstrip('/')}/")

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.path.rstrip('/')}/{name}", f"{self.shown.rstrip('/')}/{name}", self.store)

    def at(self, path: str) -> Location:
        """Another path of this store."""
        return Location(path, path, self.store)

    def exists(self) -> bool:
        if self.is_local:
            return os.path.lexists(self.path)
        info = self.info()
        return bool(info.type != info.type.NotFound)

    def info(self) -> Any:
        """What a store says about this path: a pyarrow ``FileInfo``. Raises ValueError where it does not answer."""
        from p2l_engine.tables.stores import reaching

        with reaching(self.shown):
            return self.system.get_file_info(self.path)

    def names(self) -> list[str]:
        """The names in a folder, sorted; none if there is no such folder."""
        return list(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Bytes by name of what is in a folder, sorted by name; a folder's size is 0."""
        from pyarrow import fs

        with self._reached():
            infos = self.system.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return {info.base_name: int(info.size or 0) for info in sorted(infos, key=lambda info: info.base_name)}

    def read(self) -> bytes:
        if self.is_local:
            return Path(self.path).read_bytes()
        with self._reached(), self.store.open_input_stream(self.path, compression=None) as stream:
            return bytes(stream.read())

    def write(self, data: bytes | memoryview, work: Location | None = None) -> None:
        """The whole file or nothing; work: a folder for what is not whole yet, see ``atomic.write_file``. Stores put an object
        at once."""
        if self.is_local:
            write_file(self.path, data, None if work is None else Path(work.path))
            return
        with self._reached(), self.store.open_output_stream(self.path, compression=None) as stream:
            stream.write(data)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Locks a local folder against other runs; stores have no locks. Raises RuntimeError if it is locked."""
        if not self.is_local:
            yield
            return
        with ExitStack() as held:
            try:
                held.enter_context(folder_lock(self.path))
            except BlockingIOError:
                raise RuntimeError(
                    f"{self.shown}: another run is writing here; wait for its end, or name another folder"
                ) from None
            yield

    def make_folder(self) -> None:
        with self._reached():
            self.system.create_dir(self.path, recursive=True)

    def remove(self) -> None:
        with self._reached():
            self.system.delete_file(self.path)

    def _reached(self) -> AbstractContextManager[None]:
        """Raises OSError, of one line, where a store does not answer."""
        if self.is_local:
            return nullcontext()
        from p2l_engine.tables.stores import reaching

        return reaching(self.shown, OSError)


@dataclass(frozen=True, slots=True)
class File:
    """An input file: size in bytes, modified in nanoseconds since 1970 (None if the store does not say); partitions: the names
    and values of its Hive partitions (see ``partitions``); csv_escape: what escapes quotes of a csv file (see ``quotes``);
    within: its path within the folder that was named, or below which a glob chooses."""

    location: Location
    size: int
    modified: int | None
    partitions: Partitions = ()
    csv_escape: str | None = None
    within: str = ""

    @property
    def shown(self) -> str:
        """Its name in messages."""
        return self.location.shown

    @contextmanager
    def text(self) -> Iterator[tuple[Any, Any]]:
        """A stream of the decompressed bytes, and the stream below it, whose position says how much of the file was read.
        Raises OSError, also while it is read."""
        compression, location = compression_of(self.location.path), self.location
        if compression and not self.size:
            raise OSError(f"expected a {compression} stream, got nothing")  # even one of no text has a header
        with Path(location.path).open("rb") if location.is_local else location.system.open_input_file(location.path) as raw:
            if compression == "gzip":  # Python's reads several members, and zeros after the last, as tapes leave them
                with _truncated(), gzip.GzipFile(fileobj=raw, mode="rb") as inner:
                    yield inner, raw
            elif compression:
                import pyarrow as pa

                yield pa.CompressedInputStream(raw, compression), raw
            else:
                yield raw, raw

    def share(self, stream: IO[bytes]) -> float:
        """How much of the file was read, 0 to 1."""
        return stream.tell() / self.size if self.size else 1.0


@contextmanager
def _truncated() -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise OSError(str(error)) from error


@cache
def _local_system() -> Any:
    from pyarrow import fs

    return fs.LocalFileSystem()
