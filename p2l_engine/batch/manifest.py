"""The output folder's manifest: records the run's identity, whether it is complete, and where its state is."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2l_engine.batch.identity import differences
from p2l_engine.batch.job import Job
from p2l_engine.batch.report import Report
from p2l_engine.tables.storage import Location

logger = logging.getLogger(__name__)

MANIFEST = "_manifest.json"
STATE = "_state"


def read_manifest(output: Location) -> dict[str, Any] | None:
    """The manifest of an earlier run: config (its identity), complete, and state or report and bytes; None in an empty folder.

    Raises ValueError where the folder holds anything else.
    """
    names = [name for name in output.names() if not _is_temporary(name)]
    if MANIFEST in names:
        manifest = _parsed((output / MANIFEST).read())
        if manifest is None:
            raise ValueError(
                f"{(output / MANIFEST).shown}: expected the manifest of a batch run; remove it, or name another folder"
            )
        return manifest
    if names:
        raise ValueError(
            f"{output.shown}: expected an empty folder or the output of an earlier batch run, found {', '.join(names[:3])}; "
            "name another folder"
        )
    return None


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        manifest = json.loads(text)
    except ValueError:
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("complete"), bool):
        return None
    if not isinstance(manifest.get("config", manifest.get("asked")), dict):  # "asked": of earlier versions
        return None
    if manifest["complete"]:
        try:
            if Report(**manifest["report"]).parts != len(dict(manifest["bytes"])):
                return None
        except (KeyError, TypeError, ValueError):
            return None
    return manifest


def write_manifest(output: Location, manifest: Mapping[str, Any]) -> None:
    (output / MANIFEST).write((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def state_folder(parent: str | Path | None, output: Location, identity: dict[str, Any], recorded: str | None = None) -> Path:
    """The folder of one run's state. Its name is a hash, so that runs can share a parent folder and never read or remove each
    other's state.

    parent: None for the output. recorded: the folder that the manifest of an unfinished run names.
    """
    # State within the output moves with it, so that the output's path is no part of the hash.
    path = None if parent is None and recorded is None else output.path
    name = f"run-{hashlib.sha256(json.dumps([path, identity]).encode()).hexdigest()[:16]}"
    if recorded is not None and Path(recorded).name == name:  # otherwise the manifest is a copy of another output's
        return Path(recorded)
    return (Path(output.path) / STATE if parent is None else Path(parent).expanduser().absolute()) / name


def remove_state(state: Path) -> None:
    """Removes a run's state folder, and the folder ``_state`` in the output if that is empty then."""
    if state.is_dir():
        shutil.rmtree(state)
    if state.parent.name == STATE and state.parent.is_dir() and not any(state.parent.iterdir()):
        state.parent.rmdir()


def begin(job: Job, restart: bool) -> tuple[dict[str, Any], Path]:
    """Resumes the run in the output folder, or starts a new one: its manifest and its state folder.

    restart: remove an earlier run. Raises ValueError where the folder holds anything but runs, or a run of another identity
    and not restart.
    """
    output = job.output
    state = state_folder(job.config.state, output, job.identity)
    before = read_manifest(output)
    old = None if before is None else before.get("config", before.get("asked"))
    left = None if before is None or old is None else state_folder(None, output, old, before.get("state"))
    if before is not None and before.get("config") != job.identity:
        computed_nothing = not (before["complete"] or parts(output) or _has_files(left))  # such as one with a wrong column
        if not (restart or computed_nothing):
            raise ValueError(f"{output.shown}: {_why_not_resumed(before, job)}")
        restart = True
    if output.is_local:
        for temporary in Path(output.path).glob(".*.tmp"):
            if _is_temporary(temporary.name):
                temporary.unlink()
    if before is not None and not restart:
        if before["complete"]:
            _check_parts(before, output)
        if left is not None and left != state and _has_files(left):
            logger.warning("%s: resumed with its state in %s", output.shown, left)
            state = left
        state.mkdir(parents=True, exist_ok=True)
        return before, state
    if before is not None:
        # Mark incomplete first, so that a crash cannot mix the parts of two runs.
        write_manifest(output, {"config": {}, "complete": False})
        for name in parts(output):
            (output / name).remove()
    for folder in (left, state):
        if folder is not None:
            remove_state(folder)
    manifest = {"config": job.identity, "complete": False, "state": None if job.config.state is None else str(state)}
    write_manifest(output, manifest)
    state.mkdir(parents=True, exist_ok=True)
    return manifest, state


def _why_not_resumed(before: Mapping[str, Any], job: Job) -> str:
    if "config" not in before:
        return "holds a run of an earlier version of p2l-engine, which cannot be resumed; name another folder, or --restart"
    if not before["config"]:
        return "holds an earlier run that was only partly removed; name another folder, or --restart"
    changed = "; ".join(differences(before["config"], job.identity))
    return f"holds a run with other inputs or options: {changed}; use the same ones, name another folder, or --restart"


def _has_files(folder: Path | None) -> bool:
    return folder is not None and folder.is_dir() and any(folder.iterdir())


def _is_temporary(name: str) -> bool:
    """Whether an interrupted write left this file."""
    return name.startswith((".part-", f".{MANIFEST}.")) and name.endswith(".tmp")


def _check_parts(finished: dict[str, Any], output: Location) -> None:
    """Marks a finished run as incomplete if parts are missing or of another size."""
    expected, found = finished["bytes"], parts(output)
    check_no_other_parts(output, expected)
    changed = [name for name, size in expected.items() if found.get(name) != size]
    if changed:
        logger.warning(
            "%s: %d parts of the finished run are missing or changed, and are written again: %s", output.shown, len(changed),
            ", ".join(changed[:3]),
        )  # fmt: skip
        finished["complete"] = False


def check_no_other_parts(output: Location, expected: Mapping[str, int]) -> None:
    """Raises ValueError where there are parts that this run did not write, since readers of the folder would read them too."""
    others = [name for name in parts(output) if name not in expected]
    if others:
        raise ValueError(f"{output.shown}: {', '.join(others[:3])}: expected only parts of this run; remove these files")


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def parts(output: Location) -> dict[str, int]:
    """Names and sizes in bytes of the written parts."""
    return {name: size for name, size in output.sizes().items() if name.startswith("part-") and name.endswith(".parquet")}
