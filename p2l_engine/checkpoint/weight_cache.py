"""Decoders' weights as a CPU computes with them, made once for each checkpoint and dtype, in a file that processes share.

The files are in the folder ``weights`` of ``cache_folder()``, or in the one that P2L_ENGINE_WEIGHT_CACHE names; "off": none are
made or used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from p2l_engine import __version__
from p2l_engine.backbone import Keep
from p2l_engine.checkpoint import mapped
from p2l_engine.checkpoint.cache_folder import cache_folder
from p2l_engine.checkpoint.mapped import DamagedFile
from p2l_engine.tables.locks import folder_lock

VARIABLE = "P2L_ENGINE_WEIGHT_CACHE"
SUFFIX = ".p2l-weights"
WAITING = "waiting for another process, which packs weights in %s"
LONGEST_WAIT = 600.0  # seconds
MOST_BYTES = 8 << 30  # of all files together, but for the newest

logger = logging.getLogger(__name__)


def keep_for(fingerprint: str | None) -> Keep | None:
    """What keeps the weights of the checkpoint with this fingerprint (``fingerprint.of_weights``); None where it has none, or
    where the cache is off. Raises ValueError for a P2L_ENGINE_WEIGHT_CACHE that is neither off nor an absolute path."""
    given = os.environ.get(VARIABLE)
    if given and given != "off" and not Path(given).is_absolute():
        raise ValueError(f"{VARIABLE}: expected off, or the absolute path of a folder, got {given!r}")
    if fingerprint is None or given == "off":
        return None

    def keep(how: str, make: Callable[[], dict[str, Tensor]]) -> Mapping[str, Tensor]:
        try:
            folder = Path(given) if given else cache_folder().absolute() / "weights"
        except OSError as error:
            _say_none(Path("~"), error)
            return make()
        return kept(folder, fingerprint, how, make)

    return keep


def kept(folder: Path, fingerprint: str, how: str, make: Callable[[], dict[str, Tensor]]) -> Mapping[str, Tensor]:
    """The tensors that ``make`` makes of the checkpoint with this fingerprint, mapped from a file in the folder; the file is
    made where it is not there or damaged. how: what they depend on beside the checkpoint.

    Where no file can be kept they are those of this process alone, which is logged once. Of several processes that need the
    same file one makes it, and the others wait, at most ``LONGEST_WAIT``. Files used least recently are removed, see
    ``MOST_BYTES``.
    """
    about = json.dumps([__version__, fingerprint, how])
    key = hashlib.sha256(about.encode()).hexdigest()[:40]
    path = folder / f"{key}{SUFFIX}"
    with ExitStack() as held:
        try:
            found = _read(path, key)
            if found is None:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a checkpoint may be its owner's secret
                held.enter_context(folder_lock(folder, LONGEST_WAIT, partial(logger.warning, WAITING, folder)))
                found = _read(path, key)  # another process may have made it meanwhile
        except BlockingIOError:
            _say_none(folder, f"another process has been packing weights for {LONGEST_WAIT:g} s")
            return make()
        except OSError as error:
            _say_none(folder, error)
            return make()
        if found is not None:
            return found
        made = make()
        size = mapped.size_of(made)
        try:
            _make_room(folder, size)
            mapped.write(path, key, made)
            found = mapped.read(path, key)  # as all processes do, so that this one shares it too
        except (OSError, DamagedFile) as error:
            _say_none(folder, error)
            return made
        logger.info("weights are packed, once for this checkpoint and dtype, in %s (%.0f MB)", path, size / 1e6)
        return found


def _read(path: Path, key: str) -> Mapping[str, Tensor] | None:
    """The tensors, None where there is no sound file. Raises OSError."""
    try:
        found = mapped.read(path, key)
        _used(path)
        return found
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        _say(f"{path}: {error}; this file of packed weights is made anew")
        return None


def _used(path: Path) -> None:
    """Notes that a file was used, which file systems do once a day, or never."""
    with suppress(OSError):  # of another user, on a read-only disk, removed meanwhile: it is read all the same
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _make_room(folder: Path, size: int) -> None:
    """Removes what was used longest ago until a file of this size fits within ``MOST_BYTES``, and what processes left that were
    killed while they wrote: who locks the folder is the only one that writes. Raises OSError where there is no room."""
    for file in folder.glob(f".*{SUFFIX}.*.tmp"):
        file.unlink(missing_ok=True)
    files = [(file, file.stat()) for file in folder.glob(f"*{SUFFIX}")]
    total = sum(about.st_size for _, about in files)
    for file, about in sorted(files, key=lambda each: max(each[1].st_atime, each[1].st_mtime)):
        if total + size > MOST_BYTES:
            file.unlink(missing_ok=True)
            total -= about.st_size
    free = shutil.disk_usage(folder).free
    if free < 2 * size:  # as much stays free for others
        raise OSError(errno.ENOSPC, f"expected {2 * size / 1e6:.0f} MB of free space, found {free / 1e6:.0f} MB")


def _say_none(folder: Path, why: Exception | str) -> None:
    _say(
        f"{folder}: no packed weights can be kept here: {why}; they are packed at each start, and not shared with other "
        f"processes ({VARIABLE} names another folder, or is off)"
    )


@cache
def _say(message: str) -> None:
    """Logs a warning, once."""
    logger.warning("%s", message)
