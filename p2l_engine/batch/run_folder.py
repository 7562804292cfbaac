"""The folder of a run's own files beside its output: ``OUT.run`` beside ``OUT`` has the manifest and the coefficients."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from p2l_engine.batch.identity import Identity, apart_from_inputs
from p2l_engine.batch.spill import coefficient_files
from p2l_engine.tables.atomic import write_file
from p2l_engine.tables.storage import Location

ENDING = ".run"
COSTS = "costs.npy"  # each row's, where costs vary, while a budget over the batch is solved


def run_folder(output: Location) -> Location:
    """The folder beside the output, or where that is a link, beside what it leads to. Raises ValueError for the root of a store
    or of this machine, beside which there is no folder."""
    path = os.path.realpath(output.path) if output.is_local else output.path.rstrip("/")
    if "/" not in path.rstrip("/"):
        example = f"{output.shown.rstrip('/')}/decisions"
        raise ValueError(f"output: expected a folder within {output.shown}, got its root; name one, such as {example}")
    name, shown = path.rpartition("/")[2], output.shown.rstrip("/")
    shown = shown if shown.rpartition("/")[2] == name else path
    return Location(path + ENDING, shown + ENDING, output.store)


def make_run_folder(output: Location, run: Location) -> None:
    """Raises OSError where it cannot be made, and ValueError where a new one would be on another disk than the output."""
    if output.is_local and os.path.ismount(output.path) and not os.path.isdir(run.path):
        raise ValueError(
            f"output: {output.shown} is where a disk is mounted, and the run's own files would be beside it, on another one; "
            "name a folder within it"
        )
    try:
        run.make_folder()
    except OSError as error:
        raise OSError(
            f"{run.shown}: cannot be made: {error}; a run's own files stand beside its output: name an output in a folder that "
            "can be written"
        ) from error


def check_writable(*folders: Location) -> None:
    """Raises PermissionError for a local folder in which this user cannot write, before hours are spent."""
    for folder in folders:
        if folder.is_local and not os.access(folder.path, os.W_OK | os.X_OK):
            is_read_only = os.statvfs(folder.path).f_flag & os.ST_RDONLY
            problem = os.strerror(errno.EROFS if is_read_only else errno.EACCES)
            raise PermissionError(f"{folder.shown}: cannot be written: {problem}; name another output, or let this user write")


def state_folder(parent: str | Path | None, run: Location, coefficients: Identity, recorded: str | None = None) -> Path:
    """The local folder of a run's coefficients: its own, or one in ``parent``, whose name is a hash, so that runs can share a
    parent and never read or remove each other's coefficients. recorded: the folder that the manifest of an earlier run names.
    """
    told = json.dumps([run.path, apart_from_inputs(coefficients)])
    name = f"run-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    if recorded is not None and Path(recorded).name == name:  # otherwise the manifest is a copy of another run's
        return Path(recorded)
    return Path(run.path) if parent is None else Path(parent).expanduser().absolute() / name


def has_coefficients(state: Path) -> bool:
    return bool(coefficient_files(state))


def adopt_coefficients(state: Path, of: Path) -> None:
    """Gives a run the coefficients of the one that its manifest was copied or renamed from, which keeps its own. Raises
    OSError."""
    state.mkdir(parents=True, exist_ok=True)
    for file in coefficient_files(of).values():
        try:
            os.link(file, state / file.name)
        except OSError:  # another disk, or one without links
            write_file(state / file.name, file.read_bytes())


def coefficient_bytes(state: Path) -> int:
    return sum(file.stat().st_size for file in coefficient_files(state).values())


def remove_temporary_files(state: Path, run: Location) -> None:
    """Removes what is of use within a run alone, and what interrupted writes left."""
    _remove(state.glob(".coefficients-*.npy.*.tmp"))
    _remove(state.glob(COSTS))
    if run.is_local:
        _remove(Path(run.path).glob(".manifest.json.*.tmp"))


def remove_coefficients(state: Path, run: Location) -> None:
    """Removes a run's coefficients; and a folder of their own, if it is empty then."""
    _remove(coefficient_files(state).values())
    if str(state) != run.path and state.is_dir() and not any(state.iterdir()):
        state.rmdir()


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink()
