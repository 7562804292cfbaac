"""What input files hold: a copied or renamed file is the same input, a changed one is another, whatever its times."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

from p2l_engine.tables.read_share import ReadShare, Told, untold
from p2l_engine.tables.rows import readable
from p2l_engine.tables.storage import File, Location

PIECE = 1 << 20
TOLD = ("md5hash", "blob_id", "etag")  # Google, the hub, others; the first two are the same for copies
AT_THE_SAME_TIME = 8  # files; hashing leaves Python's lock to others
SETTLED = 2_000_000_000  # nanoseconds after which a further write changes a file's times on every file system


@dataclass(frozen=True, slots=True)
class Content:
    """shown: the file's name in messages. size: bytes. digest: SHA-256 of all bytes, or what the store says instead (see
    ``TOLD``). seen: of a local file, its device, inode, size and times, by which it need not be hashed again; None where it was
    written just before."""

    shown: str
    size: int
    digest: str
    seen: tuple[int, ...] | None = None


def contents(files: Sequence[File], known: Iterable[Content] = (), told: Told = untold) -> list[Content]:
    """The content of each file, in order. known: what was found earlier, of any files. told: called with how much was read.
    Raises ValueError for a file that cannot be read."""
    share = ReadShare(files)
    hashed = {each.seen: each.digest for each in known if each.seen is not None}

    def content(file: File) -> Content:
        with readable(file):
            if not file.location.is_local:
                return Content(file.shown, file.size, _of_store(file.location))
            status, now = os.stat(file.location.path), time.time_ns()
            seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            settled = now - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED
            digest = hashed.get(seen) if settled else None
            if digest is None:
                with open(file.location.path, "rb") as opened:
                    digest = sha256(opened, lambda read: told(share.after(file, read / max(file.size, 1))))
            told(share.after(file, 1.0))
            return Content(file.shown, status.st_size, digest, seen if settled else None)

    with ThreadPoolExecutor(AT_THE_SAME_TIME) as pool:
        return list(pool.map(content, files))


def sha256(opened: IO[bytes], told: Told = untold) -> str:
    """Of all that is left in a stream. told: called with how many bytes were read."""
    found, read = hashlib.sha256(), 0
    while piece := opened.read(PIECE):
        found.update(piece)
        told(read := read + len(piece))
    return found.hexdigest()


def _of_store(location: Location) -> str:
    """What the store says that an object holds, where it says so; otherwise the hash of its bytes."""
    through_fsspec = getattr(location.system, "handler", None)
    if through_fsspec is not None and (told := _told(through_fsspec.fs.info(location.path))):
        return told
    with location.system.open_input_file(location.path) as opened:
        return _told(opened.metadata() or {}) or sha256(opened)


def _told(about: Mapping[Any, Any]) -> str | None:
    texts = {str(name).lower(): value.decode() if isinstance(value, bytes) else value for name, value in about.items()}
    found = (f"{name} {texts[name]}" for name in TOLD if isinstance(texts.get(name), str) and texts[name])
    return next(found, None)


def differences_of(before: Sequence[Content], now: Sequence[Content]) -> list[str]:
    """One line for each file that is new, missing or another; none for equal files in the same order. before: none where they
    changed while they were read."""
    if not before:
        return ["inputs: changed while they were read"]
    old, new = ({each.shown: (each.size, each.digest) for each in files} for files in (before, now))
    if list(old.values()) == list(new.values()):
        return []
    moved = set(old.values()) & set(new.values())
    lines = [f"inputs: {name} changed" for name in old if name in new and new[name] != old[name]]
    lines += [f"inputs: {name} is new" for name, what in new.items() if name not in old and what not in moved]
    lines += [f"inputs: {name} is missing" for name, what in old.items() if name not in new and what not in moved]
    return lines or ["inputs: their order"]
